#!lua flags=allow-oom
-- late: end jobs whose deadline has passed. Nodes do so as they reap; a client does where no node lives.
-- ARGV: keep.
end_late_jobs(server_time(), tonumber(ARGV[1]))
sweep_dropped()
return 1
