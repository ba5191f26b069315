#!lua flags=allow-oom
-- drop: cancel single tasks of a job: those that have no outcome yet get this one, here and now.
-- One whose chunk is not known here must still lie in Kafka: only as long as nothing was fed since the caller looked.
-- ARGV: job, keep, tasks fed when the caller looked, tasks (packed {{number or -1, offset, index}...}).
local job, keep = ARGV[1], tonumber(ARGV[2])
local name, skipped = job_key(ARGV[1]), job_key(ARGV[1], 'dropped')
if has_ended(job) then
  return {'ok', {}}
end
local tasks = cmsgpack.unpack(ARGV[4])
for _, task in ipairs(tasks) do
  if task[1] < 0 and (redis.call('HGET', name, 'fed') or '0') ~= ARGV[3] then
    return {'moved', {}}
  end
end
local dropped, running, unfed = {}, false, 0
for _, task in ipairs(tasks) do
  local number, offset, index = task[1], task[2], task[3]
  local id = job .. ':' .. number
  local chunk = number >= 0 and read_chunk(id)
  local ok = number < 0
  if chunk then
    ok = drop_task(chunk, offset)
    if ok and chunk.left == 0 then
      close_chunk(id, chunk, keep)
    elseif ok then
      write_chunk(id, chunk)
    end
    running = running or chunk.owner
  end
  if ok and redis.call('SADD', skipped, index) == 1 then
    dropped[#dropped + 1] = index
    unfed = unfed + (number < 0 and 1 or 0)
  end
end
if #dropped > 0 then
  redis.call('EXPIRE', skipped, keep * 4)
  redis.call('HINCRBY', name, 'cancelled', #dropped)
  -- They are not among the tasks that were fed: see end_if_lost.
  redis.call('HINCRBY', name, 'unfed', unfed)
  -- Redis may have lost the job meanwhile: create or feed write down the rest when they come, if they come.
  redis.call('HSET', name, 'id', job)
  if redis.call('TTL', name) < 0 then
    redis.call('EXPIRE', name, keep * 4)
  end
  local ended = end_if_complete(job, server_time(), keep) and 1 or 0
  tell(job, 'f', '', 'n', #dropped, 'e', ended, 's', cmsgpack.pack(dropped))
  redis.call('XADD', key('bell'), 'MAXLEN', '~', 64, '*', 'k', 'cancel')
end
return {'ok', dropped}
