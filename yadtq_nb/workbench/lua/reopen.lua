#!lua flags=allow-oom
-- reopen: have a job that was sent whole begin another life: some of its tasks are about to be sent again, or more are.
-- Outcomes that these tasks had count no more. Nothing is done unless the job is as its client has seen it.
-- ARGV: job, keep, life that was seen, end that was seen ('' for none), total from now on, function name ('' for the old
-- one), outcomes that count no more (packed {{field, mask, how many}...}), indices sent again (packed list), whether all that
-- is without success is sent again, and a token of the caller's, who may not have heard the answer and ask again. Returns
-- the life's number, or 0.
local job, keep, life, ended = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local name = job_key(job)
local f = redis.call('HMGET', name, 'life', 'ended', 'sealed', 'succeeded', 'fed', 'cancel', 'reopener')
if ARGV[10] ~= '' and f[7] == ARGV[10] and tonumber(f[1]) == life + 1 then
  return life + 1
end
if tonumber(f[1] or 0) ~= life or (f[2] or '') ~= ended or not (f[2] or f[3] == '1') or f[6] == 'deleted' then
  return 0
end
life = life + 1
local voided = 0
for _, out in ipairs(cmsgpack.unpack(ARGV[7])) do
  redis.call('HSET', job_key(job, 'out'), out[1] .. 'm', out[2])
  voided = voided + out[3]
end
redis.call('HSET', name, 'life', life, 'sealed', 0, 'total', ARGV[5], 'reopener', ARGV[10])
redis.call('HDEL', name, 'ended', 'doubted')
redis.call('HINCRBY', name, 'failed', -voided)
if ARGV[6] ~= '' then
  redis.call('HSET', name, 'function', ARGV[6])
end
if ARGV[9] == '1' and ended ~= '' then
  -- Chunks of earlier lives, wherever they are, have no task left that is to be run.
  redis.call('HSET', name, 'floor', life, 'cancelled', 0, 'unfed', tonumber(f[4] or 0) - tonumber(f[5] or 0))
  redis.call('HDEL', name, 'cancel', 'lost')
  redis.call('DEL', job_key(job, 'dropped'))
else
  redis.call('HINCRBY', name, 'unfed', -voided)
  note_replaced(job, life, ARGV[8])
end
if voided > 0 then
  redis.call('DEL', job_key(job, 'failed'))
end
redis.call('SREM', key('sealed'), job)
expire_job(job, keep * 4)
tell(job, 'f', '', 'n', 0, 'e', 0, 'r', life)
return life
