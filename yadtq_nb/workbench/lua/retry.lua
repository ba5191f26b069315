#!lua flags=allow-oom
-- retry: note that tasks of a leased chunk have raised and are to be tried again, and when. Release puts the chunk back.
-- Only with the current token: a woken zombie must not add attempts to a healthy run. Sent twice it counts once.
-- ARGV: node, id, token, tries (packed {{offset, times so far, delay, what it raised}...}).
local node, id, token = ARGV[1], ARGV[2], ARGV[3]
local chunk = read_chunk(id)
if not chunk or not holds(chunk, node, token) then
  return 0
end
local now = server_time()
chunk.tries, chunk.due, chunk.notes = chunk.tries or {}, chunk.due or {}, chunk.notes or {}
for _, try in ipairs(cmsgpack.unpack(ARGV[4])) do
  local offset, times = tostring(try[1]), try[2]
  if (chunk.tries[offset] or 0) < times then
    chunk.tries[offset], chunk.due[offset] = times, now + try[3]
    local notes = chunk.notes[offset] or {}
    notes[#notes + 1] = try[4]
    -- The first few and the latest are enough to see what happened.
    if #notes > 12 then
      table.remove(notes, 6)
    end
    chunk.notes[offset] = notes
  end
end
write_chunk(id, chunk)
return 1
