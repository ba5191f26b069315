"""What a job tells: futures, results, progress and frames, also in a coroutine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import MakeCluster
from redis import Redis
from waiting import wait_for_file, wait_until

from yadtq_nb import (
    Job,
    JobError,
    JobState,
    JobTimeoutError,
    LocalCluster,
    Queue,
    State,
    TaskFuture,
)
from yadtq_nb.client import board

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

#: Seconds after which something hangs.
LIMIT = 30

Point = namedtuple("Point", "x y")


@dataclass
class Score:
    mean: float
    runs: int


def square(x: int) -> int:
    return x * x


def odd_fails(x: int) -> int:
    if x % 2:
        raise ValueError(f"{x} is odd")
    return x


def both(x: int, y: str) -> pd.Series[Any]:
    return pd.Series({"x2": 2 * x, "y2": 2 * y})


def table(x: int) -> pd.DataFrame | None:
    return pd.DataFrame({"n": range(x)}) if x else None


# A sequence of futures.


def test_future_of_a_task_that_is_done_looks_at_no_other_task(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def invert(x: int) -> float:
        return 1 / (x % 3)

    job = queue.map(invert, range(30), chunksize=10)
    right = job.results(LIMIT, errors="return")
    # To go through the rows for each future would take a time that grows with the square of their number.
    monkeypatch.setattr(board.Outcomes, "rows", None)
    for index, future in enumerate(job):
        if index % 3:
            assert future.result(0) == right[index] == 1 / (index % 3)
        else:
            assert isinstance(future.exception(0), ZeroDivisionError)


def test_single_call_is_found_by_the_name_that_was_made_up_for_it(queue: Queue) -> None:
    future = queue.submit(abs, -3)
    assert future.result(LIMIT) == 3
    assert queue.job(future.job.name).results(LIMIT) == [3]  # type: ignore[attr-defined]  # a TaskFuture


def test_job_is_a_sequence_of_real_futures(queue: Queue) -> None:
    job = queue.map(square, range(5))
    assert isinstance(job, Job)
    assert isinstance(job, Sequence)
    assert len(job) == 5
    assert all(isinstance(future, concurrent.futures.Future) for future in job)
    assert [future.result(LIMIT) for future in job] == [0, 1, 4, 9, 16]
    assert job[3] is job[3] is job[-2]
    assert job[1:4] == [job[1], job[2], job[3]]
    assert next(reversed(job)) is job[4]
    assert job.index(job[2]) == 2
    for index in (5, -6):
        with pytest.raises(IndexError):
            job[index]


def test_standard_wait_and_as_completed_take_a_job(queue: Queue) -> None:
    job = queue.map(odd_fails, range(20))
    done, not_done = concurrent.futures.wait(job, LIMIT)
    assert (len(done), len(not_done)) == (20, 0)
    assert set(concurrent.futures.as_completed(job, LIMIT)) == set(job)
    done, _ = concurrent.futures.wait(
        queue.map(odd_fails, [1, 2]), LIMIT, return_when=concurrent.futures.FIRST_EXCEPTION
    )
    assert any(future.exception() for future in done)


def test_callbacks_are_called_and_may_send_more_work(queue: Queue) -> None:
    called: list[concurrent.futures.Future[Any]] = []
    all_called = threading.Event()

    def callback(future: concurrent.futures.Future[Any]) -> None:
        called.append(queue.submit(square, future.result()))
        if len(called) == 3:
            all_called.set()

    job = queue.map(square, [1, 2, 3])
    for future in job:
        future.add_done_callback(callback)
    assert all_called.wait(LIMIT)
    assert sorted(future.result(LIMIT) for future in called) == [1, 16, 81]


def test_callback_that_waits_for_another_task_holds_up_nothing(queue: Queue, tmp_path: Path) -> None:
    gate, told = str(tmp_path / "gate"), threading.Event()
    first, second = queue.map(wait_for_file, [gate]), queue.map(lambda _: wait_for_file(f"{gate}-2"), [0])
    second[0].done()

    def callback(_: concurrent.futures.Future[Any]) -> None:
        assert second.results(LIMIT) == [f"{gate}-2"]
        told.set()

    first[0].add_done_callback(callback)
    Path(gate).touch()
    assert first.results(LIMIT) == [gate]
    assert queue.map(square, range(5)).results(LIMIT) == [0, 1, 4, 9, 16]

    async def awaited() -> Any:
        return await asyncio.wrap_future(queue.submit(square, 3))

    assert asyncio.run(awaited()) == 9
    assert not told.is_set()
    Path(f"{gate}-2").touch()
    assert told.wait(LIMIT)


def test_callback_that_raises_disturbs_nobody(queue: Queue) -> None:
    job = queue.map(square, range(10))
    job[0].add_done_callback(lambda _: 1 / 0)
    assert job.results(LIMIT) == [x * x for x in range(10)]
    assert queue.map(square, [3]).results(LIMIT) == [9]


def test_futures_asked_for_before_and_after_the_end_say_the_same(queue: Queue) -> None:
    job = queue.map(odd_fails, range(6))
    before = list(job)[:3]
    assert job.wait(LIMIT)
    after = list(job)
    assert before == after[:3]
    assert [f.exception() is None for f in after] == [True, False] * 3


def test_future_knows_its_job_key_and_state(queue: Queue) -> None:
    job = queue.map(odd_fails, [2, 3], name="keys")
    future = job[1]
    assert isinstance(future, TaskFuture)
    assert future.exception(LIMIT) is not None
    assert (future.job, future.index, future.key, future.state) == (job, 1, "keys[1]", State.FAILED)
    assert "keys[1]" in repr(future)
    assert not future.cancel()


# Results.


def test_failing_task_stops_nothing(queue: Queue) -> None:
    job = queue.map(odd_fails, range(100))
    with pytest.raises(ValueError, match="1 is odd"):
        job.results(LIMIT)
    assert job.results(LIMIT, errors="skip") == list(range(0, 100, 2))
    returned = job.results(LIMIT, errors="return")
    assert [type(value) for value in returned] == [int, ValueError] * 50
    assert str(returned[99]) == "99 is odd"
    assert job.state == JobState.FAILED


def test_first_failure_in_order_is_raised_before_the_rest_is_done(queue: Queue, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    job = queue.map(lambda x: wait_for_file(gate) if x == 2 else odd_fails(x), [0, 1, 2], chunksize=1)
    with pytest.raises(ValueError, match="1 is odd"):
        job.results(LIMIT)
    assert not job.wait(0)
    Path(gate).touch()
    assert job.results(LIMIT, errors="skip") == [0, gate]


def test_results_and_wait_give_up_after_their_timeout(queue: Queue, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    job = queue.map(wait_for_file, [gate])
    with pytest.raises(JobTimeoutError, match=r"0\.05 s") as caught:
        job.results(0.05)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.job == job.name
    assert job.wait(0.05) is False
    with pytest.raises(TimeoutError):
        job[0].result(0.05)
    Path(gate).touch()
    assert job.wait(LIMIT) is True
    assert job.results() == [gate]


def test_way_to_treat_errors_that_is_unknown_is_refused(queue: Queue) -> None:
    with pytest.raises(ValueError, match="'raise', 'return' or 'skip'"):
        queue.map(square, [1]).results(errors="ignore")  # type: ignore[arg-type]  # that is the test


def test_futures_come_in_order_of_completion(queue: Queue, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    job = queue.map(lambda x: wait_for_file(gate) if x == 0 else x, range(6), chunksize=1)
    seen = []
    for future in job.as_completed():
        seen.append(future.result())
        if len(seen) == 5:
            Path(gate).touch()
    assert sorted(seen[:5]) == [1, 2, 3, 4, 5]
    assert seen[5] == gate


def test_news_that_was_trimmed_before_it_was_heard_is_made_up_for(queue: Queue, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = queue.map(lambda x: (wait_for_file(str(gate)), x * x)[1], range(100), chunksize=1)
    futures = list(job)
    with queue._link().inbox._news._redis._lock:  # the client hears nothing more
        gate.touch()
        wait_until(lambda: job.progress.succeeded == 100)
        with Redis.from_url(queue._settings().redis) as store:
            store.xtrim(f"{{yadtq:{queue.name}}}:news", maxlen=1, approximate=False)
    assert [future.result(LIMIT) for future in futures] == [x * x for x in range(100)]
    assert job.results(LIMIT) == [x * x for x in range(100)]


def test_results_after_the_queue_was_closed_raise_and_do_not_hang(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    with shared_cluster.queue() as queue:
        done = queue.map(square, [2])
        assert done.wait(LIMIT)
        open_job = queue.map(wait_for_file, [gate], name="closed")
    assert done.results(LIMIT) == [4]
    with pytest.raises(JobError, match="closed"):
        open_job.results(LIMIT)
    Path(gate).touch()
    with shared_cluster.queue() as queue:
        assert queue.job("closed").results(LIMIT) == [gate]


# Progress.


def test_progress_counts_tasks_by_state(make_cluster: MakeCluster, tmp_path: Path) -> None:
    queue = make_cluster(2).queue()
    gate = str(tmp_path / "gate")
    job = queue.map(lambda x: (wait_for_file(gate), odd_fails(x)), range(10), chunksize=1)
    wait_until(lambda: job.progress.running == 2)
    progress = job.progress
    assert (progress.total, progress.queued, progress.running) == (10, 8, 2)
    assert (progress.succeeded, progress.failed, progress.cancelled) == (0, 0, 0)
    assert (progress.rate, progress.eta) == (0, None)
    assert job.state == JobState.RUNNING
    Path(gate).touch()
    assert job.wait(LIMIT)
    progress = job.progress
    assert (progress.queued, progress.running, progress.succeeded, progress.failed) == (0, 0, 5, 5)
    assert progress.rate > 0
    assert progress.eta == 0
    assert progress.elapsed == job.progress.elapsed, "the clock of a finished job stands still"
    assert "5 of 10 succeeded, 5 failed" in str(job)


def test_progress_estimates_the_time_that_is_left(queue: Queue, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    job = queue.map(lambda x: x or wait_for_file(gate), range(4), chunksize=1)
    wait_until(lambda: job.progress.succeeded == 3)
    progress = job.progress
    assert progress.eta == pytest.approx(progress.elapsed / 3, rel=0.01)
    Path(gate).touch()
    assert job.wait(LIMIT)


def test_workers_and_jobs_are_tables(make_cluster: MakeCluster) -> None:
    queue = make_cluster(slots=2, workers=2).queue()
    job = queue.map(odd_fails, range(4), name="a table")
    assert job.wait(LIMIT)
    workers = queue.workers()
    assert list(workers["status"]) == ["live", "live"]
    assert list(workers["slots"]) == [2, 2]
    assert set(job.to_frame()["worker"]) <= set(workers.index)
    row = queue.jobs().loc["a table"]
    assert (row["id"], row["state"], row["total"], row["succeeded"], row["failed"]) == (job.id, "failed", 4, 2, 2)
    assert row["expires"] > row["created"]


# Coroutines.


def test_awaiting_a_job_lets_others_run(queue: Queue, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def opens() -> None:
        await asyncio.sleep(0)
        gate.touch()

    async def main() -> Any:
        job = queue.map(wait_for_file, [str(gate)])
        return await asyncio.wait_for(asyncio.gather(job, opens()), LIMIT)

    assert asyncio.run(main())[0] == [str(gate)]


def test_awaiting_raises_what_results_raises(queue: Queue) -> None:
    async def main() -> None:
        await queue.map(odd_fails, range(5))

    with pytest.raises(ValueError, match="1 is odd"):
        asyncio.run(main())


def test_futures_come_in_an_async_for(queue: Queue) -> None:
    async def main() -> list[Any]:
        job = queue.map(square, range(500))
        by_index = [await asyncio.wrap_future(future) async for future in job]
        assert by_index == [future.result() for future in job]
        return [future.result() async for future in job.as_completed()]

    assert sorted(asyncio.run(main())) == [x * x for x in range(500)]


def test_one_future_can_be_awaited(queue: Queue) -> None:
    async def main() -> Any:
        return await asyncio.wait_for(asyncio.wrap_future(queue.submit(square, 3)), LIMIT)

    assert asyncio.run(main()) == 9


def test_awaiting_that_is_cancelled_as_by_an_interrupted_kernel_says_that_the_job_goes_on(
    queue: Queue, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    job = queue.map(wait_for_file, [str(gate)])

    async def main() -> None:
        async def cell() -> None:
            await job

        task = asyncio.create_task(cell())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError, match=f"{job.name}' goes on"):
            await task

    asyncio.run(main())
    gate.touch()
    assert job.results(LIMIT) == [str(gate)]


def test_await_that_is_cancelled_disturbs_no_one(queue: Queue, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = queue.map(wait_for_file, [str(gate)])

    async def main() -> Any:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(job, 0.05)
        gate.touch()
        return await job

    assert asyncio.run(main()) == [str(gate)]
    assert queue.map(square, [3]).results(LIMIT) == [9]


# As a table.


def test_frame_has_a_row_for_each_task(queue: Queue) -> None:
    frame = queue.map(odd_fails, [0, 1, 2]).to_frame()
    assert list(frame.columns) == ["input", "value", "state", "error", "worker", "started", "seconds", "attempt"]
    assert list(frame["input"]) == [0, 1, 2]
    assert frame["value"].tolist() == [0, pd.NA, 2]
    assert list(frame["state"]) == ["succeeded", "failed", "succeeded"]
    assert frame["error"][1] == "ValueError: 1 is odd"
    assert frame["error"].isna().tolist() == [True, False, True]
    assert list(frame["attempt"]) == [1, 1, 1]
    assert (frame["seconds"] >= 0).all()
    assert abs((frame["started"] - pd.Timestamp.now("UTC")).dt.total_seconds()).max() < LIMIT


@pytest.mark.parametrize(
    ("make", "columns"),
    [
        (lambda x: {"mean": x / 2, "runs": x}, ["mean", "runs"]),
        (lambda x: Score(x / 2, x), ["mean", "runs"]),
        (lambda x: Point(x / 2, x), ["x", "y"]),
        (lambda x: (x / 2, x), ["value"]),
    ],
    ids=["dict", "dataclass", "named tuple", "plain tuple"],
)
def test_records_become_columns(queue: Queue, make: Callable[[int], Any], columns: list[str]) -> None:
    frame = queue.map(make, [2, 4]).to_frame()
    assert list(frame.columns)[1 : 1 + len(columns)] == columns
    if len(columns) == 2:
        assert frame[columns].to_numpy().tolist() == [[1.0, 2], [2.0, 4]]


def test_inputs_of_several_iterables_are_named_by_parameters(queue: Queue) -> None:
    frame = queue.map(lambda depth, rate: depth * rate, [1, 2], [0.1, 0.2]).to_frame()
    assert list(frame.columns)[:3] == ["depth", "rate", "value"]
    assert frame["depth"].tolist() == [1, 2]
    frame = queue.starmap(lambda depth, rate=1.0: depth * rate, [(1,), (2, 0.5)]).to_frame()
    assert frame["depth"].tolist() == [1, 2]
    frame = queue.submit(lambda depth, *, rate: depth * rate, 3, rate=2).job.to_frame()
    assert frame[["depth", "rate", "value"]].to_numpy().tolist() == [[3, 2, 6]]


def test_frame_of_a_job_of_a_generator_is_whole(queue: Queue) -> None:
    frame = queue.map(square, (x for x in range(3000))).to_frame()
    assert frame["value"].tolist() == [x * x for x in range(3000)]
    assert frame["input"].tolist() == list(range(3000))


def test_errors_are_a_frame_by_task_or_by_type_and_line(queue: Queue) -> None:
    def pick(x: int) -> int:
        if x % 4 == 1:
            raise ValueError(f"{x} is odd")
        if x == 2:
            raise KeyError(x)
        return x

    job = queue.map(pick, range(12), chunksize=3)
    assert job.wait(LIMIT)
    frame = job.errors()
    assert frame.index.tolist() == [1, 2, 5, 9]
    assert frame.type.tolist() == ["ValueError", "KeyError", "ValueError", "ValueError"]
    assert frame.message.tolist() == ["1 is odd", "2", "5 is odd", "9 is odd"]
    assert frame["where"].str.contains(r"test_job\.py, line \d+, in .*pick").all()
    assert frame.traceback.str.startswith("Traceback").all()
    assert frame.attempt.tolist() == [1] * 4
    grouped = job.errors(grouped=True)
    assert grouped["count"].tolist() == [3, 1]
    assert grouped["first"].tolist() == [1, 2]
    assert grouped.index.get_level_values("type").tolist() == ["ValueError", "KeyError"]
    whole = queue.map(abs, [1])
    assert whole.wait(LIMIT)
    assert len(whole.errors()) == len(whole.errors(grouped=True)) == 0
    assert whole.errors().columns.tolist() == frame.columns.tolist()


def test_group_of_exceptions_is_raised_where_its_first_is(queue: Queue) -> None:
    async def several(x: int) -> None:
        async def fails() -> None:
            raise ValueError(x)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fails())
            tasks.create_task(asyncio.to_thread(int, "no number"))

    async def gives_up(x: int) -> None:
        try:
            await several(x)
        except ExceptionGroup as exc:
            raise RuntimeError("given up") from exc

    for fn, raised, function in ((several, "ExceptionGroup", "fails"), (gives_up, "RuntimeError", "gives_up")):
        job = queue.map(fn, [0, 1])
        job.wait(LIMIT)
        (place,) = job.errors(grouped=True).index
        assert place[0] == raised
        assert re.fullmatch(rf"test_job\.py, line \d+, in {function}", place[1])


def test_frame_has_several_iterables_as_columns_and_series_as_rows(queue: Queue) -> None:
    frame = queue.map(both, [1, 2], ["a", "b"]).to_frame()
    assert list(frame.columns[:4]) == ["x", "y", "x2", "y2"]
    assert frame[["x", "y", "x2", "y2"]].values.tolist() == [[1, "a", 2, "aa"], [2, "b", 4, "bb"]]


def test_frames_of_a_job_are_put_below_one_another(queue: Queue) -> None:
    job = queue.map(table, [2, 0, 1])
    assert job.to_frame().index.tolist() == [(0, 0), (0, 1), (2, 0)]
    frame = job.to_frame(meta=True, dtype_backend="numpy_nullable")
    assert frame["input"].tolist() == [2, 2, 0, 1]
    assert frame["n"].tolist() == [0, 1, pd.NA, 0]


def test_inputs_that_have_gone_are_missing_or_left_out(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job = queue.map(square, range(10), chunksize=5)
    job.results()
    store = job._link.store
    kept = list(store.inputs(job.id))
    monkeypatch.setattr(store, "inputs", lambda job: iter(kept[1:]))
    assert job.to_frame()["input"].tolist() == [pd.NA] * 5 + [5, 6, 7, 8, 9]
    monkeypatch.setattr(store, "inputs", lambda job: iter(()))
    frame = job.to_frame()
    assert list(frame.columns[:2]) == ["value", "state"]
    assert frame["value"].tolist() == [x * x for x in range(10)]
