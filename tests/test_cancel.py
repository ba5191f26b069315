"""Cancelling jobs, and deadlines, on both stacks."""

from __future__ import annotations

import datetime
import itertools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ALL_COMPLETED, CancelledError, wait
from pathlib import Path

import pytest
from stacks import MakeCluster
from waiting import wait_until

from yadtq_nb import JobCancelledError, JobState, JobTimeoutError, LocalCluster

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

LIMIT = 30


def lines(audit: Path) -> list[str]:
    return audit.read_text().split() if audit.exists() else []


def write(audit: Path, text: object) -> None:
    with audit.open("a") as file:
        file.write(f"{text}\n")


def test_cancel_stops_what_runs_and_starts_nothing_that_waits(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def slow(x: int) -> int:
        if x < 10:
            return x
        write(audit, f"begin-{x}")
        try:
            time.sleep(60)
        finally:
            write(audit, f"end-{x}")
        return x

    queue = cluster.queue()
    job = queue.map(slow, range(500), chunksize=1)
    wait_until(lambda: len(lines(audit)) == 2)
    began = time.monotonic()
    assert job.cancel() == 500 - job.progress.succeeded
    assert job.state is JobState.CANCELLED
    assert job.wait(LIMIT)
    # The slots are free again, and the tasks had their time to clean up.
    assert queue.submit(abs, -1).result(LIMIT) == 1
    wait_until(lambda: len(lines(audit)) == 4)
    assert time.monotonic() - began < 8
    assert {line.split("-")[0] for line in lines(audit)} == {"begin", "end"}
    progress = job.progress
    assert (progress.cancelled, progress.running, progress.queued) == (500 - progress.succeeded, 0, 0)
    assert job.to_frame().state.value_counts().to_dict() == {
        "cancelled": 500 - progress.succeeded,
        **({"succeeded": progress.succeeded} if progress.succeeded else {}),
    }
    assert len(job.results(errors="skip")) == progress.succeeded
    with pytest.raises(JobCancelledError, match="was cancelled"):
        job.results()
    assert job.cancel() == 0, "it has ended"
    time.sleep(0.5)
    assert len(lines(audit)) == 4


def test_futures_of_a_cancelled_job_are_cancelled_in_every_process(cluster: LocalCluster) -> None:
    queue, other = cluster.queue(), cluster.queue()
    job = queue.map(lambda _: time.sleep(60), range(6), chunksize=1, name="long")
    seen = other.job("long")
    futures = [job[0], job[5], seen[0], seen[5]]
    wait_until(lambda: job.progress.running == 2)
    seen.cancel()
    _, pending = wait(futures, LIMIT, ALL_COMPLETED)
    assert not pending
    assert all(future.cancelled() for future in futures)
    with pytest.raises(CancelledError):
        job[3].result(LIMIT)
    assert [type(error) for error in job.results(errors="return")] == [JobCancelledError] * 6
    assert other.jobs().state["long"] == "cancelled"


def test_one_future_is_cancelled_and_then_the_whole_job(cluster: LocalCluster) -> None:
    here = cluster.queue()
    job = here.map(time.sleep, [60] * 6, chunksize=1)
    futures = list(job)
    wait_until(lambda: job.progress.running == 2)
    assert futures[2].cancel()
    assert job.cancel() == 5
    assert not wait(futures, LIMIT, ALL_COMPLETED).not_done
    with cluster.queue() as queue:
        for future in (*futures, *queue.job(job.id), *here.job(job.id)):
            assert future.cancelled()
            assert str(future.state) == "cancelled"
            assert "cancelled" in repr(future)


def test_task_that_does_not_listen_is_killed(cluster: LocalCluster, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def stubborn(_: int) -> None:
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        write(pids, os.getpid())
        write(pids, child.pid)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

    job = cluster.queue().map(stubborn, range(1))
    wait_until(lambda: len(lines(pids)) == 2)
    job.cancel()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in lines(pids)), seconds=10)


def test_job_that_is_cancelled_while_its_items_are_drawn_says_that_and_not_that_it_is_incomplete(
    cluster: LocalCluster,
) -> None:
    queue = cluster.queue()
    # Whether its sender or the queue ends it first is a race.
    for _ in range(30):
        job = queue.map(abs, itertools.count(), chunksize=5)
        job[0].result(LIMIT)
        job.cancel()
        with pytest.raises(JobCancelledError):
            job.results(LIMIT)


def test_cancel_by_a_second_process_ends_the_drawing_of_an_iterator(cluster: LocalCluster) -> None:
    queue = cluster.queue()
    drawn = itertools.count()
    job = queue.map(abs, drawn, chunksize=5, name="endless")
    wait_until(lambda: job.progress.succeeded > 50)
    cluster.queue().job("endless").cancel()
    assert job.wait(LIMIT)
    assert job.state is JobState.CANCELLED
    # A thread that draws on would draw thousands in this time.
    time.sleep(0.3)
    before = next(drawn)
    time.sleep(0.5)
    assert next(drawn) == before + 1
    kept = job.results(errors="skip")
    assert len(kept) == job.progress.succeeded


def test_chunks_that_still_lie_in_kafka_never_start(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=1, workers=1, settings={"watermark_chunks": 2})
    audit = tmp_path / "audit"

    def slow(x: int) -> None:
        write(audit, x)
        time.sleep(0.2)

    queue = cluster.queue()
    job = queue.map(slow, range(200), chunksize=1)
    wait_until(lambda: lines(audit))
    job.cancel()
    ran = len(lines(audit))
    assert queue.submit(abs, -1).result(LIMIT) == 1, "it lies behind them in Kafka"
    assert len(lines(audit)) <= ran + 1
    assert job.progress.cancelled >= 190


