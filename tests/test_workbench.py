"""The verbs of the workbench: each rule with the crash that needs it. Real Valkey; the tests play the nodes."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator

import msgspec
import pytest
import stacks
from waiting import wait_until

from yadtq_nb import codec, journal
from yadtq_nb.client.inbox import is_incomplete
from yadtq_nb.config import Config
from yadtq_nb.errors import Crash, JobNotFoundError, SignatureError, WorkbenchError
from yadtq_nb.model import (
    LIFE,
    WHOLE,
    Cancel,
    ChunkHead,
    Environment,
    Lease,
    Manifest,
    Need,
    Policy,
    Reopen,
    Retry,
    Seal,
    Segment,
    WorkerInfo,
)
from yadtq_nb.workbench.bench import Batch, Cursor, NotLiveError, Share, Workbench
from yadtq_nb.workbench.jobs import JobStore
from yadtq_nb.worker.restore import restore_jobs

pytestmark = pytest.mark.one_stack

TOPIC = "topic-1"
LEASE = 0.4
DEATH = Crash("here", "a", "killed by SIGSEGV", 1_000, 0.0, "some lines")


class Bench:
    """A queue on the session's store, with nodes that are made by naming them."""

    def __init__(self, config: Config, queue: str) -> None:
        self.config = config
        self.queue = queue
        self.store = JobStore(config, queue)
        self.nodes: dict[str, Workbench] = {}
        self.offsets = 0

    def node(self, name: str) -> Workbench:
        if name not in self.nodes:
            self.nodes[name] = Workbench(self.config, self.queue, name)
        return self.nodes[name]

    def wipe(self) -> None:
        keys = self.store._redis.client.keys(self.store._redis.key("*"))
        self.store._redis.client.delete(*keys)

    def beat(self, name: str, *leases: Lease, polls: bool = False, partitions: int = 4) -> list[Share]:
        info = WorkerInfo(name, "host", 1, 2, 0, 0, 0.0, "3.11")
        held = [(lease, 0) for lease in leases]
        return self.node(name).beat(info, {"normal": (partitions, polls)}, held).shares

    def lost(self, name: str, *leases: Lease) -> list[str]:
        info = WorkerInfo(name, "host", 1, 2, 0, 0, 0.0, "3.11")
        return self.node(name).beat(info, {}, [(lease, 0) for lease in leases]).lost

    def start(self, partition: int = 0) -> None:
        self.node("a").begin_restore()
        self.node("a").end_restore()
        self.node("a").init(partition, None, Cursor(TOPIC, 0))

    def head(self, number: int, count: int = 1, job: str = "job") -> ChunkHead:
        return ChunkHead(
            job, number, number * count, count, "f", "fn", 0, "item", False, Environment(), job_name=job, created=1.0
        )

    def batch(self, *heads: ChunkHead, at: int | None = None, partition: int = 0, topic: str = TOPIC) -> Batch:
        first = self.offsets if at is None else at
        chunks = [
            (first + n, head, codec.encode_chunk(self.config.key, head, b"", codec.dumps([0] * head.count)))
            for n, head in enumerate(heads)
        ]
        self.offsets = first + len(heads)
        return Batch(partition, topic, first, first + len(heads), chunks)

    def frame(self, lease: Lease, offsets: range, states: bytes) -> bytes:
        head = lease.head
        segment = Segment(
            head.job,
            head.number,
            head.first + offsets[0],
            len(offsets),
            b"",
            states,
            {},
            array("d", [0.0] * len(offsets)).tobytes(),
            array("d", [0.0] * len(offsets)).tobytes(),
            "a",
        )
        return codec.encode_segment(self.config.key, segment, codec.dumps([1] * states.count(b"S")))

    def finish(self, name: str, lease: Lease, states: bytes = b"S", *, first: int = 0) -> str:
        offsets = range(first, first + len(states))
        return self.node(name).finish(lease, offsets, states, self.frame(lease, offsets, states))

    def feed(self, *heads: ChunkHead, free: int = 0, name: str = "a", at: int | None = None) -> list[Lease]:
        (fed,), leases = self.node(name).feed([self.batch(*heads, at=at)], free)
        assert fed.status == "fed"
        return leases

    def reap_until(self, count: int, name: str = "b") -> list[tuple[str, str]]:
        """Reap as a living node does, until so many leases have lapsed."""
        lapsed: list[tuple[str, str]] = []
        deadline = time.monotonic() + 10
        while len(lapsed) < count:
            assert time.monotonic() < deadline, "no lease has lapsed"
            lapsed += self.node(name).reap()
            time.sleep(0.02)
        return lapsed


@pytest.fixture
def bench(stack: stacks.Servers, queue_name: str) -> Iterator[Bench]:
    made = Bench(msgspec.structs.replace(stack.config, lease=LEASE, heartbeat=0.1), queue_name)
    made.beat("a")
    made.start()
    yield made
    for node in made.nodes.values():
        node.close()
    made.store.close()


# Feeding: the cursor fences.


@pytest.mark.parametrize("at", [0, 2], ids=["behind", "ahead"])
def test_batch_that_does_not_begin_at_the_cursor_is_refused_whole(bench: Bench, at: int) -> None:
    bench.feed(bench.head(0))
    (fed,), leases = bench.node("a").feed([bench.batch(bench.head(1), at=at)], 1)
    assert (fed.status, fed.cursor, leases) == ("moved", Cursor(TOPIC, 1), [])
    assert [lease.head.number for lease in bench.node("a").take(9)[0]] == [0]


def test_batch_is_refused_where_there_is_no_cursor(bench: Bench) -> None:
    (fed,), leases = bench.node("a").feed([bench.batch(bench.head(0), partition=1)], 1)
    assert (fed.status, fed.cursor, leases) == ("no cursor", None, [])


def test_batch_of_an_older_life_of_the_topic_is_refused(bench: Bench) -> None:
    (fed,), _ = bench.node("a").feed([bench.batch(bench.head(0), topic="topic-0")], 1)
    assert fed.status == "moved"


def test_cursor_is_set_once_and_replaced_only_by_who_has_seen_it(bench: Bench) -> None:
    seen = Cursor(TOPIC, 0)
    assert bench.node("a").init(0, None, Cursor(TOPIC, 7)) == seen
    assert bench.node("a").init(0, seen, Cursor("topic-2", 0)) == Cursor("topic-2", 0)
    assert bench.node("b").init(0, seen, Cursor("topic-3", 0)) == Cursor("topic-2", 0)


def test_no_cursor_is_set_before_the_jobs_are_known(bench: Bench) -> None:
    bench.wipe()
    a, b, start = bench.node("a"), bench.node("b"), Cursor(TOPIC, 0)
    assert a.init(0, None, start) is None
    assert not a.begin_restore()
    assert b.init(0, None, start) is None, "not yet"
    bench.wipe()
    assert not a.end_restore(), "what it has replayed is gone again"
    assert a.init(0, None, start) is None
    assert not a.begin_restore()
    assert not b.begin_restore(), "two may replay at once"
    assert b.end_restore()
    assert a.begin_restore(), "no need to"
    assert a.init(0, None, start) == start


def test_one_refused_batch_does_not_hold_up_the_others(bench: Bench) -> None:
    bench.start(1)
    wrong = bench.batch(bench.head(0), at=5, partition=0)
    right = bench.batch(bench.head(1), at=0, partition=1)
    fed, _ = bench.node("a").feed([wrong, right], 0)
    assert [one.status for one in fed] == ["moved", "fed"]
    assert [lease.head.number for lease in bench.node("a").take(9)[0]] == [1]


