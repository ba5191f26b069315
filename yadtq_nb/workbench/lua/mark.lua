#!lua flags=allow-oom
-- mark: write down which task of a suspect chunk is about to run, so that its node's death is charged to the right one.
-- ARGV: node, id, token, offset.
local chunk = read_chunk(ARGV[2])
if not chunk or not holds(chunk, ARGV[1], ARGV[3]) then
  return 0
end
redis.call('HSET', key('at'), ARGV[2], ARGV[4])
return 1
