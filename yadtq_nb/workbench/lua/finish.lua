#!lua flags=allow-oom
-- finish: store outcomes of a chunk, move the job's counters, tell the clients, and close the chunk when none is left.
-- The first outcome of a task wins. Without the current token only a success counts: a woken zombie must not
-- report a failure over a healthy run.
-- ARGV: node, id, token, keep, most bytes told inline, offsets (packed list, or '' for start and count), start, states, blob.
local node, id, token, keep, inline = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local start, states, blob = tonumber(ARGV[7]), ARGV[8], ARGV[9]
local chunk = read_chunk(id)

if not chunk then
  return {'closed', 0}
end
if is_over(chunk.job, chunk.number) then
  -- Given back since the job was cancelled, it waits in a line: it goes with its place there. What a cancel has taken out
  -- of a line is swept by and by.
  if leave_line(id, chunk) then
    forget(id, chunk)
  end
  redis.call('HINCRBY', job_key(chunk.job), 'late', #states)
  return {'closed', 0}
end
local current = holds(chunk, node, token)
local accepted, succeeded, failed, mask = 0, 0, 0, nil

if ARGV[6] == '' and chunk.left == chunk.count and #states == chunk.count and (current or not states:find('[^S]')) then
  -- The usual case: the whole chunk at once.
  accepted = chunk.count
  local _, good = states:gsub('S', '')
  succeeded, failed = good, accepted - good
else
  local offsets = ARGV[6] ~= '' and cmsgpack.unpack(ARGV[6])
  local done, kept = {}, {}
  for i = 1, chunk.count do
    done[i] = chunk.done ~= '' and chunk.done:byte(i) or 48
  end
  for i = 1, #states do
    local place = (offsets and offsets[i] or start + i - 1) + 1
    local good = states:byte(i) == 83
    if done[place] == 48 and (current or good) then
      done[place], kept[i] = 49, '1'
      accepted = accepted + 1
      succeeded, failed = succeeded + (good and 1 or 0), failed + (good and 0 or 1)
    else
      kept[i] = '0'
    end
  end
  if accepted < #states then
    mask = table.concat(kept)
  end
  for i = 1, #done do
    done[i] = string.char(done[i])
  end
  chunk.done = table.concat(done)
end

local late = #states - accepted
if late > 0 then
  redis.call('HINCRBY', job_key(chunk.job), 'late', late)
end
if accepted == 0 then
  return {current and 'current' or 'lapsed', 0}
end

local now = server_time()
local field = chunk.number .. '.' .. chunk.seq
local out = job_key(chunk.job, 'out')
redis.call('HSET', out, field, blob)
if mask then
  redis.call('HSET', out, field .. 'm', mask)
end
if chunk.seq == 0 then
  redis.call('EXPIRE', out, keep * 4)
end
redis.call('HINCRBY', job_key(chunk.job), 'bytes', #blob)
if succeeded > 0 then
  redis.call('HINCRBY', job_key(chunk.job), 'succeeded', succeeded)
end
if failed > 0 then
  redis.call('HINCRBY', job_key(chunk.job), 'failed', failed)
  -- Where the first errors are, for who wants to see no more than these.
  if redis.call('LLEN', job_key(chunk.job, 'failed')) < 200 then
    redis.call('RPUSH', job_key(chunk.job, 'failed'), field)
    redis.call('EXPIRE', job_key(chunk.job, 'failed'), keep * 4)
  end
end
chunk.seq, chunk.left = chunk.seq + 1, chunk.left - accepted

local answer = current and 'current' or 'lapsed'
if chunk.left > 0 then
  write_chunk(id, chunk)
else
  close_chunk(id, chunk, keep)
  answer = 'closed'
end
local ended = end_if_complete(chunk.job, now, keep) and 1 or 0
if #blob <= inline and not mask then
  tell(chunk.job, 'f', field, 'n', accepted, 'e', ended, 'b', blob)
else
  tell(chunk.job, 'f', field, 'n', accepted, 'e', ended)
end
return {answer, accepted}
