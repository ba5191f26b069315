"""The verbs of the workbench against a model in plain Python, driven at random by Hypothesis.

    Model      the workbench as its rules say; its verbs answer as the real ones must
    Machine    the world around it: Kafka's logs and commits, nodes that crash, replies that are lost, time, faults

Each rule sends one verb to both and compares the answers. After each, all that lies in Redis is compared with the
model, and what no verb may break is checked without it: see Machine.nothing_is_lost. At the end a healthy node must be
able to finish everything.

Nothing sleeps: a lease lasts 1,000 s, and time passes by moving all times in Redis back, in steps of 300 s. A time that
a client has set is given by the model's clock, which starts at 0: see Machine.server_time.

To add a verb: a method of Model, and a rule that passes both calls to Machine.both. What it keeps in Redis goes into
Model.view and observe.

YADTQ_EXAMPLES=5000 makes a long run; tests/mutations.py shows which bugs it finds.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import stacks
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from workbench_model import LEASE, WATERMARK, Model, steps

from yadtq_nb import codec
from yadtq_nb.config import Config
from yadtq_nb.errors import Crash
from yadtq_nb.model import (
    LANES,
    WHOLE,
    Cancel,
    ChunkHead,
    Environment,
    Lane,
    Lease,
    Manifest,
    Policy,
    Retry,
    Seal,
    WorkerInfo,
)
from yadtq_nb.workbench.bench import Batch, Cursor, NotLiveError, Share, Workbench
from yadtq_nb.workbench.jobs import JobStore

#: Each partition is in one lane only, so that its number says which; the topics of all lanes have the same id here.
GROUPS: dict[Lane, list[int]] = {"nested": [2], "high": [3], "normal": [0, 1], "low": [4]}
LANE_OF = {partition: lane for lane, group in GROUPS.items() for partition in group}
PARTITIONS = len(LANE_OF)
NODES = 2
MOST_CHUNKS = 20
#: At a time.
OPEN_CHUNKS = 4
QUEUE = "machine"
EXAMPLES = int(os.environ.get("YADTQ_EXAMPLES", "200"))

COUNTS = (b"fed", b"running", b"succeeded", b"failed", b"late", b"cancelled")
#: Where the reason stands in what is seen of a job.
CANCEL = len(COUNTS) + 1
FATES = st.sampled_from(["ok", "ok", "ok", "lost", "twice"])
NODE = st.integers(0, NODES - 1)
PARTITION = st.sampled_from([0, 0, 1, 1, 2, 3, 4])

T = TypeVar("T")


_SHIFT = """
for n = 1, 3 do
  for _, member in ipairs(redis.call('ZRANGE', KEYS[n], 0, -1)) do
    redis.call('ZINCRBY', KEYS[n], -ARGV[1], member)
  end
end
local reaped = redis.call('GET', KEYS[4])
if reaped then
  redis.call('SET', KEYS[4], string.format('%.6f', reaped - ARGV[1]))
end
local open = redis.call('HGETALL', KEYS[5])
for n = 1, #open, 2 do
  local chunk = cmsgpack.unpack(open[n + 1])
  for offset, due in pairs(chunk.due or {}) do
    chunk.due[offset] = due - ARGV[1]
  end
  redis.call('HSET', KEYS[5], open[n], cmsgpack.pack(chunk))
