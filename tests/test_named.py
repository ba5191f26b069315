"""Named jobs: the same cell attaches, another one says what differs; how long a job is kept; and its end."""

from __future__ import annotations

import datetime
import itertools
import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import RunScript, StartScript
from kernels import Kernel, start_kernel
from stacks import MakeCluster
from waiting import wait_for_file, wait_until

from yadtq_nb import JobExistsError, JobNotFoundError, JobState, Queue
from yadtq_nb.client import link
from yadtq_nb.local import LocalCluster

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

#: Seconds after which something hangs.
LIMIT = 30

CELL = """
def scaled(x):
    return x * FACTOR

def work(x, gate=GATE):
    while x == 3 and not pathlib.Path(gate).exists():
        time.sleep(0.01)
    if x == 1:
        raise ValueError(f"no {x}")
    return scaled(x) if x not in {"a", "b", "c"} else None

job = queue.map(work, range(4), name="sweep")
print(job.id)
"""


def square(x: int) -> int:
    return x * x


def halve(x: int) -> float:
    if x == 3:
        raise ValueError("three")
    return x / 2


# In two notebooks.


@pytest.fixture
def kernels(shared_cluster: LocalCluster, tmp_path: Path) -> Iterator[tuple[Kernel, Kernel]]:
    """Two kernels with a queue of their own."""
    config = tmp_path / "config.json"
    config.write_bytes(msgspec.json.encode(shared_cluster.config))
    name, gate = shared_cluster.queue().name, str(tmp_path / "gate")
    head = f"import pathlib, time\nfrom yadtq_nb import *\nqueue = Queue({name!r})\nGATE, FACTOR = {gate!r}, 10"
    with start_kernel(tmp_path, seed=1, config=config) as one, start_kernel(tmp_path, seed=2, config=config) as other:
        for kernel in (one, other):
            kernel.run(head)
        yield one, other


def test_same_cell_attaches_in_another_kernel_while_it_runs_and_when_it_is_done(
    kernels: tuple[Kernel, Kernel], tmp_path: Path
) -> None:
    one, other = kernels
    id = one.run(CELL)
    assert one.run(CELL) == id
    assert other.run("# A remark.\n" + CELL.replace("def scaled", "# Another.\ndef scaled")) == id
    # What it has so far, in a kernel that has not sent it.
    wait_for_three = "while job.progress.done < 3: time.sleep(0.01)\nprint(job.state, len(job), job.progress.failed)"
    assert other.run(wait_for_three) == "running 4 1"
    assert other.run("print(job[0].result(30), job[2].result(30), type(job[1].exception(30)).__name__)") == (
        "0 20 ValueError"
    )
    (tmp_path / "gate").touch()
    assert other.run("print(job.results(30, errors='skip'), list(job.to_frame()['state']))") == (
        "[0, 20, 30] ['succeeded', 'failed', 'succeeded', 'succeeded']"
    )
    # It has failed by now, and is attached to as it is.
    assert one.run(CELL) == id
    assert one.run("print(queue.job('sweep') == job, job.state, job.to_frame().error[1])") == (
        "True failed ValueError: no 1"
    )
    for old, new, differs in (
        ("x * FACTOR", "x * FACTOR + 1", "the code of scaled"),
        ("raise ValueError", "raise KeyError", "the code of work"),
        ('"c"}', '"d"}', "the code of work"),
        ("def scaled", "FACTOR = 11\ndef scaled", "the global 'FACTOR' that scaled uses"),
        ("gate=GATE", "gate=GATE + 'x'", "the default of 'gate' in work"),
        ("range(4)", "[0, 1, -2, 3]", "item 2"),
    ):
        cell = CELL.replace(old, new).replace("print(job.id)", "").replace("job =", "again =")
        shown = other.run(f"try:\n    exec({cell!r}, globals())\nexcept JobExistsError as exc:\n    print(exc)")
        assert f"and it differs in {differs}. Ways out: if_exists='attach' " in shown
        other.run("FACTOR = 10")
    assert other.run("FACTOR = 10\n" + CELL) == id
    one.run("job.delete()")
    assert other.run(CELL) != id


# From one program and another.


def test_each_way_out_of_a_taken_name(queue: Queue) -> None:
    first = queue.map(halve, [1, 3], name="ways")
    assert first.wait(LIMIT)
    with pytest.raises(JobExistsError, match=r"differs in the function \(halve there, square here\)") as caught:
        queue.map(square, [1, 3], name="ways")
    assert caught.value.differing == ("the function (halve there, square here)",)
    assert queue.map(square, [1, 3], name="ways", if_exists="attach") == first
    assert queue.options(name="ways", if_exists="attach").submit(square, 5).job == first
    new = [queue.map(square, [n], name="ways", if_exists="new") for n in (4, 5)]
    assert [job.name for job in new] == ["ways-2", "ways-3"]
    assert [job.results(LIMIT) for job in new] == [[16], [25]]
    assert queue.map(square, [5], name="ways-3") == new[1]
    replaced = queue.map(square, [1, 3], name="ways", if_exists="replace")
    assert replaced != first
    assert replaced.results(LIMIT) == [1, 9]
    assert queue.job("ways") == replaced == queue.map(square, [1, 3], name="ways")
    with pytest.raises(JobNotFoundError, match="deleted"):
        queue.job(first.id)