def test_chunk_that_was_sent_twice_runs_once_and_both_records_are_closed_by_its_outcome(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), bench.head(0), free=2)
    assert bench.node("a").take(9)[0] == []
    (share,) = bench.beat("a", lease, polls=True, partitions=1)
    assert share.low == Cursor(TOPIC, 0)
    assert bench.finish("a", lease) == "closed"
    (share,) = bench.beat("a", polls=True, partitions=1)
    assert share.low == Cursor(TOPIC, 2)


def test_chunk_that_is_finished_is_not_run_when_it_is_fed_again(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), free=1)
    bench.finish("a", lease)
    assert bench.feed(bench.head(0), free=1) == []
    assert bench.node("a").take(9)[0] == []


def test_low_mark_stays_before_the_oldest_chunk_that_is_not_finished(bench: Bench) -> None:
    first, second = bench.feed(bench.head(0), bench.head(1), free=2)
    bench.finish("a", second)
    assert bench.beat("a", first, polls=True, partitions=1)[0].low == Cursor(TOPIC, 0)
    bench.finish("a", first)
    assert bench.beat("a", polls=True, partitions=1)[0].low == Cursor(TOPIC, 2)


def test_feeding_stops_at_the_watermark_and_goes_on_below_it(bench: Bench) -> None:
    tight = Workbench(msgspec.structs.replace(bench.config, watermark_chunks=1), bench.queue, "a")
    tight.feed([bench.batch(bench.head(0))], 0)
    batch = bench.batch(bench.head(1))
    (fed,), _ = tight.feed([batch], 0)
    assert (fed.status, fed.cursor) == ("full", Cursor(TOPIC, 1))
    (lease,) = tight.take(1)[0]
    bench.finish("a", lease)
    (fed,), _ = tight.feed([batch], 0)
    assert fed.status == "fed"
    tight.close()


# Leases: only the living hold them, and only what they name.


def test_nothing_is_leased_to_a_node_whose_heartbeat_has_lapsed(bench: Bench) -> None:
    bench.feed(bench.head(0))
    bench.node("c")
    with pytest.raises(NotLiveError):
        bench.node("c").take(1)
    with pytest.raises(NotLiveError):
        bench.node("c").feed([bench.batch(bench.head(1))], 1)


def test_nothing_is_leased_to_a_node_that_is_known_to_be_dead_until_it_beats(bench: Bench) -> None:
    """What it has sent arrives late: nobody would run it until the lease lapses."""
    bench.feed(bench.head(0))
    bench.node("b").reap("a")
    with pytest.raises(NotLiveError):
        bench.node("a").take(1)
    bench.beat("a")
    assert len(bench.node("a").take(1)[0]) == 1


def test_two_nodes_never_hold_the_same_chunk(bench: Bench) -> None:
    bench.beat("b")
    bench.feed(bench.head(0), bench.head(1))
    numbers = [lease.head.number for name in ("a", "b") for lease in bench.node(name).take(1)[0]]
    assert numbers == [0, 1]


def test_lease_that_its_node_does_not_name_lapses_uncharged(bench: Bench) -> None:
    """The reply that granted it was lost: the node lives, and does not know of the chunk."""
    bench.feed(bench.head(0), free=1)
    bench.node("b").reap()

    def lapsed() -> bool:
        bench.beat("a")
        return bool(bench.node("b").reap())

    wait_until(lapsed)
    (lease,) = bench.node("a").take(1)[0]
    assert lease.crashes == {}


def test_lease_that_is_named_stays_for_as_long_as_it_is_named(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), free=1)
    until = time.monotonic() + 3 * LEASE
    while time.monotonic() < until:
        bench.beat("a", lease)
        assert bench.node("b").reap() == []
        time.sleep(0.02)
    assert bench.finish("a", lease) == "closed"


def test_chunk_of_a_dead_node_goes_to_another_and_is_charged_to_the_task_that_ran(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, count=3), free=1)
    bench.node("a").mark(lease, 2)
    bench.node("b").reap()
    assert bench.reap_until(1) == [("job:0", "a")]
    bench.beat("b")
    (again,) = bench.node("b").take(1)[0]
    assert (again.crashes, again.lapses, again.token > lease.token) == ({2: 1}, 1, True)


def test_node_that_is_known_to_be_dead_loses_its_leases_at_once(bench: Bench) -> None:
    bench.feed(bench.head(0), free=1)
    assert bench.node("b").reap("a") == [("job:0", "a")]
    assert [view.status for view in bench.store.workers()] == ["lost"]


def test_all_leases_are_extended_when_nobody_could_reap_for_longer_than_a_lease(bench: Bench) -> None:
    """Redis was away: its clients are alive, and long tasks are not to be charged for it."""
    bench.node("a").reap()
    (lease,) = bench.feed(bench.head(0), free=1)
    gone = time.monotonic() + 2 * LEASE
    wait_until(lambda: time.monotonic() > gone)
    assert bench.node("b").reap() == []
    assert bench.lost("a", lease) == []


def test_node_is_told_which_of_its_chunks_are_anothers_by_now(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), free=1)
    bench.node("b").reap("a")
    bench.beat("b")
    bench.node("b").take(1)
    assert bench.lost("a", lease) == ["job:0"]


# Outcomes: the first one wins, and a zombie harms nothing.


def test_outcome_that_is_sent_twice_counts_once(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), free=1)
    assert bench.finish("a", lease) == "closed"
    assert bench.finish("a", lease) == "closed"
    record = bench.store.record("job")
    assert record is not None
    assert (record.succeeded, record.running) == (1, 0)


def test_failure_without_the_current_token_is_dropped_and_the_healthy_run_goes_on(bench: Bench) -> None:
    (old,) = bench.feed(bench.head(0), free=1)
    bench.node("b").reap("a")
    bench.beat("b")
    (new,) = bench.node("b").take(1)[0]
    assert bench.finish("a", old, b"F") == "lapsed"
    assert bench.node("a").release(old) is False
    assert bench.finish("b", new, b"S") == "closed"
    record = bench.store.record("job")
    assert record is not None
    assert (record.succeeded, record.failed, record.late) == (1, 0, 1)


def test_success_without_the_current_token_counts_if_it_is_the_first(bench: Bench) -> None:
    (old,) = bench.feed(bench.head(0), free=1)
    bench.node("b").reap("a")
    assert bench.finish("a", old, b"S") == "closed"
    bench.beat("b")
    assert bench.node("b").take(1)[0] == []


def test_parts_of_a_chunk_that_overlap_are_counted_once_and_the_mask_tells_which(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, count=4), free=1)
    assert bench.finish("a", lease, b"SS") == "current"
    assert bench.finish("a", lease, b"SSS", first=1) == "closed"
    stored = {one.field: one.mask for one in bench.store.outcomes("job", bench.store.fields("job"))}
    record = bench.store.record("job")
    assert record is not None
    assert (record.succeeded, record.late) == (4, 1)
    assert stored == {"0.0": b"", "0.1": b"011"}


def test_chunk_that_is_given_back_keeps_what_is_done(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, count=3), free=1)
    bench.finish("a", lease, b"S", first=1)
    assert bench.node("a").release(lease, crashed=(2, DEATH))
    (again,) = bench.node("a").take(1)[0]
    assert (again.done, again.crashes) == (frozenset({1}), {2: 1})


