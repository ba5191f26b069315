#!lua flags=allow-oom
-- release: give a leased chunk back to the front of the line; with an offset, that task has killed its slot.
-- ARGV: node, id, token, offset ('' for none), how (packed {host, node, reason, memory, time, stderr}).
local node, id, token, offset = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local now = server_time()
local chunk = read_chunk(id)
if not chunk or not holds(chunk, node, token) then
  return 0
end
if offset ~= '' then
  local crash = cmsgpack.unpack(ARGV[5])
  crash[5] = now
  charge(id, chunk, offset, crash)
end
put_back(id, chunk, now)
ring()
return 1