end
"""


class Jobs(JobStore):
    """Something may happen after drop has looked where its tasks are."""

    meanwhile: Callable[[], Any] | None = None

    def _places(self, job: str, indices: Sequence[int]) -> dict[int, tuple[int, int]]:
        places = super()._places(job, indices)
        if self.meanwhile is not None:
            happens, self.meanwhile = self.meanwhile, None
            happens()
        return places


class Store:
    """The server, and one pair of hands for each name: they last for all examples."""

    def __init__(self, config: Config) -> None:
        self.config = msgspec.structs.replace(config, lease=LEASE, watermark_chunks=WATERMARK, watermark_bytes=None)
        self.jobs = Jobs(self.config, QUEUE)
        self.redis = self.jobs._redis.client
        self.key = self.jobs._redis.key
        self.benches: dict[tuple[str, Lane], Workbench] = {}
        self.records: dict[ChunkHead, bytes] = {}

    def bench(self, name: str, lane: Lane = "normal") -> Workbench:
        if (name, lane) not in self.benches:
            self.benches[name, lane] = Workbench(self.config, QUEUE, name, lane)
        return self.benches[name, lane]

    def record(self, head: ChunkHead) -> bytes:
        if head not in self.records:
            self.records[head] = codec.encode_chunk(self.config.key, head, b"", codec.dumps([0] * head.count))
        return self.records[head]

    def shift(self, seconds: float) -> None:
        """Let time pass: everything that was, is longer ago."""
        self.redis.eval(_SHIFT, 5, *map(self.key, ("beats", "leases", "delayed", "reaped", "open")), seconds)

    def dump(self) -> dict[bytes, tuple[int, bytes]]:
        pipe, names = self.redis.pipeline(transaction=False), self.redis.keys("*")
        for name in names:
            pipe.pttl(name).dump(name)
        cells = pipe.execute()
        return dict(zip(names, zip(cells[::2], cells[1::2], strict=True), strict=True))

    def load(self, dump: dict[bytes, tuple[int, bytes]]) -> None:
        pipe = self.redis.pipeline(transaction=False).flushdb()
        for name, (ttl, value) in dump.items():
            pipe.restore(name, max(0, ttl), value)
        pipe.execute()

    def close(self) -> None:
        for bench in self.benches.values():
            bench.close()
        self.jobs.close()


def observe(store: Store) -> dict[str, Any]:
    """Return what lies in Redis, in the form of Model.view."""
    redis, key = store.redis, store.key
    names = [name.decode() for name in redis.keys("*")]
    pipe = redis.pipeline(transaction=False)
    pipe.time().hgetall(key("open"))
    pipe.zrange(key("leases"), 0, -1, withscores=True).hgetall(key("at"))
    pipe.zrange(key("beats"), 0, -1, withscores=True).smembers(key("dead"))
    pipe.hkeys(key("restored")).zrange(key("delayed"), 0, -1, withscores=True).hgetall(key("crashes"))
    for lane in LANES:
        named = functools.partial(store.jobs._redis.lane_key, lane=lane)
        pipe.hgetall(named("cursor")).lrange(named("ready"), 0, -1).get(named("ready_bytes")).smembers(named("feeders"))
    (now, _), packed, leases, at, beats, dead, restored, delayed, deaths, *of_lanes = pipe.execute()
    cursors, lines, ready_bytes, feeders = (dict(zip(LANES, of_lanes[n::4], strict=True)) for n in range(4))
    ready = {lane: [id.decode() for id in line] for lane, line in lines.items()}
    open = {id.decode(): msgspec.msgpack.decode(chunk) for id, chunk in packed.items()}
    for lane, line in ready.items():
        assert int(ready_bytes[lane] or 0) == sum(open[id]["size"] for id in line if id in open)
        assert {int(p) for p in cursors[lane]} <= set(GROUPS[lane]), "another lane's cursor"
    temporary = [name for name in names if name.startswith((key("job:"), key("name:")))]
    jobs = [name for name in temporary if name.startswith(key("job:")) and name.count(":") == key("job:").count(":")]
    lines = [name for name in names if name.startswith(key("position:"))]
    for name in temporary:
        pipe.ttl(name)
    for name in jobs:
        pipe.hgetall(name).hgetall(f"{name}:out").smembers(f"{name}:dropped")
    for name in lines:
        pipe.zrange(name, 0, -1)
    cells = pipe.execute()
    assert all(ttl > 0 for ttl in cells[: len(temporary)]), "a job stays for ever"
    found = cells[len(temporary) : len(temporary) + 3 * len(jobs)]
    outcomes: dict[str, dict[int, tuple[int, str]]] = {}
    for name, stored in zip(jobs, found[1::3], strict=True):
        outcomes.update(read_outcomes(name.rpartition(":")[2], stored))
    return {
        "cursor": {int(p): Cursor.parse(at) for of_lane in cursors.values() for p, at in of_lane.items()},
        "open": {
            id: (
                {n for n, flag in enumerate(chunk["done"]) if flag == "1"},
                chunk.get("owner"),
                chunk.get("token", 0),
                chunk["lapses"],
                by_offset(chunk["crashes"]),
                {tuple(position) for position in chunk["positions"]},
                by_offset(chunk.get("tries")),
                by_offset(chunk.get("notes")),
            )
            for id, chunk in open.items()
        },
        "deaths": {
            field.decode(): [tuple(death[:3]) for death in msgspec.msgpack.decode(told)]
            for field, told in deaths.items()
        },
        "due": {
            id: {n: steps(due - now) for n, due in by_offset(chunk.get("due")).items()} for id, chunk in open.items()
        },
        "positions": {
            (topic, int(p), int(offset))
            for name, held in zip(lines, cells[len(cells) - len(lines) :], strict=True)
            for topic, p in [name.split(":")[-2:]]
            for offset in held
        },
        "ready": ready,
        "delayed": {id.decode(): steps(due - now) for id, due in delayed},
        "leases": {id.decode(): steps(deadline - now) for id, deadline in leases},
        "at": {id.decode(): int(offset) for id, offset in at.items()},
        "beats": {node.decode(): steps(beat - now) for node, beat in beats},
        "feeders": {lane: {node.decode() for node in nodes} for lane, nodes in feeders.items()},
        "dead": {node.decode() for node in dead},
        "restored": {name.decode().removeprefix("by:") for name in restored},
        "jobs": {
            name.rpartition(":")[2]: (
                *(int(job.get(part, 0)) for part in COUNTS),
                int(job.get(b"total", -1)),
                job.get(b"cancel", b"").decode(),
                b"ended" in job,
                b"name" in job,
            )
            for name, job in zip(jobs, found[::3], strict=True)
        },
        "outcomes": outcomes,
        "dropped": {
            name.rpartition(":")[2]: set(map(int, indices))
            for name, indices in zip(jobs, found[2::3], strict=True)
            if indices
        },
    }


def by_offset(table: Any) -> dict[int, Any]:
    return {int(offset): value for offset, value in table.items()} if table else {}


def read_outcomes(job: str, stored: dict[bytes, bytes]) -> dict[str, dict[int, tuple[int, str]]]:
    found: dict[str, dict[int, tuple[int, str]]] = collections.defaultdict(dict)
    for field, frame in stored.items():
        if field.endswith(b"m"):
            continue
        results, mask = json.loads(frame), stored.get(field + b"m")
        of_chunk = found[f"{job}:{field.decode().split('.')[0]}"]
        for n, (offset, run, state) in enumerate(results):
            if mask is None or mask[n : n + 1] == b"1":
                assert offset not in of_chunk, "two outcomes of one task"
                of_chunk[offset] = (run, state)
    return found


class Node:
    """What a node knows; forgotten when it crashes."""

    def __init__(self, name: str, topic: str) -> None:
        self.name = name
        self.topic = topic
        self.positions: dict[int, int] = {}
        #: Partition -> the cursor that was seen to be missing or of another topic, and what is to replace it.
        self.seen: dict[int, tuple[Cursor | None, Cursor]] = {}
        self.held: dict[str, Lease] = {}
        self.replays = False


class Machine(RuleBasedStateMachine):
    leases = Bundle("leases")

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.model = Model(0.0)
        store.redis.flushdb()
        self.began = store.jobs.now()
        #: How much time has passed, and how much of it before the snapshot.
        self.waited = self.waited_before = 0
        self.snapshot = (store.dump(), copy.deepcopy(self.model))
        self.topic = "t1"
        #: Topic -> partition -> what lies there; None is a record that cannot be read.
        self.logs: dict[str, list[list[ChunkHead | None]]] = {"t1": [[] for _ in range(PARTITIONS)]}
        self.committed: dict[int, Cursor] = {}
        #: The highest mark that was ever committed: a wipe may lose what was finished before it.
        self.floor: collections.Counter[tuple[str, int]] = collections.Counter()
        #: Marks that were told, and those of them that are on disk.
        self.marks: list[tuple[int, Cursor]] = []
        self.settled: list[tuple[int, Cursor]] = []
        self.heads: list[ChunkHead] = []
        #: Job -> a partition of its lane.
        self.home: dict[str, int] = {}
        self.created = self.sealed = False
        #: Jobs that someone has cancelled.
        self.cancelled: set[str] = set()
        self.born = self.runs = self.faults = 0
        self.nodes = [self.bear() for _ in range(NODES)]

    def both(
        self,
        fate: str,
        real: Callable[[], T],
        model: Callable[[], Any],
        facts: Callable[[T], Any] = lambda reply: reply,
    ) -> T | None:
        """Send a verb to both, and compare; return the answer, unless it is lost. Or lost, and the verb sent again."""
        self.sound = False
        for _ in range(2 if fate == "twice" else 1):
            self.model.now += 1e-6
            try:
                reply: T | None = real()
                seen = facts(reply)
            except NotLiveError:
                reply, seen = None, "refused"
            assert seen == model()
        return None if fate == "lost" else reply

    # The client.

    @initialize(counts=st.lists(st.integers(1, 3), min_size=2, max_size=OPEN_CHUNKS), created=st.booleans())
    def begin(self, counts: list[int], created: bool) -> None:
        if created:
            self.create("ok")
        for count in counts:
            self.produce(0, count, concurrent=False, alone=False, gap=False, later=0)

    @rule(
        partition=PARTITION,
        count=st.integers(1, 3),
        concurrent=st.booleans(),
        alone=st.booleans(),
        gap=st.booleans(),
        later=st.sampled_from([0, 0, 0, 1, 3]),
    )
    @precondition(lambda self: len(self.heads) < MOST_CHUNKS and len(self.model.open) < OPEN_CHUNKS)
    def produce(self, partition: int, count: int, concurrent: bool, alone: bool, gap: bool, later: int) -> None:
        """Send a chunk of the map, or a job of its own, which needs neither manifest nor seal; it may start later."""
        alone = alone or self.sealed or LANE_OF[partition] != "normal"
        mates = [] if alone else [head for head in self.heads if head.job == "map"]
        job, first = f"map{len(self.heads)}" if alone else "map", sum(head.count for head in mates)
        head = ChunkHead(job, len(mates), first, count, "f", "fn", 0, "item", concurrent, Environment(), job)
        starts = Policy(start_after=self.waited + 300 * later - 100 if later else 0)
        head = msgspec.structs.replace(head, total=count if alone else -1, created=1.0, policy=starts)
        self.heads.append(head)
        self.home.setdefault(job, partition)
        self.logs[self.topic][partition] += [None, head] if gap else [head]

    @rule(partition=PARTITION, which=st.integers(1, OPEN_CHUNKS))
    @precondition(lambda self: self.heads)
    def produce_again(self, partition: int, which: int) -> None:
        head = self.heads[-which % len(self.heads)]
        home = self.home[head.job]
        self.logs[self.topic][partition if LANE_OF[partition] == LANE_OF[home] else home].append(head)

    @rule(fate=FATES)
    def create(self, fate: str) -> None:
        self.created = True
        manifest = Manifest("map", "map", "fn", 1.0, -1)
        self.both(fate, lambda: self.store.jobs.create(manifest), lambda: self.model.create("map"))

    @rule(fate=FATES)
    @precondition(lambda self: self.created)
    def seal(self, fate: str) -> None:
        self.sealed = True
        total = sum(head.count for head in self.heads if head.job == "map")
        seal = Seal("map", total)
        self.both(fate, lambda: self.store.jobs.seal(seal), lambda: self.model.seal("map", total), lambda reply: None)

    @rule(which=st.integers(1, OPEN_CHUNKS), fate=FATES)
    @precondition(lambda self: self.heads)
    def cancel(self, which: int, fate: str) -> None:
        job = self.heads[-which % len(self.heads)].job
        self.cancelled.add(job)
        self.send_cancel(job, fate)

    def send_cancel(self, job: str, fate: str) -> None:
        self.both(fate, lambda: self.store.jobs.cancel(Cancel(job)), lambda: self.model.cancel(job, "cancelled"))

    @rule(
        which=st.integers(1, OPEN_CHUNKS),
        indices=st.sets(st.integers(0, 5), min_size=1, max_size=4),
        feeder=st.none() | NODE,
        fate=FATES,
    )
    @precondition(lambda self: self.heads)
    def drop_tasks(self, which: int, indices: set[int], feeder: int | None, fate: str) -> None:
        """Cancel single tasks around those of one chunk; it may be fed meanwhile."""
        head = self.heads[-which % len(self.heads)]
        sent = sum(other.count for other in self.heads if other.job == head.job)
        chosen = [index for index in range(max(0, head.first - 1), sent) if index - head.first + 1 in indices]
        if feeder is not None:
            group = GROUPS[LANE_OF[self.home[head.job]]]
            self.store.jobs.meanwhile = lambda: self.read(self.nodes[feeder], group, 2, 1)
        self.both(
            fate, lambda: self.store.jobs.drop(head.job, chosen), lambda: self.model.drop(head.job, chosen), sorted
        )
        self.store.jobs.meanwhile = None

    # The feeder.

    @rule(node=NODE, partition=PARTITION, at_topic=st.booleans(), replays=st.booleans())
    def look(self, node: int, partition: int, at_topic: bool, replays: bool) -> None:
        if at_topic:
            self.turn_to_topic(self.nodes[node])
        self.find(self.nodes[node], partition, replays)

    def find(self, node: Node, partition: int, replays: bool = True) -> None:
        """Go to the cursor, or make up one that is to be set: Feeder._find up to its init."""
        cursor = self.store.bench(node.name, LANE_OF[partition]).cursor(partition)
        if cursor is not None and cursor.topic_id == node.topic:
            node.positions[partition] = cursor.offset
            return
        if cursor is None and replays:
            self.replay(node)
        committed = self.committed.get(partition)
        offset = committed.offset if committed is not None and committed.topic_id == node.topic else 0
        node.seen[partition] = (cursor, Cursor(node.topic, offset))

    def replay(self, node: Node) -> None:
        self.begin_restore(node, "ok")
        self.replay_jobs()
        self.end_restore(node, "ok")

    def replay_jobs(self) -> None:
        if self.created:
            self.create("ok")
        if self.sealed:
            self.seal("ok")
        for job in sorted(self.cancelled):
            self.send_cancel(job, "ok")

    @rule(node=NODE, fate=FATES, ends=st.booleans())
    def restore(self, node: int, fate: str, ends: bool) -> None:
        """Begin to replay, or end, when it was begun: what has happened in between may have taken it away again."""
        it = self.nodes[node]
        if not ends:
            self.begin_restore(it, fate)
        elif it.replays:
            self.replay_jobs()
            self.end_restore(it, fate)

    def begin_restore(self, node: Node, fate: str) -> None:
        node.replays = True
        self.both(
            fate, lambda: self.store.bench(node.name).begin_restore(), lambda: self.model.begin_restore(node.name)
        )

    def end_restore(self, node: Node, fate: str) -> None:
        node.replays = False
        self.both(fate, lambda: self.store.bench(node.name).end_restore(), lambda: self.model.end_restore(node.name))

    def turn_to_topic(self, node: Node) -> None:
        if node.topic != self.topic:
            node.topic, node.positions, node.seen = self.topic, {}, {}

    @rule(node=NODE, partition=PARTITION, fate=FATES)
    def init(self, node: int, partition: int, fate: str) -> None:
        if partition in self.nodes[node].seen:
            self.set_cursor(self.nodes[node], partition, fate)

    def set_cursor(self, node: Node, partition: int, fate: str) -> None:
        seen, made = node.seen.pop(partition)
        now = self.both(
            fate,
            lambda: self.store.bench(node.name, LANE_OF[partition]).init(partition, seen, made) or "none",
            lambda: self.model.init(partition, seen, made) or "none",
        )
        if isinstance(now, Cursor) and now.topic_id == node.topic:
            node.positions[partition] = now.offset

    @rule(
        target=leases,
        node=NODE,
        partitions=st.sampled_from([[0], [1], [0, 1], [0, 1], [2], [3], [4]]),
        most=st.sampled_from([2, 1, 3, 0]),
        free=st.sampled_from([1, 0, 2]),
        fate=FATES,
    )
    def feed(self, node: int, partitions: list[int], most: int, free: int, fate: str) -> MultipleResults[Any]:
        return self.read(self.nodes[node], partitions, most, free, fate)

    def read(self, node: Node, partitions: list[int], most: int, free: int, fate: str = "ok") -> MultipleResults[Any]:
        """Feed what lies next in partitions of one lane."""
        batches, lane = [], LANE_OF[partitions[0]]
        for p in partitions:
            if p not in node.positions:
                self.find(node, p)
                if p in node.seen:
                    self.set_cursor(node, p, "ok")
            start = node.positions.get(p, 0)
            records = self.logs[node.topic][p][start : start + most]
            chunks = [(start + n, head, self.store.record(head)) for n, head in enumerate(records) if head]
            batches.append(Batch(p, node.topic, start, start + len(records), chunks))
        reply = self.both(
            fate,
            lambda: self.store.bench(node.name, lane).feed([self.dated(batch) for batch in batches], free),
            lambda: self.model.feed(node.name, batches, free, lane),
            lambda reply: ([(f.status, f.cursor) for f in reply[0]], [(one.head.id, one.token) for one in reply[1]]),
        )
        if reply is None:
            return multiple()
        for batch, fed in zip(batches, reply[0], strict=True):
            if fed.status == "fed":
                node.positions[batch.partition] = batch.next
            elif fed.status != "full":
                node.positions.pop(batch.partition, None)
        return self.hold(node, reply[1])

    def dated(self, batch: Batch) -> Batch:
        """Return it with times by the server's clock, in which what was is moved back instead."""
        chunks = [(offset, self.date(head), record) for offset, head, record in batch.chunks]
        return msgspec.structs.replace(batch, chunks=chunks)

    def date(self, head: ChunkHead) -> ChunkHead:
        starts = head.policy.start_after
        return msgspec.structs.replace(head, policy=Policy(start_after=starts and self.server_time(starts)))

    def server_time(self, at: float) -> float:
        return self.began + at - self.waited

    # The node.

    @rule(target=leases, node=NODE, most=st.integers(1, 3), count=st.integers(1, 3))
    def turn(self, node: int, most: int, count: int) -> MultipleResults[Any]:
        """Do what healthy clients and nodes do, so that there is something to spoil."""
        it = self.nodes[node]
        if len(self.model.open) < 2 and len(self.heads) < MOST_CHUNKS:
            self.produce(node, count, concurrent=False, alone=False, gap=False, later=0)
        self.say_alive(it)
        self.bury(it)
        fed = [self.read(it, group, most, 1) for group in self.groups_in_use()]
        taken = self.fill(it, 2)
        return multiple(*(lease for granted in fed for lease in granted.values), *taken.values)

    def groups_in_use(self) -> list[list[int]]:
        return [group for group in GROUPS.values() if any(self.logs[self.topic][p] for p in group)]

    @rule(target=leases, node=NODE, count=st.integers(1, 3), plain=st.sampled_from([3, 3, 1, 0]), fate=FATES)
    def take(self, node: int, count: int, plain: int, fate: str) -> MultipleResults[Any]:
        """Take chunks; if any but nested ones are among them, up to plain."""
        return self.fill(self.nodes[node], count, min(count, plain), fate)

    def fill(self, node: Node, count: int, plain: int | None = None, fate: str = "ok") -> MultipleResults[Any]:
        taken = self.both(
            fate,
            lambda: self.store.bench(node.name).take(count, plain=plain),
            lambda: self.model.take(node.name, count, count if plain is None else plain),
            lambda reply: ([granted(lease) for lease in reply[0]], reply[1] if reply[1] is None else steps(reply[1])),
        )
        return self.hold(node, taken[0] if taken else [])

    def hold(self, node: Node, granted: list[Lease]) -> MultipleResults[Any]:
        node.held.update({lease.head.id: lease for lease in granted})
        return multiple(*((node, lease) for lease in granted))

    def drop(self, node: Node, lease: Lease) -> None:
        if node.held.get(lease.head.id) is lease:
            del node.held[lease.head.id]

    @rule(lease=leases, states=st.text("S.F", min_size=3, max_size=3), fate=FATES)
    def finish(self, lease: tuple[Node, Lease], states: str, fate: str) -> None:
        """By whoever has ever held it: the outcome of a zombie, or of a node that died since, may come late."""
        self.tell(*lease, states, fate)

    @rule(lease=leases, state=st.sampled_from("SF"), fate=FATES)
    def finish_whole(self, lease: tuple[Node, Lease], state: str, fate: str) -> None:
        self.tell(*lease, 3 * state, fate)

    def tell(self, node: Node, lease: Lease, states: str, fate: str = "ok") -> None:
        self.runs += 1
        results = {n: (self.runs, state) for n, state in enumerate(states[: lease.head.count]) if state != "."}
        results = results or {0: (self.runs, "F")}
        told = list(results)
        consecutive = range(told[0], told[-1] + 1)
        frame = json.dumps([(offset, *result) for offset, result in results.items()]).encode()
        packed = "".join(state for _, state in results.values()).encode()
        offsets = consecutive if told == list(consecutive) else told
        answer = self.both(
            fate,
            lambda: self.store.bench(node.name).finish(lease, offsets, packed, frame),
            lambda: self.model.finish(node.name, lease, results),
        )
        if answer != "current":
            self.drop(node, lease)

    @rule(lease=leases, crashed=st.none() | st.integers(WHOLE, 2), fate=FATES)
    def release(self, lease: tuple[Node, Lease], crashed: int | None, fate: str) -> None:
        node, held = lease
        charged = None if crashed is None else (crashed, Crash("host", node.name, "killed"))
        self.both(
            fate,
            lambda: self.store.bench(node.name).release(held, crashed=charged),
            lambda: self.model.release(node.name, held, charged),
        )
        self.drop(node, held)

    @rule(
        lease=leases,
        offsets=st.sets(st.integers(0, 2), min_size=1),
        times=st.sampled_from([1, 1, 2, 3]),
        delay=st.sampled_from([300, 600, 900, 0]),
        ends=st.booleans(),
        fate=FATES,
    )
    def retry(
        self, lease: tuple[Node, Lease], offsets: set[int], times: int, delay: int, ends: bool, fate: str
    ) -> None:
        """Tasks have raised; mostly the chunk is given back then."""
        node, held = lease
        tries = [Retry(n, held.tries.get(n, 0) + times, delay, f"{self.runs}") for n in offsets if n < held.head.count]
        self.both(
            fate,
            lambda: self.store.bench(node.name).retry(held, tries),
            lambda: self.model.retry(node.name, held, tries),
        )
        if ends:
            self.release(lease, None, fate)

    @rule(lease=leases, offset=st.integers(0, 2), fate=FATES)
    def mark(self, lease: tuple[Node, Lease], offset: int, fate: str) -> None:
        node, held = lease
        self.both(
            fate,
            lambda: self.store.bench(node.name).mark(held, offset),
            lambda: self.model.mark(node.name, held, offset),
        )

    @rule(
        node=NODE,
        polls=st.sampled_from([LANES, LANES, LANES, (), ("normal",), ("nested", "high")]),
        offset=st.integers(-1, 2),
        fate=FATES,
    )
    def beat(self, node: int, polls: Sequence[Lane], offset: int, fate: str) -> None:
        """Of the lanes that it does not poll a node may still read some."""
        self.say_alive(self.nodes[node], polls, offset, fate)

    def say_alive(self, node: Node, polls: Sequence[Lane] = LANES, offset: int = -1, fate: str = "ok") -> None:
        info = WorkerInfo(node.name, "host", 1, 2, 0, 0, 0.0, "3.11")
        named = [(lease, offset) for lease in node.held.values()]
        read = {lane: (PARTITIONS, lane in polls) for lane in LANES if lane in polls or lane in ("normal", "low")}
        heard = self.both(
            fate,
            lambda: self.store.bench(node.name).beat(info, read, named),
            lambda: self.model.beat(node.name, named, set(polls)),
            lambda heard: (heard.lost, heard.dropped, heard.ready),
        )
        if heard is None:
            return
        for id in heard.lost:
            del node.held[id]
        assert {share.lane for share in heard.shares} <= read.keys()
        for lane in read:
            self.look_at_shares(node, lane, [share for share in heard.shares if share.lane == lane], lane in polls)

    def look_at_shares(self, node: Node, lane: Lane, shares: list[Share], polls: bool) -> None:
        found = self.store.redis.hgetall(self.store.jobs._redis.lane_key("partitions", lane))
        owners = [found.get(str(p).encode(), b"").decode() for p in range(PARTITIONS)]
        live = {name for name in self.model.feeders[lane] if self.model.is_live(name)}
        ours = [p for p, owner in enumerate(owners) if owner == node.name]
        assert sorted(share.partition for share in shares) == ours
        assert len(shares) <= (math.ceil(PARTITIONS / len(live)) if polls else 0), "more than a fair share"
        assert not polls or shares or live.issuperset(owners), "partitions that nobody reads"
        for share in shares:
            p = share.partition
            known = (self.model.cursor.get(p), self.model.low(p)) if LANE_OF[p] == lane else (None, None)
            assert (share.cursor, share.low) == known
            if share.low is not None:
                self.marks.append((p, share.low))

    @rule(node=NODE, fate=FATES)
    def reap(self, node: int, fate: str) -> None:
        self.bury(self.nodes[node], "", fate)

    def bury(self, node: Node, dead: str = "", fate: str = "ok") -> None:
        self.both(fate, lambda: self.store.bench(node.name).reap(dead), lambda: self.model.reap(dead), set)

    def bear(self) -> Node:
        self.born += 1
        node = Node(f"n{self.born}", self.topic)
        self.say_alive(node)
        return node

    # What happens to them.

    @rule(node=NODE, told=st.booleans(), late=st.booleans())
    def crash(self, node: int, told: bool, late: bool) -> None:
        """A node dies; the one that takes its place may know of it. What the dead has sent may still arrive."""
        dead, self.nodes[node] = self.nodes[node], self.bear()
        if told:
            self.bury(self.nodes[node], dead.name)
        if late:
            self.fill(dead, 1, fate="lost")

    @rule(count=st.integers(1, 4), asleep=st.sets(NODE))
    def pass_time(self, count: int, asleep: set[int]) -> None:
        self.wait(300 * count)
        for number, node in enumerate(self.nodes):
            if number not in asleep:
                self.say_alive(node)

    def wait(self, seconds: float) -> None:
        self.store.shift(seconds)
        self.model.now += seconds
        self.waited += seconds

    @rule(node=NODE)
    @precondition(lambda self: self.model.open and len(self.logs) < 4)
    def make_topic_again(self, node: int) -> None:
        """One node notices at once."""
        self.topic = f"t{len(self.logs) + 1}"
        self.logs[self.topic] = [[] for _ in range(PARTITIONS)]
        self.turn_to_topic(self.nodes[node])

    @rule()
    def sync(self) -> None:
        """Redis has on disk what it knows: marks that it has told may be committed from now on."""
        self.snapshot = (self.store.dump(), copy.deepcopy(self.model))
        self.waited_before = self.waited
        self.settled, self.marks = self.settled + self.marks, []

    @rule(which=st.integers(0, 9))
    @precondition(lambda self: self.settled)
    def commit(self, which: int) -> None:
        partition, mark = self.settled[-1 - which % len(self.settled)]
        self.committed[partition] = mark
        self.floor[mark.topic_id, partition] = max(self.floor[mark.topic_id, partition], mark.offset)

    @rule()
    @precondition(lambda self: self.snapshot[1].open and self.faults < 3)
    def roll_back(self) -> None:
        """Redis has restarted, with what was on disk."""
        self.faults += 1
        dump, model = self.snapshot
        self.store.load(dump)
        self.store.shift(self.waited - self.waited_before)
        now, self.model = self.model.now, copy.deepcopy(model)
        self.model.now, self.marks = now, []

    @rule()
    @precondition(lambda self: self.model.open and self.faults < 3)
    def wipe(self) -> None:
        self.faults += 1
        self.store.redis.flushdb()
        self.model = Model(self.model.now)
        self.snapshot, self.waited_before = ({}, copy.deepcopy(self.model)), self.waited
        self.marks, self.settled = [], []

    # What always holds.

    @invariant()
    def redis_holds_what_the_model_says(self) -> None:
        self.sound = False
        seen = observe(self.store)
        expected = self.model.view()
        differ = {part: (seen[part], expected[part]) for part in expected if seen[part] != expected[part]}
        assert not differ, f"found, expected: {differ}"
        self.nothing_is_lost(seen)
        self.sound = True

    def nothing_is_lost(self, seen: dict[str, Any]) -> None:
        """Compare with what lies in Kafka; the model has no say in it."""
        done = collections.Counter({id: len(outcomes) for id, outcomes in seen["outcomes"].items()})
        for head in self.heads:
            dropped = {n for n in range(head.count) if head.first + n in seen["dropped"].get(head.job, ())}
            done[head.id] += len(dropped)
            assert not dropped & seen["outcomes"].get(head.id, {}).keys(), "cancelled, and finished as well"
        ended = {job for job in self.cancelled & seen["jobs"].keys() if seen["jobs"][job][CANCEL]}
        for p, cursor in seen["cursor"].items():
            for offset, head in enumerate(self.logs[cursor.topic_id][p][: cursor.offset]):
                if head is None or offset < self.floor[cursor.topic_id, p] or head.job in ended:
                    continue
                if done[head.id] != head.count:
                    assert (cursor.topic_id, p, offset) in seen["positions"], "a commit may pass what is not finished"
                    assert head.id in seen["open"], "lost"
        waiting = [id for id, chunk in seen["open"].items() if chunk[1] is None]
        found = [*seen["delayed"], *(id for line in seen["ready"].values() for id in line)]
        assert sorted(found) == sorted(waiting), "waits twice, or neither waits nor is leased"
        assert seen["leases"].keys() == seen["open"].keys() - set(waiting), "a lease that never lapses"

    def teardown(self) -> None:
        """Let a healthy node work, alone, until all is quiet. Not after a failure: it would hide it."""
        if not self.sound:
            return
        node = self.bear()
        # The first reap may find that nobody has reaped for long; then the leases of the dead lapse.
        for _ in range(7):
            self.say_alive(node)
            self.bury(node)
            self.turn_to_topic(node)
            for _ in range(2 * MOST_CHUNKS):
                before = dict(node.positions)
                for group in self.groups_in_use():
                    self.read(node, group, 400, 1)
                self.fill(node, 9)
                for lease in list(node.held.values()):
                    self.tell(node, lease, "SSS")
                if before == node.positions and not any(self.model.ready.values()):
                    break
            else:
                raise AssertionError("never quiet")
            self.redis_holds_what_the_model_says()
            self.wait(600)
        assert not self.model.open, "stuck"
        for p in [p for group in self.groups_in_use() for p in group]:
            assert self.model.cursor[p] == Cursor(self.topic, len(self.logs[self.topic][p])), "not fed"
            assert self.model.low(p) == self.model.cursor[p]
        # A seal or cancel that a restart of Redis has taken away is in Kafka, but nobody tells it again by himself.
        self.sealed |= self.created
        self.replay_jobs()
        self.redis_holds_what_the_model_says()
        for job in {head.job for head in self.heads}:
            mine = [head for head in self.heads if head.job == job]
            if (self.sealed or job != "map") and all(map(self.model.is_finished, mine)):
                assert self.model.jobs[job].ended, "never ends"


def granted(lease: Lease) -> tuple[Any, ...]:
    notes = {offset: list(texts) for offset, texts in lease.notes.items()}
    return (
        lease.head.id,
        lease.token,
        set(lease.done),
        lease.crashes,
        lease.lapses,
        lease.tries,
        notes,
        set(lease.waiting),
        how(lease),
    )


def how(lease: Lease) -> dict[int, list[tuple[str, ...]]]:
    return {offset: [death[:3] for death in deaths] for offset, deaths in lease.deaths.items()}


def chosen(examples: int, **more: Any) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        derandomize=False,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        # Explaining traces every line.
        **{"phases": set(Phase) - {Phase.explain}, **more},
    )


@pytest.mark.timeout(60 + EXAMPLES)
def test_verbs_do_what_the_model_says_and_nothing_is_lost(tmp_path: Path) -> None:
    with stacks.start_store(tmp_path) as config, contextlib.closing(Store(config)) as store:

        def machine() -> Machine:  # decorate with the @reproduce_failure that a failure has printed
            return Machine(store)

        run_state_machine_as_test(machine, settings=chosen(EXAMPLES))
