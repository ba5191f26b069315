"""Repair: what has failed runs again in its job, with another function if need be, and more items join it."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import MakeCluster
from test_wipe import wipe
from waiting import wait_until

from yadtq_nb import JobError, LocalCluster, Queue, WorkbenchError
from yadtq_nb.client.inbox import PATIENCE
from yadtq_nb.client.sender import Mailer
from yadtq_nb.model import JobState, Reopen, Seal

__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

LIMIT = 60


def inverse(x: int) -> float:
    return 1 / x


def test_failed_tasks_run_again_with_a_mended_function_and_no_others(queue: Queue, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def broken(x: int) -> int:
        with audit.open("a") as file:
            file.write(f"{x}\n")
        if x % 10 == 3:
            raise ValueError(f"no {x}")
        return x

    def fixed(x: int, sign: int = 1) -> int:
        with audit.open("a") as file:
            file.write(f"fixed {x}\n")
        return sign * x

    job = queue.map(broken, range(200))
    with pytest.raises(ValueError, match="no 3"):
        job.results(LIMIT)
    job.wait(LIMIT)
    assert job.state is JobState.FAILED
    assert job.retryable == 20
    failed, succeeded = job[3], job[4]
    audit.unlink()
    assert job.retry(fixed, kwargs={"sign": -1}) == 20
    assert job.results(LIMIT) == [-x if x % 10 == 3 else x for x in range(200)]
    assert sorted(audit.read_text().split("\n")[:-1]) == sorted(f"fixed {x}" for x in range(3, 200, 10))
    assert job.state is JobState.SUCCEEDED
    assert (job.progress.succeeded, job.progress.failed, job.progress.total) == (200, 0, 200)
    assert isinstance(failed.exception(), ValueError), "a future that has failed stays as it is"
    assert job[3].result(1) == -3
    assert job[4] is succeeded
    assert job.retry() == 0
    assert job.errors().empty
    frame = job.to_frame()
    assert frame["input"].tolist() == list(range(200))
    assert (frame.state == "succeeded").all()
    other = queue.job(job.id)
    assert other.results(LIMIT) == job.results()


def test_retry_without_a_function_calls_the_one_of_the_job_again(queue: Queue, tmp_path: Path) -> None:
    flag = tmp_path / "mended"

    def fails_at_first(x: int) -> int:
        if x % 2 and not flag.exists():
            raise OSError("not yet")
        return x

    job = queue.map(fails_at_first, range(20), chunksize=7)
    job.wait(LIMIT)
    assert job.retry() == 10, "and they fail again"
    job.wait(LIMIT)
    assert job.progress.failed == 10
    assert len(job.errors()) == 10
    assert job.errors().attempt.tolist() == [1] * 10
    flag.touch()
    assert job.retry() == 10
    assert job.results(LIMIT) == list(range(20))


def test_failed_tasks_run_again_while_the_others_still_run(queue: Queue) -> None:
    def work(x: int) -> int:
        if x < 4:
            raise ValueError("early")
        time.sleep(0.2)
        return x

    job = queue.map(work, range(30), chunksize=2)
    wait_until(lambda: job.retryable == 4)
    assert job.retry(lambda x: x) == 4
    assert job.results(LIMIT) == list(range(30))
    assert job.progress.total == 30
    assert queue.job(job.id).results(LIMIT) == list(range(30))


def test_cancelled_tasks_run_again_those_included_that_were_never_fed(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=1, workers=1, settings={"watermark_chunks": 3})
    queue = cluster.queue()
    job = queue.map(lambda x: (time.sleep(0.02), x)[1], range(200), chunksize=1)
    wait_until(lambda: job.progress.succeeded > 5)
    job.cancel()
    assert job.state is JobState.CANCELLED
    done = job.progress.succeeded
    assert job.retry() == 200 - done
    assert job.results(LIMIT) == list(range(200))
    assert job.state is JobState.SUCCEEDED


def test_tasks_cancelled_one_by_one_run_again(queue: Queue) -> None:
    job = queue.map(lambda x: (time.sleep(0.1), x)[1], range(20), chunksize=1)
    cancelled = job.cancel_tasks([18, 19])
    assert cancelled == [18, 19]
    job.wait(LIMIT)
    assert job.retry() == 2
    assert job.results(LIMIT) == list(range(20))
    assert job[19].result(1) == 19


def test_a_job_that_waits_for_another_waits_for_its_repair(queue: Queue) -> None:
    def work(x: int) -> int:
        if x == 1:
            raise ValueError("bad")
        return x

    def slow(x: int) -> int:
        time.sleep(1.0)
        return -x

    job = queue.map(work, range(3))
    job.wait(LIMIT)
    assert queue.submit(abs, job[1]).exception(LIMIT) is not None
    assert job.retry(slow) == 1
    assert queue.submit(lambda x: x * 10, job[1]).result(LIMIT) == -10
    assert queue.submit(sum, job).result(LIMIT) == 1


def test_large_arguments_and_a_large_function_are_sent_again(queue: Queue) -> None:
    ballast = bytes(100_000)

    def broken(data: bytes) -> int:
        raise ValueError("bad")

    def fixed(data: bytes) -> int:
        return len(data) + len(ballast)

    job = queue.map(broken, [bytes(3_000_000), bytes(2_500_000)])
    job.wait(LIMIT)
    assert job.retry(fixed) == 2
    assert job.results(LIMIT) == [3_100_000, 2_600_000]


def test_items_that_cannot_be_read_here_are_sent_again_as_they_are(queue: Queue) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            return eval, ("__import__('os').environ.get('YADTQ_NODE') and 7 or 1/0",)

    job = queue.map(lambda x: 1 / 0, [Odd()])
    job.wait(LIMIT)
    assert job.retry(lambda x: x) == 1
    assert job.results(LIMIT) == [7]


def test_more_items_join_a_job_that_has_ended_and_one_that_runs(queue: Queue) -> None:
    job = queue.map(inverse, [1, 2, 0, 4], name="halves")
    job.wait(LIMIT)
    before = job[0]
    job.extend([5, 8])
    assert len(job) == 6
    assert job.results(LIMIT, errors="skip") == [1, 0.5, 0.25, 0.2, 0.125]
    assert job[0] is before
    assert job.to_frame()["input"].tolist() == [1, 2, 0, 4, 5, 8]
    assert job.retry(lambda x: 1 / x if x else 0) == 1
    job.extend(range(10, 60))
    job.extend(iter([64]))
    assert job.results(LIMIT)[-1] == 1 / 64
    assert len(queue.job("halves").results(LIMIT)) == 57
    assert job.state is JobState.SUCCEEDED
    assert queue.map(inverse, [1, 2, 0, 4], name="halves").id == job.id, "the same cell attaches"


def test_repair_is_seen_by_all_who_have_the_job_also_when_it_had_ended_for_them(
    queue: Queue, shared_cluster: LocalCluster
) -> None:
    job = queue.map(odd_fails, range(6))
    job.wait(LIMIT)
    twin = queue.job(job.id)
    with shared_cluster.queue() as elsewhere:
        theirs = elsewhere.job(job.id)
        for seen in (twin, theirs):
            assert len(seen.errors()) == 3
        assert job.retry(slowly) == 3
        wait_until(lambda: theirs.wait(LIMIT) and theirs.errors().empty)
        for seen in (job, twin, theirs):
            assert seen.results(LIMIT) == list(range(6))
            assert seen[1].result(LIMIT) == 1
        theirs.extend([6, 7])
        wait_until(lambda: len(job) == 8)
        for seen in (job, twin, theirs):
            assert seen.results(LIMIT) == list(range(8))
            assert len(seen.to_frame()) == 8


def test_who_waits_for_a_job_in_another_process_gets_the_tasks_that_join_it_too(
    queue: Queue, shared_cluster: LocalCluster
) -> None:
    job = queue.map(lambda x: (time.sleep(0.2), x)[1], range(8), chunksize=1)
    with shared_cluster.queue() as elsewhere:
        theirs = elsewhere.job(job.id)
        assert len(theirs) == 8
        job.extend(range(8, 12))
        assert theirs.results(LIMIT) == list(range(12))
        assert len(theirs) == len(theirs.to_frame()) == 12
        assert sorted(future.index for future in theirs.as_completed()) == list(range(12))


def test_who_repairs_is_not_taken_for_dead_by_others_nor_by_who_comes_second(
    queue: Queue, shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yadtq_nb.client.inbox._SENDING", 0.0)  # as with a job that is older
    job = queue.map(odd_fails, range(6))
    job.wait(LIMIT)
    with shared_cluster.queue() as elsewhere:
        theirs = elsewhere.job(job.id)
        link: Any = job.link
        send_safely, states = link.mailer.send_safely, list[JobState]()

        def slow_to_send(entry: Any) -> None:
            states.append(theirs.state)
            send_safely(entry)

        monkeypatch.setattr(link.mailer, "send_safely", slow_to_send)
        job.extend([6, 8])
        assert job.results(LIMIT, errors="skip") == [0, 2, 4, 6, 8]
        assert states[0] is JobState.RUNNING, "when the journal is told, before anything is sent"

        store: Any = theirs.link.store  # type: ignore[attr-defined]
        reopen, known = store.reopen, link.store.record(job.id)

        def second(*args: Any, **how: Any) -> int:
            link.inbox.sending(job.id)
            assert link.store.reopen(known, total=8)
            return reopen(*args, **how)

        monkeypatch.setattr(store, "reopen", second)
        with pytest.raises(JobError, match="still being sent"):
            theirs.retry()
        assert job.state is JobState.RUNNING
        link.inbox.sent(job.id)


@pytest.mark.parametrize("how", ["retry", "extend"])
def test_lost_answer_to_a_repair_is_asked_for_again(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, how: Literal["retry", "extend"]
) -> None:
    job = queue.map(odd_fails if how == "retry" else abs, range(6))
    assert job.wait(LIMIT)
    connection = queue._link().store._redis
    call, lost = connection.call, []

    def cut(verb: str, *args: Any) -> Any:
        answer = call(verb, *args)
        if verb == "reopen" and not lost:
            lost.append(answer)
            raise WorkbenchError("Redis cannot be reached: it has done that, and then the connection broke")
        return answer

    monkeypatch.setattr(connection, "call", cut)
    if how == "retry":
        assert job.retry(abs) == 3
    else:
        job.extend([6])
    assert lost
    assert job.results(LIMIT) == list(range(6 if how == "retry" else 7))


def test_cancel_that_is_told_again_does_not_end_what_somebody_has_had_run_again(
    queue: Queue, shared_cluster: LocalCluster
) -> None:
    job = queue.map(time.sleep, [1] * 4, chunksize=1)
    wait_until(lambda: job.progress.running == 2)
    job.cancel()
    with shared_cluster.queue() as elsewhere:
        theirs = elsewhere.job(job.id)
        assert theirs.retry(abs) == 4
        queue._link().inbox._tell_again()  # as to a Redis that was started again, and has lost nothing
        assert theirs.results(LIMIT) == [1] * 4


def test_what_cannot_be_repaired_says_so(queue: Queue) -> None:
    def drawn() -> Any:
        yield 1
        time.sleep(3)
        yield 2

    job = queue.map(inverse, drawn())
    job[0].result(LIMIT)
    assert job.retryable == 0
    with pytest.raises(JobError, match="still being sent"):
        job.retry()
    with pytest.raises(TypeError, match="callable"):
        job.retry(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kwargs go with a function"):
        job.retry(kwargs={})
    job.cancel()
    with pytest.raises(JobError, match="ended before its time"):
        job.extend([3])


def test_nothing_is_lost_or_doubled_when_a_node_dies_in_a_repair(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=2, workers=2)
    queue = cluster.queue()
    job = queue.map(odd_fails, range(100), chunksize=5)
    job.wait(LIMIT)
    assert job.retry(slowly) == 50
    wait_until(lambda: job.progress.succeeded > 60)
    cluster.workers[0].kill()
    assert job.results(LIMIT) == list(range(100))
    assert job.progress.succeeded == 100


def test_store_that_is_away_for_longer_than_a_call_waits_does_not_end_a_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalCluster(slots=1) as cluster, cluster.queue() as queue:
        job = queue.map(odd_fails, range(20), chunksize=1)
        job.wait(LIMIT)
        mailer = queue._link().mailer

        def send(entry: Reopen | Seal) -> None:
            Mailer.send_safely(mailer, entry)
            if isinstance(entry, Reopen):
                cluster.kill_store()
                threading.Timer(PATIENCE + 2, cluster.restart_store).start()

        monkeypatch.setattr(mailer, "send_safely", send)
        assert job.retry(abs) == 10
        assert job.results(LIMIT) == list(range(20))


@pytest.mark.parametrize("while_it_runs", [False, True])
def test_emptied_redis_forgets_no_repair(make_cluster: MakeCluster, while_it_runs: bool) -> None:
    cluster = make_cluster(slots=2, workers=1)
    queue = cluster.queue()
    job = queue.map(odd_fails, range(100), kwargs={"last": 2.0 if while_it_runs else 0.0}, chunksize=5)
    wait_until(lambda: job.retryable == 50 if while_it_runs else job.progress.failed == 50 and job.wait(0))
    assert job.retry(slowly) == 50
    wait_until(lambda: 60 < job.progress.succeeded < 90)
    seen = cluster.queue().job(job.id)
    wipe(cluster, queue.name)
    wait_until(lambda: seen.state is not JobState.RUNNING, seconds=LIMIT)
    while seen.state is not JobState.SUCCEEDED:
        assert seen.progress.failed == 0, "what was replaced has not come back"
        assert seen.retry() > 0
        seen.wait(LIMIT)
    assert seen.results(LIMIT) == list(range(100))
    assert seen.progress.succeeded == 100


def test_emptied_redis_forgets_no_extension(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=2, workers=1)
    queue = cluster.queue()
    job = queue.map(slowly, range(40), chunksize=2)
    job.extend(range(40, 80))
    wait_until(lambda: job.progress.succeeded > 10)
    seen = cluster.queue().job(job.id)
    wipe(cluster, queue.name)
    wait_until(lambda: seen.state is not JobState.RUNNING, seconds=LIMIT)
    if seen.state is not JobState.SUCCEEDED:
        assert seen.retry() > 0
    assert seen.results(LIMIT) == list(range(80))


def odd_fails(x: int, last: float = 0.0) -> int:
    if x % 2:
        raise ValueError("odd")
    if x > 90:
        time.sleep(last)
    return x


def slowly(x: int, last: float = 0.0) -> int:
    time.sleep(0.05)
    return x
