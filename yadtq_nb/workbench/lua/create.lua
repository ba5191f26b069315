#!lua
-- create: claim a name for a job. Returns the id that holds the name, so that the caller sees whether it is its own.
-- ARGV: id, name, function, created, total, style, client, keep, parameter names.
local id, name = ARGV[1], ARGV[2]
local holder = redis.call('HGET', key('names'), name)
if holder and holder ~= id and redis.call('EXISTS', job_key(holder)) == 1 then
  return holder
end
redis.call('HSET', key('names'), name, id)
if redis.call('HSETNX', job_key(id), 'id', id) == 1 then
  redis.call('HSET', job_key(id), 'name', name, 'function', ARGV[3], 'created', ARGV[4], 'total', ARGV[5], 'style', ARGV[6], 'client', ARGV[7], 'parameters', ARGV[9], 'sealed', 0)
  redis.call('ZADD', key('jobs'), ARGV[4], id)
  redis.call('EXPIRE', job_key(id), tonumber(ARGV[8]) * 4)
end
return id
