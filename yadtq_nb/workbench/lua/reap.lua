#!lua flags=allow-oom
-- reap: return what lapsed leases held to the line, whichever node notices first.
-- When nobody has reaped for longer than a lease, the server was away, not the nodes: all leases are extended.
-- Ends jobs whose deadline has passed, too.
-- ARGV: lease, a node that is known to be dead ('' for none), keep, seconds of doubt before tasks are called lost.
local lease, dead = tonumber(ARGV[1]), ARGV[2]
local now = server_time()
local last = tonumber(redis.call('GET', key('reaped')) or now)
local lapsed = {}

redis.call('SET', key('reaped'), string.format('%.6f', now))
local away = now - last > lease
local held
if away or dead ~= '' then
  held = redis.call('ZRANGE', key('leases'), 0, -1)
else
  held = redis.call('ZRANGEBYSCORE', key('leases'), '-inf', now)
end
if dead ~= '' then
  for _, lane in ipairs(LANES) do
    redis.call('SREM', lane_key('feeders', lane), dead)
  end
  redis.call('SADD', key('dead'), dead)
end
for _, id in ipairs(held) do
  local chunk = read_chunk(id)
  if not chunk then
    redis.call('ZREM', key('leases'), id)
  elseif dead ~= '' and chunk.owner == dead then
    lapsed[#lapsed + 1] = {id, chunk}
  elseif away then
    redis.call('ZADD', key('leases'), now + lease, id)
  elseif dead == '' then
    lapsed[#lapsed + 1] = {id, chunk}
  end
end

local told = {}
for i, entry in ipairs(lapsed) do
  local id, chunk = entry[1], entry[2]
  local offset = redis.call('HGET', key('at'), id)
  if offset then
    local info = redis.call('HGET', key('nodes'), chunk.owner)
    local host = info and cmsgpack.unpack(info).host or ''
    charge(id, chunk, offset, {host, chunk.owner, 'its node died or was cut off', 0, now, ''})
  end
  chunk.lapses = chunk.lapses + 1
  told[i] = {id, chunk.owner}
  put_back(id, chunk, now)
end
if wake_delayed(now) > 0 or #lapsed > 0 then
  ring()
end
end_late_jobs(now, tonumber(ARGV[3]))
sweep_dropped()
-- Once a second: a job of which nothing more will come.
if math.floor(now) ~= math.floor(last) then
  for _, job in ipairs(redis.call('SRANDMEMBER', key('sealed'), 50)) do
    end_if_lost(job, now, tonumber(ARGV[3]), tonumber(ARGV[4]))
  end
end
-- Once a minute: what has expired leaves the list of jobs.
if math.floor(now / 60) ~= math.floor(last / 60) then
  for _, job in ipairs(redis.call('ZRANGE', key('jobs'), 0, 99)) do
    if redis.call('EXISTS', job_key(job)) == 0 then
      redis.call('ZREM', key('jobs'), job)
    end
  end
end
for _, node in ipairs(redis.call('ZRANGEBYSCORE', key('beats'), '-inf', now - 86400)) do
  redis.call('ZREM', key('beats'), node)
  redis.call('HDEL', key('nodes'), node)
  for _, lane in ipairs(LANES) do
    redis.call('SREM', lane_key('feeders', lane), node)
  end
  redis.call('SREM', key('dead'), node)
end
return told
