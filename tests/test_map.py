"""What map, starmap and submit take, and what they send."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import MakeCluster, StartScript
from waiting import wait_until

from yadtq_nb import (
    ConfigError,
    ItemPickleError,
    JobError,
    JobExistsError,
    JobIncompleteError,
    JobState,
    LocalCluster,
    Queue,
    TaskError,
)

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

#: Seconds after which something hangs.
LIMIT = 30


def square(x: int) -> int:
    return x * x


def everything(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


# What is called, with what.


def test_map_calls_the_function_on_each_item_and_keeps_their_order(queue: Queue) -> None:
    assert queue.map(square, range(1000)).results(LIMIT) == [x * x for x in range(1000)]


def test_shortest_of_several_iterables_ends_the_map(queue: Queue) -> None:
    assert queue.map(pow, [2, 3, 4], [5, 6]).results(LIMIT) == [32, 729]
    assert queue.map(pow, itertools.count(2), [5, 6]).results(LIMIT) == [32, 729]
    assert queue.map(pow, [2, 3], iter([])).results(LIMIT) == []


def test_fixed_arguments_go_to_every_call(queue: Queue) -> None:
    job = queue.map(everything, [1, 2], kwargs={"name": "n", "fn": 3})
    assert job.results(LIMIT) == [((1,), {"name": "n", "fn": 3}), ((2,), {"name": "n", "fn": 3})]


def test_starmap_unpacks_each_item(queue: Queue) -> None:
    assert queue.starmap(pow, [(2, 3), [3, 2]]).results(LIMIT) == [8, 9]
    assert queue.starmap(pow, ((x, 2) for x in range(3)), kwargs={"mod": 3}).results(LIMIT) == [0, 1, 1]


def test_submit_passes_everything_to_the_function(queue: Queue) -> None:
    future = queue.submit(everything, 1, [2], name="n", fn="f", self=4, timeout=5, kwargs=6)
    assert future.result(LIMIT) == ((1, [2]), {"name": "n", "fn": "f", "self": 4, "timeout": 5, "kwargs": 6})


def test_options_name_a_map_a_starmap_and_a_submit(queue: Queue) -> None:
    assert queue.options(name="a map", chunksize=3).map(square, [2, 3]).results(LIMIT) == [4, 9]
    assert queue.options(name="a starmap").starmap(pow, [(2, 3)]).results(LIMIT) == [8]
    future = queue.options(name="a submit").submit(everything, name="n")
    assert future.result(LIMIT) == ((), {"name": "n"})
    assert future.job.name == "a submit"
    for name in ("a map", "a starmap", "a submit"):
        assert queue.job(name).state == JobState.SUCCEEDED


def test_named_submit_is_not_incomplete_while_it_runs(make_cluster: MakeCluster) -> None:
    queue = make_cluster(1).queue()
    future = queue.options(name="one").submit(time.sleep, 3.5)
    states = set()
    while wait([future], timeout=0.1).not_done:
        states.add(queue.job("one").state)
    assert states <= {JobState.RUNNING, JobState.SUCCEEDED}


def test_work_sent_before_any_worker_is_there_waits_for_one(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(1)
    queue = cluster.queue()
    cluster.workers[0].stop()
    futures = [queue.submit(square, 3), queue.options(name="named").submit(square, 4), queue.map(square, [5])[0]]
    assert not any(future.done() for future in futures)
    cluster.workers[0].start()
    assert [future.result(LIMIT) for future in futures] == [9, 16, 25]


@pytest.mark.parametrize(
    ("iterable", "expected"),
    [
        ("abc", ["a", "b", "c"]),
        ({"k": 1, "l": 2}, ["k", "l"]),
        ({5}, [5]),
        (range(3, 0, -1), [3, 2, 1]),
        (b"\x01\x02", [1, 2]),
        (np.arange(3), [0, 1, 2]),
        (pd.Series([1.5, 2.5], index=["x", "y"]), [1.5, 2.5]),
        (pd.DataFrame({"x": [1], "y": [2]}), ["x", "y"]),
        ([None, (), (1, 2)], [None, (), (1, 2)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_that_can_be_iterated_is_mapped_as_the_builtin_does(
    queue: Queue, iterable: Any, expected: list[Any]
) -> None:
    assert queue.map(lambda item: item, iterable).results(LIMIT) == expected


def test_generator_is_mapped_as_the_builtin_does(queue: Queue) -> None:
    assert queue.map(lambda item: item, (c for c in "xy")).results(LIMIT) == ["x", "y"]


def test_rows_of_an_array_are_items(queue: Queue) -> None:
    found = queue.map(lambda row: row.sum(), np.ones((50, 1000))).results(LIMIT)
    assert found == [1000.0] * 50


@pytest.mark.parametrize("empty", [[], (), range(0), iter([]), np.array([]), {}], ids=lambda v: type(v).__name__)
def test_empty_iterable_gives_a_finished_job(queue: Queue, empty: Any) -> None:
    job = queue.map(square, empty)
    assert job.wait(LIMIT)
    assert job.results() == list(job) == list(job.as_completed()) == []
    assert len(job) == 0
    assert job.state == JobState.SUCCEEDED
    assert len(job.to_frame()) == 0


# What is refused, and when.


def test_what_cannot_be_meant_is_refused_at_once(queue: Queue) -> None:
    for wrong, error, words in [
        (lambda: queue.map(square), TypeError, "at least one iterable"),
        (lambda: queue.map(square, 5), TypeError, "not iterable"),
        (lambda: queue.map(5, [1]), TypeError, "must be callable"),
        (lambda: queue.submit(None), TypeError, "must be callable"),
        (lambda: queue.map(square, [1], chunksize=0), ValueError, "chunksize"),
        (lambda: queue.map(square, [1], chunksize=-3), ValueError, "chunksize"),
        (lambda: queue.map(square, [1], chunksize=1.5), ValueError, "chunksize"),
        (lambda: queue.map(square, [1], chunksize="some"), ValueError, "chunksize"),
        (lambda: queue.map(square, [1], name=7), TypeError, "string"),
        (lambda: queue.map(square, [1], name="n", if_exists="overwrite"), ValueError, "if_exists"),  # type: ignore[arg-type]
        (lambda: queue.map(square, [1], if_exists="new"), ValueError, "name="),
        (lambda: queue.map(square, [1], name=""), ValueError, "name"),
        (lambda: queue.map(square, [1], name="\ud800"), ValueError, "name"),
    ]:
        with pytest.raises(error, match=words):
            wrong()


def test_chunksize_may_be_any_whole_number(queue: Queue) -> None:
    assert queue.map(square, range(10), chunksize=np.int64(3)).results(LIMIT) == [x * x for x in range(10)]
    assert queue.map(square, range(10), chunksize=10**9).results(LIMIT) == [x * x for x in range(10)]


def test_function_that_does_not_pickle_is_refused_at_once(queue: Queue) -> None:
    lock = threading.Lock()
    for send in (
        lambda: queue.map(lambda _: lock, [1]),
        lambda: queue.submit(lambda: lock),
        lambda: queue.map(square, [1], kwargs={"lock": lock}),
    ):
        with pytest.raises(TypeError, match=r"cannot be sent to workers: .*pickle.*lock"):
            send()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a:b", "{a}", "ü", "x" * 101, "a\n"])
def test_queue_name_with_characters_that_servers_refuse_is_refused(shared_cluster: LocalCluster, name: str) -> None:
    with pytest.raises(ConfigError, match="queue name"):
        Queue(name, config=shared_cluster.config)


@pytest.mark.parametrize("name", ["Müller 🧪 試験", "a/b:c {d}\n\t'\"", "x" * 5_000])
def test_job_may_have_any_name(queue: Queue, name: str) -> None:
    assert queue.map(square, [3], name=name).results(LIMIT) == [9]
    assert queue.job(name).results(LIMIT) == [9]
    assert name in queue.jobs().index


def test_name_that_is_taken_is_refused(queue: Queue) -> None:
    queue.map(square, [1], name="taken")
    for send in (
        lambda: queue.map(square, [2], name="taken"),
        lambda: queue.options(name="taken").starmap(pow, [(1, 1)]),
        lambda: queue.options(name="taken").submit(square, 1),
    ):
        with pytest.raises(JobExistsError, match="taken") as caught:
            send()
        assert caught.value.job == "taken"
    assert queue.job("taken").results(LIMIT) == [1]


def test_one_of_two_programs_gets_a_name_that_both_want(queue: Queue, start_script: StartScript) -> None:
    source = """
        print("ready", flush=True)
        sys.stdin.readline()
        for n in range(20):
            try:
                print(queue.map(lambda x: x, [sys.argv[1]], name=f"race-{n}").name, flush=True)
            except JobExistsError:
                pass
    """
    programs = [start_script(source, who) for who in "ab"]
    assert [program.stdout.readline() for program in programs] == ["ready\n"] * 2  # type: ignore[union-attr]
    outputs = []
    for program in programs:
        program.stdin.write("\n")  # type: ignore[union-attr]
        program.stdin.flush()  # type: ignore[union-attr]
    for program in programs:
        output, errors = program.communicate(timeout=LIMIT)
        assert program.returncode == 0, errors
        outputs.append(output.split())
    assert sorted(outputs[0] + outputs[1]) == sorted(f"race-{n}" for n in range(20))
    for who, names in zip("ab", outputs, strict=True):
        assert all(queue.job(name).results(LIMIT) == [who] for name in names)


def test_made_up_names_of_many_jobs_never_clash(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yadtq_nb.client.link.new_id", iter([f"{n:011x}abcde" for n in range(3)]).__next__)
    jobs = [queue.map(square, [n]) for n in range(3)]
    assert [job.results(LIMIT) for job in jobs] == [[0], [1], [4]]
    assert len({job.name for job in jobs}) == 3


# When items are drawn.


def test_map_returns_before_its_tasks_run(queue: Queue) -> None:
    job = queue.map(time.sleep, [0.5, 0.5])
    assert not job.wait(0)
    assert not any(future.done() for future in job)
    assert job.wait(LIMIT)


def test_map_returns_before_its_iterator_is_drawn(queue: Queue) -> None:
    may_go = threading.Event()

    def slow() -> Iterator[int]:
        may_go.wait(LIMIT)
        yield 3

    job = queue.map(square, slow())
    may_go.set()
    assert job.results(LIMIT) == [9]


def test_list_may_be_changed_after_map(queue: Queue) -> None:
    items = list(range(5000))
    job = queue.map(square, items)
    items.clear()
    assert job.results(LIMIT) == [x * x for x in range(5000)]


@pytest.mark.parametrize("chunksize", ["auto", 7])
def test_iterator_may_wait_for_results_of_what_it_has_yielded(queue: Queue, chunksize: Any) -> None:
    job = None
    started = threading.Event()

    def feedback() -> Iterator[int]:
        started.wait(LIMIT)
        yield 1
        for index in range(12):
            yield job[index].result(LIMIT) + 1

    job = queue.map(lambda x: x, feedback(), chunksize=chunksize)
    started.set()
    assert job.results(LIMIT) == list(range(1, 14))


@pytest.mark.parametrize("chunksize", ["auto", 5])
def test_infinite_iterator_is_drawn_only_a_bounded_way_ahead(make_cluster: MakeCluster, chunksize: Any) -> None:
    queue = make_cluster().queue()
    drawn = itertools.count()
    job = queue.map(square, drawn, chunksize=chunksize)
    first = [future.result(LIMIT) for future in itertools.islice(job, 1000)]
    assert first == [x * x for x in range(1000)]
    with pytest.raises(TypeError, match="still drawing"):
        len(job)
    blocked = queue.map(lambda _: time.sleep(60), itertools.count(), chunksize=2)
    wait_until(lambda: blocked.progress.running >= 2)
    progress = blocked.progress
    assert progress.total is None
    assert progress.queued + progress.running <= 2 * 4 * 2 + 2
    queue.close()  # ends both, since no one draws any more


def test_closing_ends_jobs_that_are_still_being_drawn(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    drawing = threading.Event()

    def slow() -> Iterator[int]:
        yield from range(10)
        drawing.set()
        time.sleep(LIMIT)

    for _ in range(2):
        queue = cluster.queue()
        jobs = [queue.map(square, itertools.count(), chunksize=5), queue.map(square, itertools.count())]
        jobs.append(queue.map(square, slow()))
        futures = [job[100_000_000] for job in jobs]
        assert drawing.wait(LIMIT)
        queue.close()
        assert all(isinstance(future.exception(LIMIT), JobError) for future in futures)
        with cluster.queue() as again:
            states = [again.job(job.id) for job in jobs]
            wait_until(lambda: all(job.state == "incomplete" for job in states))  # noqa: B023  # called at once
        drawing.clear()


def test_iterator_that_raises_keeps_what_was_sent(queue: Queue) -> None:
    def breaks() -> Iterator[int]:
        yield from range(100)
        raise OSError("the disk is gone")

    job = queue.map(square, breaks(), name="breaks")
    with pytest.raises(JobIncompleteError, match=r"item 100 .*the disk is gone") as caught:
        job.results(LIMIT)
    assert isinstance(caught.value.__cause__, OSError)
    assert job.results(errors="skip") == [x * x for x in range(100)]
    assert job[3].result(LIMIT) == 9
    assert isinstance(job[100].exception(LIMIT), JobIncompleteError)
    assert [f.result() for f in itertools.islice(job, 100)] == [x * x for x in range(100)]
    with pytest.raises(JobIncompleteError):
        list(job)
    with pytest.raises(JobIncompleteError):
        list(job.as_completed())
    assert list(job.to_frame()["value"]) == [x * x for x in range(100)]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_iterator_that_exits_ends_the_job_and_not_the_program(queue: Queue, error: BaseException) -> None:
    def leaves() -> Iterator[int]:
        yield 2
        raise error

    job = queue.map(square, leaves())
    with pytest.raises(JobIncompleteError):
        job.results(LIMIT)
    assert job.results(errors="skip") == [4]


# Items that do not travel.


class Stubborn:
    def __reduce__(self) -> Any:
        raise ValueError("not I")


def test_item_that_does_not_pickle_names_its_index_and_the_others_run(queue: Queue) -> None:
    items: list[Any] = list(range(200))
    items[7], items[150] = threading.Lock(), Stubborn()
    job = queue.map(lambda x: x, items)
    found = job.results(LIMIT, errors="return")
    for index in (7, 150):
        error = found[index]
        assert isinstance(error, ItemPickleError)
        assert error.index == index
        assert str(index) in str(error)
    assert "not I" in str(found[150])
    assert [x for n, x in enumerate(found) if n not in (7, 150)] == [n for n in range(200) if n not in (7, 150)]
    frame = job.to_frame()
    assert pd.isna(frame["input"][7])
    assert frame["error"][7].startswith("ItemPickleError")
    assert frame["value"][8] == 8


def test_single_argument_that_does_not_pickle_fails_its_task(queue: Queue) -> None:
    error = queue.submit(square, threading.Lock()).exception(LIMIT)
    assert isinstance(error, ItemPickleError)
    assert isinstance(error, TaskError)
