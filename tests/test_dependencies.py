"""Futures and jobs as arguments: awaited on the queue and passed by value, on both stacks."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
from stacks import ROOT, MakeCluster

from yadtq_nb import DependencyError, ItemPickleError, JobError, JobState, LocalCluster, Queue

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

LIMIT = 45


def when(condition: Callable[[], object], what: str = "", seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def gated(x: Any, gate: str) -> Any:
    """Give x back once a file is there."""
    while not Path(gate).exists():
        time.sleep(0.01)
    return x


def waiting(queue: Queue) -> int:
    """Return how many chunks of a queue wait aside."""
    client = queue._link().store._redis
    return int(client.client.zcard(client.key("delayed")))


# By value.


def test_future_and_job_as_arguments_are_their_values(queue: Queue) -> None:
    future = queue.submit(pow, 2, 5)
    job = queue.map(abs, range(-3, 3))
    assert queue.submit(lambda x, y: (x, y), future, job).result(LIMIT) == (32, [3, 2, 1, 0, 1, 2])
    assert queue.submit(lambda *, x, y: (x, y), x=job[0], y=future).result(LIMIT) == (3, 32)


def test_they_may_lie_anywhere_in_an_item_and_in_what_all_calls_share(queue: Queue) -> None:
    future, job = queue.submit(str.upper, "a"), queue.map(abs, range(-2, 0))
    deep = {"list": [future, (job, 1)], "dict": {"job": job[1:]}}
    assert queue.map(lambda item: item, [deep]).results(LIMIT) == [{"list": ["A", ([2, 1], 1)], "dict": {"job": [1]}}]
    shared = queue.map(lambda x, table: x + sum(table), range(40), kwargs={"table": job})
    assert shared.results(LIMIT) == [x + 3 for x in range(40)]
    held = queue.submit(abs, -7)  # in the function itself
    assert queue.map(lambda x: (x, held), [1, 2]).results(LIMIT) == [(1, 7), (2, 7)]


def test_map_over_a_job_and_zipped_with_others_gives_its_values(queue: Queue) -> None:
    job = queue.map(lambda x: x * x, range(30))
    assert queue.map(lambda x: x + 1, job).results(LIMIT) == [x * x + 1 for x in range(30)]
    assert queue.map(lambda x, y: (x, y), job, range(30)).results(LIMIT) == [(x * x, x) for x in range(30)]
    assert queue.starmap(lambda x, y: x - y, queue.map(lambda x: (x, 1), range(5))).results(LIMIT) == [-1, 0, 1, 2, 3]
    drawn = queue.map(lambda x: x * x, iter(range(30)))
    assert queue.map(lambda x: -x, drawn).results(LIMIT) == [-x * x for x in range(30)]


def test_large_arrays_and_classes_of_the_notebook_arrive_as_they_were(queue: Queue) -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

        def far(self) -> bool:
            return self.x > 100

    array = queue.submit(lambda n: np.arange(n, dtype=float), 300_000)
    points = queue.map(Point, range(99, 103))
    assert queue.submit(lambda a: float(a.sum()), array).result(LIMIT) == float(np.arange(300_000).sum())
    assert queue.map(lambda p: (type(p) is Point, p.far()), points).results(LIMIT) == [
        (True, x > 100) for x in range(99, 103)
    ]


def test_frame_shows_what_an_argument_was(queue: Queue) -> None:
    job = queue.map(abs, range(-2, 0), name=f"first-{time.time()}")
    frame = queue.map(lambda x: x, job).to_frame()
    assert list(map(repr, frame["input"])) == [f"{job.name}[0]", f"{job.name}[1]"]
    assert frame["value"].tolist() == [2, 1]


def test_job_that_another_process_has_sent_is_an_argument_too(queue: Queue, run_script: Any) -> None:
    run_script("queue.map(abs, range(-4, 0), name='elsewhere').wait()")
    assert queue.submit(sum, queue.job("elsewhere")).result(LIMIT) == 10
    assert run_script("print(queue.map(lambda x: x + 1, queue.job('elsewhere')).results(30))") == ["[5, 4, 3, 2]"]


def test_task_may_need_a_task_that_it_has_sent_itself(queue: Queue) -> None:
    def chain(x: int) -> str:
        first = queue.submit(abs, x)
        return str(queue.submit(lambda y: y + 1, first).job.id)

    id = queue.submit(chain, -5).result(LIMIT)
    when(lambda: queue._link().store.record(id) is not None)
    assert queue.job(id).results(LIMIT) == [6]


# Where they cannot be.


def test_future_of_another_queue_is_refused_when_it_is_sent(cluster: LocalCluster) -> None:
    with cluster.queue("other") as other, cluster.queue() as queue, cluster.queue() as same:
        job = other.map(abs, [1], name="foreign")
        for send in (
            lambda: queue.submit(abs, job[0]),
            lambda: queue.submit(abs, x=[job]),
            lambda: queue.options(name="named").submit(abs, [job[0]]),
            lambda: queue.map(abs, job),
            lambda: queue.map(abs, [1, job[0]]),
            lambda: queue.map(abs, [1], kwargs={"x": job}),
        ):
            with pytest.raises(JobError, match="'foreign' belongs to queue 'other'"):
                send()
        deep = queue.map(lambda x: x, [[job[0]], [1]]).results(LIMIT, errors="return")
        assert isinstance(deep[0], ItemPickleError), "deeper in an item, which is pickled later"
        assert "belongs to queue 'other'" in str(deep[0])
        assert deep[1] == [1]
        assert same.submit(abs, queue.submit(abs, -3)).result(LIMIT) == 3


def test_future_is_pickled_as_an_argument_only(queue: Queue) -> None:
    job = queue.map(abs, [1])
    for act in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"only as arguments of map, starmap and submit.*queue\.job"):
            act(job)
        with pytest.raises(TypeError, match="only as arguments"):
            act(job[0])


# Without a slot, and as early as can be.


def test_no_slot_is_held_by_what_waits(make_cluster: MakeCluster, tmp_path: Path) -> None:
    queue = make_cluster(slots=1).queue()
    gate = tmp_path / "gate"
    # Tasks of several jobs begin in whatever order: this one must not come behind the gate.
    assert queue.submit(lambda x: x, 1).result(LIMIT) == 1
    held = queue.map(gated, [1, 2], [str(gate)] * 2, chunksize=1)
    dependants = [queue.submit(lambda x, y: x + y, job, n) for n, job in enumerate([held[0], held[1], held[0]])]
    whole = queue.submit(sum, held)
    when(lambda: waiting(queue) == 4, "all four wait aside")
    gate.touch()
    assert [future.result(LIMIT) for future in dependants] == [1, 3, 3]
    assert whole.result(LIMIT) == 3
    assert waiting(queue) == 0


def test_map_over_a_job_begins_before_that_has_ended(make_cluster: MakeCluster, tmp_path: Path) -> None:
    queue = make_cluster(slots=2).queue()
    gate = tmp_path / "gate"
    first = queue.map(lambda x: gated(x, str(gate)) if x == 7 else x, range(8), chunksize=1)
    second = queue.map(lambda x: x * 10, first, chunksize=1)
    assert [second[index].result(LIMIT) for index in range(7)] == [x * 10 for x in range(7)]
    assert first.state is JobState.RUNNING
    assert not second[7].done()
    gate.touch()
    assert second.results(LIMIT) == [x * 10 for x in range(8)]


def test_dependants_that_are_sent_first_run_last(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=1)
    queue = cluster.queue()
    cluster.workers[0].stop()
    audit = tmp_path / "audit"

    def note(name: str, *_: Any) -> str:
        with audit.open("a") as file:
            file.write(f"{name}\n")
        return name

    first = queue.map(note, ["a", "b"], chunksize=1)
    second = queue.map(note, ["c", "d"], [first, first], chunksize=1)
    third = queue.submit(note, "e", second)
    cluster.workers[0].start()
    assert third.result(LIMIT) == "e"
    assert sorted(audit.read_text().split()[:2]) == ["a", "b"]
    assert audit.read_text().split()[4] == "e"


def test_dependant_with_a_later_start_waits_for_both(cluster: LocalCluster) -> None:
    queue = cluster.queue()
    began = time.monotonic()
    slow = queue.submit(lambda: time.sleep(0.3))
    late = queue.options(start_after=1.5).submit(lambda _: time.monotonic(), slow)
    early = queue.options(start_after=0.1).submit(lambda _: time.monotonic(), slow)
    assert early.result(LIMIT) - began >= 0.3
    assert late.result(LIMIT) - began >= 1.5


def test_dependant_that_is_tried_again_waits_for_nothing_once_more(cluster: LocalCluster, tmp_path: Path) -> None:
    queue, tried = cluster.queue(), tmp_path / "tried"

    def flaky(x: int) -> int:
        if not tried.exists():
            tried.touch()
            raise OSError
        return x

    assert queue.options(retries=1, backoff=0.01).submit(flaky, queue.submit(abs, -3)).result(LIMIT) == 3


# Chains of failures.


def test_failure_goes_down_a_chain_of_jobs_and_says_where_it_began(queue: Queue) -> None:
    def broken(x: int) -> int:
        if x == 3:
            raise ValueError("the disk is square")
        return x

    stamp = f"{time.time():.6f}"
    load = queue.map(broken, range(5), chunksize=5, name=f"load-{stamp}")
    clean = queue.map(lambda x: x + 1, load, chunksize=2, name=f"clean-{stamp}")
    fit = queue.map(lambda x: x * 2, clean, chunksize=5, name=f"fit-{stamp}")
    results = fit.results(LIMIT, errors="return")
    assert results[:3] + results[4:] == [2, 4, 6, 10], "just the task that needs it fails"
    error = results[3]
    assert isinstance(error, DependencyError)
    assert error.index == 3
    assert error.needs == (f"{clean.name}[3]", f"{load.name}[3]")
    assert str(error) == (
        f"{fit.name}[3] was not run: it needs {clean.name}[3], which needs {load.name}[3], which has no value: "
        "ValueError: the disk is square"
    )
    trace = str(error.__cause__)
    assert "in broken" in trace, "the line where it began"
    assert trace.index("ValueError: the disk is square") < trace.index(f"{clean.name}[3] was not run")
    last = queue.submit(sum, fit).exception(LIMIT)
    assert isinstance(last, DependencyError)
    assert last.needs == (f"{fit.name}[3]", *error.needs)


def test_failed_dependant_is_not_tried_again(queue: Queue, tmp_path: Path) -> None:
    bad = queue.submit(lambda: 1 / 0)
    job = queue.map(lambda x: x, [bad], retries=3, backoff=0.01)
    assert isinstance(job.results(LIMIT, errors="return")[0], DependencyError)
    assert job.to_frame().attempt.tolist() == [1]
    shared = queue.map(lambda x, y: x, range(4), kwargs={"y": bad}).results(LIMIT, errors="return")
    assert {type(error) for error in shared} == {DependencyError}
    assert "ZeroDivisionError" in str(shared[0])


@pytest.mark.parametrize("way", ["job", "future", "deadline"])
def test_dependants_of_what_is_cancelled_fail_and_wait_no_longer(
    make_cluster: MakeCluster, tmp_path: Path, way: str
) -> None:
    queue = make_cluster(slots=1).queue()
    gate = str(tmp_path / "gate")
    deadline = 2.0 if way == "deadline" else None
    first = queue.map(gated, [1, 2], [gate] * 2, chunksize=1, name="first", deadline=deadline)
    second = queue.map(lambda x: x, first, chunksize=1, name="second")
    third = queue.submit(sum, second)
    when(lambda: waiting(queue) == 3)
    if way == "job":
        first.cancel()
    elif way == "future":
        first[1].cancel()
        Path(gate).touch()  # one slot: first[0] is in it
    error = second[1].exception(10)
    assert isinstance(error, DependencyError)
    assert error.needs == ("first[1]",)
    assert ("deadline" if way == "deadline" else "cancelled") in error.reason
    Path(gate).touch()
    last = third.exception(10)
    assert isinstance(last, DependencyError)
    assert last.needs[-1].startswith("first[")


def test_dependant_of_a_deleted_job_says_that_it_was_deleted(queue: Queue) -> None:
    job = queue.map(abs, [-1])
    future = job[0]
    assert future.result(30) == 1
    job.delete()
    for what in (future, job):
        with pytest.raises(DependencyError, match=r"JobNotFoundError.*was deleted"):
            queue.submit(str, what).result(30)


def test_dependant_can_be_cancelled_while_it_waits(make_cluster: MakeCluster, tmp_path: Path) -> None:
    queue = make_cluster(slots=2).queue()
    gate = str(tmp_path / "gate")
    first = queue.submit(gated, 1, gate)
    job, future, other = queue.map(abs, [first] * 3), queue.submit(abs, first), queue.submit(abs, first)
    when(lambda: waiting(queue) >= 3)
    assert job.cancel() == 3
    assert future.cancel()
    Path(gate).touch()
    assert other.result(LIMIT) == 1
    assert job.state is JobState.CANCELLED
    assert job.progress.succeeded == 0
    when(lambda: waiting(queue) == 0)


# What dies meanwhile.


def test_client_that_is_killed_after_sending_is_not_needed(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=1)
    gate, config = tmp_path / "gate", tmp_path / "config.json"
    config.write_bytes(msgspec.json.encode(cluster.config))
    script = f"""
        import os, time
        from yadtq_nb import Queue
        def gated(x):
            while not os.path.exists({str(gate)!r}):
                time.sleep(0.01)
            return x
        queue = Queue({cluster.queue().name!r})
        first = queue.map(gated, range(4), name="first", chunksize=1)
        second = queue.map(lambda x: x + 1, first, name="second", chunksize=1)
        third = queue.options(name="third").submit(lambda x: sum(x), second)
        while not all(queue._link().store.record(job.id).sealed for job in (first, second, third.job)):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    """
    environment = {**os.environ, "YADTQ_CONFIG": str(config), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, cwd=tmp_path, capture_output=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    gate.touch()
    assert cluster.queue().job("third").results(LIMIT) == [10]


def test_nodes_die_while_dependants_wait_and_while_they_run(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=1, workers=3)
    queue = cluster.queue()
    gates = [str(tmp_path / "first"), str(tmp_path / "second")]
    begun = tmp_path / "begun"

    def second_task(x: int, gate: str) -> int:
        with begun.open("a") as file:
            file.write(f"{os.getppid()}\n")
        return gated(x * 10, gate)

    first = queue.map(gated, range(2), [gates[0]] * 2, chunksize=1)
    second = queue.map(second_task, first, [gates[1]] * 2, chunksize=1)
    total = queue.submit(sum, second)
    when(lambda: waiting(queue) == 3)
    os.kill(cluster.workers[0].pid, signal.SIGKILL)
    Path(gates[0]).touch()
    when(lambda: begun.exists() and len(begun.read_text().split()) >= 1, "a dependant runs")
    os.kill(cluster.workers[1].pid, signal.SIGKILL)
    Path(gates[1]).touch()
    assert total.result(LIMIT) == 10
    assert second.results(LIMIT) == [0, 10]


def test_redis_is_emptied_while_dependants_wait(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=2)
    queue = cluster.queue()
    gate = str(tmp_path / "gate")
    first = queue.map(gated, range(6), [gate] * 6, chunksize=1)
    second = queue.map(lambda x: x + 1, first, chunksize=2)
    third = queue.submit(sum, second)
    when(lambda: waiting(queue) == 4)
    client = redis.Redis.from_url(cluster.config.redis)
    script = "local k = redis.call('KEYS', ARGV[1]) for i = 1, #k do redis.call('DEL', k[i]) end return #k"
    assert client.eval(script, 0, f"{{yadtq:{queue.name}}}:*") > 5
    client.close()
    when(lambda: waiting(queue) == 4, "they wait again")
    Path(gate).touch()
    assert third.result(LIMIT) == 21
    assert second.results(LIMIT) == list(range(1, 7))


# Many.


def test_two_thousand_dependants_are_run(cluster: LocalCluster, record_property: Any) -> None:
    queue = cluster.queue()
    first = queue.map(lambda x: x, range(2000), chunksize=1)
    began = time.monotonic()
    second = queue.map(lambda x: x + 1, first, chunksize=1)
    assert second.results(60) == list(range(1, 2001))
    record_property("seconds", time.monotonic() - began)
    fan = queue.map(lambda x, y: x + y, range(2000), [first[0]] * 2000, chunksize=1)
    assert fan.results(60) == list(range(2000))
    assert queue.submit(sum, list(second)).result(LIMIT) == sum(range(1, 2001))
