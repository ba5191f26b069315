#!lua flags=allow-oom
-- take: lease ready chunks to a node with free slots, whoever fed them. Tells when the next of those that wait is due.
-- ARGV: node, lease, how many, how many of them at most if others than nested ones are among them: what a slot that
-- waits for a nested job lends is for these.
local node, lease, wanted, plain = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local now = server_time()
local taken = {}

if not is_live(node, now, lease) then
  return {'lapsed', {}, ''}
end
wake_delayed(now)
local function take_next(lane)
  local id = redis.call('LPOP', lane_key('ready', lane))
  local chunk = id and read_chunk(id)
  -- Closed or leased meanwhile: its place in the line is stale.
  if chunk and not chunk.owner then
    count_ready_bytes(chunk, -1)
    local data = not is_over(chunk.job, chunk.number) and redis.call('HGET', job_key(chunk.job, 'in'), chunk.number)
    if data then
      local token = grant(id, chunk, node, now + lease)
      redis.call('HINCRBY', job_key(chunk.job), 'running', chunk.weight)
      local waiting = {}
      for offset, due in pairs(chunk.due or {}) do
        if due > now then
          waiting[#waiting + 1] = tonumber(offset)
        end
      end
      local deaths = {}
      for offset in pairs(chunk.crashes) do
        local packed = redis.call('HGET', key('crashes'), crash_field(id, offset))
        deaths[offset] = packed and cmsgpack.unpack(packed) or {}
      end
      local told = {chunk.crashes, chunk.lapses, chunk.tries or {}, chunk.notes or {}, waiting, deaths}
      taken[#taken + 1] = {id, token, data, chunk.done, cmsgpack.pack(told)}
    else
      -- Its job was cancelled or has expired: nobody asks for it any more.
      forget(id, chunk)
    end
  end
  return id
end

for _, lane in ipairs(LANES) do
  local most = lane == 'nested' and wanted or plain
  while #taken < most and take_next(lane) do
  end
end
local next = redis.call('ZRANGE', key('delayed'), 0, 0, 'WITHSCORES')[2]
return {'ok', taken, next and string.format('%.6f', tonumber(next) - now) or ''}
