#!lua flags=allow-oom
-- cancel: end a job now. Returns how many of its tasks had no outcome.
-- ARGV: job, reason, keep.
local cancelled = cancel_job(ARGV[1], ARGV[2], server_time(), tonumber(ARGV[3]))
sweep_dropped()
return cancelled
