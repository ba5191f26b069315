#!lua flags=allow-oom
-- reopen: have a job that has lost tasks go on: these are about to be sent again. Returns 0 when it has lost none.
-- ARGV: job, keep.
local name, keep = job_key(ARGV[1]), tonumber(ARGV[2])
if redis.call('HGET', name, 'cancel') ~= 'lost' then
  return 0
end
redis.call('HDEL', name, 'cancel', 'lost', 'ended')
expire_job(ARGV[1], keep * 4)
return 1
