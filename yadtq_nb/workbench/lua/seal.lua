#!lua flags=allow-oom
-- seal: say how many tasks a job has, once all are sent.
-- ARGV: id, total, ends (packed), keep, life.
-- Redis may have lost the job meanwhile: create or feed write down the rest when they come.
local name, keep = job_key(ARGV[1]), tonumber(ARGV[4])
-- One of an earlier life comes late: the job was opened again.
if redis.call('HEXISTS', name, 'cancel') == 1 or tonumber(redis.call('HGET', name, 'life') or 0) > tonumber(ARGV[5]) then
  return 0
end
redis.call('HSET', name, 'id', ARGV[1], 'total', ARGV[2], 'sealed', 1, 'ends', ARGV[3])
redis.call('DEL', job_key(ARGV[1], 'sending'))
if redis.call('TTL', name) < 0 then
  redis.call('EXPIRE', name, keep * 4)
end
if end_if_complete(ARGV[1], server_time(), keep) then
  tell(ARGV[1], 'f', '', 'n', 0, 'e', 1)
else
  redis.call('SADD', key('sealed'), ARGV[1])
end
return 1
