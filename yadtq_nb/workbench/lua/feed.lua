#!lua
-- feed: put chunks that were read from Kafka on the workbench, and lease some to the feeder's own node.
-- Without it a chunk would be lost or doubled when a partition changes hands: a batch counts only if the cursor kept
-- here equals the offset it was read from, neither behind nor ahead.
-- ARGV: node, lease, free slots, most ready chunks (-1), most ready bytes (-1), keep, groups (packed), lane, whether the
-- broker forgets what was read, then the records.
-- group: {partition, topic id, expected, next, {{job, number, first, count, weight, offset, job name, function, total, created, style, start after, needs, done}...}}
local node, lease, free = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local most_chunks, most_bytes, keep = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local groups = cmsgpack.unpack(ARGV[7])
local now = server_time()
local lane, forgets = ARGV[8], ARGV[9] == '1'
local replies, leases, record = {}, {}, 9
local added = false

if not is_live(node, now, lease) then
  return {'lapsed', {}, {}}
end

-- What waits already, in this line or in one that is served before it, comes first.
for _, other in ipairs(free > 0 and LANES or {}) do
  if redis.call('LLEN', lane_key('ready', other)) > 0 then
    free = 0
  end
  if other == lane or free == 0 then
    break
  end
end

-- What is known of the jobs in this feed, read once for each, and counted here until the end.
local jobs = {}

local function job_of(c)
  local job = jobs[c[1]]
  if not job then
    local name = job_key(c[1])
    local f = redis.call('HMGET', name, 'name', 'ended', 'cancelled', 'cancel', 'floor', 'life')
    job = {name = name, known = f[1], ended = f[2], dropped = f[3], bytes = 0, fed = 0, running = 0, spans = ''}
    job.repairable = f[2] and f[4] and f[4] ~= 'deleted'
    job.floor, job.life = tonumber(f[5] or 0), tonumber(f[6] or 0)
    jobs[c[1]] = job
    if not job.known and f[4] ~= 'deleted' then
      redis.call('HSET', name, 'id', c[1], 'name', c[7], 'function', c[8], 'created', c[10], 'style', c[11], 'lane', lane)
      -- Its seal may have come before, when Redis had lost the job.
      redis.call('HSETNX', name, 'total', c[9])
      redis.call('HSETNX', name, 'sealed', c[9] >= 0 and 1 or 0)
      redis.call('ZADD', key('jobs'), c[10], c[1])
      redis.call('EXPIRE', name, keep * 4)
    end
  end
  return job
end

-- What is kept of the inputs of a job, by this feed, and for how long if it is the first.
local function note_inputs(id, job, seconds)
  redis.call('HINCRBY', job.name, 'bytes', job.bytes)
  if redis.call('APPEND', job_key(id, 'spans'), job.spans) == #job.spans then
    redis.call('EXPIRE', job_key(id, 'in'), seconds)
    redis.call('EXPIRE', job_key(id, 'spans'), seconds)
  end
end

local function count_jobs()
  for id, job in pairs(jobs) do
    if job.fed > 0 then
      note_inputs(id, job, keep * 4)
      if job.running > 0 then
        redis.call('HINCRBY', job.name, 'running', job.running)
      end
      redis.call('HINCRBY', job.name, 'fed', job.fed)
      tell_fed(id, job.spans)
    elseif job.repairable and job.spans ~= '' then
      note_inputs(id, job, redis.call('TTL', job.name))
    end
  end
end

local function count_input(c, job, data)
  job.bytes = job.bytes + #data
  job.spans = job.spans .. struct.pack('<I4I4I4', c[2], c[3], c[4])
end

-- Of a job that was cancelled: job.retry() finds it in Kafka's log, or here.
local function keep_input(c, job, data)
  if redis.call('HSETNX', job_key(c[1], 'in'), c[2], data) == 1 then
    count_input(c, job, data)
  end
end

