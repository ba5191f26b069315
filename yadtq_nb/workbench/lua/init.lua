#!lua flags=allow-oom
-- init: set a partition's cursor by compare-and-set: none yet, or that of a topic that has been made again.
-- ARGV: partition, cursor that was seen ('' for none), new cursor. Returns the cursor that holds now.
local cursor = redis.call('HGET', key('cursor'), ARGV[1]) or ''
if cursor ~= ARGV[2] then
  return cursor
end
redis.call('HSET', key('cursor'), ARGV[1], ARGV[3])
return ARGV[3]
