-- Shared by every verb: put in front of it when it is loaded.
-- All keys of a queue share one hash tag, which KEYS[1] holds, so that a queue lives on one node of a Redis Cluster.
-- Time is the server's, never a node's.
local prefix = KEYS[1]

local function key(name)
  return prefix .. ':' .. name
end

-- Each lane has a topic of its own in Kafka, and cursors, feeders and a line here. In the order in which they are served.
local LANES = {'nested', 'high', 'normal', 'low'}

local function lane_key(name, lane)
  return key(lane == 'normal' and name or (name .. ':' .. lane))
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

-- An open chunk: lane, job, number, first, count, weight (of the job's running counter), size (bytes), left, seq,
-- done ('' or one '0'/'1' a task), owner, token, lapses, crashes (offset -> times), positions in Kafka; once a task was
-- to be tried again: tries (offset -> times), due (offset -> when), notes (offset -> what it raised, attempt by attempt);
-- once some of its tasks were cancelled: dropped (their offsets); while it waits for tasks of other jobs: needs
-- ({{job, first, count or -1}...}, what is not known to be there yet), waits (the job that it waits for now), stalled
-- (since when nobody is there who would send what it waits for). How its tasks have crashed lies in key('crashes').
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

-- Complete or cancelled: what is still open of it is of no use.
local function has_ended(job)
  return redis.call('HEXISTS', job_key(job), 'ended') == 1
end

-- Chunks of a job's lives are numbered from here on: see model.LIFE. Those of lives below the floor are over, since the
-- job had ended when it was opened again.
local LIFE = 4194304

local function is_over(job, number)
  local f = redis.call('HMGET', job_key(job), 'ended', 'floor')
  return f[1] or (f[2] and math.floor(number / LIFE) < tonumber(f[2]))
end

-- The life in which a task was sent again while chunks of earlier ones might still run, for when they are fed once more.
local function note_replaced(job, life, packed)
  for _, index in ipairs(cmsgpack.unpack(packed)) do
    redis.call('HSET', job_key(job, 'replaced'), index, life)
  end
end

local function crash_field(id, offset)
  return id .. ':' .. offset
end

-- A task has killed its slot or node: {host, node, reason, memory, time, stderr}. What it wrote is kept of the last time.
local function charge(id, chunk, offset, crash)
  chunk.crashes[offset] = (chunk.crashes[offset] or 0) + 1
  local field = crash_field(id, offset)
  local packed = redis.call('HGET', key('crashes'), field)
  local all = packed and cmsgpack.unpack(packed) or {}
  for _, earlier in ipairs(crash[6] ~= '' and all or {}) do
    earlier[6] = ''
  end
  all[#all + 1] = crash
  -- The first few and the latest are enough to see what happened.
  if #all > 12 then
    table.remove(all, 6)
  end
  redis.call('HSET', key('crashes'), field, cmsgpack.pack(all))
end

local function ring()
  redis.call('XADD', key('bell'), 'MAXLEN', '~', 64, '*', 'k', 'ready')
end

-- When a chunk has a task to run: 0 for now, else the time at which the first of those that wait is due.
local function due_at(chunk, now)
  local first
  for i = 1, chunk.due and chunk.count or 0 do
    if chunk.done == '' or chunk.done:byte(i) == 48 then
      local due = chunk.due[tostring(i - 1)] or 0
      if due <= now then
        return 0
      end
      first = math.min(first or due, due)
    end
  end
  return first or 0
end

local function wait_until(id, due)
  redis.call('ZADD', key('delayed'), due, id)
end

local function count_ready_bytes(chunk, sign)
  redis.call('INCRBY', lane_key('ready_bytes', chunk.lane), sign * chunk.size)
end

local function put_in_front(id, chunk)
  redis.call('LPUSH', lane_key('ready', chunk.lane), id)
  count_ready_bytes(chunk, 1)
end

local function put_at_end(id, chunk)
  redis.call('RPUSH', lane_key('ready', chunk.lane), id)
  count_ready_bytes(chunk, 1)
end

-- A chunk that needs tasks of other jobs waits aside, for one chunk of them at a time. It is noted there, at the other
-- job: in job:ID:waiters, by the number of the chunk that it waits for, by unfed(index) as long as that has not come, or
-- by WHOLE for the end of the job. So nothing is asked again and again, and a job that nobody waits for pays nothing.
local WHOLE = -1
local function unfed(index)
  return -2 - index
end
-- Every so many seconds it looks by itself: nobody tells it that what it needs will never be sent.
local LOOK_AGAIN = 60

-- A job of which single tasks are needed has its chunks in order, too: job:ID:places, by their first index.
local function note_places(job, spans)
  local places, at = job_key(job, 'places'), 1
  while at < #spans do
    local number, first, count
    number, first, count, at = struct.unpack('<I4I4I4', spans, at)
    redis.call('ZADD', places, first, number .. ':' .. first + count)
  end
  redis.call('EXPIRE', places, redis.call('TTL', job_key(job)))
end

-- The chunk of a job that has a task: its number, and the index after its last.
local function chunk_with(job, index)
  if redis.call('HSETNX', job_key(job), 'placed', 1) == 1 then
    note_places(job, redis.call('GET', job_key(job, 'spans')) or '')
  end
  local found = redis.call('ZREVRANGEBYSCORE', job_key(job, 'places'), index, '-inf', 'LIMIT', 0, 1)[1]
  local number, stop = (found or ''):match('^(%d+):(%d+)$')
  if number and index < tonumber(stop) then
    return tonumber(number), tonumber(stop)
  end
end

-- What a need waits for: the number of a chunk, unfed(index) or WHOLE, and whether nobody is there who would send it; nil
-- when it is met. What has ended without an outcome is met, too: the slot will say so. What is met is taken off.
local function first_unmet(need, chunk)
  local job = need[1]
  local f = redis.call('HMGET', job_key(job), 'ended', 'sealed', 'id', 'life')
  if f[1] or (job == chunk.job and need[3] < 0) then
    return nil  -- whoever waits for the end of his own job would wait for ever
  end
  -- A chunk of a job that is not known yet may lie in Kafka, behind a full line.
  local lonely = not f[3] and redis.call('EXISTS', key('full')) == 0
    or f[3] and f[2] ~= '1' and redis.call('EXISTS', job_key(job, 'sending')) == 0
  -- Of a job that was opened again, a task may be in a chunk that is done and in one that is not.
  if need[3] < 0 or f[4] then
    return WHOLE, lonely
  elseif not f[3] then
    return unfed(need[2]), lonely
  end
  while need[3] > 0 do
    local number, stop = chunk_with(job, need[2])
    if not number then
      return unfed(need[2]), lonely
    end
    local own = job == chunk.job and number == chunk.number
    if not own and redis.call('GETBIT', job_key(job, 'finished'), number) == 0 then
      return number, false
    end
    need[2], need[3] = stop, need[3] - (stop - need[2])
  end
end

local function stop_waiting(id, chunk)
  if chunk.waits then
    redis.call('ZREM', job_key(chunk.waits, 'waiters'), id)
    chunk.waits = nil
  end
end

-- True when a chunk is put aside, since something that it needs has no outcome yet. The caller writes it down.
local function waits_for_others(id, chunk, now)
  stop_waiting(id, chunk)
  while chunk.needs do
    local need = table.remove(chunk.needs)
    local where, lonely = first_unmet(need, chunk)
    -- Given up when it was the same a while ago. Not when nobody has looked for longer: all nodes were away.
    local given_up = lonely and chunk.stalled and now - chunk.stalled >= LOOK_AGAIN
      and now - chunk.stalled < 2.1 * LOOK_AGAIN
    if where and not given_up then
      if not lonely then
        chunk.stalled = nil
      elseif not chunk.stalled or now - chunk.stalled >= LOOK_AGAIN then
        chunk.stalled = now
      end
      chunk.needs[#chunk.needs + 1] = need
      chunk.waits = need[1]
      redis.call('ZADD', job_key(need[1], 'waiters'), where, id)
      -- It is noted anew whenever the chunk looks by itself.
      redis.call('EXPIRE', job_key(need[1], 'waiters'), 10 * LOOK_AGAIN)
      wait_until(id, now + LOOK_AGAIN)
      return true
    end
    if #chunk.needs == 0 then
      chunk.needs, chunk.stalled = nil, nil
    end
  end
  return false
end

-- Something of a job is there, or will never be: who waits for it looks again when the line is next looked at.
local function tell_waiters(job, from, to)
  local waiters = job_key(job, 'waiters')
  local told = redis.call('ZRANGEBYSCORE', waiters, from, to)
  if #told == 0 then
    return
  end
  redis.call('ZREMRANGEBYSCORE', waiters, from, to)
  local now = server_time()
  for _, id in ipairs(told) do
    redis.call('ZADD', key('delayed'), 'XX', now, id)
  end
  ring()
end

-- Chunks of a job have come: they are noted, for those who search them, and told to those who wait for them.
local function tell_fed(job, spans)
  if redis.call('HEXISTS', job_key(job), 'placed') == 1 then
    note_places(job, spans)
  end
  local at = redis.call('EXISTS', job_key(job, 'waiters')) == 1 and 1 or #spans
  while at < #spans do
    local number, first, count
    number, first, count, at = struct.unpack('<I4I4I4', spans, at)
    tell_waiters(job, unfed(first + count - 1), unfed(first))
  end
end

-- Back to the front of the line: it has waited already. One whose tasks all wait for their next attempt waits aside.
local function put_back(id, chunk, now)
  revoke(id, chunk)
  write_chunk(id, chunk)
  local due = due_at(chunk, now)
  if due > now then
    wait_until(id, due)
  else
    put_in_front(id, chunk)
  end
end

-- What is due by now joins the line, in front, unless it has to wait for something else. Returns how many have joined.
local function wake_delayed(now)
  local woken = redis.call('ZRANGEBYSCORE', key('delayed'), '-inf', now, 'LIMIT', 0, 1000)
  local joined = 0
  for i = #woken, 1, -1 do
    local id = woken[i]
    redis.call('ZREM', key('delayed'), id)
    local chunk = read_chunk(id)
    if chunk and not chunk.owner then
      local due = 0
      if chunk.needs then
        due = waits_for_others(id, chunk, now) and math.huge or due_at(chunk, now)
        write_chunk(id, chunk)
      end
      if due == 0 then
        put_in_front(id, chunk)
        joined = joined + 1
      elseif due < math.huge then
        wait_until(id, due)
      end
    end
  end
  return joined
end

-- Gone from the workbench: no record of it in Kafka holds up the commit any more.
local function forget(id, chunk)
  stop_waiting(id, chunk)
  redis.call('HDEL', key('open'), id)
  redis.call('ZREM', key('delayed'), id)
  for offset in pairs(chunk.crashes) do
    redis.call('HDEL', key('crashes'), crash_field(id, offset))
  end
  for _, p in ipairs(chunk.positions) do
    redis.call('ZREM', key('position:' .. p[1] .. ':' .. p[2]), p[3])
  end
end

local function tell(job, ...)
  local seq = redis.call('INCR', key('news_seq'))
  redis.call('XADD', key('news'), 'MAXLEN', '~', 8192, '*', 'q', seq, 'j', job, ...)
end

local JOB_PARTS = {'in', 'out', 'finished', 'failed', 'dropped', 'replaced', 'spans', 'places', 'sameness', 'blobs'}

-- The keys of arguments that were too large for their chunks.
local function blobs_of(job)
  local names = redis.call('HKEYS', job_key(job, 'blobs'))
  for i, number in ipairs(names) do
    names[i] = key('blob:' .. job .. '-' .. number)
  end
  return names
end

-- All keys of a job live for so many seconds from now, and so does its hold of the name.
local function expire_job(job, seconds)
  for _, blob in ipairs(blobs_of(job)) do
    redis.call('EXPIRE', blob, seconds)
  end
  for _, part in ipairs(JOB_PARTS) do
    redis.call('EXPIRE', job_key(job, part), seconds)
  end
  redis.call('EXPIRE', job_key(job), seconds)
  local called = redis.call('HGET', job_key(job), 'name')
  if called and redis.call('GET', key('name:' .. called)) == job then
    redis.call('EXPIRE', key('name:' .. called), seconds)
  end
end

-- What is left of a deleted job is a mark: chunks of it that come from Kafka later are passed by.
local function is_deleted(job)
  return redis.call('HGET', job_key(job), 'cancel') == 'deleted'
end

local function end_job(job, now, keep)
  local name = job_key(job)
  redis.call('HSET', name, 'ended', string.format('%.6f', now))
  tell_waiters(job, '-inf', '+inf')
  -- Someone may have said how long it shall be kept.
  expire_job(job, tonumber(redis.call('HGET', name, 'keep') or keep))
  redis.call('ZREM', key('deadlines'), job)
  redis.call('SREM', key('sealed'), job)
end

-- End a job now: every task without an outcome is cancelled by this one entry. What waits leaves the line; what runs
-- is stopped when its node names the lease; what comes from Kafka later is passed by.
local function cancel_job(job, reason, now, keep)
  local name = job_key(job)
  local f = redis.call('HMGET', name, 'total', 'succeeded', 'failed', 'ended', 'fed', 'cancelled')
  if f[4] then
    return 0
  end
  -- Tasks that were cancelled one by one have their outcome.
  local dropped_before = tonumber(f[6] or 0)
  local done = tonumber(f[2] or 0) + tonumber(f[3] or 0) + dropped_before
  local total = tonumber(f[1] or '-1')
  if total < 0 then
    total = math.max(done, tonumber(f[5] or 0))
  end
  redis.call('HSET', name, 'id', job, 'cancel', reason, 'cancelled', dropped_before + total - done, 'total', total, 'sealed', 1)
  end_job(job, now, keep)
  local mine = job .. ':'
  local kept, dropped = {}, {}
  local line = lane_key('ready', redis.call('HGET', name, 'lane') or 'normal')
  for _, id in ipairs(redis.call('LRANGE', line, 0, -1)) do
    if id:sub(1, #mine) == mine then
      dropped[#dropped + 1] = 'ready:' .. id
    else
      kept[#kept + 1] = id
    end
  end
  if #dropped > 0 then
    redis.call('DEL', line)
    for i = 1, #kept, 1000 do
      redis.call('RPUSH', line, unpack(kept, i, math.min(i + 999, #kept)))
    end
  end
  for _, id in ipairs(redis.call('ZRANGE', key('delayed'), 0, -1)) do
    if id:sub(1, #mine) == mine then
      redis.call('ZREM', key('delayed'), id)
      redis.call('RPUSH', key('dropped'), 'delayed:' .. id)
    end
  end
  for i = 1, #dropped, 1000 do
    redis.call('RPUSH', key('dropped'), unpack(dropped, i, math.min(i + 999, #dropped)))
  end
  tell(job, 'f', '', 'n', total - done, 'e', 1, 'c', reason)
  redis.call('XADD', key('bell'), 'MAXLEN', '~', 64, '*', 'k', 'cancel')
  return total - done
end

-- Jobs whose deadline has passed, some at a time.
local function end_late_jobs(now, keep)
  for _, job in ipairs(redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', now, 'LIMIT', 0, 10)) do
    redis.call('ZREM', key('deadlines'), job)
    cancel_job(job, 'deadline', now, keep)
  end
end

-- Forget what a cancel has taken out of the line, some at a time: there may be a hundred thousand.
local function sweep_dropped()
  for _, entry in ipairs(redis.call('LPOP', key('dropped'), 1000) or {}) do
    local from, id = entry:match('^(%a+):(.*)$')
    local chunk = read_chunk(id)
    if chunk then
      if from == 'ready' then
        count_ready_bytes(chunk, -1)
      end
      forget(id, chunk)
    end
  end
end

-- True once every task has its outcome; then the job's keys get their time to live.
local function end_if_complete(job, now, keep)
  local name = job_key(job)
  local f = redis.call('HMGET', name, 'total', 'succeeded', 'failed', 'cancelled', 'ended')
  local total = tonumber(f[1] or '-1')
  if f[5] or total < 0 or tonumber(f[2] or 0) + tonumber(f[3] or 0) + tonumber(f[4] or 0) < total then
    return false
  end
  end_job(job, now, keep)
  return true
end

-- A workbench that was emptied is filled again from Kafka, but not with what was finished before. Once every cursor has
-- passed a job's sealed end, and each of its tasks that came has its outcome, those that did not come are lost: their
-- outcomes went with the workbench, or their record could not be read.
local function end_if_lost(job, now, keep, doubt)
  local name = job_key(job)
  local f = redis.call('HMGET', name, 'total', 'fed', 'succeeded', 'failed', 'cancelled', 'ends', 'doubted', 'lane', 'unfed')
  if not f[1] then
    redis.call('SREM', key('sealed'), job)
    return
  end
  local total, fed = tonumber(f[1]), tonumber(f[2] or 0)
  local done = tonumber(f[3] or 0) + tonumber(f[4] or 0) + tonumber(f[5] or 0)
  -- A task that was cancelled before it came says nothing of those that came. Whoever is sending may have the others.
  local passed = done - tonumber(f[9] or 0) >= fed and done < total
    and redis.call('EXISTS', job_key(job, 'sending')) == 0
  for place, offset in pairs(passed and cmsgpack.unpack(f[6]) or {}) do
    local topic, partition = place:match('^(.*)/(%d+)$')
    local cursor = redis.call('HGET', lane_key('cursor', f[8] or 'normal'), partition)
    local life, at = (cursor or ''):match('^(.*):(%d+)$')
    passed = passed and cursor and (life ~= topic or tonumber(at) >= offset)
  end
  if not passed then
    if f[7] then
      redis.call('HDEL', name, 'doubted')
    end
  elseif not f[7] then
    redis.call('HSET', name, 'doubted', string.format('%.6f', now))
  elseif now - tonumber(f[7]) > doubt then
    -- For a while first: what a broker in memory has forgotten is sent again by its client, which says so now and then.
    redis.call('HSET', name, 'cancel', 'lost', 'lost', total - done)
    redis.call('HDEL', name, 'doubted')
    end_job(job, now, keep)
    tell(job, 'f', '', 'n', 0, 'e', 1, 'c', 'lost')
  end
end

-- Take a chunk from whoever has it, or from the line where it waits. False when it is in neither.
local function leave_line(id, chunk)
  if chunk.owner then
    revoke(id, chunk)
    return true
  elseif redis.call('LREM', lane_key('ready', chunk.lane), 1, id) == 1 then
    count_ready_bytes(chunk, -1)
    return true
  end
  return redis.call('ZREM', key('delayed'), id) == 1
end

-- Every task of a chunk has its outcome. The caller looks whether its job has ended with it.
local function close_chunk(id, chunk, keep)
  leave_line(id, chunk)
  forget(id, chunk)
  redis.call('SETBIT', job_key(chunk.job, 'finished'), chunk.number, 1)
  redis.call('EXPIRE', job_key(chunk.job, 'finished'), keep * 4)
  tell_waiters(chunk.job, chunk.number, chunk.number)
end

-- The outcome of one task becomes that it was cancelled. True unless it has one already.
local function drop_task(chunk, offset)
  local done = chunk.done ~= '' and chunk.done or string.rep('0', chunk.count)
  if done:byte(offset + 1) ~= 48 then
    return false
  end
  chunk.done = done:sub(1, offset) .. '1' .. done:sub(offset + 2)
  chunk.left = chunk.left - 1
  chunk.dropped = chunk.dropped or {}
  chunk.dropped[#chunk.dropped + 1] = offset
  return true
end