def test_each_crash_of_a_task_is_kept_with_host_node_and_reason_until_its_chunk_is_closed(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, count=3), free=1)
    before = time.time()
    assert bench.node("a").release(lease, crashed=(2, DEATH))
    assert bench.node("a").release(lease, crashed=(2, DEATH)) is False, "sent twice it counts once"
    (lease,) = bench.node("a").take(1)[0]
    bench.node("a").mark(lease, 2)
    bench.node("b").reap("a")
    bench.beat("b")
    (lease,) = bench.node("b").take(1)[0]
    first, second = lease.deaths[2]
    assert first[:4] == DEATH[:4]
    assert first.stderr == DEATH.stderr, "what a dead node cannot tell does not take its place"
    assert (second.host, second.node, second.reason) == ("host", "a", "its node died or was cut off")
    assert before - 5 < first.time < second.time < time.time() + 5
    assert lease.crashes == {2: 2}
    bench.node("b").release(lease, crashed=(2, DEATH._replace(node="b", memory=1, stderr="later")))
    (lease,) = bench.node("b").take(1)[0]
    assert [death.stderr for death in lease.deaths[2]] == ["", "", "later"]
    assert bench.finish("b", lease, b"SSF") == "closed"
    with bench.store._redis.use() as client:
        assert client.hgetall(bench.store._redis.key("crashes")) == {}


def test_of_very_many_crashes_the_first_and_the_latest_are_kept(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), free=1)
    for number in range(20):
        bench.node("a").release(lease, crashed=(0, DEATH._replace(memory=number)))
        (lease,) = bench.node("a").take(1)[0]
    assert lease.crashes == {0: 20}
    assert [death.memory for death in lease.deaths[0]] == [0, 1, 2, 3, 4, *range(13, 20)]


def test_job_ends_when_it_is_sealed_and_its_last_outcome_is_there_in_either_order(bench: Bench) -> None:
    for job, seal_first in (("one", True), ("two", False)):
        bench.store.create(Manifest(job, job, "fn", 1.0, -1))
        (lease,) = bench.feed(bench.head(0, job=job), free=1)
        steps = [lambda job=job: bench.store.seal(Seal(job, 1)), lambda lease=lease: bench.finish("a", lease)]
        for step in steps if seal_first else reversed(steps):
            record = bench.store.record(job)
            assert record is not None
            assert record.ended is None
            step()
        record = bench.store.record(job)
        assert record is not None
        assert record.ended is not None


def test_seal_of_a_job_that_redis_has_lost_waits_for_the_job_and_expires_with_it(bench: Bench) -> None:
    """Redis was wiped before the seal: a job without a name would stay for ever, or one without a total never end."""
    bench.store.seal(Seal("made", 1))
    bench.store.seal(Seal("fed", 1))
    assert bench.store.create(Manifest("made", "made", "fn", 1.0, -1)) == "made"
    (lease,) = bench.feed(bench.head(0, job="fed"), free=1)
    bench.finish("a", lease)
    made, fed = bench.store.records(["made", "fed"])
    assert (made.name, made.total, made.sealed, made.expires > 0) == ("made", 1, True, True)
    assert (fed.name, fed.total, fed.ended is not None, fed.expires > 0) == ("fed", 1, True, True)


# Partitions.


def test_partitions_are_shared_out_evenly_and_those_of_a_lapsed_node_are_taken_over(bench: Bench) -> None:
    assert len(bench.beat("a", polls=True)) == 4
    bench.beat("b", polls=True)
    bench.beat("a", polls=True)
    shares = {name: {share.partition for share in bench.beat(name, polls=True)} for name in ("b", "a")}
    assert sorted(shares["a"] | shares["b"]) == [0, 1, 2, 3]
    assert len(shares["a"]) == len(shares["b"]) == 2
    wait_until(lambda: len(bench.beat("b", polls=True)) == 4)


def test_node_whose_feeder_does_not_poll_loses_its_partitions(bench: Bench) -> None:
    bench.beat("a", polls=True)
    assert bench.beat("a", polls=False) == []
    assert len(bench.beat("b", polls=True)) == 4


# The house.


def test_all_keys_of_a_queue_share_one_hash_tag(bench: Bench) -> None:
    bench.store.create(Manifest("job", "name", "fn", 1.0, -1))
    bench.store.put_blob("hash", b"data")
    bench.store.say_sending("job")
    lease, _ = bench.feed(bench.head(0, count=2), bench.head(1), free=2)
    bench.finish("a", lease, b"S")
    bench.beat("a", polls=True)
    with bench.store._redis.use() as client:
        keys = [key.decode() for key in client.scan_iter(f"*{bench.queue}*")]
    assert len(keys) > 10
    assert all(key.startswith(f"{{yadtq:{bench.queue}}}:") for key in keys)


def test_name_is_given_to_the_first_job_that_claims_it(bench: Bench) -> None:
    assert bench.store.create(Manifest("1", "sweep", "fn", 1.0, 1)) == "1"
    assert bench.store.create(Manifest("2", "sweep", "fn", 1.0, 1)) == "1"
    assert bench.store.create(Manifest("1", "sweep", "fn", 1.0, 1)) == "1"
    assert bench.store.find("sweep") == "1"


def test_secret_that_differs_from_that_of_living_workers_is_told_on_connecting(bench: Bench) -> None:
    bench.store.check_secret()
    info = WorkerInfo("a", "host", 1, 2, 0, 0, 0.0, "3.11", secret=codec.fingerprint(b"another"))
    bench.node("a").beat(info, {}, [])
    with pytest.raises(SignatureError, match="YADTQ_SECRET"):
        bench.store.check_secret()
    wait_until(lambda: bench.store.workers()[0].status == "lost")
    bench.store.check_secret()


def test_server_that_evicts_is_refused(bench: Bench) -> None:
    with bench.store._redis.use() as client:
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(WorkbenchError, match="noeviction"):
            bench.node("a").check_server()
    finally:
        with bench.store._redis.use() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "0")


# Tries: a retry keeps the chunk open, and waits aside.


def test_task_that_is_to_be_tried_again_waits_aside_and_its_chunk_stays_open(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, count=2), bench.head(1), free=1)
    bench.finish("a", lease, b"S")
    assert bench.node("a").retry(lease, [Retry(1, 1, 0.5, "boom")])
    assert bench.node("a").release(lease)
    (other,), due = bench.node("a").take(9)
    assert (other.head.number, due is not None and 0.2 < due <= 0.5) == (1, True)
    bench.finish("a", other)
    (share,) = [share for share in bench.beat("a", polls=True) if share.partition == 0]
    assert share.low == Cursor(TOPIC, 0), "a wipe of Redis would have it fed again"
    taken: list[Lease] = []

    def take() -> list[Lease]:
        bench.beat("a")
        return bench.node("a").take(9)[0]

    wait_until(lambda: bool(taken.extend(take()) or taken))
    (again,) = taken
    assert (again.tries, again.notes, again.done, again.waiting) == ({1: 1}, {1: ("boom",)}, {0}, frozenset())
    assert bench.finish("a", again, b"S", first=1) == "closed"


def test_try_that_is_sent_twice_counts_once(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), free=1)
    for _ in range(2):
        assert bench.node("a").retry(lease, [Retry(0, 1, 0.0, "boom")])
    assert bench.node("a").release(lease)
    assert bench.node("a").release(lease) is False
    (again,) = bench.node("a").take(9)[0]
    assert (again.tries, again.notes) == ({0: 1}, {0: ("boom",)})
    assert bench.node("a").take(9)[0] == []


def test_zombie_adds_no_try_to_a_healthy_run(bench: Bench) -> None:
    (old,) = bench.feed(bench.head(0), free=1)
    bench.node("b").reap("a")
    bench.beat("b")
    (new,) = bench.node("b").take(1)[0]
    assert bench.node("a").retry(old, [Retry(0, 1, 60.0, "boom")]) is False
    assert bench.node("b").release(new)
    (again,) = bench.node("b").take(1)[0]
    assert (again.tries, again.waiting) == ({}, frozenset())


