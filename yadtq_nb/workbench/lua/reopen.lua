#!lua flags=allow-oom
-- reopen: have a job that has lost tasks go on: these are about to be sent again. Returns 0 when it has lost none.
-- ARGV: job, keep.
local name, keep = job_key(ARGV[1]), tonumber(ARGV[2])
if redis.call('HGET', name, 'cancel') ~= 'lost' then
  return 0
end
redis.call('HDEL', name, 'cancel', 'lost', 'ended')
redis.call('EXPIRE', name, keep * 4)
for _, part in ipairs({'in', 'out', 'finished', 'failed', 'dropped', 'spans'}) do
  redis.call('EXPIRE', job_key(ARGV[1], part), keep * 4)
end
return 1
