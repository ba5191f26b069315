#!lua
-- create: claim a name for a job. Returns the id that holds the name, so that the caller sees whether it is its own.
-- A job that was deleted stays so: its manifest may still lie in the jobs topic.
-- ARGV: id, name, function, created, total, style, client, keep, parameter names, deadline (0 for none), lane, what it
-- is compared by ('' for nothing).
local id, name = ARGV[1], ARGV[2]
if is_deleted(id) then
  return id
end
local name_key = key('name:' .. name)
local holder = redis.call('GET', name_key)
if holder and holder ~= id and redis.call('EXISTS', job_key(holder)) == 1 then
  return holder
end
redis.call('SET', name_key, id, 'EX', tonumber(ARGV[8]) * 4)
-- A chunk may have come before, when Redis had lost the job: it knows less, and not the client.
if redis.call('HSETNX', job_key(id), 'client', ARGV[7]) == 1 then
  redis.call('HSET', job_key(id), 'id', id, 'name', name, 'function', ARGV[3], 'created', ARGV[4], 'style', ARGV[6], 'parameters', ARGV[9], 'lane', ARGV[11])
  -- Its seal may have come before, when Redis had lost the job.
  redis.call('HSETNX', job_key(id), 'total', ARGV[5])
  redis.call('HSETNX', job_key(id), 'sealed', 0)
  redis.call('ZADD', key('jobs'), ARGV[4], id)
  if tonumber(ARGV[10]) > 0 then
    redis.call('ZADD', key('deadlines'), ARGV[10], id)
  end
  redis.call('EXPIRE', job_key(id), tonumber(ARGV[8]) * 4)
end
if ARGV[12] ~= '' and not has_ended(id) then
  redis.call('SET', job_key(id, 'sameness'), ARGV[12], 'EX', tonumber(ARGV[8]) * 4)
end
return id
