"""Bad input: what cannot be read or run is refused with its cause and remedy, put aside, and harms nothing else."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from conftest import MakeCluster
from redis import Redis
from waiting import wait_until

from yadtq_nb import LocalCluster, Queue, ResultPickleError, TaskError, TooLargeError, codec
from yadtq_nb.backlog import dead as notes
from yadtq_nb.model import ChunkHead, Environment, Segment, new_id

# Functions and classes of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

#: Seconds after which something hangs.
LIMIT = 60
MB = 1_000_000
ROOT = Path(__file__).parents[1]


_queues: dict[int, Queue] = {}


def queue_of(cluster: LocalCluster) -> Queue:
    """Return the one queue of a test's cluster."""
    return _queues.setdefault(id(cluster), cluster.queue())


@pytest.fixture(autouse=True)
def _close_queues() -> Iterator[None]:
    yield
    while _queues:
        _queues.popitem()[1].close()


def double(x: int) -> int:
    return 2 * x


def make_record(cluster: LocalCluster, items: list[Any] | None = None, *, secret: str = "", **options: Any) -> bytes:
    """Return the record of a chunk that is the whole of its job."""
    function = b"".join(codec.dumps((double, {})))
    items = [1, 2] if items is None else items
    fields: dict[str, Any] = {
        "job": new_id(),
        "number": 0,
        "first": 0,
        "count": len(items),
        "function": codec.content_hash(function),
        "function_name": "double",
        "function_size": len(function),
        "style": "item",
        "concurrent": False,
        "environment": Environment(),
        "job_name": "by hand",
        "total": len(items),
        "created": time.time(),
        **options,
    }
    key = secret.encode() or cluster.config.key
    return codec.encode_chunk(
        key, ChunkHead(**fields), function if fields["function_size"] else b"", codec.dumps(items)
    )


def post(cluster: LocalCluster, *records: bytes | None, topic: str = "tasks", key: bytes | None = None) -> None:
    """Put records on a topic of the queue, as somebody else would."""
    queue = queue_of(cluster)
    name = queue._link().publisher().topic.name if topic == "tasks" else f"yadtq.{queue.name}.{topic}"
    producer = Producer({"bootstrap.servers": cluster.config.kafka, "message.max.bytes": 20 * MB, "linger.ms": 0})
    refused: list[Any] = []
    for record in records:
        producer.produce(
            name, record, key=key, partition=0, on_delivery=lambda error, _: error and refused.append(error)
        )
    assert producer.flush(20) == 0
    assert not refused
    Redis.from_url(cluster.config.redis).xadd(f"{{yadtq:{queue.name}}}:bell", {"k": "tasks"})


def wait_for_dead(cluster: LocalCluster, count: int) -> pd.DataFrame:
    """Wait until so many records were refused, and return them, oldest first."""

    def enough() -> tuple[pd.DataFrame, ...]:
        found = queue_of(cluster).dead()
        return (found,) if len(found) >= count else ()

    (found,) = wait_until(enough, seconds=LIMIT)
    return found[::-1].reset_index(drop=True)


def attach(cluster: LocalCluster, job: str) -> Any:
    """Return a job that was sent by hand, once the workbench knows it."""
    queue = queue_of(cluster)

    def known() -> Any:
        try:
            return queue.job(job)
        except LookupError:
            return None

    return wait_until(known)


def raw_dead(cluster: LocalCluster) -> list[tuple[notes.Dead, bytes]]:
    """Return all records of the dead topic as they lie there."""
    consumer = Consumer({"bootstrap.servers": cluster.config.kafka, "group.id": "test", "fetch.wait.max.ms": 10})
    found = []
    try:
        place = TopicPartition(f"yadtq.{queue_of(cluster).name}.dead", 0, 0)
        consumer.assign([place])
        while (message := consumer.poll(5.0 if not found else 1.0)) is not None:
            assert message.error() is None
            (header,) = message.headers() or []
            found.append((notes.decode(bytes(header[1])), message.value() or b""))
    finally:
        consumer.close()
    return found