def test_lease_that_lapses_leaves_those_that_wait_waiting(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, count=2), free=1)
    bench.node("a").retry(lease, [Retry(0, 1, 60.0, "boom")])
    bench.node("b").reap("a")
    bench.beat("b")
    (again,) = bench.node("b").take(1)[0]
    assert again.waiting == {0}
    assert bench.finish("b", again, b"S", first=1) == "current"
    assert bench.node("b").release(again)
    assert bench.node("b").take(1)[0] == []


# Cancel: one entry ends the job, and nothing of it holds up the queue.


def test_cancel_is_the_outcome_of_every_task_that_has_none(bench: Bench) -> None:
    leases = bench.feed(*(bench.head(n, count=2) for n in range(4)), free=2)
    bench.store.seal(Seal("job", 8))
    bench.finish("a", leases[0])
    assert bench.store.cancel(Cancel("job")) == 7
    assert bench.store.cancel(Cancel("job")) == 0, "sent twice"
    assert bench.node("a").take(9) == ([], None)
    assert bench.lost("a", *leases) == ["job:0", "job:1"], "so that their node stops them"
    assert bench.finish("a", leases[1], b"SS") == "closed"
    record = bench.store.record("job")
    assert record is not None
    assert (record.succeeded, record.cancelled, record.running, record.total) == (1, 7, 0, 8)
    assert record.ended is not None
    assert bench.node("a").open_chunks() == 0
    (share,) = [share for share in bench.beat("a", polls=True) if share.partition == 0]
    assert share.low == Cursor(TOPIC, 4), "nothing of it holds up the commit"


def test_outcome_that_comes_after_a_cancel_is_dropped(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, count=2), free=1)
    bench.store.seal(Seal("job", 2))
    bench.store.cancel(Cancel("job"))
    assert bench.finish("a", lease, b"SS") == "closed"
    record = bench.store.record("job")
    assert record is not None
    assert (record.succeeded, record.cancelled, record.late, record.running) == (0, 2, 2, 0)


def test_chunks_of_a_cancelled_job_that_come_from_kafka_later_are_passed_by(bench: Bench) -> None:
    bench.store.create(Manifest("job", "job", "fn", 1.0, 3))
    bench.feed(bench.head(0))
    bench.store.cancel(Cancel("job"))
    assert bench.feed(bench.head(1), bench.head(2), free=2) == []
    bench.store.seal(Seal("job", 3))
    record = bench.store.record("job")
    assert record is not None
    assert (record.cancelled, record.total) == (3, 3)
    (share,) = [share for share in bench.beat("a", polls=True) if share.partition == 0]
    assert share.low == Cursor(TOPIC, 3)


def test_chunk_of_a_cancelled_job_that_waits_for_a_retry_or_whose_node_died_never_runs(bench: Bench) -> None:
    waiting, lapsing = bench.feed(bench.head(0), bench.head(1), free=2)
    bench.node("a").retry(waiting, [Retry(0, 1, 0.2, "boom")])
    bench.node("a").release(waiting)
    bench.store.cancel(Cancel("job"))
    bench.node("b").reap("a")
    assert bench.lost("b", lapsing) == ["job:1"]
    bench.beat("b")
    gone = time.monotonic() + 0.4
    wait_until(lambda: time.monotonic() > gone)
    bench.node("b").reap()
    bench.beat("b")
    assert bench.node("b").take(9) == ([], None)
    assert bench.node("b").open_chunks() == 0


def test_cancel_takes_only_its_own_job_out_of_the_line(bench: Bench) -> None:
    bench.feed(bench.head(0), bench.head(0, job="job2"), bench.head(1), bench.head(1, job="job2"))
    bench.store.cancel(Cancel("job"))
    assert [lease.head.id for lease in bench.node("a").take(9)[0]] == ["job2:0", "job2:1"]


def test_late_outcome_of_a_cancelled_chunk_that_was_given_back_takes_its_place_in_the_line_away(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), free=1)
    bench.store.cancel(Cancel("job"))
    assert bench.node("a").release(lease)
    assert bench.finish("a", lease) == "closed"
    redis, key = bench.store._redis.client, bench.store._redis.key
    assert (redis.llen(key("ready")), redis.get(key("ready_bytes"))) == (0, b"0"), (
        "feeders would stop for ever in the end"
    )


def test_cancel_counts_tasks_that_were_cancelled_one_by_one_before_it_once(bench: Bench) -> None:
    bench.feed(bench.head(0, count=3))
    assert bench.store.drop("job", [1, 2]) == [1, 2]
    assert bench.store.cancel(Cancel("job")) == 1
    record = bench.store.record("job")
    assert record is not None
    assert (record.cancelled, record.total) == (3, 3)


def test_chunk_whose_tasks_were_all_cancelled_is_counted_once_when_a_feed_has_it_twice(bench: Bench) -> None:
    bench.store.drop("job", [0])
    assert bench.feed(bench.head(0), bench.head(0), free=2) == []
    record = bench.store.record("job")
    assert record is not None
    assert (record.fed, record.cancelled) == (1, 1)


def test_job_whose_tasks_were_all_cancelled_before_the_workbench_knew_it_ends_when_it_comes(bench: Bench) -> None:
    for index in (0, 1):
        bench.store.drop("job", [index])
    bench.feed(msgspec.structs.replace(bench.head(0, count=2), total=2))
    record = bench.store.record("job")
    assert record is not None
    assert record.ended is not None


def test_job_is_not_lost_while_a_task_runs_when_others_were_cancelled_that_never_came(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), free=1)
    bench.store.seal(Seal("job", 3, {f"{TOPIC}/0": 1}))
    assert bench.store.drop("job", [1]) == [1]
    node = Workbench(msgspec.structs.replace(bench.config, doubt=0.1), bench.queue, "b")
    until = time.monotonic() + 3
    while time.monotonic() < until:
        bench.beat("a", lease)
        node.reap()
        time.sleep(0.1)
    node.close()
    record = bench.store.record("job")
    assert record is not None
    assert (record.ended, bench.finish("a", lease)) == (None, "closed")


def test_job_is_not_lost_while_its_client_holds_some_of_it(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0), free=1)
    bench.store.seal(Seal("job", 2, {f"{TOPIC}/0": 1}))
    bench.finish("a", lease)
    bench.store.say_sending("other", "job")
    node = Workbench(msgspec.structs.replace(bench.config, doubt=0.1), bench.queue, "b")
    until = time.monotonic() + 3
    while time.monotonic() < until:
        bench.beat("a")
        node.reap()
        time.sleep(0.1)
    record = bench.store.record("job")
    assert record is not None
    assert record.ended is None
    bench.store.stop_sending("job")
    wait_until(lambda: node.reap() or ((seen := bench.store.record("job")) and seen.cancel == "lost"))
    node.close()


def test_seal_says_that_nothing_more_is_sent(bench: Bench) -> None:
    bench.store.create(Manifest("job", "sweep", "fn", 1.0, 2))
    bench.store.say_sending("job")
    bench.store.seal(Seal("job", 2, {f"{TOPIC}/0": 1}))
    record = bench.store.record("job")
    assert record is not None
    assert not record.sending


def test_job_that_redis_has_lost_expires_when_its_tasks_are_cancelled(bench: Bench) -> None:
    assert bench.store.drop("job", [0]) == [0]
    record = bench.store.record("job")
    assert record is not None
    assert record.expires > 0


def test_cancel_survives_a_wipe_by_the_journal(bench: Bench) -> None:
    entries = [
        journal.encode(bench.config.key, entry) for entry in (Manifest("job", "sweep", "fn", 1.0, 5), Cancel("job"))
    ]
    restore_jobs(bench.config, bench.queue, entries)
    assert bench.feed(bench.head(0), free=1) == []
    record = bench.store.record("job")
    assert record is not None
    assert (record.cancel, record.cancelled) == ("cancelled", 5)


