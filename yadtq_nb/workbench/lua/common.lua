-- Shared by every verb: put in front of it when it is loaded.
-- All keys of a queue share one hash tag, which KEYS[1] holds, so that a queue lives on one node of a Redis Cluster.
-- Time is the server's, never a node's.
local prefix = KEYS[1]

local function key(name)
  return prefix .. ':' .. name
end

local function job_key(job, part)
  return prefix .. ':job:' .. job .. (part and (':' .. part) or '')
end

local function server_time()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1e6
end

-- A lapsed node gets nothing: it might die unseen, and nobody would reap what it holds. Nor does a dead one, whose call
-- arrives late.
local function is_live(node, now, lease)
  local beat = redis.call('ZSCORE', key('beats'), node)
  return beat and now - tonumber(beat) < lease and redis.call('SISMEMBER', key('dead'), node) == 0
end

-- An open chunk: job, number, first, count, weight (of the job's running counter), size (bytes), left, seq,
-- done ('' or one '0'/'1' a task), owner, token, lapses, crashes (offset -> times), positions in Kafka.
local function read_chunk(id)
  local packed = redis.call('HGET', key('open'), id)
  return packed and cmsgpack.unpack(packed)
end

local function write_chunk(id, chunk)
  redis.call('HSET', key('open'), id, cmsgpack.pack(chunk))
end

local function holds(chunk, node, token)
  return chunk.owner == node and tostring(chunk.token) == token
end

-- The caller adds the chunk's weight to the job's running counter.
local function grant(id, chunk, node, deadline)
  chunk.owner = node
  chunk.token = redis.call('INCR', key('token'))
  write_chunk(id, chunk)
  redis.call('ZADD', key('leases'), deadline, id)
  return tostring(chunk.token)
end

local function revoke(id, chunk)
  chunk.owner = nil
  redis.call('ZREM', key('leases'), id)
  redis.call('HDEL', key('at'), id)
  redis.call('HINCRBY', job_key(chunk.job), 'running', -chunk.weight)
end

local function ring()
  redis.call('XADD', key('bell'), 'MAXLEN', '~', 64, '*', 'k', 'ready')
end

-- Back to the front of the line: it has waited already.
local function put_back(id, chunk)
  revoke(id, chunk)
  write_chunk(id, chunk)
  redis.call('LPUSH', key('ready'), id)
  redis.call('INCRBY', key('ready_bytes'), chunk.size)
end

-- Gone from the workbench: no record of it in Kafka holds up the commit any more.
local function forget(id, chunk)
  redis.call('HDEL', key('open'), id)
  for _, p in ipairs(chunk.positions) do
    redis.call('ZREM', key('position:' .. p[1] .. ':' .. p[2]), p[3])
  end
end

local function tell(job, ...)
  local seq = redis.call('INCR', key('news_seq'))
  redis.call('XADD', key('news'), 'MAXLEN', '~', 8192, '*', 'q', seq, 'j', job, ...)
end

-- True once every task has its outcome; then the job's keys get their time to live.
local function end_if_complete(job, now, keep)
  local name = job_key(job)
  local f = redis.call('HMGET', name, 'total', 'succeeded', 'failed', 'cancelled', 'ended', 'name')
  local total = tonumber(f[1] or '-1')
  if f[5] or total < 0 or tonumber(f[2] or 0) + tonumber(f[3] or 0) + tonumber(f[4] or 0) < total then
    return false
  end
  redis.call('HSET', name, 'ended', string.format('%.6f', now))
  for _, part in ipairs({'in', 'out', 'finished', 'failed'}) do
    redis.call('EXPIRE', job_key(job, part), keep)
  end
  redis.call('EXPIRE', name, keep)
  local holder = f[6] and redis.call('GET', key('name:' .. f[6]))
  if holder == job then
    redis.call('EXPIRE', key('name:' .. f[6]), keep)
  end
  return true
end
