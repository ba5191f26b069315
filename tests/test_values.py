"""Arguments and results: arrays and frames, large and many of them, and what they cost."""

from __future__ import annotations

import sys
import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
from confluent_kafka import Consumer, TopicPartition
from conftest import MakeCluster, RunScript
from redis import Redis

from yadtq_nb import Queue, ResultPickleError

pytestmark = pytest.mark.one_stack

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

#: Seconds after which something hangs.
LIMIT = 60
MB = 1_000_000


def identity(value: Any) -> Any:
    return value


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10),
        np.random.default_rng(1).normal(size=(300, 200)),
        np.asfortranarray(np.arange(20_000.0).reshape(100, 200)),
        np.arange(20_000)[::2],
        np.array(["a", None, {"k": 1}], dtype=object),
        np.array([("x", 1.5)], dtype=[("name", "U3"), ("value", "f8")]),
        np.array(["2026-01-01"], dtype="datetime64[ns]"),
        np.zeros((0, 5)),
        np.float64(2.5),
    ],
    ids=["small", "large", "fortran", "strided", "objects", "records", "times", "empty", "scalar"],
)
def test_arrays_come_back_equal_and_writable(queue: Queue, array: Any) -> None:
    for found in (queue.submit(identity, array).result(LIMIT), queue.map(identity, [array, array]).results(LIMIT)[1]):
        assert type(found) is type(array)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
        if isinstance(found, np.ndarray):
            found[...] = found
            assert found.flags.writeable


def test_task_may_write_to_its_argument(queue: Queue) -> None:
    def double(array: Any) -> Any:
        array *= 2
        return array

    array = np.ones(100_000)
    found = queue.map(double, [array, array]).results(LIMIT)
    assert array.sum() == 100_000
    assert [result.sum() for result in found] == [200_000, 200_000]


def test_frames_come_back_equal_and_writable(queue: Queue) -> None:
    frame = pd.DataFrame(
        {
            "n": np.arange(5_000),
            "x": np.linspace(0, 1, 5_000),
            "s": [f"row {n}" for n in range(5_000)],
            "c": pd.Categorical(["a", "b"] * 2_500),
            "t": pd.date_range("2026-01-01", periods=5_000, tz="UTC"),
        },
        index=pd.Index(range(5_000), name="key"),
    )
    found = queue.submit(identity, frame).result(LIMIT)
    pd.testing.assert_frame_equal(found, frame)
    found.loc[3, "x"] = 5.0
    found["n"] += 1
    assert found.loc[3, "x"] == 5.0
    series = queue.map(lambda part: part["x"].sum(), [frame, frame.head(10)]).results(LIMIT)
    assert series == [frame["x"].sum(), frame["x"].head(10).sum()]


def test_many_kinds_of_values_come_back_equal(queue: Queue) -> None:
    import datetime
    import decimal

    values = [
        None,
        True,
        2**200,
        float("inf"),
        1j,
        "ü🧪\x00",
        b"\x00\xff",
        (1, [2, {3: {4}}]),
        range(5),
        datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        decimal.Decimal("1.10"),
        int,
        len,
        ValueError("a value, not a failure"),
        ...,
        NotImplemented,
    ]
    job = queue.map(identity, values)
    found = job.results(LIMIT)
    assert repr(found) == repr(values)
    assert all(future.exception() is None for future in job)
    assert queue.map(identity, values).results(LIMIT, errors="skip")[1] is True
    assert isinstance(queue.submit(identity, ValueError("a")).result(LIMIT), ValueError)


# Large ones.


def test_large_arguments_and_results_travel(queue: Queue) -> None:
    rng = np.random.default_rng(2)
    arrays = [rng.integers(0, 256, 5 * MB, dtype=np.uint8) for _ in range(6)]
    job = queue.map(lambda array: array[::-1].copy(), arrays)
    for found, array in zip(job.results(LIMIT), arrays, strict=True):
        np.testing.assert_array_equal(found[::-1], array)