def test_job_that_runs_is_stopped_when_it_is_replaced(queue: Queue, tmp_path: Path) -> None:
    gate = tmp_path / "never"
    stuck = queue.map(wait_for_file, [str(gate)] * 8, name="stuck", chunksize=1)
    wait_until(lambda: stuck.progress.running == 2)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(stuck.results, LIMIT)
        assert queue.map(square, range(5), name="stuck", if_exists="replace").results(LIMIT) == [0, 1, 4, 9, 16]
        assert isinstance(waiting.exception(LIMIT), JobNotFoundError)


def test_job_that_was_cancelled_or_cut_is_attached_to_as_it_is(queue: Queue, tmp_path: Path) -> None:
    gate = str(tmp_path / "never")
    job = queue.map(wait_for_file, [gate], name="cancelled")
    job.cancel()
    again = queue.map(wait_for_file, [gate], name="cancelled")
    assert again == job
    wait_until(lambda: again.state == JobState.CANCELLED)


def test_iterator_asks_for_a_way_out_once_the_name_is_taken(queue: Queue) -> None:
    first = queue.map(square, iter([1, 2]), name="drawn")
    assert first.results(LIMIT) == [1, 4]
    with pytest.raises(
        JobExistsError, match=r"cannot be told: its items are an iterator.*if_exists='attach'"
    ) as caught:
        queue.map(square, iter([1, 2]), name="drawn")
    assert caught.value.differing == ()
    with pytest.raises(JobExistsError, match="the function"):
        queue.map(halve, iter([1, 2]), name="drawn")
    assert queue.map(square, iter([1, 2]), name="drawn", if_exists="attach") == first
    assert queue.map(square, iter([3]), name="drawn", if_exists="replace").results(LIMIT) == [9]


def test_two_programs_that_send_the_same_job_at_once_get_one(queue: Queue, start_script: StartScript) -> None:
    source = """
        def double(x):
            return 2 * x
        print("ready", flush=True)
        sys.stdin.readline()
        jobs = [queue.map(double, range(10), name=f"both-{n}") for n in range(20)]
        assert all(job.results(30) == list(range(0, 20, 2)) for job in jobs)
        print(*[job.id for job in jobs])
    """
    programs = [start_script(source) for _ in "ab"]
    assert [program.stdout.readline() for program in programs] == ["ready\n"] * 2  # type: ignore[union-attr]
    for program in programs:
        program.stdin.write("\n")  # type: ignore[union-attr]
        program.stdin.flush()  # type: ignore[union-attr]
    (one, errors), (other, _) = [program.communicate(timeout=2 * LIMIT) for program in programs]
    assert one == other != "", errors
    assert sum(name.startswith("both-") for name in queue.jobs().index) == 20


def test_unnamed_jobs_have_readable_names_of_their_own(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [queue.map(square, [n]) for n in range(20)]
    assert len({job.name for job in jobs}) == 20
    assert all(re.fullmatch(r"square-[a-z]+-[a-z]+", job.name) for job in jobs)
    assert re.fullmatch(r"lambda-[a-z]+-[a-z]+", queue.submit(lambda: 1).job.name)
    monkeypatch.setattr(link, "made_up", lambda name, _job, times=0: f"{name}-{'same' if times < 2 else 'other'}")
    taken = [queue.map(square, [n]) for n in range(3)]
    assert [job.name for job in taken[:2]] == ["square-same", "square-other"]
    assert taken[2].name == f"square-{taken[2].id}"
    assert [job.results(LIMIT) for job in taken] == [[0], [1], [4]]


# How long it is kept.


def keys_of(queue: Queue, job: Any) -> dict[str, float]:
    """Return the keys in Redis that are a job's, each with its seconds to live."""
    redis = queue._link().store._redis
    names = {name.decode() for name in redis.client.keys(redis.key("*"))}
    ours = {name for name in names if job.id in name or name == redis.key("name", job.name)}
    return {name.removeprefix(redis.prefix + ":").replace(job.id, "ID"): redis.client.ttl(name) for name in ours}


def large() -> bytes:
    """Return what is too large for a chunk, and not to be compressed."""
    return os.urandom(2_000_000)


def test_job_is_kept_as_long_as_was_said_with_all_that_is_its_own(queue: Queue) -> None:
    job = queue.map(len, [large(), large()], name="kept")
    assert job.results(LIMIT) == [2_000_000] * 2
    before = keys_of(queue, job)
    assert {"job:ID", "job:ID:in", "job:ID:out", "job:ID:sameness", "job:ID:blobs", "name:kept"} <= before.keys()
    assert {"blob:ID-0", "blob:ID-1"} <= before.keys()
    assert queue.jobs().bytes["kept"] > 4_000_000
    for wanted, seconds in ((1_000, 1_000), (datetime.timedelta(days=400), 400 * 86_400), (0.5, 1)):
        job.keep(wanted)
        kept = keys_of(queue, job)
        assert kept.keys() == before.keys() - {"job:ID:sending"} or seconds == 1
        assert all(seconds - 30 <= ttl <= seconds for ttl in kept.values())
        expires = queue.jobs().expires.get("kept")
        assert seconds == 1 or abs((expires.timestamp() - queue._link().store.now()) - seconds) < 30
    wait_until(lambda: not keys_of(queue, job))
    assert "kept" not in queue.jobs().index
    with pytest.raises(JobNotFoundError, match="not kept"):
        job.keep(10)
    assert queue.map(square, [1], name="kept").results(LIMIT) == [1]


def test_job_that_runs_is_kept_from_its_end_on(queue: Queue, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = queue.map(wait_for_file, [str(gate)], name="kept later")
    wait_until(lambda: job.progress.running == 1)
    job.keep(100)
    assert min(keys_of(queue, job)[name] for name in ("job:ID", "job:ID:in", "name:kept later")) > 86_400
    gate.touch()
    assert job.results(LIMIT) == [str(gate)]
    wait_until(lambda: all(ttl <= 100 for ttl in keys_of(queue, job).values()))


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), "a day", None])
def test_time_that_is_none_is_refused(queue: Queue, seconds: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="seconds"):
        queue.map(square, [1]).keep(seconds)