def test_deadline_is_kept_by_whoever_reaps(bench: Bench) -> None:
    now = bench.store.now()
    bench.store.create(Manifest("job", "late", "fn", 1.0, 1, deadline=now + 0.2))
    bench.store.create(Manifest("job2", "early", "fn", 1.0, 1, deadline=now + 60))
    bench.feed(bench.head(0))
    gone = time.monotonic() + 0.3
    wait_until(lambda: time.monotonic() > gone)
    bench.node("b").reap()
    late, early = bench.store.record("job"), bench.store.record("job2")
    assert late is not None
    assert early is not None
    assert (late.cancel, late.cancelled, early.cancel) == ("deadline", 1, "")


def test_cancel_of_a_long_line_reads_none_of_it_and_is_swept_bit_by_bit(bench: Bench) -> None:
    wide = Workbench(msgspec.structs.replace(bench.config, watermark_chunks=None), bench.queue, "a")

    def feed(numbers: range, job: str = "job") -> None:
        batch = bench.batch(*(bench.head(n, job=job) for n in numbers))
        bench.beat("a")  # so many take as long as a lease, on a machine that is busy
        wide.feed([batch], 0)

    feed(range(300))
    feed(range(3), "other")
    client, key = bench.store._redis.client, bench.store._redis.key
    (lease,), _ = bench.node("a").take(1)
    bench.node("a").release(lease)
    for n in range(300, 1500, 300):
        feed(range(n, n + 300))
    wide.close()
    bench.store.cancel(Cancel("job"))
    assert client.llen(key("ready")) == 3
    assert client.hlen(key("open")) == 503, "a thousand are swept at once"
    bench.node("a").finish(lease, range(1), b"S", b"late")
    bench.node("a").reap()
    assert client.hlen(key("open")) == 3
    bench.beat("a")
    assert [lease.head.job for lease in bench.node("a").take(9)[0]] == ["other"] * 3
    assert int(client.get(key("ready_bytes"))) == 0


# Needs: a chunk waits aside for chunks of other jobs, one at a time, and whatever becomes of these ends its wait.


def needing(bench: Bench, *needs: Need, number: int = 0, count: int = 1, job: str = "second") -> ChunkHead:
    return msgspec.structs.replace(bench.head(number, count, job), needs=needs)


def take(bench: Bench) -> list[str]:
    bench.beat("a")
    return [lease.head.id for lease in bench.node("a").take(9)[0]]


def keys(bench: Bench, pattern: str) -> list[bytes]:
    with bench.store._redis.use() as client:
        return list(client.scan_iter(bench.store._redis.key(pattern)))


def look_later(bench: Bench, chunk: str, seconds: float) -> list[str]:
    """Have a chunk look for what it needs, as if so much time had passed; returns what is taken then."""
    with bench.store._redis.use() as client:
        name = bench.store._redis.key("open")
        known = msgspec.msgpack.decode(client.hget(name, chunk))
        if "stalled" in known:
            known["stalled"] -= seconds
        client.hset(name, chunk, msgspec.msgpack.encode(known))
        assert client.zadd(bench.store._redis.key("delayed"), {chunk: 1.0}, xx=True, ch=True) == 1, "it waits"
    return take(bench)


def test_chunk_waits_for_the_chunk_that_holds_what_it_needs_and_for_no_other(bench: Bench) -> None:
    leases = bench.feed(*(bench.head(n, count=2) for n in range(3)), free=3)
    assert bench.feed(needing(bench, Need("job", 3, 1)), free=1) == [], "a free slot is not given to it"
    bench.finish("a", leases[0], b"SS")
    bench.finish("a", leases[1], b"S")
    assert take(bench) == []
    assert bench.finish("a", leases[1], b"F", first=1) == "closed"
    assert bench.finish("a", leases[1], b"F", first=1) == "closed", "sent twice"
    assert take(bench) == ["second:0"]
    assert take(bench) == []
    assert bench.feed(needing(bench, Need("job", 0, 3), number=1), free=1)[0].head.id == "second:1", "all is there"
    assert keys(bench, "job:job:waiters") == []


def test_chunk_waits_for_a_range_of_tasks_whatever_their_order(bench: Bench) -> None:
    heads = [bench.head(n, count=2) for n in range(5)]
    leases = {lease.head.number: lease for lease in bench.feed(*(heads[n] for n in (3, 1, 4, 0, 2)), free=5)}
    bench.feed(needing(bench, Need("job", 3, 5)))
    for number in (2, 4, 1, 3):
        assert take(bench) == []
        bench.finish("a", leases[number], b"SS")
    assert take(bench) == ["second:0"]


def test_chunk_waits_for_what_has_not_been_fed_yet_in_whatever_order_it_comes(bench: Bench) -> None:
    bench.feed(needing(bench, Need("job", 4, 2)), needing(bench, Need("job", 0, 1), number=1))
    bench.store.say_sending("job")
    assert take(bench) == []
    (last,) = bench.feed(bench.head(2, count=2), free=1)
    bench.finish("a", last, b"SS")
    assert take(bench) == ["second:0"], "the first is not fed yet"
    (first,) = bench.feed(bench.head(0, count=2), free=1)
    assert take(bench) == []
    bench.finish("a", first, b"SS")
    assert take(bench) == ["second:1"]
    # In one batch, the one that needs another in front of it.
    bench.feed(needing(bench, Need("third", 0, 1), number=2), bench.head(0, job="third"))
    (lease,) = bench.node("a").take(9)[0]
    assert lease.head.id == "third:0"
    bench.finish("a", lease)
    assert take(bench) == ["second:2"]


@pytest.mark.parametrize("jobs", ["xyz", "zyx"])
def test_chunk_that_needs_several_jobs_waits_for_all_of_them(bench: Bench, jobs: str) -> None:
    leases = bench.feed(*(bench.head(0, job=job) for job in jobs), free=3)
    bench.feed(needing(bench, *(Need(job, 0, 1) for job in "xyz")))
    for lease in leases:
        assert take(bench) == []
        assert len(keys(bench, "job:*:waiters")) == 1, "it is noted in one place at a time"
        bench.finish("a", lease)
    assert take(bench) == ["second:0"]


@pytest.mark.parametrize("sealed", ["before", "after"])
def test_chunk_that_needs_a_whole_job_waits_for_its_end(bench: Bench, sealed: str) -> None:
    bench.store.create(Manifest("job", "job", "fn", 1.0, -1))
    leases = bench.feed(bench.head(0), bench.head(1), free=2)
    bench.feed(needing(bench, Need("job", 0, WHOLE)))
    if sealed == "before":
        bench.store.seal(Seal("job", 2))
    for lease in leases:
        assert take(bench) == []
        bench.finish("a", lease)
    if sealed == "after":
        assert take(bench) == []
        bench.store.seal(Seal("job", 2))
    assert take(bench) == ["second:0"]
    assert bench.feed(needing(bench, Need("job", 0, WHOLE), number=1), free=1), "it has ended"


@pytest.mark.parametrize("end", ["cancel", "drop", "deadline", "lost"])
def test_whatever_ends_a_job_ends_the_wait_for_it(bench: Bench, end: str) -> None:
    deadline = bench.store.now() - 1 if end == "deadline" else 0.0
    bench.store.create(Manifest("job", "job", "fn", 1.0, 3, deadline=deadline))
    bench.feed(bench.head(0), bench.head(1))
    bench.feed(needing(bench, Need("job", 1, 1)))
    if end == "cancel":
        bench.store.cancel(Cancel("job"))
    elif end == "drop":
        assert bench.store.drop("job", [1]) == [1]
    elif end == "deadline":
        bench.node("b").reap()
    else:
        bench.feed(needing(bench, Need("job", 2, 1), number=1))
        for lease in bench.node("a").take(9)[0]:
            bench.finish("a", lease)
        assert take(bench) == ["second:0"]
        bench.store.seal(Seal("job", 3, {f"{TOPIC}/0": 1}))
        hasty = Workbench(msgspec.structs.replace(bench.config, doubt=0.1), bench.queue, "b")
        wait_until(lambda: bool(hasty.reap() or "second:1" in take(bench)))
        hasty.close()
        return
    assert "second:0" in take(bench)


