"""Put a bug into the verbs of the workbench, and see whether their state machine finds it: for each of a list.

    python tests/mutations.py [examples] [word of a name]

Prints how many examples it took; ends with 1 if a bug was not found.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Final
from unittest import mock

import stacks
from hypothesis import Phase
from hypothesis.stateful import run_state_machine_as_test
from test_workbench_machine import Machine, Store, chosen

from yadtq_nb.config import Config
from yadtq_nb.workbench import connection

#: What is wrong, the verb (or "common"), the text, and what takes its place.
MUTATIONS: Final = (
    ("feed: a feeder that is behind or ahead is let in", "feed", "cursor ~= topic .. ':' .. expected", "false"),
    (
        "feed: a feeder that is ahead is let in",
        "feed",
        "cursor ~= topic .. ':' .. expected",
        "tonumber(cursor:match(':(%d+)$')) > expected",
    ),
    (
        "feed: the offset alone is compared, not the topic",
        "feed",
        "cursor ~= topic .. ':' .. expected",
        "cursor:match(':(%d+)$') ~= tostring(expected)",
    ),
    ("feed: no cursor counts as the right one", "feed", "if not cursor then", "if false then"),
    ("feed: a finished chunk is fed again", "feed", "if not finished then", "if true then"),
    ("feed: an open chunk is made anew", "feed", "if open then", "if false then"),
    ("feed: the second record's position is not kept", "feed", "open.positions[#open.positions + 1] = position", ""),
    ("feed: no position is written down", "feed", "'ZADD', key('position:'", "'DEL', key('none:'"),
    ("feed: more leases than free slots", "feed", "free, job.running = free - 1,", "job.running ="),
    ("feed: a lapsed node feeds", "feed", "if not is_live(node, now, lease) then", "if false then"),
    ("take: a lapsed node takes", "take", "if not is_live(node, now, lease) then", "if false then"),
    (
        "take: ready bytes stay",
        "take",
        "  if chunk and not chunk.owner then\n    count_ready_bytes(chunk, -1)",
        "  if chunk and not chunk.owner then",
    ),
    ("a dead node gets leases", "common", "and redis.call('SISMEMBER', key('dead'), node) == 0", ""),
    ("the token is not looked at", "common", "and tostring(chunk.token) == token", ""),
    ("the owner is not looked at", "common", "chunk.owner == node and", ""),
    ("finish: a zombie's failure counts", "finish", "and (current or good) then", "then"),
    ("finish: a zombie's failures of a whole chunk count", "finish", "and (current or not states:find('[^S]'))", ""),
    ("finish: the last outcome wins", "finish", "if done[place] == 48 and", "if"),
    ("finish: no mask", "finish", "redis.call('HSET', out, field .. 'm', mask)", ""),
    ("finish: positions stay", "common", "'ZREM', key('position:'", "'DEL', key('none:'"),
    ("finish: the place in the line stays", "finish", "redis.call('LREM', lane_key('ready', chunk.lane), 1, id)", ""),
    ("finish: the lease stays", "finish", "    revoke(id, chunk)\n", "    chunk.owner = nil\n"),
    ("finish: the chunk is not said to be finished", "finish", "'SETBIT'", "'DEL'"),
    ("finish: a part closes the chunk", "finish", "if chunk.left > 0 then", "if chunk.left > chunk.count then"),
    ("finish: the same name for two segments", "finish", "chunk.seq, chunk.left = chunk.seq + 1,", "chunk.left ="),
    ("finish: the job never ends", "finish", "end_if_complete(chunk.job, now, keep) and 1 or 0", "0"),
    (
        "beat: all leases of the node are renewed",
        "beat",
        "local lost, dropped = {}, {}",
        "local lost, dropped = {}, {}\n"
        + """
for _, id in ipairs(redis.call('ZRANGE', key('leases'), 0, -1)) do
  local chunk = read_chunk(id)
  if chunk and chunk.owner == node then redis.call('ZADD', key('leases'), now + lease, id) end