# Its end.


def test_deleted_job_leaves_its_name_free_and_no_bytes_behind(queue: Queue) -> None:
    job = queue.map(len, [large()], name="deleted")
    assert job.results(LIMIT) == [2_000_000]
    job.delete()
    job.delete()
    # A mark, so that what may still come of it is passed by.
    assert keys_of(queue, job).keys() == {"job:ID"}
    assert "deleted" not in queue.jobs().index
    for use in (
        job.results,
        job.to_frame,
        lambda: job.state,
        lambda: job.progress,
        lambda: job.keep(5),
    ):
        with pytest.raises(JobNotFoundError):
            use()
    for name in ("deleted", job.id):
        with pytest.raises(JobNotFoundError):
            queue.job(name)
    assert "deleted" in repr(job)
    assert queue.map(square, [2], name="deleted").results(LIMIT) == [4]


def test_who_waits_for_a_job_in_another_program_hears_that_it_was_deleted(
    queue: Queue, start_script: StartScript, run_script: RunScript, tmp_path: Path
) -> None:
    done = queue.map(square, range(100), name="done and deleted")
    assert done.wait(LIMIT)
    stuck = queue.map(wait_for_file, [str(tmp_path / "never")], name="stuck and deleted")
    source = """
        stuck, done = (queue.job(name) for name in ("stuck and deleted", "done and deleted"))
        print("attached", flush=True)
        for use in (lambda: stuck.results(30), lambda: done.results(30), lambda: done.state, done.to_frame):
            try:
                use()
            except JobNotFoundError as exc:
                print("deleted" in str(exc), flush=True)
    """
    program = start_script(source)
    assert program.stdout.readline() == "attached\n"  # type: ignore[union-attr]
    done.delete()
    run_script("queue.job('stuck and deleted').delete()")
    output, errors = program.communicate(timeout=LIMIT)
    assert output == "True\n" * 4, output + errors
    with pytest.raises(JobNotFoundError):
        stuck.results(LIMIT)


def test_job_that_is_deleted_while_it_is_sent_is_sent_no_more(queue: Queue) -> None:
    drawn = itertools.count()
    job = queue.map(square, drawn, name="endless", chunksize=5)
    wait_until(lambda: job.progress.done > 20)
    job.delete()
    at = wait_until(lambda: _stands_still(drawn))
    assert at < 100_000
    assert keys_of(queue, job).keys() <= {"job:ID", "job:ID:sending"}
    assert queue.submit(square, 3).result(LIMIT) == 9


def _stands_still(drawn: Iterator[int]) -> int:
    first = next(drawn)
    threading.Event().wait(0.3)
    return first if next(drawn) == first + 1 else 0


def test_deleted_job_does_not_come_back_when_redis_is_emptied(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    queue = cluster.queue()
    kept = queue.map(square, range(3), name="stays")
    gone = queue.map(square, range(3), name="goes")
    assert kept.wait(LIMIT)
    assert gone.wait(LIMIT)
    gone.delete()
    redis = queue._link().store._redis
    redis.client.delete(*redis.client.keys(redis.key("*")))
    wait_until(lambda: "stays" in queue.jobs().index)
    assert queue.submit(square, 2).result(LIMIT) == 4
    assert "goes" not in queue.jobs().index
    assert queue.map(square, [5], name="goes").results(LIMIT) == [25]