def test_chunk_that_waits_for_others_holds_up_no_watermark_and_keeps_its_record(bench: Bench) -> None:
    node = Workbench(msgspec.structs.replace(bench.config, watermark_chunks=1), bench.queue, "a")
    bench.feed(*(needing(bench, Need("job", 0, 1), number=n) for n in range(3)))
    (fed,), _ = node.feed([bench.batch(bench.head(0))], 0)
    assert fed.status == "fed", "what waits does not count"
    for share in bench.beat("a", polls=True):
        assert share.partition or share.low == Cursor(TOPIC, 0), "a wipe of Redis would have them fed again"
    node.close()


def test_waiting_chunk_that_is_fed_twice_runs_once(bench: Bench) -> None:
    (first,) = bench.feed(bench.head(0), free=1)
    head = needing(bench, Need("job", 0, 1))
    bench.feed(head, head)
    assert take(bench) == []
    bench.finish("a", first)
    (lease,) = bench.node("a").take(9)[0]
    assert take(bench) == []
    bench.feed(head)
    assert bench.finish("a", lease) == "closed"
    assert take(bench) == []
    (share,) = [share for share in bench.beat("a", polls=True) if share.partition == 0]
    assert share.low == Cursor(TOPIC, bench.offsets), "all of its records are closed"


def test_chunk_that_comes_back_does_not_wait_again(bench: Bench) -> None:
    (first,) = bench.feed(bench.head(0), free=1)
    bench.feed(needing(bench, Need("job", 0, 1), count=2))
    bench.finish("a", first)
    (lease,) = bench.node("a").take(9)[0]
    bench.store._redis.client.delete(*keys(bench, "job:job*"))  # it has expired
    bench.node("a").retry(lease, [Retry(0, 1, 0.0, "boom")])
    bench.node("a").release(lease)
    (again,) = bench.node("a").take(9)[0]
    bench.node("b").reap("a")
    assert again.tries == {0: 1}
    bench.beat("b")
    assert [lease.head.id for lease in bench.node("b").take(9)[0]] == ["second:0"], "nor after its node's death"


def test_chunk_with_a_later_start_waits_for_both(bench: Bench) -> None:
    (first,) = bench.feed(bench.head(0), free=1)
    policy = Policy(start_after=bench.store.now() + 0.6)
    bench.feed(msgspec.structs.replace(needing(bench, Need("job", 0, 1)), policy=policy))
    bench.finish("a", first)
    assert take(bench) == []
    wait_until(lambda: take(bench) == ["second:0"])
    assert bench.store.now() >= policy.start_after


def test_cancelled_chunk_that_waits_never_runs_and_leaves_nothing(bench: Bench) -> None:
    (first,) = bench.feed(bench.head(0), free=1)
    bench.feed(needing(bench, Need("job", 0, 1)), needing(bench, Need("job", 0, 1), number=0, job="third"))
    bench.store.cancel(Cancel("second"))
    assert bench.store.drop("third", [0]) == [0]
    assert keys(bench, "job:*:waiters") == []
    bench.finish("a", first)
    assert take(bench) == []
    assert bench.node("a").open_chunks() == 0


def test_wait_begins_anew_after_a_wipe(bench: Bench) -> None:
    heads = bench.head(0), needing(bench, Need("job", 0, 1))
    bench.feed(*heads, free=1)
    bench.wipe()
    bench.beat("a")
    bench.start()
    (first,) = bench.feed(*heads, free=2, at=0)
    assert first.head.id == "job:0"
    assert take(bench) == []
    bench.finish("a", first)
    assert take(bench) == ["second:0"]


def test_what_nobody_will_send_is_not_waited_for_for_ever(bench: Bench) -> None:
    bench.feed(*(needing(bench, Need(job, 0, count), job=f"by-{job}") for job, count in (("x", 1), ("y", WHOLE))))
    for job in ("by-x:0", "by-y:0"):
        assert look_later(bench, job, 30) == []
        assert look_later(bench, job, 31) == [job]


def test_what_may_still_be_sent_is_waited_for(bench: Bench) -> None:
    chunk = "second:0"
    bench.feed(needing(bench, Need("job", 0, 1)))
    assert look_later(bench, chunk, 1_000) == [], "nobody has looked for long: all nodes were away"
    assert look_later(bench, chunk, 59) == [], "so that it counts from there"
    node = Workbench(msgspec.structs.replace(bench.config, watermark_chunks=0), bench.queue, "a")
    assert node.feed([bench.batch(bench.head(0))], 0)[0][0].status == "full"
    assert look_later(bench, chunk, 61) == [], "it may lie in Kafka, behind a full line"
    node.close()
    with bench.store._redis.use() as client:
        client.delete(bench.store._redis.key("full"))
    bench.store.create(Manifest("job", "job", "fn", 1.0, 5))
    bench.store.say_sending("job")
    assert look_later(bench, chunk, 0) == []
    assert look_later(bench, chunk, 61) == [], "its client is sending"
    bench.store.stop_sending("job")
    bench.store.seal(Seal("job", 5))
    assert look_later(bench, chunk, 0) == []
    assert look_later(bench, chunk, 61) == [], "all is in Kafka"


def test_chunk_does_not_wait_for_itself(bench: Bench) -> None:
    bench.feed(needing(bench, Need("second", 1, 1), count=2))
    bench.feed(needing(bench, Need("second", 0, WHOLE), number=2))
    assert sorted(take(bench)) == ["second:0", "second:2"], "their slot will say that this has no outcome"


def test_chunk_is_found_again_whose_note_was_lost(bench: Bench) -> None:
    (first,) = bench.feed(bench.head(0), free=1)
    bench.feed(needing(bench, Need("job", 0, 1)))
    bench.store._redis.client.delete(*keys(bench, "job:job:waiters"))
    bench.finish("a", first)
    assert look_later(bench, "second:0", 0) == ["second:0"]


def test_keys_of_dependencies_expire_and_are_the_queues(bench: Bench) -> None:
    bench.feed(bench.head(0))
    bench.feed(needing(bench, Need("job", 0, 1)), needing(bench, Need("unknown", 0, 1), number=1))
    names = [*keys(bench, "job:*:waiters"), *keys(bench, "job:*:places")]
    with bench.store._redis.use() as client:
        assert sorted(name.decode().partition("}:job:")[2] for name in names) == [
            "job:places",
            "job:waiters",
            "unknown:waiters",
        ]
        assert all(client.ttl(name) > 0 for name in names)
        assert not client.exists(bench.store._redis.key("job:unknown")), "nothing is made up of a job"


# Keeping and deleting.


def keys_of(bench: Bench, job: str) -> set[str]:
    redis = bench.store._redis
    names = {name.decode().removeprefix(f"{redis.prefix}:") for name in redis.client.keys(redis.key("*"))}
    return {name for name in names if job in name or name.startswith("name:")}


