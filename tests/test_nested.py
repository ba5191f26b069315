"""Tasks that send jobs and wait for them, on both stacks: their slots are lent meanwhile, so nothing stands still."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import psutil
import pytest
from stacks import MakeCluster
from waiting import wait_until

from yadtq_nb import LocalCluster, Queue

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

LIMIT = 90


WAYS = [
    "result",
    "exception",
    "as_completed",
    "iterated",
    "frame",
    "wait",
    "awaited",
    "futures.wait",
    "futures.as_completed",
]


@pytest.fixture
def narrow(make_cluster: MakeCluster) -> LocalCluster:
    """One slot: whoever waits in it for another task waits for ever, unless it is lent."""
    return make_cluster(slots=1, workers=1)


def count_slots(cluster: LocalCluster) -> int:
    """Count the processes below the templates."""
    templates = [p for worker in cluster.workers for p in psutil.Process(worker.pid).children()]
    return sum(len(template.children()) for template in templates)


def test_maps_in_tasks_of_maps_never_deadlock(narrow: LocalCluster) -> None:
    queue = narrow.queue()

    def total(depth: int) -> int:
        return 1 if depth == 0 else sum(queue.map(total, [depth - 1] * 3).results())

    assert queue.map(total, [2] * 6, chunksize=1).results(LIMIT) == [9] * 6
    wait_until(lambda: count_slots(narrow) == 1)
    worker = queue.workers().iloc[0]
    assert (worker.slots, worker.busy <= 1) == (1, True)


@pytest.mark.parametrize("way", WAYS)
def test_slot_is_lent_whichever_way_a_task_waits(narrow: LocalCluster, way: str) -> None:
    queue = narrow.queue()

    def outer(x: int) -> Any:
        if way == "result":
            return queue.submit(abs, -x).result()
        if way == "exception":
            return x if queue.submit(abs, -x).exception() is None else None
        job = queue.map(abs, [-x])
        if way == "as_completed":
            return next(future.result() for future in job.as_completed())
        if way == "futures.wait":
            return futures.wait([*job, queue.submit(abs, -x)]).done.pop().result()
        if way == "futures.as_completed":
            return next(futures.as_completed([*job, queue.submit(abs, -x)])).result()
        if way == "iterated":
            return next(iter(job)).result()
        if way == "frame":
            return int(job.to_frame().value[0])
        assert job.wait()
        return job.results()[0]

    async def awaited(x: int) -> int:
        return (await queue.map(abs, [-x]))[0]

    assert queue.map(awaited if way == "awaited" else outer, [7, 8]).results(LIMIT) == [7, 8]


def test_generator_that_a_task_keeps_half_way_does_not_keep_its_slot_from_being_lent_again(
    narrow: LocalCluster,
) -> None:
    queue = narrow.queue()

    def keep(_: int) -> int:
        kept = futures.as_completed(list(queue.map(abs, range(5))))
        sys.kept = kept  # type: ignore[attr-defined]  # lives on in the slot's process
        return next(kept).result() and 0

    def nested(_: int) -> int:
        return sum(queue.map(abs, range(5)).results())

    for task, value in ((keep, 0), (nested, 10), (nested, 10)):
        assert queue.submit(task, 0).result(LIMIT) == value


def test_waiter_that_is_collected_while_outcomes_are_pickled_holds_up_nothing(narrow: LocalCluster) -> None:
    queue = narrow.queue()

    class Collecting:
        def __reduce__(self) -> tuple[type, tuple[int]]:
            gc.enable()
            gc.collect()
            return int, (7,)

    def leave(_: int) -> Collecting:
        gc.disable()
        circle: list[Any] = [futures.as_completed(list(queue.map(time.sleep, [0, 1], chunksize=1)))]
        circle.append(circle)
        next(circle[0])  # type: ignore[call-overload]  # the first of its two
        return Collecting()

    assert queue.submit(leave, 0).result(LIMIT) == 7
    assert queue.submit(abs, -1).result(LIMIT) == 1


def test_nested_jobs_come_before_a_long_line_of_their_parents(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=2, workers=1, settings={"watermark_chunks": 10})
    queue = cluster.queue()

    def outer(x: int) -> tuple[int, int]:
        return queue.submit(abs, -x).result(), count(os.getppid())

    def count(template: int) -> int:
        return len(psutil.Process(template).children())

    results = queue.map(outer, range(60), chunksize=1).results(LIMIT)
    assert [value for value, _ in results] == list(range(60))
    assert max(slots for _, slots in results) <= 5, "lent slots run what is waited for, and not more and more parents"


@pytest.mark.one_stack
def test_endless_nesting_ends_with_an_error_that_says_so(narrow: LocalCluster) -> None:
    queue = narrow.queue()

    def deeper(x: int) -> int:
        return queue.submit(deeper, x + 1).result()

    with pytest.raises(RecursionError, match="tasks wait for jobs of their own, 16 levels deep"):
        queue.submit(deeper, 0).result(LIMIT)
    wait_until(lambda: count_slots(narrow) == 1)


def test_task_that_sends_jobs_and_does_not_wait_may_do_so_without_end(narrow: LocalCluster, tmp_path: Path) -> None:
    queue, audit = narrow.queue(), tmp_path / "audit"

    def crawl(page: int) -> None:
        with audit.open("a") as file:
            file.write(f"{page}\n")
        if page < 20:
            queue.submit(crawl, page + 1)

    queue.submit(crawl, 0).result(LIMIT)
    wait_until(lambda: audit.read_text().split() == [str(n) for n in range(21)])


def test_node_that_dies_with_a_task_that_waits_costs_nothing(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=1, workers=2)
    queue, began = cluster.queue(), tmp_path / "began"

    def inner(x: int) -> int:
        time.sleep(0.2)
        return x * x

    def outer(x: int) -> int:
        with began.open("a") as file:
            file.write(f"{os.getppid()}\n")
        return sum(queue.map(inner, range(x)).results())

    job = queue.map(outer, [4, 5], chunksize=1)
    wait_until(lambda: began.exists() and len(began.read_text().split()) == 2)
    template = int(began.read_text().split()[0])
    os.kill(psutil.Process(template).ppid(), signal.SIGKILL)
    assert job.results(LIMIT) == [14, 30]


def test_slot_that_dies_while_it_is_lent_leaves_as_many_as_there_were(narrow: LocalCluster, tmp_path: Path) -> None:
    queue, pids = narrow.queue(), tmp_path / "pids"

    def outer(x: int) -> int:
        pids.write_text(str(os.getpid()))
        return queue.submit(time.sleep, 0.5).result() or x

    future = queue.submit(outer, 3)
    wait_until(pids.exists)
    wait_until(lambda: count_slots(narrow) == 2)
    os.kill(int(pids.read_text()), signal.SIGKILL)
    assert future.result(LIMIT) == 3
    wait_until(lambda: count_slots(narrow) == 1)


def test_queue_of_a_task_is_one_that_is_pickled_or_opened_there(narrow: LocalCluster) -> None:
    config = narrow.config
    name = narrow.queue().name

    def outer(x: int) -> int:
        with Queue(name, config=config) as queue:
            return queue.submit(abs, -x).result()

    assert narrow.queue().map(outer, [1, 2]).results(LIMIT) == [1, 2]
