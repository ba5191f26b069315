#!lua flags=allow-oom
-- release: give a leased chunk back to the front of the line; with an offset, that task has killed its slot.
-- ARGV: node, id, token, offset ('' for none).
local node, id, token, offset = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local chunk = read_chunk(id)
if not chunk or not holds(chunk, node, token) then
  return 0
end
if offset ~= '' then
  chunk.crashes[offset] = (chunk.crashes[offset] or 0) + 1
end
put_back(id, chunk, server_time())
ring()
return 1
