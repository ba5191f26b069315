#!lua flags=allow-oom
-- keep: have a job live for so many seconds: from now when it has ended, else from its end. Returns 0 when it is gone.
-- One that runs keeps what it has for at least as long as before: it must not expire while it runs.
-- ARGV: job, seconds.
local job, seconds = ARGV[1], tonumber(ARGV[2])
local name = job_key(job)
if redis.call('HEXISTS', name, 'id') == 0 or is_deleted(job) then
  return 0
end
redis.call('HSET', name, 'keep', seconds)
if has_ended(job) or redis.call('TTL', name) < seconds then
  expire_job(job, seconds)
end
return 1
