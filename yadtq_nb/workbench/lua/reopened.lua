#!lua flags=allow-oom
-- reopened: have a workbench that was emptied know of a job's last life. What it knows already stays as it is.
-- ARGV: job, keep, life, floor, total, indices that were sent again (packed list).
local job, keep, life = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local name = job_key(job)
if is_deleted(job) or tonumber(redis.call('HGET', name, 'life') or 0) >= life then
  return 0
end
redis.call('HSET', name, 'id', job, 'life', life, 'total', ARGV[5], 'sealed', 0)
if tonumber(ARGV[4]) > 0 then
  redis.call('HSET', name, 'floor', ARGV[4])
end
redis.call('HDEL', name, 'cancel', 'lost', 'ended', 'cancelled')
note_replaced(job, life, ARGV[6])
redis.call('SREM', key('sealed'), job)
expire_job(job, keep * 4)
return 1