def test_deleted_job_leaves_a_mark_only_and_what_comes_of_it_later_is_dropped(bench: Bench) -> None:
    bench.store.create(Manifest("job", "named", "fn", 1.0, 5, sameness=b"key"))
    held, waits, late = bench.head(0), bench.head(1), bench.head(2)
    (lease,) = bench.feed(held, waits, free=1)
    bench.store.put_arguments("job", 3, b"large")
    assert bench.store.sameness("job") == b"key"
    known = bench.store.record("job")
    assert known is not None
    assert bench.store.delete("job")
    assert not bench.store.delete("job")
    assert bench.finish("a", lease) == "closed"
    assert bench.lost("a", lease) == ["job:0"]
    assert not bench.feed(late, free=1)
    assert not bench.node("a").take(3)[0]
    bench.store.seal(Seal("job", 5))
    assert bench.store.cancel(Cancel("job")) == 0
    assert bench.store.drop("job", [4]) == []
    assert bench.store.create(Manifest("job", "named", "fn", 1.0, 5)) == "job"
    assert not bench.store.keep("job", 10)
    assert not bench.store.reopen(known, total=5)
    assert keys_of(bench, "job") <= {"job:job", "jobs"}
    assert bench.store.records() == []
    assert bench.store.find("named") is None
    with pytest.raises(JobNotFoundError):
        bench.store.record("job")
    assert bench.store.create(Manifest("other", "named", "fn", 1.0, 5)) == "other"
    # Of the old job's, after the name has gone to another.
    bench.store.delete("job")
    assert bench.store.find("named") == "other"


def test_delete_survives_a_wipe_by_the_journal_and_the_name_goes_to_the_next(bench: Bench) -> None:
    first, second = Manifest("first", "named", "fn", 1.0, 1), Manifest("second", "named", "fn", 2.0, 1, sameness=b"key")
    entries = [first, Seal("first", 1), Cancel("first", "deleted"), second]
    bench.wipe()
    restore_jobs(bench.config, bench.queue, [journal.encode(bench.config.key, entry) for entry in entries])
    assert [record.id for record in bench.store.records()] == ["second"]
    assert bench.store.find("named") == "second"
    assert bench.store.sameness("second") == b"key"
    bench.beat("a")
    bench.start()
    assert not bench.feed(bench.head(0, job="first"), free=1, at=0)
    assert [record.id for record in bench.store.records()] == ["second"]


def test_time_to_keep_is_that_of_the_end_and_may_be_said_twice(bench: Bench) -> None:
    bench.store.create(Manifest("job", "named", "fn", 1.0, 1))
    (lease,) = bench.feed(bench.head(0), free=1)
    for _ in "ab":
        assert bench.store.keep("job", 50)
    redis = bench.store._redis
    assert redis.client.ttl(redis.key("job", "job")) > 86_400
    bench.finish("a", lease)
    for name in (("job", "job"), ("job", "job", "in"), ("job", "job", "out"), ("name", "named")):
        assert 0 < redis.client.ttl(redis.key(*name)) <= 50
    assert bench.store.keep("job", 1_000)
    assert 950 < redis.client.ttl(redis.key("job", "job", "out")) <= 1_000
    assert not bench.store.keep("unknown", 50)


# Opened again: another life of the job.


def opened(bench: Bench, **how: object) -> int:
    """Open the job again as its client sees it now."""
    seen = bench.store.record("job")
    assert seen is not None
    return bench.store.reopen(seen, total=seen.total, **how)  # type: ignore[arg-type]


def again(head: ChunkHead, life: int, done: bytes = b"") -> ChunkHead:
    """Return the chunk as it is sent in another life."""
    return msgspec.structs.replace(head, number=life * LIFE + head.number, done=done)


def test_outcomes_of_a_life_that_was_over_count_no_more(bench: Bench) -> None:
    held, waits, late = bench.head(0, 2), bench.head(1, 2), bench.head(2, 2)
    lease, named, released = bench.feed(held, bench.head(3, 2), bench.head(4, 2), free=3)
    bench.feed(waits)
    bench.store.seal(Seal("job", 10))
    bench.store.cancel(Cancel("job"))
    assert opened(bench, whole=True) == 1
    assert bench.finish("a", lease, b"SS") == "closed"
    record = bench.store.record("job")
    assert record is not None
    assert record.succeeded == 0
    assert bench.lost("a", named) == ["job:3"]
    assert bench.node("a").release(released)
    assert not bench.feed(late, free=1), "it lay in Kafka when the job was cancelled"
    assert not bench.node("a").take(9)[0]
    leases = bench.feed(*(again(bench.head(n, 2), 1) for n in range(5)), free=5)
    assert [bench.finish("a", lease, b"SS") for lease in leases] == ["closed"] * 5
    record = bench.store.record("job")
    assert record is not None
    assert (record.succeeded, record.cancelled, record.total, record.cancel, record.fed) == (10, 0, 10, "", 10)
    assert record.ended is not None


def test_only_what_failed_is_run_of_a_chunk_that_is_sent_again(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, 3), free=1)
    bench.store.seal(Seal("job", 3))
    bench.finish("a", lease, b"SFS")
    assert opened(bench, void=[("0.0", b"101", 1)], whole=True) == 1
    (lease,) = bench.feed(again(lease.head, 1, b"101"), free=1)
    assert lease.done == {0, 2}
    assert bench.finish("a", lease, b"S", first=1) == "closed"
    record = bench.store.record("job")
    assert record is not None
    assert (record.succeeded, record.failed, record.running) == (3, 0, 0)
    assert record.ended is not None
    (stored,) = bench.store.outcomes("job", ["0.0"])
    assert stored.mask == b"101"


@pytest.mark.parametrize("free", [0, 1])
def test_a_chunk_that_is_sent_again_is_run_from_the_line_as_at_once(bench: Bench, free: int) -> None:
    (lease,) = bench.feed(bench.head(0, 3), free=1)
    bench.store.seal(Seal("job", 3))
    bench.finish("a", lease, b"FSF")
    opened(bench, void=[("0.0", b"010", 2)], whole=True)
    leases = bench.feed(again(lease.head, 1, b"010"), free=free) or bench.node("a").take(1)[0]
    assert [lease.done for lease in leases] == [{1}]


def test_job_is_opened_only_as_it_was_seen(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, 2), free=1)
    running = bench.store.record("job")
    assert running is not None
    assert not bench.store.reopen(running, total=2), "it is still being sent"
    bench.store.seal(Seal("job", 2))
    bench.finish("a", lease, b"FF")
    assert not bench.store.reopen(running, total=2), "it has ended meanwhile"
    ended = bench.store.record("job")
    assert ended is not None
    assert bench.store.reopen(ended, total=2, void=[("0.0", b"00", 2)], whole=True) == 1
    assert not bench.store.reopen(ended, total=2, void=[("0.0", b"00", 2)], whole=True), "another client was first"
    record = bench.store.record("job")
    assert record is not None
    assert (record.failed, record.life, record.ended, record.sealed) == (0, 1, None, False)


def test_tasks_that_are_about_to_be_sent_again_are_not_called_lost(bench: Bench) -> None:
    quick = Workbench(msgspec.structs.replace(bench.config, doubt=0.1), bench.queue, "a")
    (lease,) = bench.feed(bench.head(0, 2), free=1)
    bench.store.seal(Seal("job", 2, {f"{TOPIC}/0": 1}))
    bench.finish("a", lease, b"F")
    opened(bench, void=[("0.0", b"0", 1)], replaced=[0])
    bench.finish("a", lease, b"S", first=1)
    until = time.monotonic() + 2.5  # reap looks for them once a second
    while time.monotonic() < until:
        quick.reap()
        time.sleep(0.05)
    record = bench.store.record("job")
    assert record is not None
    assert record.ended is None
    bench.store.seal(Seal("job", 2, {f"{TOPIC}/0": 1}, life=1))
    wait_until(lambda: quick.reap() is not None and (bench.store.record("job") or record).cancel == "lost")
    quick.close()


