"""Retries, timeouts and delayed starts, on both stacks."""

from __future__ import annotations

import asyncio
import datetime
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stacks import MakeCluster
from waiting import wait_until

from yadtq_nb import JobState, LocalCluster, TaskCrashedError, TaskTimeoutError
from yadtq_nb.model import Policy

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

LIMIT = 30


class FlakyError(Exception):
    pass


def wrote(audit: Path) -> Counter[str]:
    return Counter(audit.read_text().split()) if audit.exists() else Counter()


def note(audit: Path, x: Any) -> int:
    """Write down that x runs, and return for which time."""
    with audit.open("a") as file:
        file.write(f"{x}\n")
    return audit.read_text().split().count(str(x))


def test_only_the_task_that_failed_is_tried_again(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def flaky(x: int) -> int:
        times = note(audit, x)
        if x in (3, 7) and times < 3:
            raise FlakyError(f"boom {times}")
        return x * 10

    job = cluster.queue().map(flaky, range(10), chunksize=10, retries=3, backoff=0.05)
    assert job.results(LIMIT) == [x * 10 for x in range(10)]
    assert wrote(audit) == Counter({str(x): 3 if x in (3, 7) else 1 for x in range(10)})
    frame = job.to_frame()
    assert frame.attempt.tolist() == [3 if x in (3, 7) else 1 for x in range(10)]
    assert job.state is JobState.SUCCEEDED
    assert job.progress.queued == job.progress.running == 0


def test_error_whose_text_cannot_be_encoded_is_tried_again_and_spares_its_chunk_mates(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    audit = tmp_path / "audit"

    def open_badly(x: int) -> int:
        note(audit, x)
        if x == 0:
            raise OSError("no such file: \udcff")
        return x

    job = cluster.queue().map(open_badly, range(5), chunksize=5, retries=1, backoff=0.05)
    assert job.results(LIMIT, errors="skip") == [1, 2, 3, 4]
    with pytest.raises(OSError, match="no such file"):
        job[0].result(LIMIT)
    assert wrote(audit) == Counter({"0": 2, "1": 1, "2": 1, "3": 1, "4": 1})


def test_error_with_notes_of_its_own_making_is_an_error_like_others(cluster: LocalCluster) -> None:
    def raise_oddly(_: int) -> None:
        error = ValueError("odd")
        error.__notes__ = 5  # type: ignore[assignment]  # what Python would not put there
        raise error

    job = cluster.queue().map(raise_oddly, [0], retries=1, backoff=0.05)
    assert isinstance(job[0].exception(LIMIT), ValueError)


def test_last_error_is_kept_with_the_earlier_ones_as_its_notes(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def always(x: int) -> None:
        raise FlakyError(f"boom {note(audit, x)}")

    future = cluster.queue().options(retries=2, backoff=0.01).submit(always, 1)
    error = future.exception(LIMIT)
    assert isinstance(error, FlakyError)
    assert str(error) == "boom 3"
    assert [line.partition(": ")[2] for line in error.__notes__] == [
        f"{FlakyError.__module__}.FlakyError: boom {n}" for n in (1, 2)
    ]
    assert "boom 1" in str(error.__cause__), "the remote traceback shows them, too"


def test_errors_of_other_types_are_not_tried_again(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def fails(x: int) -> None:
        note(audit, x)
        raise KeyError(x) if x else FlakyError(x)

    job = cluster.queue().map(fails, range(2), retries=2, backoff=0.01, retry_on=(FlakyError, OSError))
    assert [type(error) for error in job.results(LIMIT, errors="return")] == [FlakyError, KeyError]
    assert wrote(audit) == Counter({"0": 3, "1": 1})


def test_error_type_that_cannot_be_asked_is_no_reason_to_try_again_nor_to_charge_others(cluster: LocalCluster) -> None:
    class Odd(type):
        def __instancecheck__(cls, instance: object) -> bool:
            raise RuntimeError("ask somebody else")

    class OddError(Exception, metaclass=Odd):
        pass

    def fails(x: int) -> int:
        if x == 1:
            raise KeyError(x)
        return x

    job = cluster.queue().map(fails, range(3), chunksize=3, retries=2, backoff=0.01, retry_on=OddError)
    first, error, last = job.results(LIMIT, errors="return")
    assert (first, type(error), last) == (0, KeyError, 2)


def test_waits_double_up_to_the_longest_and_are_left_to_chance_by_half() -> None:
    policy = Policy(retries=9, backoff=2.0, max_delay=10.0)
    for tries, whole in enumerate((2.0, 4.0, 8.0, 10.0, 10.0)):
        waits = [policy.delay(tries) for _ in range(500)]
        assert whole / 2 <= min(waits) < 0.6 * whole
        assert 0.9 * whole < max(waits) <= whole


def test_longest_wait_is_kept(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def flaky(x: int) -> int:
        if note(audit, x) < 4:
            raise FlakyError
        return x

    job = cluster.queue().map(flaky, [1], retries=3, backoff=3_600, max_delay=0.1)
    assert job.results(LIMIT) == [1]


def test_no_slot_waits_for_a_retry_and_the_others_go_on(make_cluster: MakeCluster, tmp_path: Path) -> None:
    queue = make_cluster(slots=1).queue()
    audit = tmp_path / "audit"

    def once(x: int) -> int:
        if note(audit, x) == 1:
            raise FlakyError
        return x

    waiting = queue.options(retries=1, backoff=8.0).submit(once, 0)
    began = time.monotonic()
    assert queue.map(lambda x: x, range(20)).results(LIMIT) == list(range(20))
    assert time.monotonic() - began < 3.9, "less than the shortest wait"
    assert not waiting.done()
    assert waiting.result(LIMIT) == 0


def test_task_that_waits_for_its_retry_outlives_its_node(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=1, workers=1)
    audit = tmp_path / "audit"

    def once(x: int) -> int:
        if note(audit, x) == 1:
            raise FlakyError
        return x

    future = cluster.queue().options(retries=1, backoff=3.0).submit(once, 5)
    wait_until(lambda: wrote(audit))
    time.sleep(0.3)  # its node tells the workbench
    os.kill(cluster.workers[0].pid, 9)
    assert future.result(LIMIT) == 5
    assert wrote(audit) == Counter({"5": 2})


def test_coroutines_are_tried_again_one_by_one(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    async def flaky(x: int) -> int:
        times = note(audit, x)
        await asyncio.sleep(0.01)
        if x % 5 == 0 and times < 2:
            raise FlakyError
        return x

    job = cluster.queue().map(flaky, range(20), chunksize=20, retries=1, backoff=0.01)
    assert job.results(LIMIT) == list(range(20))
    assert wrote(audit) == Counter({str(x): 2 if x % 5 == 0 else 1 for x in range(20)})


def test_task_that_takes_too_long_fails_and_its_mates_go_on(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def slow(x: int) -> int:
        note(audit, x)
        time.sleep(60 if x == 2 else 0.01)
        return x

    began = time.monotonic()
    job = cluster.queue().map(slow, range(6), chunksize=6, timeout=1.0)
    results = job.results(LIMIT, errors="return")
    assert time.monotonic() - began < 10
    error = results.pop(2)
    assert results == [0, 1, 3, 4, 5]
    assert isinstance(error, TaskTimeoutError)
    assert isinstance(error, TimeoutError)
    assert error.index == 2
    assert "timeout of 1 s" in str(error)
    assert wrote(audit) == Counter({str(x): 1 for x in range(6)}), "it was not tried again, nor were its mates"
    assert job.to_frame().seconds[2] >= 1.0


def test_timeout_counts_for_each_task_and_not_for_its_chunk(cluster: LocalCluster) -> None:
    job = cluster.queue().map(lambda _: time.sleep(0.2), range(10), chunksize=10, timeout=1.5)
    assert job.results(LIMIT) == [None] * 10


def test_task_that_took_too_long_is_tried_again(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def slow_once(x: int) -> int:
        if note(audit, x) == 1:
            time.sleep(60)
        return x

    chosen = cluster.queue().options(timeout=0.5, retries=1, backoff=0.01, retry_on=TimeoutError)
    assert chosen.submit(slow_once, 4).result(LIMIT) == 4
    never = chosen.submit(lambda: time.sleep(60))
    error = never.exception(LIMIT)
    assert isinstance(error, TaskTimeoutError)
    assert "attempt on " in str(error), "the earlier one is listed"


def test_what_a_task_has_started_ends_with_its_timeout(cluster: LocalCluster, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def starts() -> None:
        import subprocess

        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        pid_file.write_text(str(child.pid))
        time.sleep(300)

    future = cluster.queue().options(timeout=2.0).submit(starts)
    assert isinstance(future.exception(LIMIT), TaskTimeoutError)
    pid = int(pid_file.read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "it still runs", seconds=10)


def test_coroutine_that_takes_too_long_fails_alone(cluster: LocalCluster) -> None:
    async def slow(x: int) -> int:
        await asyncio.sleep(60 if x == 1 else 0.01)
        return x

    results = cluster.queue().map(slow, range(4), chunksize=4, timeout=0.5).results(LIMIT, errors="return")
    assert isinstance(results[1], TaskTimeoutError)
    assert results[1].index == 1
    assert [results[0], *results[2:]] == [0, 2, 3]


@pytest.mark.parametrize("when", ["seconds", "datetime"])
def test_nothing_starts_before_its_time(cluster: LocalCluster, when: str) -> None:
    began = time.time()
    after: Any = 1.5 if when == "seconds" else datetime.datetime.now().astimezone() + datetime.timedelta(seconds=1.5)
    future = cluster.queue().options(start_after=after).submit(time.time)
    assert cluster.queue().submit(int).result(LIMIT) == 0
    assert not future.done()
    assert began + 1.5 <= future.result(LIMIT) + 0.01


def test_how_often_a_task_may_crash_can_be_said(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def crash(x: int) -> None:
        note(audit, x)
        os._exit(3)

    job = cluster.queue().map(crash, [1], max_crashes=1)
    assert isinstance(job.results(LIMIT, errors="return")[0], TaskCrashedError)
    assert wrote(audit) == Counter({"1": 1})


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("retries", -1, ValueError),
        ("retries", 1.5, TypeError),
        ("backoff", -0.1, ValueError),
        ("backoff", "soon", TypeError),
        ("backoff", float("nan"), ValueError),
        ("timeout", 0, ValueError),
        ("retry_on", ["OSError"], TypeError),
        ("retry_on", (), TypeError),
        ("max_crashes", 0, ValueError),
        ("start_after", float("inf"), ValueError),
    ],
)
def test_option_that_makes_no_sense_is_named(cluster: LocalCluster, option: str, value: Any, error: Any) -> None:
    queue = cluster.queue()
    with pytest.raises(error, match=option):
        queue.map(int, [1], **{option: value})
    with pytest.raises(error, match=option):
        queue.options(**{option: value})
