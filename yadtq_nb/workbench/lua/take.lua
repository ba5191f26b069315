#!lua flags=allow-oom
-- take: lease ready chunks to a node with free slots, whoever fed them.
-- ARGV: node, lease, how many.
local node, lease, wanted = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = server_time()
local taken = {}

if not is_live(node, now, lease) then
  return {'lapsed', {}}
end
while #taken < wanted do
  local id = redis.call('LPOP', key('ready'))
  if not id then
    break
  end
  local chunk = read_chunk(id)
  -- Closed or leased meanwhile: its place in the line is stale.
  if chunk and not chunk.owner then
    redis.call('DECRBY', key('ready_bytes'), chunk.size)
    local data = redis.call('HGET', job_key(chunk.job, 'in'), chunk.number)
    if data then
      local token = grant(id, chunk, node, now + lease)
      redis.call('HINCRBY', job_key(chunk.job), 'running', chunk.weight)
      taken[#taken + 1] = {id, token, data, chunk.done, cmsgpack.pack(chunk.crashes), chunk.lapses}
    else
      -- Its job has expired: nobody asks for it any more.
      forget(id, chunk)
    end
  end
end
return {'ok', taken}