@pytest.mark.parametrize("make", [bytes, np.zeros], ids=["bytes", "array"])
def test_argument_and_result_of_50_mb_travel(queue: Queue, make: Any) -> None:
    value = make(50 * MB // (8 if make is np.zeros else 1))
    found = queue.submit(identity, value).result(LIMIT)
    assert len(found) == len(value)
    assert type(found) is type(value)


def test_items_too_large_together_travel_apart(queue: Queue) -> None:
    sizes = [10, 400_000, 600_000, 1_500_000, 20] * 4
    assert queue.map(len, [bytes(size) for size in sizes], chunksize=20).results(LIMIT) == sizes


def test_small_items_with_large_results_come_back(queue: Queue) -> None:
    found = queue.map(lambda n: np.full(MB // 8, n), range(20), chunksize=10).results(LIMIT)
    assert [array[0] for array in found] == list(range(20))


def test_function_with_a_large_closure_is_sent_once(queue: Queue) -> None:
    table = np.random.default_rng(3).integers(0, 256, 20 * MB, dtype=np.uint8)
    with Redis.from_url(queue._settings().redis) as store:
        before = store.info("stats")["total_net_input_bytes"]
        for _ in range(2):
            job = queue.map(lambda index: int(table[index]), range(0, 20 * MB, MB // 10), chunksize=5)
            assert job.results(LIMIT) == [int(table[index]) for index in range(0, 20 * MB, MB // 10)]
        sent = store.info("stats")["total_net_input_bytes"] - before
    assert 20 * MB < sent < 30 * MB


# Many.


def test_job_of_100_000_items_is_few_keys_records_and_bytes(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    queue = cluster.queue()
    queue.map(identity, range(100)).results(LIMIT)
    with Redis.from_url(cluster.config.redis) as store:
        before = {*store.scan_iter(match=f"*{queue.name}*", count=1000)}
        records = _records(queue)
        tracemalloc.start()
        try:
            job = queue.map(identity, range(100_000))
            assert job.wait(LIMIT)
            waiting, _ = tracemalloc.get_traced_memory()
            assert job.results(LIMIT) == list(range(100_000))
            collected, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        added = {*store.scan_iter(match=f"*{queue.name}*", count=1000)} - before
        assert len(added) <= 8 + cluster.config.partitions, added
        assert store.hlen(f"{{yadtq:{queue.name}}}:job:{job.id}:out") < 1_000
    assert _records(queue) - records < 1_000
    assert waiting / 100_000 < 25, "the client holds next to nothing of what nobody has asked for"
    assert collected / 100_000 < 150, "bytes an item, its value among them"


def _records(queue: Queue) -> int:
    consumer = Consumer({"bootstrap.servers": queue._settings().kafka, "group.id": "counts"})
    try:
        total = 0
        for topic in (queue._link().publisher().topic.name, f"yadtq.{queue.name}.jobs"):
            for partition in consumer.list_topics(topic, timeout=10).topics[topic].partitions:
                total += consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)[1]
        return total
    finally:
        consumer.close()


# Results that do not travel.


def test_result_that_does_not_pickle_names_its_index_and_the_others_come(queue: Queue) -> None:
    import threading

    job = queue.map(lambda n: threading.Lock() if n == 70 else n, range(200))
    found = job.results(LIMIT, errors="return")
    error = found[70]
    assert isinstance(error, ResultPickleError)
    assert error.index == 70
    assert "70" in str(error)
    assert "lock" in str(error)
    assert found[:70] + found[71:] == [n for n in range(200) if n != 70]
    assert job.to_frame()["state"][70] == "failed"


def test_result_that_cannot_be_unpickled_here_fails_alone(run_script: RunScript) -> None:
    output = run_script(
        """
        import os

        class Homesick:
            def __reduce__(self):
                return come_back, (os.getpid(),)

        def come_back(pid):
            if os.getpid() != pid:
                raise LookupError("I live elsewhere")
            return Homesick()

        job = queue.map(lambda n: Homesick() if n == 1 else n, range(3), chunksize=1)
        error = job[1].exception(30)
        print(type(error).__name__, error.index, "I live elsewhere" in str(error))
        print(job.results(30, errors="skip"), [type(r).__name__ for r in job.results(30, errors="return")])
        print(job.to_frame()["error"][1][:17], queue.submit(abs, -1).result(30))
        """
    )
    assert output == ["ResultPickleError 1 True", "[0, 2] ['int', 'ResultPickleError', 'int']", "ResultPickleError 1"]


def test_deep_nesting_fails_its_task_only(queue: Queue) -> None:
    def nest(depth: int) -> Any:
        value: list[Any] = []
        for _ in range(depth):
            value = [value]
        return value

    found = queue.map(nest, [3, 100_000, 2]).results(LIMIT, errors="return")
    assert found[0] == [[[[]]]]
    assert isinstance(found[1], ResultPickleError)
    assert found[2] == [[[]]]