def test_seal_of_an_earlier_life_comes_too_late(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, 2), free=1)
    bench.store.seal(Seal("job", 2))
    bench.finish("a", lease, b"SF")
    opened(bench, void=[("0.0", b"10", 1)], whole=True)
    bench.store.seal(Seal("job", 2))
    record = bench.store.record("job")
    assert record is not None
    assert not record.sealed
    bench.store.seal(Seal("job", 2, life=1))
    record = bench.store.record("job")
    assert record is not None
    assert record.sealed


def test_what_was_sent_again_does_not_run_twice_after_a_wipe(bench: Bench) -> None:
    first = bench.head(0, 4)
    (lease,) = bench.feed(first, free=1)
    bench.store.seal(Seal("job", 4))
    bench.finish("a", lease, b"SF")  # two of its tasks still run
    assert opened(bench, void=[("0.0", b"10", 1)], replaced=[1]) == 1
    second = again(first, 1, b"1011")
    bench.feed(second)
    bench.wipe()
    bench.beat("a")
    entries = [
        Manifest("job", "job", "fn", 1.0, 4),
        Reopen("job", 1, 0, 4, array("I", [1]).tobytes()),
        Seal("job", 4, life=1),
    ]
    for _ in range(2):  # two nodes may replay the topic
        restore_jobs(bench.config, bench.queue, [journal.encode(bench.config.key, entry) for entry in entries])
    bench.start()
    leases = bench.feed(first, second, free=2, at=0)
    assert [lease.head.number for lease in leases] == [LIFE], "a chunk with tasks that are no more its own waits"
    leases += bench.node("a").take(2)[0]
    assert [lease.done for lease in leases] == [{0, 2, 3}, {1}]
    bench.finish("a", leases[0], b"S", first=1)
    bench.finish("a", leases[1], b"S", first=0)
    bench.finish("a", leases[1], b"SS", first=2)
    record = bench.store.record("job")
    assert record is not None
    assert (record.succeeded, record.failed, record.fed) == (4, 0, 4)
    assert record.ended is not None


def test_cancelled_job_that_was_opened_again_stays_open_after_a_wipe(bench: Bench) -> None:
    bench.feed(bench.head(0))
    bench.store.seal(Seal("job", 2))
    bench.store.cancel(Cancel("job"))
    assert opened(bench, whole=True) == 1
    bench.wipe()
    bench.beat("a")
    entries = [
        Manifest("job", "job", "fn", 1.0, 2),
        Cancel("job"),
        Reopen("job", 1, 1, 2, ended=True),
        Seal("job", 2, life=1),
    ]
    restore_jobs(bench.config, bench.queue, [journal.encode(bench.config.key, entry) for entry in entries])
    bench.start()
    assert not bench.feed(bench.head(0), free=1, at=0), "of the life that was cancelled"
    leases = bench.feed(again(bench.head(0), 1), again(bench.head(1), 1), free=2)
    assert [bench.finish("a", lease) for lease in leases] == ["closed", "closed"]
    record = bench.store.record("job")
    assert record is not None
    assert (record.succeeded, record.cancelled, record.cancel) == (2, 0, "")
    assert record.ended is not None


def test_nobody_is_told_after_a_wipe_that_a_job_was_ended_which_was_opened_again(bench: Bench) -> None:
    entries = [Manifest("job", "job", "fn", 1.0, 2, deadline=1.0), Cancel("job"), Reopen("job", 1, 1, 2, ended=True)]
    position = bench.store.news_position()
    restore_jobs(bench.config, bench.queue, [journal.encode(bench.config.key, entry) for entry in entries])
    bench.beat("a")
    bench.node("a").reap()  # ends jobs whose deadline has passed
    _, news, _ = bench.store.wait_for_news(position, 0.05)
    assert not any(entry.ended for entry in news)
    record = bench.store.record("job")
    assert record is not None
    assert (record.cancel, record.ended) == ("", None)


@pytest.mark.parametrize("seconds", [-1.0, 0.5])
def test_deadline_of_a_job_that_was_extended_while_it_ran_is_kept_after_a_wipe(bench: Bench, seconds: float) -> None:
    entries = [Manifest("job", "job", "fn", 1.0, 2, deadline=bench.store.now() + seconds), Reopen("job", 1, 0, 3)]
    restore_jobs(bench.config, bench.queue, [journal.encode(bench.config.key, entry) for entry in entries])

    def is_over() -> bool:
        bench.beat("a")
        bench.node("a").reap()
        record = bench.store.record("job")
        return record is not None and record.cancel == "deadline"

    wait_until(is_over)


def test_deadline_to_come_of_a_job_that_had_ended_and_was_extended_is_over_after_a_wipe(bench: Bench) -> None:
    deadline = bench.store.now() + 0.1
    entries = [
        Manifest("job", "job", "fn", 1.0, 2, deadline=deadline),
        Seal("job", 2),
        Reopen("job", 1, 0, 3, ended=True),
    ]
    restore_jobs(bench.config, bench.queue, [journal.encode(bench.config.key, entry) for entry in entries])
    wait_until(lambda: bench.store.now() > deadline)
    bench.beat("a")
    bench.node("a").reap()
    record = bench.store.record("job")
    assert record is not None
    assert record.cancel == ""


def test_job_whose_name_another_has_taken_after_a_wipe_is_known_to_be_sent_whole(bench: Bench) -> None:
    old, new = Manifest("old", "sweep", "fn", 1.0, 2), Manifest("new", "sweep", "fn", 2.0, 2)
    bench.store.create(new)  # right after the wipe, while the old one still ran
    entries = [old, Seal("old", 2), new]
    restore_jobs(bench.config, bench.queue, [journal.encode(bench.config.key, entry) for entry in entries])
    (lease,) = bench.feed(bench.head(0, 2, job="old"), free=1)
    bench.finish("a", lease, b"SS")
    record = bench.store.record("old")
    assert record is not None
    assert record.ended is not None


def test_name_belongs_to_the_last_job_that_had_it_after_a_wipe(bench: Bench) -> None:
    old, new = Manifest("old", "sweep", "fn", 1.0, 2), Manifest("new", "sweep", "fn", 2.0, 2)  # the old one has expired
    entries = [old, Seal("old", 2), new]
    restore_jobs(bench.config, bench.queue, [journal.encode(bench.config.key, entry) for entry in entries])
    assert bench.store.find("sweep") == "new"
    assert [record.id for record in bench.store.records()] == ["new"]


def test_deadline_is_kept_by_a_client_where_no_node_reaps(bench: Bench) -> None:
    bench.store.create(Manifest("job", "late", "fn", 1.0, 1, deadline=bench.store.now() - 1))
    bench.store.end_late()
    record = bench.store.record("job")
    assert record is not None
    assert record.cancel == "deadline"


@pytest.mark.parametrize("entry", [Manifest("job", "job", "fn", 1.0, 2), Reopen("job", 1, 1, 2)])
def test_job_that_is_being_restored_is_not_taken_for_incomplete(bench: Bench, entry: Manifest | Reopen) -> None:
    restore_jobs(bench.config, bench.queue, [journal.encode(bench.config.key, entry)])
    record = bench.store.record("job")
    assert record is not None
    assert not is_incomplete(record), "its seal is about to come"


def test_dependant_waits_for_the_whole_of_a_job_that_was_opened_again(bench: Bench) -> None:
    (lease,) = bench.feed(bench.head(0, 2), free=1)
    bench.store.seal(Seal("job", 2))
    bench.finish("a", lease, b"SF")
    opened(bench, void=[("0.0", b"10", 1)], whole=True)
    needy = msgspec.structs.replace(bench.head(0, job="other"), needs=(Need("job", 1, 1),))
    assert not bench.feed(needy, free=1)
    (lease,) = bench.feed(again(lease.head, 1, b"10"), free=1)
    bench.finish("a", lease, b"S", first=1)
    assert [lease.head.job for lease in bench.node("a").take(1)[0]] == ["other"]