@pytest.fixture
def worker(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A worker that is the same process after the test, and still works."""
    before = pids(cluster)
    yield cluster
    assert queue_of(cluster).map(double, range(10)).results(LIMIT) == [2 * x for x in range(10)]
    assert pids(cluster) == before, "the worker has crashed"


def pids(cluster: LocalCluster) -> list[int]:
    queue_of(cluster).submit(double, 1).result(LIMIT)
    return sorted(queue_of(cluster).workers().query("status == 'live'")["pid"])


# What cannot be read.


def changed(record: bytes, place: int, value: bytes) -> bytes:
    return record[:place] + value + record[place + len(value) :]


def bad_records(cluster: LocalCluster) -> dict[str, tuple[bytes, str, str]]:
    """Return name -> record, error, and what its reason says of cause and remedy."""
    good = make_record(cluster)
    segment = Segment("job", 0, 0, 1, b"", b"S", {}, bytes(8), bytes(8), "node")
    secret = r"not signed with this queue's secret.*set the same YADTQ_SECRET"
    return {
        "text": (b"hello", "FormatError", r"does not start with the magic bytes.*Queue\.map"),
        "empty": (b"", "FormatError", r"does not start with the magic bytes.*Queue\.map"),
        "head only": (good[:20], "FormatError", "is cut short"),
        "truncated": (good[:-10], "SignatureError", "cut short on its way"),
        "unsigned": (changed(good, 5, bytes(32)), "SignatureError", secret),
        "wrongly signed": (make_record(cluster, secret="another", job="claimed"), "SignatureError", secret),
        "changed": (changed(good, len(good) - 5, b"\xff"), "SignatureError", secret),
        "too new": (changed(good, 2, b"\x09"), "FormatError", "version 9, .* version 1: install the same version"),
        "another kind": (
            codec.encode_segment(cluster.config.key, segment, codec.dumps([1])),
            "FormatError",
            "record of kind b's'",
        ),
        "oversized": (
            make_record(cluster, ["x" * 20 * MB]),
            "FormatError",
            r"record of 2\d,\d\d\d,\d\d\d bytes.*at most 4,194,304 .*by reference",
        ),
        "harmful": (make_record(cluster, number=-1), "FormatError", "number is out of range; install the same version"),
    }


def test_bad_records_are_put_aside_with_cause_remedy_and_place_and_the_worker_goes_on(worker: LocalCluster) -> None:
    bad = bad_records(worker)
    good = [make_record(worker, job=new_id()) for _ in bad]
    jobs = {job.decode() for job in re.findall(rb"[0-9a-f]{24}", b"".join(record for record, _, _ in bad.values()))}
    before = time.time()
    post(worker, *[record for pair in zip([r for r, _, _ in bad.values()], good, strict=True) for record in pair])
    seen = wait_for_dead(worker, len(bad))
    assert len(seen) == len(bad)
    (node,) = queue_of(worker).workers().query("status == 'live'").index
    kept = raw_dead(worker)
    offsets = []
    for (name, (record, error, words)), row, (_, value) in zip(bad.items(), seen.itertuples(), kept, strict=True):
        assert row.error == error, name
        assert re.search(words, row.reason), (name, row.reason)
        assert row.size == len(record)
        assert value == record[: notes.KEPT]
        assert row.node == node
        assert row.partition == 0
        assert before - 2 < row.time.timestamp() < time.time() + 2
        assert row.topic_id
        assert row.job == "claimed" if name == "wrongly signed" else row.job in ("", *jobs), name
        offsets.append(row.offset)
    assert offsets == list(range(offsets[0], offsets[0] + 2 * len(bad), 2))
    for record in good:
        head, *_ = codec.decode_chunk(worker.config.key, record)
        assert attach(worker, head.job).results(LIMIT) == [2, 4]


def test_long_original_is_kept_in_part(worker: LocalCluster) -> None:
    record = random.Random(1).randbytes(900_000)
    post(worker, record)
    assert wait_for_dead(worker, 1)["size"][0] == len(record)
    assert [value for _, value in raw_dead(worker)] == [record[: notes.KEPT]]


def test_tombstone_is_passed_by(worker: LocalCluster) -> None:
    post(worker, None, b"bad")
    assert list(wait_for_dead(worker, 1)["size"]) == [3]


def test_thousands_of_mutated_records_neither_crash_nor_stall_a_worker(worker: LocalCluster) -> None:
    from test_fuzz import mutate

    chance = random.Random(7)
    good = [make_record(worker), make_record(worker, ["x" * 30_000, 1])]
    bad = [record for _ in range(2_000) if (record := mutate(chance.choice(good), good, chance)) not in good]
    began = time.monotonic()
    post(worker, *bad)
    assert queue_of(worker).map(double, range(1_000)).results(LIMIT) == [2 * x for x in range(1_000)]
    seen = wait_for_dead(worker, len(bad))
    assert time.monotonic() - began < LIMIT
    assert len(seen) == len(bad) == len(raw_dead(worker)), "each once"


def test_record_is_refused_once_while_the_workbench_is_full(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(1, settings={"watermark_chunks": 1})
    gate = tmp_path / "gate"

    def wait(_: int) -> int:
        while not gate.exists():
            time.sleep(0.02)
        return 1

    held = queue_of(cluster).map(wait, range(2), chunksize=1)
    wait_until(lambda: held.progress.running == 1)
    first = [make_record(cluster, job=new_id()) for _ in range(3)]
    post(cluster, first[0], b"bad", *first[1:])
    wait_for_dead(cluster, 1)
    time.sleep(1.0)  # not to wait for something: in which it would be refused again, ten times
    gate.touch()
    assert held.results(LIMIT) == [1, 1]
    head, *_ = codec.decode_chunk(cluster.config.key, first[2])
    assert attach(cluster, head.job).results(LIMIT) == [2, 4]
    assert len(raw_dead(cluster)) == 1


def test_dead_topic_is_made_with_the_others_and_again_when_it_is_gone(worker: LocalCluster) -> None:
    name = f"yadtq.{queue_of(worker).name}.dead"
    admin = AdminClient({"bootstrap.servers": worker.config.kafka})
    assert name in admin.list_topics(timeout=10).topics
    assert queue_of(worker).dead().empty
    if worker.config.reading == "wake":
        return  # Tansu may say of a topic that is made again while someone writes to it what it does not have
    for future in admin.delete_topics([name]).values():
        future.result(10)
    post(worker, b"bad")
    assert list(wait_for_dead(worker, 1)["size"]) == [3]


def test_entries_of_the_jobs_topic_that_cannot_be_read_do_not_end_who_replays_them(cluster: LocalCluster) -> None:
    queue, redis = queue_of(cluster), Redis.from_url(cluster.config.redis)
    queue.map(double, [1], name="before").results(LIMIT)
    cluster.workers[0].stop()
    for key in (b"\xff\xfe", b"manifest/x", b"unknown/x"):
        post(cluster, b"bad", topic="jobs", key=key)
    redis.delete(f"{{yadtq:{queue.name}}}:cursor")
    cluster.workers[0].start()
    assert queue.map(double, [1, 2]).results(LIMIT) == [2, 4]
    assert redis.hlen(f"{{yadtq:{queue.name}}}:cursor") == cluster.config.partitions


# What can be read, but not run: its tasks end with the error.


def test_tasks_of_an_unknown_function_end_with_an_error_and_are_put_aside(worker: LocalCluster) -> None:
    record = make_record(worker, job="unknown-function", function="0" * 32, function_size=0)
    post(worker, record)
    job = attach(worker, "unknown-function")
    for error in job.results(LIMIT, errors="return"):
        assert type(error) is TaskError
        assert re.search(r"the function .* neither in Redis nor on the jobs topic.*send the job again", str(error))
    assert job.state == "failed"
    row = wait_for_dead(worker, 1).iloc[0]
    assert (row.job, row.chunk, row.error, row.partition, row.offset >= 0) == ("by hand", 0, "TaskError", 0, True)
    assert [value for _, value in raw_dead(worker)] == [record]


def test_function_that_redis_has_lost_is_found_on_the_jobs_topic(cluster: LocalCluster) -> None:
    blob = os.urandom(40_000)
    queue, redis = queue_of(cluster), Redis.from_url(cluster.config.redis)
    cluster.workers[0].stop()
    job = queue.map(lambda x: len(blob) + x, [1], name="lost")
    blobs = wait_until(lambda: redis.keys(f"{{yadtq:{queue.name}}}:blob:*"))
    queue._link().publisher().flush(10)
    redis.delete(*blobs)
    cluster.workers[0].start()
    assert job.results(LIMIT) == [40_001]


def test_function_that_was_changed_in_redis_is_refused_and_a_good_one_is_taken(worker: LocalCluster) -> None:
    queue, redis = queue_of(worker), Redis.from_url(worker.config.redis)
    function = b"".join(codec.dumps((double, {})))
    name = codec.content_hash(function)
    key = f"{{yadtq:{queue.name}}}:blob:{name}"
    redis.set(key, codec.seal(b"another", codec.FUNCTION, function))
    post(worker, make_record(worker, job="changed", function=name, function_size=0))
    (error, _) = attach(worker, "changed").results(LIMIT, errors="return")
    assert re.search(r"the function of this task.*cannot be read.*YADTQ_SECRET", str(error))
    redis.set(key, codec.seal(worker.config.key, codec.FUNCTION, function))
    post(worker, make_record(worker, job="good", function=name, function_size=0))
    assert attach(worker, "good").results(LIMIT) == [2, 4]


def test_chunk_from_another_python_is_refused_with_both_versions(worker: LocalCluster) -> None:
    post(worker, make_record(worker, job="old-python", environment=Environment(python="3.8")))
    job = attach(worker, "old-python")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for error in job.results(LIMIT, errors="return"):
        assert type(error) is TaskError
        assert re.search(rf"Python 3\.8, .* runs {re.escape(here)}.*start the worker with Python 3\.8", str(error))
    assert wait_for_dead(worker, 1)["job"][0] == "by hand"


def test_chunk_names_the_python_of_its_client(worker: LocalCluster) -> None:
    job = queue_of(worker).map(double, [1])
    assert job.results(LIMIT) == [2]
    (record,) = queue_of(worker)._link().store.inputs(job.id)
    head, *_ = codec.decode_chunk(worker.config.key, record)
    assert head.environment.python == f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 3, "total": 3}, "says 3 tasks and holds 2"),
        ({"function_size": 10**6}, "cut short within its function"),
        ({"function_size": 5}, "cut short"),
    ],
    ids=str,
)
def test_tasks_of_a_signed_chunk_that_contradicts_itself_end_with_an_error(
    worker: LocalCluster, options: dict[str, Any], words: str
) -> None:
    post(worker, make_record(worker, job="contradiction", **options))
    found = attach(worker, "contradiction").results(LIMIT, errors="return")
    assert len(found) == options.get("total", 2)
    assert all(isinstance(error, Exception) and words in str(error) for error in found)


def test_tasks_of_a_chunk_that_was_spoilt_on_the_workbench_end_with_an_error(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster = make_cluster(1, settings={"heartbeat": 0.3, "lease": 0.8})
    queue, redis, gate = queue_of(cluster), Redis.from_url(cluster.config.redis), tmp_path / "gate"

    def wait(_: int) -> None:
        while not gate.exists():
            time.sleep(0.02)

    held = queue.submit(wait, 1)
    wait_until(lambda: queue.workers()["busy"].sum() == 1)
    post(cluster, make_record(cluster, job="spoilt"))
    job = attach(cluster, "spoilt")
    redis.hset(f"{{yadtq:{queue.name}}}:job:spoilt:in", "0", b"nonsense")
    gate.touch()
    held.result(LIMIT)
    for error in job.results(LIMIT, errors="return"):
        assert type(error) is TaskError
        assert "magic bytes" in str(error)
    assert wait_for_dead(cluster, 1)["job"][0] == "spoilt"
    assert queue.submit(double, 4).result(LIMIT) == 8


# Items and results that cannot be unpickled: their mates do not mind.


class Homesick:
    """Can be unpickled where it was made only."""

    def __init__(self, in_state: bool = False) -> None:
        self.home, self.in_state = os.getpid(), in_state

    def __reduce__(self) -> Any:
        if self.in_state:
            return Homesick, (), {"home": self.home, "in_state": True}
        return come_back, (self.home,)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if os.getpid() != state["home"]:
            raise LookupError("I live elsewhere")
        self.__dict__.update(state)


def come_back(home: int) -> Homesick:
    if os.getpid() != home:
        raise LookupError("I live elsewhere")
    return Homesick()


@pytest.mark.parametrize("in_state", [False, True])
@pytest.mark.parametrize("concurrent", [False, True])
def test_item_that_cannot_be_unpickled_fails_alone(queue: Queue, in_state: bool, concurrent: bool) -> None:
    async def later(x: Any) -> Any:
        return x

    shared = {"shared": [1, 2]}
    items = [shared, Homesick(in_state), 2, [3, {"deep": Homesick(in_state)}], shared, (5, shared)]
    job = queue.map(later if concurrent else lambda x: x, items, chunksize=6)
    found = job.results(LIMIT, errors="return")
    assert [found[0], found[2], found[4], found[5]] == [shared, 2, shared, (5, shared)]
    for error in (found[1], found[3]):
        assert isinstance(error, LookupError)
        assert "I live elsewhere" in str(error)
    assert list(job.to_frame()["state"]) == ["succeeded", "failed", "succeeded", "failed", "succeeded", "succeeded"]


def test_item_of_a_module_that_the_worker_lacks_fails_alone_and_names_it(queue: Queue) -> None:
    import types

    module = types.ModuleType("only_here")
    exec("class Thing:\n    pass", module.__dict__)
    sys.modules["only_here"] = module
    try:
        found = queue.map(lambda x: x, [1, module.Thing(), 3], chunksize=3).results(LIMIT, errors="return")
    finally:
        del sys.modules["only_here"]
    assert (found[0], found[2]) == (1, 3)
    assert isinstance(found[1], ModuleNotFoundError)
    assert "only_here" in str(found[1])


@pytest.mark.parametrize("in_state", [False, True])
def test_result_that_cannot_be_unpickled_here_spares_those_it_came_with(queue: Queue, in_state: bool) -> None:
    def make(n: int) -> Any:
        return Homesick(in_state) if n in (1, 4) else [n]

    job = queue.map(make, range(6), chunksize=6)
    found = job.results(LIMIT, errors="return")
    assert [found[n] for n in (0, 2, 3, 5)] == [[0], [2], [3], [5]]
    for n in (1, 4):
        assert isinstance(found[n], ResultPickleError)
        assert f"task {n} cannot be unpickled here" in str(found[n])
        assert "I live elsewhere" in str(found[n])
    assert job.results(LIMIT, errors="skip") == [[0], [2], [3], [5]]
    assert job[3].result(LIMIT) == [3]


# Large ones.


def test_argument_over_the_brokers_limit_goes_by_reference(worker: LocalCluster) -> None:
    data = random.Random(3).randbytes(3 * MB)
    queue, redis = queue_of(worker), Redis.from_url(worker.config.redis)
    job = queue.map(len, [data, b"small", data], chunksize=3)
    assert job.results(LIMIT) == [3 * MB, 5, 3 * MB]
    assert queue.submit(len, data).result(LIMIT) == 3 * MB
    heads = [codec.decode_chunk(worker.config.key, record)[0] for record in queue._link().store.inputs(job.id)]
    assert [head.by_reference for head in heads] == [True, False, True]
    names = [key.decode().rpartition(":")[2] for key in redis.keys(f"{{yadtq:{queue.name}}}:blob:{job.id}-*")]
    assert sorted(names) == sorted(f"{job.id}-{head.number}" for head in heads if head.by_reference)


@pytest.fixture
def small_store(worker: LocalCluster) -> Iterator[LocalCluster]:
    """A worker whose Redis takes 2 MB at once."""
    redis = Redis.from_url(worker.config.redis)
    before = redis.config_get("proto-max-bulk-len")["proto-max-bulk-len"]
    redis.config_set("proto-max-bulk-len", 2 * MB)
    yield worker
    redis.config_set("proto-max-bulk-len", before)


SIZES = r"3,000,\d\d\d bytes.* 2,000,000 bytes that Redis takes at once \(proto-max-bulk-len\)"


def test_argument_over_the_stores_limit_raises_in_the_caller_with_the_sizes(small_store: LocalCluster) -> None:
    queue, data = queue_of(small_store), random.Random(3).randbytes(3 * MB)
    with pytest.raises(TooLargeError, match=SIZES) as caught:
        queue.submit(len, data)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(TooLargeError, match=SIZES):
        queue.map(lambda x: len(data) + x, [1])
    with pytest.raises(TooLargeError, match=SIZES):
        queue.options(name="named").submit(len, data).result(LIMIT)
    found = queue.map(len, [b"1", data, b"333"], chunksize=3).results(LIMIT, errors="return")
    assert (found[0], found[2]) == (1, 3)
    assert isinstance(found[1], TooLargeError)
    assert re.search(SIZES, str(found[1]))


def test_result_over_the_stores_limit_fails_its_task_and_holds_up_no_other(small_store: LocalCluster) -> None:
    queue = queue_of(small_store)
    job = queue.map(lambda n: random.Random(n).randbytes(n), [3 * MB, 5], chunksize=1)
    with pytest.raises(TooLargeError, match=SIZES):
        job[0].result(LIMIT)
    assert len(job[1].result(LIMIT)) == 5
    assert queue.submit(double, 4).result(LIMIT) == 8


# What shows them.


def test_command_dead_shows_them_as_a_table_and_as_json(worker: LocalCluster, tmp_path: Path) -> None:
    # Not by --kafka: that it is Tansu, which says smaller ends than it has, must be known.
    settings = tmp_path / "settings.json"
    settings.write_bytes(msgspec.json.encode(worker.config))
    environment = {**os.environ, "YADTQ_CONFIG": str(settings), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def yadtq(*more: str) -> str:
        command = [sys.executable, "-m", "yadtq_nb.cli", "dead", "--queue", queue_of(worker).name, *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout

    assert yadtq() == "Nothing was refused.\n"
    assert yadtq("--json") == ""
    post(worker, b"[red]bad\x1b[31m", make_record(worker, secret="another", job="claimed"))
    wait_for_dead(worker, 2)
    table = yadtq()
    for word in ("reason", "claimed", "YADTQ_SECRET", "magic bytes", "FormatError"):
        assert word in table
    newest, oldest = map(json.loads, yadtq("--json").splitlines())
    assert (newest["job"], newest["error"], oldest["size"]) == ("claimed", "SignatureError", 13)
    assert {"time", "partition", "offset", "topic_id", "node", "reason", "chunk"} <= oldest.keys()
    assert len(yadtq("--json", "--limit", "1").splitlines()) == 1


def test_note_holds_nothing_that_a_terminal_obeys() -> None:
    note = notes.Dead(
        reason="a\x1b[31m\ud800",
        error="E",
        topic_id="",
        partition=-1,
        offset=-1,
        size=1,
        time=0.0,
        node="n",
        job="\x07",
    )
    found = notes.decode(notes.encode(note))
    assert "\x1b" not in found.reason + found.job
    assert "\x07" not in found.job
