#!lua flags=allow-oom
-- restore: note that a node begins to replay the jobs topic into an empty workbench, and that it has done so.
-- What a wipe in between has taken away again counts as not replayed.
-- ARGV: node, 'begin' or 'end'. Returns 1 once all jobs are known.
if ARGV[2] == 'begin' then
  redis.call('HSET', key('restored'), 'by:' .. ARGV[1], 1)
elseif redis.call('HDEL', key('restored'), 'by:' .. ARGV[1]) == 1 then
  redis.call('HSET', key('restored'), 'done', 1)
end
return redis.call('HEXISTS', key('restored'), 'done')
