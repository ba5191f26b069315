#!lua flags=allow-oom
-- init: set a partition's cursor by compare-and-set: none yet, or that of a topic that has been made again.
-- ARGV: partition, cursor that was seen ('' for none), new cursor, lane. Returns the cursor that holds now, or '' when this
-- workbench is empty, and must know of all jobs before any of their chunks is fed: see restore.
local cursor = redis.call('HGET', lane_key('cursor', ARGV[4]), ARGV[1]) or ''
if cursor ~= ARGV[2] or (cursor == '' and redis.call('HEXISTS', key('restored'), 'done') == 0) then
  return cursor
end
redis.call('HSET', lane_key('cursor', ARGV[4]), ARGV[1], ARGV[3])
return ARGV[3]
