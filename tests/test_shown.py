"""What a card is told of real jobs: errors by type and line, slow tasks, workers' load, a queue's jobs."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable

import pandas as pd
import pytest

from yadtq_nb import LocalCluster, Queue
from yadtq_nb.client.shown import Overview, place
from yadtq_nb.notebook.snapshot import queue_snapshot, snapshot

pytestmark = pytest.mark.one_stack

__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])


def _eventually(ready: Callable[[], bool], seconds: float = 15.0) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.05)


def _fails_in_two_ways(item: int) -> int:
    if item % 5 == 0:
        raise ValueError(f"bad item {item}")
    if item == 7:
        raise KeyError(item)
    return item


def test_failures_are_counted_by_type_and_line_with_the_first_traceback(queue: Queue) -> None:
    job = queue.map(_fails_in_two_ways, range(20), chunksize=3)
    job.wait(20)
    shown = snapshot(job)
    values, keys = shown["errors"]
    line = _fails_in_two_ways.__code__.co_firstlineno + 2
    assert (values["type"], values["count"], values["first"]) == ("ValueError", 4, 0)
    assert values["place"] == f"test_shown.py, line {line}, in _fails_in_two_ways"
    assert values["message"] == "bad item 0"
    assert values["traceback"].endswith("ValueError: bad item 0")
    assert (keys["type"], keys["count"], keys["first"]) == ("KeyError", 1, 7)
    assert shown["errors_seen"] == shown["counts"]["failed"] == 5


def test_failures_of_an_attached_job_are_the_same(queue: Queue) -> None:
    job = queue.map(_fails_in_two_ways, range(10), chunksize=1)
    job.wait(20)
    assert snapshot(queue.job(job.id))["errors"] == snapshot(job)["errors"]


def test_failures_past_a_bound_are_not_fetched_and_the_card_says_so(queue: Queue) -> None:
    job = queue.map(_fails_in_two_ways, [0] * 210, chunksize=1)
    job.wait(30)
    shown = snapshot(job)
    assert shown["counts"]["failed"] == 210
    assert shown["errors_seen"] == shown["errors"][0]["count"] == 200


def test_task_that_runs_for_long_is_told_by_its_index(queue: Queue) -> None:
    job = queue.map(time.sleep, [0.0, 0.0, 30.0, 0.0], chunksize=2)
    try:
        _eventually(lambda: [row["index"] for row in snapshot(job)["running"]] == [2])
        first = snapshot(job)["running"][0]["seconds"]
        _eventually(lambda: snapshot(job)["running"][0]["seconds"] > first + 1)
        (row,) = snapshot(job)["workers"]
        assert row["busy"] == 1
        assert row["memory"] > 10
    finally:
        job.cancel()


def test_overview_has_the_newest_jobs_and_all_workers(cluster: LocalCluster) -> None:
    queue = cluster.queue()
    for name in ("first", "second"):
        queue.map(abs, range(10), name=name).wait(20)
    shown = queue_snapshot(Overview(queue._link()))
    assert [job["name"] for job in shown["jobs"]] == ["second", "first"]
    assert [job["state"] for job in shown["jobs"]] == ["succeeded"] * 2
    assert shown["fleet"]["live"] == len(shown["workers"]) == 1


def test_workers_are_a_dataframe_and_what_is_made_from_it_is_a_plain_one(queue: Queue) -> None:
    frame = queue.workers()
    assert isinstance(frame, pd.DataFrame)
    for made in (frame.copy(), frame[frame["slots"] > 0], frame.head(1), frame[["slots"]], frame.reset_index()):
        assert type(made) is pd.DataFrame
    travelled = pickle.loads(pickle.dumps(frame))
    pd.testing.assert_frame_equal(pd.DataFrame(travelled), pd.DataFrame(frame))
    with pytest.raises(NotImplementedError):
        travelled._ipython_display_()


@pytest.mark.parametrize(
    ("traceback", "where"),
    [
        ('Traceback:\n  File "/tmp/ipykernel_12/34.py", line 3, in fit\nValueError: x\n', "cell, line 3, in fit"),
        ('  File "/home/a/fit.py", line 1, in a\n  File "/home/a/load.py", line 7, in b\nE\n', "load.py, line 7, in b"),
        ('  File "C:\\fit.py", line 2, in <module>\n', "fit.py, line 2"),
        ("", ""),
    ],
)
def test_place_is_the_innermost_line(traceback: str, where: str) -> None:
    assert place(traceback) == where
