#!lua flags=allow-oom
-- delete: forget a job with its inputs, outcomes, large arguments and name; one that runs is cancelled first.
-- What is left is a mark that it has ended: without it a chunk that comes from Kafka later, or a manifest that is
-- replayed, would bring it back. Returns 0 when it was deleted before.
-- ARGV: job, keep.
local job, keep = ARGV[1], tonumber(ARGV[2])
local name = job_key(job)
if is_deleted(job) then
  return 0
end
local now = server_time()
if has_ended(job) then
  tell(job, 'f', '', 'n', 0, 'e', 1, 'c', 'deleted')
else
  cancel_job(job, 'deleted', now, keep)
  sweep_dropped()
end
local called = redis.call('HGET', name, 'name')
if called and redis.call('GET', key('name:' .. called)) == job then
  redis.call('DEL', key('name:' .. called))
end
for _, blob in ipairs(blobs_of(job)) do
  redis.call('UNLINK', blob)
end
for _, part in ipairs(JOB_PARTS) do
  redis.call('UNLINK', job_key(job, part))
end
redis.call('DEL', name, job_key(job, 'sending'), job_key(job, 'written'))
redis.call('ZREM', key('jobs'), job)
redis.call('HSET', name, 'id', job, 'cancel', 'deleted', 'ended', string.format('%.6f', now))
redis.call('EXPIRE', name, keep * 4)
return 1