end""",
    ),
    (
        "beat: a lease is renewed whoever has it",
        "beat",
        "local held = chunk and holds(chunk, node, named[2])",
        "local held = chunk",
    ),
    ("beat: the low mark is the cursor", "beat", "0, 0)[1] or offset", "0, 0)[9] or offset"),
    ("beat: partitions of the lapsed stay theirs", "beat", "not (owner and live[owner])", "not owner"),
    ("beat: who does not poll keeps partitions", "beat", "polls and fair or 0", "fair"),
    ("reap: no grace after a gap", "reap", "local away = now - last > lease", "local away = false"),
    ("reap: always grace", "reap", "local away = now - last > lease", "local away = true"),
    ("reap: what has not lapsed goes as well", "reap", "'-inf', now)", "'-inf', now + lease / 2)"),
    ("reap: the crash is not charged", "reap", "if offset then", "if false then"),
    ("how it crashed is not kept", "common", "redis.call('HSET', key('crashes')", "redis.call('HDEL', key('none')"),
    ("how it crashed stays for ever", "common", "redis.call('HDEL', key('crashes')", "redis.call('HDEL', key('none')"),
    ("release: what is told of the crash is not put down", "release", "charge(id, chunk, offset, crash)", ""),
    ("take: how it crashed is not told", "take", "deaths[offset] = packed and", "deaths[offset] = false and"),
    ("reap: chunks of others than the dead", "reap", "dead ~= '' and chunk.owner == dead", "dead ~= ''"),
    (
        "revoke: the running counter stays",
        "common",
        "redis.call('HINCRBY', job_key(chunk.job), 'running', -chunk.weight)",
        "",
    ),
    ("revoke: the running task stays written down", "common", "redis.call('HDEL', key('at'), id)", ""),
    (
        "put back: to the end of the line",
        "common",
        "redis.call('LPUSH', lane_key('ready', chunk.lane), id)",
        "redis.call('RPUSH', lane_key('ready', chunk.lane), id)",
    ),
    ("release: by who does not hold it", "release", "or not holds(chunk, node, token)", ""),
    ("mark: by who does not hold it", "mark", "or not holds(chunk, ARGV[1], ARGV[3])", ""),
    ("init: without comparing", "init", "cursor ~= ARGV[2] or", "false or"),
    ("init: before the jobs are known", "init", "redis.call('HEXISTS', key('restored'), 'done') == 0", "false"),
    (
        "restore: a wipe in between is not seen",
        "restore",
        "redis.call('HDEL', key('restored'), 'by:' .. ARGV[1]) == 1",
        "true",
    ),
    ("seal: a job that is complete does not end", "seal", "if end_if_complete(", "if false and end_if_complete("),
    (
        "seal: the job is taken for known when it is fed",
        "feed",
        "'HMGET', name, 'name', 'ended'",
        "'HMGET', name, 'id', 'ended'",
    ),
    (
        "seal: the job is taken for known when it is made",
        "create",
        "job_key(id), 'name', name) ==",
        "job_key(id), 'id', id) ==",
    ),
    ("retry: by who does not hold it", "retry", "or not holds(chunk, node, token)", ""),
    ("retry: sent twice it counts twice", "retry", "if (chunk.tries[offset] or 0) < times then", "if true then"),
    ("retry: it need not wait", "retry", "now + try[3]", "now"),
    (
        "retry: who waits stands in the line",
        "common",
        "if due > now then\n    wait_until",
        "if false then\n    wait_until",
    ),
    (
        "retry: who has an outcome is waited for",
        "common",
        "if chunk.done == '' or chunk.done:byte(i) == 48 then",
        "if true then",
    ),
    ("retry: the latest to be due goes first", "common", "for i = #woken, 1, -1 do", "for i = 1, #woken do"),
    (
        "retry: who waits aside stays there when it is finished",
        "common",
        "redis.call('HDEL', key('open'), id)\n  redis.call('ZREM', key('delayed'), id)",
        "redis.call('HDEL', key('open'), id)",
    ),
    ("retry: a job that is to start later starts", "feed", "if c[12] > now then", "if false then"),
    ("cancel: what comes from Kafka later runs", "feed", "job.ended or (", "("),
    ("cancel: what is given back later runs", "take", "not has_ended(chunk.job) and", ""),
    (
        "cancel: what waits aside stays",
        "common",
        "if id:sub(1, #mine) == mine then\n      redis.call('ZREM'",
        "if false then\n      redis.call('ZREM'",
    ),
    ("cancel: jobs of a name that begins alike go as well", "common", "local mine = job .. ':'", "local mine = job"),
    (
        "cancel: ready bytes stay",
        "common",
        "      if from == 'ready' then",
        "      if false then",
    ),
    ("cancel: a late outcome counts", "finish", "if has_ended(chunk.job) then", "if false then"),
    (
        "cancel: a late outcome leaves the chunk's place in the line",
        "finish",
        "  if leave_line(id, chunk) then\n    forget(id, chunk)",
        "  if not chunk.owner or leave_line(id, chunk) then\n    forget(id, chunk)",
    ),
    ("cancel: its leases are renewed", "beat", "if held and has_ended(chunk.job) then", "if false then"),
    ("cancel: a dropped task is counted again", "common", "tonumber(f[6] or 0)", "0"),
    ("cancel: a seal says otherwise", "seal", "if redis.call('HEXISTS', name, 'cancel') == 1 then", "if false then"),
    ("drop: what was fed meanwhile is not seen", "drop", "task[1] < 0 and (redis", "false and (redis"),
    (
        "drop: twice counts twice",
        "drop",
        "if ok and redis.call('SADD', skipped, index) == 1 then",
        "if ok then redis.call('SADD', skipped, index)",
    ),
    ("drop: a chunk of which nothing is left stays", "drop", "if ok and chunk.left == 0 then", "if false then"),
    ("drop: what comes from Kafka later runs", "feed", "if job.dropped then", "if false then"),
    ("drop: what has an outcome gets another", "common", "if done:byte(offset + 1) ~= 48 then", "if false then"),
    ("drop: its node is not told", "beat", "if held and chunk.dropped then", "if false then"),
    ("drop: a job that nobody knows stays for ever", "drop", "if redis.call('TTL', name) < 0 then", "if false then"),
    ("drop: a job of dropped tasks never ends", "feed", "if end_if_complete(c[1], now, keep) then", "if false then"),
    ("drop: the feeder gets a chunk whole", "feed", "and not chunk.dropped then", "then"),
    (
        "lanes: the last is served first",
        "take",
        "for _, lane in ipairs(LANES) do\n  local most",
        "for n = #LANES, 1, -1 do\n  local lane = LANES[n]\n  local most",
    ),
    ("lanes: lent slots are for all", "take", "lane == 'nested' and wanted or plain", "wanted"),
    ("lanes: nested chunks join at the end", "feed", "if lane == 'nested' then", "if false then"),
    ("lanes: the feeder passes those that are served before", "feed", "free > 0 and LANES or {}", "{lane}"),
    (
        "lanes: what is given back is in another",
        "common",
        "redis.call('LPUSH', lane_key('ready', chunk.lane), id)",
        "redis.call('LPUSH', key('ready'), id)",
    ),
    (
        "lanes: who died feeds others than the normal one",
        "reap",
        "redis.call('SREM', lane_key('feeders', lane), dead)",
        "redis.call('SREM', key('feeders'), dead)",
    ),
    (
        "lanes: one cursor for all",
        "feed",
        "lane_key('cursor', lane), partition, cursor)",
        "key('cursor'), partition, cursor)",
    ),
)


def examples_until_found(config: Config, verb: str, old: str, new: str, most: int) -> int | None:
    """Return how many examples the machine needed, or None if it found nothing."""
    original = connection._source
    made = 0

    def mutated(name: str) -> str:
        text = original(name)
        if verb not in ("common", name):
            return text
        assert old in text, f"{verb}.lua has no {old!r}"
        return text.replace(old, new, 1)

    def machine() -> Machine:
        nonlocal made
        made += 1
        return Machine(store)

    with mock.patch.object(connection, "_source", mutated), contextlib.closing(Store(config)) as store:
        try:
            run_state_machine_as_test(machine, settings=chosen(most, phases=[Phase.generate], database=None))
        except Exception:
            # It is played once more, to be shown.
            return max(1, made - 1)
    return None


def main(most: int = 1_000, word: str = "") -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as directory, stacks.start_store(Path(directory)) as config:
        for name, verb, old, new in MUTATIONS:
            if word not in name:
                continue
            began = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = examples_until_found(config, verb, old, new, most)
            missed += found is None
            print(f"{found or 'missed':>6}  {time.monotonic() - began:5.1f} s  {name}", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:3]))