def test_deadline_ends_a_job_with_what_it_has(cluster: LocalCluster) -> None:
    queue = cluster.queue()
    assert queue.submit(abs, -1).result(LIMIT) == 1  # a node has the queue: what follows takes no time
    job = queue.map(lambda x: time.sleep(60 if x else 0), range(2), chunksize=1, deadline=8)
    single = queue.options(deadline=5).submit(time.sleep, 60)
    with pytest.raises(JobTimeoutError, match="deadline"):
        job.results(LIMIT)
    assert job.results(errors="skip") == [None]
    assert isinstance(job[1].exception(LIMIT), JobTimeoutError)
    assert isinstance(single.exception(LIMIT), JobTimeoutError)
    assert job.state is JobState.CANCELLED
    assert queue.submit(abs, -1).result(LIMIT) == 1, "the slots are free again"


def test_deadline_is_kept_where_no_node_lives(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=1, workers=1)
    with cluster.queue() as queue:
        assert queue.submit(abs, -1).result(LIMIT) == 1
        cluster.workers[0].stop()
        job = queue.map(abs, range(10), deadline=1)
        with pytest.raises(JobTimeoutError, match="deadline"):
            job.results(LIMIT)
        assert [str(future.state) for future in job] == ["cancelled"] * 10


@pytest.mark.parametrize("deadline", [datetime.datetime(1970, 1, 1), datetime.datetime(1969, 1, 1)])
def test_deadline_of_long_ago_has_passed(cluster: LocalCluster, deadline: datetime.datetime) -> None:
    with pytest.raises(JobTimeoutError, match="deadline"):
        cluster.queue().map(time.sleep, [60], deadline=deadline).results(LIMIT)


def test_deadline_that_no_clock_can_tell_is_named(cluster: LocalCluster) -> None:
    with pytest.raises(ValueError, match="deadline is further away than"):
        cluster.queue().map(abs, [1], deadline=datetime.datetime.min)


def test_cancelling_one_task_while_the_first_are_measured_spares_the_rest(cluster: LocalCluster) -> None:
    with cluster.queue() as queue:
        busy = queue.map(time.sleep, [3, 3], chunksize=1)
        wait_until(lambda: busy.progress.running == 2)
        job = queue.map(abs, range(100))
        wait_until(lambda: job.progress.total > 0)
        assert job[0].cancel()
        assert job.results(LIMIT, errors="skip") == list(range(1, 100))


def test_deadline_that_is_kept_changes_nothing(cluster: LocalCluster) -> None:
    job = cluster.queue().map(abs, range(10), deadline=60)
    assert job.results(LIMIT) == list(range(10))
    assert job.state is JobState.SUCCEEDED


def test_single_tasks_are_cancelled_wherever_they_are(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=1, workers=1, settings={"watermark_chunks": 3})
    audit = tmp_path / "audit"

    def slow(x: int) -> int:
        write(audit, x)
        time.sleep(60 if x == 0 else 0.05)
        return x

    queue = cluster.queue()
    blocked = queue.map(slow, [0, 1, 2], chunksize=3)
    wait_until(lambda: lines(audit) == ["0"])
    behind = queue.map(slow, range(100, 130), chunksize=2)
    # One runs, one is to run in the same slot, one lies on the workbench or in Kafka.
    assert blocked[0].cancel()
    assert blocked[2].cancel()
    assert blocked[0].cancelled()
    assert behind[5].cancel()
    assert behind[29].cancel()
    assert behind.cancel_tasks([28, 28, 29]) == [28]
    assert blocked[1].result(LIMIT) == 1
    with pytest.raises(CancelledError, match="task 5 was cancelled"):
        behind.results(LIMIT)
    kept = [x for x in range(30) if x not in (5, 28, 29)]
    assert behind.results(LIMIT, errors="skip") == [100 + x for x in kept]
    assert sorted(map(int, lines(audit))) == [0, 1, *(100 + x for x in kept)]
    assert not behind[7].cancel(), "it has its outcome"
    assert behind[7].result() == 107
    progress = behind.progress
    assert (progress.succeeded, progress.cancelled, progress.queued, progress.running) == (27, 3, 0, 0)
    frame = behind.to_frame()
    assert frame.index[frame.state == "cancelled"].tolist() == [5, 28, 29]
    assert len(list(behind.as_completed())) == 30
    attached = cluster.queue().job(behind.id)
    assert attached[28].cancelled() or isinstance(attached[28].exception(LIMIT), CancelledError)
    assert attached.results(errors="skip") == behind.results(errors="skip")


def test_task_that_is_cancelled_while_its_chunk_runs_never_starts(make_cluster: MakeCluster, tmp_path: Path) -> None:
    audit, go_on = tmp_path / "audit", tmp_path / "go-on"
    cluster = make_cluster(slots=1, workers=1)

    def work(x: int) -> int:
        write(audit, x)
        while x == 0 and not go_on.exists():
            time.sleep(0.02)
        return x

    with cluster.queue() as queue:
        job = queue.map(work, range(4), chunksize=4)
        wait_until(lambda: lines(audit))
        assert job[2].cancel()
        # Once its node has heard of it.
        time.sleep(1.5)
        go_on.touch()
        assert job.results(LIMIT, errors="skip") == [0, 1, 3]
        assert sorted(lines(audit)) == ["0", "1", "3"]


def test_future_of_a_submit_can_be_cancelled(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    queue = cluster.queue()
    future = queue.submit(lambda: (write(audit, 1), time.sleep(60)))
    wait_until(lambda: lines(audit))
    assert future.cancel()
    wait_until(future.cancelled)
    assert queue.submit(abs, -1).result(LIMIT) == 1
