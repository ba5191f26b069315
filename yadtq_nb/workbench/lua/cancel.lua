#!lua flags=allow-oom
-- cancel: end a job now. Returns how many of its tasks had no outcome, and how often the job had been opened again.
-- ARGV: job, reason, keep, the life that is meant ('' for any): one that was opened again since then goes on.
local life = redis.call('HGET', job_key(ARGV[1]), 'life') or '0'
local cancelled = 0
if ARGV[4] == '' or tonumber(life) <= tonumber(ARGV[4]) then
  cancelled = cancel_job(ARGV[1], ARGV[2], server_time(), tonumber(ARGV[3]))
end
sweep_dropped()
return {cancelled, tonumber(life)}
