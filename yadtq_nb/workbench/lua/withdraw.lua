#!lua flags=allow-oom
-- withdraw: forget a job of which nothing was sent, and give its name back.
-- ARGV: job.
local name = job_key(ARGV[1])
local f = redis.call('HMGET', name, 'fed', 'sealed', 'name')
if not f[3] or f[1] or f[2] == '1' then
  return 0
end
if redis.call('GET', key('name:' .. f[3])) == ARGV[1] then
  redis.call('DEL', key('name:' .. f[3]))
end
redis.call('DEL', name, job_key(ARGV[1], 'sending'), job_key(ARGV[1], 'sameness'))
redis.call('ZREM', key('jobs'), ARGV[1])
redis.call('ZREM', key('deadlines'), ARGV[1])
return 1
