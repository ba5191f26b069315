#!lua flags=allow-oom
-- beat: a node's sign of life. Renews just the leases that it names, and shares out the partitions.
-- A lease that is not named lapses: the reply that granted it was lost, and nobody runs it.
-- ARGV: node, info, lease, lanes that it reads (packed {lane = {number of partitions, whether its feeder polls}}),
-- leases (packed {{id, token, offset}...}).
local node, info, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = server_time()
local lost, dropped = {}, {}

redis.call('ZADD', key('beats'), now, node)
redis.call('HSET', key('nodes'), node, info)
redis.call('SREM', key('dead'), node)
for _, named in ipairs(cmsgpack.unpack(ARGV[5])) do
  local chunk = read_chunk(named[1])
  local held = chunk and holds(chunk, node, named[2])
  if held and is_over(chunk.job, chunk.number) then
    revoke(named[1], chunk)
    forget(named[1], chunk)
    held = false
  end
  if held and chunk.dropped then
    dropped[#dropped + 1] = {named[1], chunk.dropped}
  end
  if held then
    redis.call('ZADD', key('leases'), now + lease, named[1])
    if named[3] >= 0 then
      redis.call('HSET', key('at'), named[1], named[3])
    end
  else
    lost[#lost + 1] = named[1]
  end
end

-- Partitions are shared out lane by lane, among the nodes that read them.
local function share_out(lane, partitions, polls)
  local key_of_feeders, key_of_owners = lane_key('feeders', lane), lane_key('partitions', lane)
  if polls then
    redis.call('SADD', key_of_feeders, node)
  else
    redis.call('SREM', key_of_feeders, node)
  end
  local live, feeders = {}, 0
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', key('beats'), now - lease, '+inf')) do
    if redis.call('SISMEMBER', key_of_feeders, other) == 1 then
      live[other], feeders = true, feeders + 1
    end
  end
  local owners = {}
  local flat = redis.call('HGETALL', key_of_owners)
  for i = 1, #flat, 2 do
    owners[flat[i]] = flat[i + 1]
  end
  local fair = feeders > 0 and math.ceil(partitions / feeders) or 0
  local share, owned = polls and fair or 0, {}
  for p = 0, partitions - 1 do
    if owners[tostring(p)] == node then
      if #owned < share then
        owned[#owned + 1] = p
      else
        redis.call('HDEL', key_of_owners, p)
      end
    end
  end
  for p = 0, partitions - 1 do
    local owner = owners[tostring(p)]
    if #owned < share and owner ~= node and not (owner and live[owner]) then
      redis.call('HSET', key_of_owners, p, node)
      owned[#owned + 1] = p
    end
  end
  return owned
end

local marks, ready = {}, 0
local named = cmsgpack.unpack(ARGV[4])
for _, lane in ipairs(LANES) do
  ready = ready + redis.call('LLEN', lane_key('ready', lane))
  local partitions, polls = 0, false
  if named[lane] then
    partitions, polls = named[lane][1], named[lane][2]
  end
  for _, p in ipairs(share_out(lane, partitions, polls)) do
    local cursor = redis.call('HGET', lane_key('cursor', lane), p) or ''
    local low = ''
    local topic, offset = cursor:match('^(.*):(%d+)$')
    if topic then
      low = topic .. ':' .. (redis.call('ZRANGE', key('position:' .. topic .. ':' .. p), 0, 0)[1] or offset)
    end
    marks[#marks + 1] = {lane, p, cursor, low}
  end
end
return {lost, marks, ready, dropped, redis.call('ZRANGEBYSCORE', key('followed'), now, '+inf')}