local function add(id, c, job, position, data)
  redis.call('HSET', job_key(c[1], 'in'), c[2], data)
  count_input(c, job, data)
  local chunk = {
    lane = lane, job = c[1], number = c[2], first = c[3], count = c[4], weight = c[5], size = #data,
    left = c[4], seq = 0, done = c[14], lapses = 0, crashes = {}, positions = {position},
  }
  if c[14] ~= '' then
    chunk.left = select(2, c[14]:gsub('0', ''))
  end
  if math.floor(c[2] / LIFE) < job.life then
    -- Some of its tasks were sent again. It is fed only now that the workbench was emptied.
    for offset = 0, c[4] - 1 do
      local replaced = redis.call('HGET', job_key(c[1], 'replaced'), c[3] + offset)
      if replaced and math.floor(c[2] / LIFE) < tonumber(replaced) then
        drop_task(chunk, offset)
      end
    end
    chunk.dropped = nil
  end
  job.fed = job.fed + chunk.left
  if chunk.left == 0 then
    close_chunk(id, chunk, keep)
    return
  end
  if job.dropped then
    -- Some of its tasks were cancelled while they lay in Kafka.
    for offset = 0, c[4] - 1 do
      if redis.call('SISMEMBER', job_key(c[1], 'dropped'), c[3] + offset) == 1 then
        drop_task(chunk, offset)
        redis.call('HINCRBY', job.name, 'unfed', -1)
      end
    end
    if chunk.left == 0 then
      close_chunk(id, chunk, keep)
      -- Its record may come twice in this feed.
      job.known = true
      -- How many tasks it has may be known only now.
      if end_if_complete(c[1], now, keep) then
        job.ended = true
        tell(c[1], 'f', '', 'n', 0, 'e', 1)
      end
      return
    end
  end
  if c[12] > now then
    chunk.due = {}
    for offset = 0, c[4] - 1 do
      chunk.due[tostring(offset)] = c[12]
    end
  end
  chunk.needs = c[13][1] and c[13]
  if waits_for_others(id, chunk, now) then
    write_chunk(id, chunk)
  elseif chunk.due then
    write_chunk(id, chunk)
    wait_until(id, c[12])
    added = true
  elseif free > 0 and chunk.done == c[14] then
    free, job.running = free - 1, job.running + chunk.weight
    leases[#leases + 1] = {id, grant(id, chunk, node, now + lease)}
  else
    write_chunk(id, chunk)
    if lane == 'nested' then
      -- The last first: whoever waits for it has begun, and is waited for by who came before.
      put_in_front(id, chunk)
    else
      put_at_end(id, chunk)
    end
    added = true
  end
end

for g, group in ipairs(groups) do
  local partition, topic, expected, chunks = group[1], group[2], group[3], group[5]
  local cursor = redis.call('HGET', lane_key('cursor', lane), partition)
  local status = 'fed'
  if not cursor then
    status = 'no cursor'
  elseif cursor ~= topic .. ':' .. expected then
    status = 'moved'
  elseif (most_chunks >= 0 and redis.call('LLEN', lane_key('ready', lane)) >= most_chunks)
      or (most_bytes >= 0 and tonumber(redis.call('GET', lane_key('ready_bytes', lane)) or 0) >= most_bytes) then
    status = 'full'
    redis.call('SET', key('full'), 1, 'EX', LOOK_AGAIN)
  end
  for _, c in ipairs(chunks) do
    record = record + 1
    if status == 'fed' then
      local id = c[1] .. ':' .. c[2]
      local position = {topic, partition, c[6]}
      local job = job_of(c)
      local finished = job.ended or math.floor(c[2] / LIFE) < job.floor
        or (job.known and redis.call('GETBIT', job_key(c[1], 'finished'), c[2]) == 1)
      if not finished then
        -- First: a chunk that closes at once takes it away again.
        redis.call('ZADD', key('position:' .. topic .. ':' .. partition), c[6], c[6])
        local open = read_chunk(id)
        if open then
          -- A producer's retry, or fed again after a wipe: the outcome will close every position.
          open.positions[#open.positions + 1] = position
          write_chunk(id, open)
        else
          add(id, c, job, position, ARGV[record])
        end
      elseif forgets and job.repairable then
        keep_input(c, job, ARGV[record])
      end
    end
  end
  if status == 'fed' then
    cursor = topic .. ':' .. group[4]
    redis.call('HSET', lane_key('cursor', lane), partition, cursor)
  end
  replies[g] = {status, cursor or ''}
end
count_jobs()
if added then
  ring()
end
return {'ok', replies, leases}
