"""What tasks write: whose it is, how much of it is kept, and that it comes with their outcome."""

from __future__ import annotations

import asyncio
import ctypes
import io
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import MakeCluster
from test_slots import SECRET, Run, gone, make_lease, segments
from waiting import wait_for_file

from yadtq_nb import Queue, TaskCrashedError, TaskTimeoutError, codec
from yadtq_nb.model import Segment
from yadtq_nb.slots import child
from yadtq_nb.slots.capture import CUT, KEPT
from yadtq_nb.slots.pool import SlotPool
from yadtq_nb.worker import crash

pytestmark = pytest.mark.one_stack

#: Seconds after which something hangs.
LIMIT = 30
MARK = CUT.decode()

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])


def logs(job: Any) -> list[str]:
    assert job.wait(LIMIT)
    return [future.log for future in job]


def speak(x: int) -> int:
    print("one", x)
    print("two", x, file=sys.stderr)
    print("no end of line", x, end="")
    return x


# Whose it is


def test_tasks_of_one_chunk_have_each_its_own_lines_even_without_an_end(queue: Queue) -> None:
    found = logs(queue.map(speak, range(3), chunksize=3))
    assert found == [f"one {x}\ntwo {x}\nno end of line {x}" for x in range(3)]


def test_task_that_writes_nothing_has_an_empty_log(queue: Queue) -> None:
    def odd(x: int) -> None:
        if x % 2:
            print(x)

    assert logs(queue.map(odd, range(4), chunksize=4)) == ["", "1\n", "", "3\n"]
    assert queue.submit(abs, -1).result(LIMIT) == 1


def test_log_is_empty_before_the_outcome_and_there_with_it(queue: Queue, tmp_path: Path) -> None:
    def wait(path: str) -> None:
        print("begun")
        wait_for_file(path)

    future = queue.submit(wait, str(tmp_path / "gate"))
    assert future.log == ""
    (tmp_path / "gate").touch()
    future.result(LIMIT)
    assert future.log == "begun\n"


def test_log_is_read_in_another_client_by_the_jobs_name(queue: Queue, shared_cluster: Any) -> None:
    job = queue.map(speak, range(2), name="speaks", chunksize=2)
    job.wait(LIMIT)
    with shared_cluster.queue() as other:
        assert other.job("speaks")[1].log.startswith("one 1\n")


@pytest.mark.parametrize("chunksize", [1, 2])
def test_failed_task_has_its_log(queue: Queue, chunksize: int) -> None:
    def fail(x: int) -> None:
        print("about to fail", x)
        raise ValueError(x)

    job = queue.map(fail, range(2), chunksize=chunksize)
    assert logs(job) == ["about to fail 0\n", "about to fail 1\n"]
    assert isinstance(job[1].exception(), ValueError)


def test_task_that_is_tried_again_has_the_log_of_its_last_attempt(queue: Queue, tmp_path: Path) -> None:
    def flaky(x: int) -> int:
        marker = tmp_path / str(x)
        if not marker.exists():
            marker.touch()
            print("first attempt", x)
            raise OSError("not yet")
        print("second attempt", x)
        return x

    job = queue.map(flaky, range(2), chunksize=2, retries=2, backoff=0.01)
    assert logs(job) == ["second attempt 0\n", "second attempt 1\n"]


def test_coroutines_that_run_side_by_side_have_each_its_own_lines(queue: Queue) -> None:
    async def speak_and_nap(x: int) -> None:
        def below(what: str) -> None:
            print(what, x)

        async def part() -> None:
            await asyncio.sleep(0.01)
            below("in a task of its own")

        for turn in range(3):
            below(f"turn {turn} of")
            await asyncio.sleep(0.005)
        await asyncio.gather(part(), asyncio.to_thread(below, "in a thread of"))

    for x, found in enumerate(logs(queue.map(speak_and_nap, range(5), chunksize=5))):
        said = ["turn 0 of", "turn 1 of", "turn 2 of", "in a task of its own", "in a thread of"]
        assert sorted(found.splitlines()) == sorted(f"{what} {x}" for what in said)


def test_what_a_thread_of_a_task_writes_is_its_own(queue: Queue) -> None:
    def threaded(x: int) -> None:
        thread = threading.Thread(target=print, args=("thread", x))
        thread.start()
        thread.join()

    assert logs(queue.map(threaded, range(2), chunksize=2)) == ["thread 0\n", "thread 1\n"]


def test_warnings_and_logging_are_in_the_log(queue: Queue) -> None:
    def warn(x: int) -> None:
        logging.getLogger("fit").warning("logged %s", x)
        logging.getLogger("fit").info("nobody has asked for this")
        warnings.warn(f"warned {x}", stacklevel=1)

    for x, found in enumerate(logs(queue.map(warn, range(2), chunksize=2))):
        assert f"logged {x}\n" in found
        assert f"UserWarning: warned {x}" in found
        assert "nobody" not in found


def test_logging_that_a_task_configures_is_in_the_logs_of_those_after_it(make_cluster: MakeCluster) -> None:
    def log(x: int) -> None:
        logging.basicConfig(level=logging.INFO)
        logging.info("task %s", x)

    with make_cluster(1).queue() as queue:
        assert logs(queue.map(log, range(3), chunksize=2)) == [f"INFO:root:task {x}\n" for x in range(3)]


def test_task_that_runs_alone_has_what_its_subprocess_and_c_code_write_in_order(queue: Queue) -> None:
    def run(x: int) -> None:
        print("before")
        subprocess.run(["echo", "subprocess"], check=True)
        os.write(2, b"raw\n")
        ctypes.CDLL(None).puts(b"puts")
        ctypes.CDLL(None).fflush(None)
        print("after")
        ctypes.CDLL(None).puts(b"in the buffer of C")

    expected = "before\nsubprocess\nraw\nputs\nafter\nin the buffer of C\n"
    assert logs(queue.map(run, range(2), chunksize=1)) == [expected, expected]


def test_task_whose_child_forks_and_writes_among_others_neither_hangs_nor_takes_others_lines(queue: Queue) -> None:
    def fork(x: int) -> None:
        print("parent", x)
        if not (pid := os.fork()):
            print("child", x)
            os._exit(0)
        os.waitpid(pid, 0)

    assert logs(queue.map(fork, range(2), chunksize=2)) == ["parent 0\n", "parent 1\n"]


def test_child_that_comes_back_from_a_fork_runs_no_other_task(queue: Queue, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def fork(x: int) -> int:
        with audit.open("a") as file:
            file.write(f"{x}\n")
        if pid := os.fork():
            os.waitpid(pid, 0)
        elif x % 2:
            raise ValueError("in the child")
        print("parent", x)
        return x

    assert logs(queue.map(fork, range(6), chunksize=6)) == [f"parent {x}\n" for x in range(6)]
    assert audit.read_text() == "0\n1\n2\n3\n4\n5\n"


def test_progress_bar_is_kept_as_it_was_written(queue: Queue) -> None:
    def bar(x: int) -> None:
        for percent in range(3):
            print(f"\r{x}: {percent} %", end="", file=sys.stderr)

    assert logs(queue.map(bar, range(2), chunksize=2)) == [f"\r{x}: 0 %\r{x}: 1 %\r{x}: 2 %" for x in range(2)]


# How much of it


@pytest.mark.parametrize("chunksize", [1, 2])
def test_of_ten_megabytes_the_end_is_kept_with_a_mark(queue: Queue, chunksize: int) -> None:
    def chatter(x: int) -> None:
        for line in range(10_000):
            print(f"{x} {line:06d}", "." * 1_000)
        print("the end of", x)

    for x, found in enumerate(logs(queue.map(chatter, range(2), chunksize=chunksize))):
        assert found.startswith(MARK)
        assert found.endswith(f"the end of {x}\n")
        assert KEPT - 1_100 < len(found) <= KEPT + len(MARK)
        assert all(line.split()[0] == str(x) for line in found.removeprefix(MARK).splitlines()[1:-1])


def test_chatty_tasks_of_one_chunk_keep_a_megabyte_together_and_quiet_ones_all(queue: Queue) -> None:
    def chatter(x: int) -> None:
        print("begin", x)
        if x % 2:
            print("." * 50_000)
        print("end", x)

    found = logs(queue.map(chatter, range(100), chunksize=100))
    assert sum(map(len, found)) < 1_200_000
    for x, log in enumerate(found):
        assert log.endswith(f"end {x}\n")
        assert log.startswith(MARK if x % 2 else f"begin {x}\n")


def test_late_tasks_of_a_long_job_keep_less(run: Run) -> None:
    def chatter(x: int) -> None:
        print("." * 100_000)

    sizes = []
    for first in (0, 100_000, 50_000_000):
        lease = make_lease(chatter, [1, 2], first=first)
        run.outcomes(lease)
        found = segments([event for event in run.events if event.lease is lease])
        sizes.append(max(len(log) for segment in found for log in segment.logs.values()))
    assert sizes == [KEPT + len(CUT), 2684 + len(CUT), 1024 + len(CUT)]


def test_bytes_that_are_no_text_are_shown_as_such(queue: Queue) -> None:
    def odd(x: int) -> None:
        sys.stdout.buffer.write(b"caf\xe9 \xff\n")
        print("lone \udc80 surrogate")

    expected = "caf� �\nlone \\udc80 surrogate\n"
    for chunksize in (1, 2):
        assert logs(queue.map(odd, range(2), chunksize=chunksize)) == [expected] * 2


def test_cut_does_not_split_a_character(queue: Queue) -> None:
    def chatter(x: int) -> None:
        print("é" * 40_000 + "x" * x)

    for chunksize in (1, 2):
        for found in logs(queue.map(chatter, range(2), chunksize=chunksize)):
            assert found.startswith(MARK + "é")


# Tasks that get in the way


@pytest.mark.parametrize("chunksize", [1, 2])
def test_task_that_replaces_or_closes_stdout_costs_the_next_chunk_nothing(
    make_cluster: MakeCluster, chunksize: int
) -> None:
    def replace(x: int) -> None:
        print("before")
        sys.stdout = io.StringIO()
        print("into the void")

    def rewrap(x: int) -> None:
        if not x:
            sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding="utf-8")
        print("in a buffer")

    def close(x: int) -> None:
        sys.stdout.close()
        sys.stderr.close()
        print("after close")

    with make_cluster(1).queue() as queue:
        assert logs(queue.map(replace, range(chunksize), chunksize=chunksize))[0] == "before\n"
        assert "".join(logs(queue.map(rewrap, range(chunksize), chunksize=chunksize))) == "in a buffer\n" * chunksize
        assert set(logs(queue.map(close, range(chunksize), chunksize=chunksize))) == {"after close\n"}
        assert logs(queue.map(speak, range(chunksize), chunksize=chunksize))[0].startswith("one 0\ntwo 0\n")


@pytest.mark.parametrize("chunksize", [1, 2])
def test_task_that_spoils_stdout_for_itself_spoils_it_for_no_later_chunk(
    make_cluster: MakeCluster, chunksize: int
) -> None:
    def detach(x: int) -> None:
        if not x:
            sys.stdout.detach()

    def reconfigure(x: int) -> None:
        sys.stdout.reconfigure(encoding="ascii", errors="strict", write_through=False)  # type: ignore[union-attr]

    def delete(x: int) -> None:
        if not x:
            del sys.stdout

    def close(x: int) -> None:
        if not x:
            os.close(1)
            os.close(2)

    def silence(x: int) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(x: int) -> None:
        print("é\udc80", x)
        print("err", x, file=sys.stderr)

    with make_cluster(1).queue() as queue:
        for spoil in (detach, reconfigure, delete, close, silence):
            job = queue.map(spoil, range(chunksize), chunksize=chunksize)
            assert job.results(LIMIT) == [None] * chunksize, spoil.__name__
            later = queue.map(say, range(chunksize), chunksize=chunksize)
            assert later.results(LIMIT) == [None] * chunksize, spoil.__name__
            assert logs(later) == [f"é\\udc80 {x}\nerr {x}\n" for x in range(chunksize)], spoil.__name__


def test_task_that_redirects_stdout_keeps_what_it_has_redirected(queue: Queue) -> None:
    def redirect(x: int) -> str:
        from contextlib import redirect_stdout

        with redirect_stdout(io.StringIO()) as out:
            print("kept", x)
        print("shown", x)
        return out.getvalue()

    job = queue.map(redirect, range(2), chunksize=2)
    assert logs(job) == ["shown 0\n", "shown 1\n"]
    assert job.results() == ["kept 0\n", "kept 1\n"]


def test_task_that_kills_its_slot_has_its_last_lines(queue: Queue) -> None:
    def die(x: int) -> int:
        print("task", x, flush=True)
        if x == 1:
            print("last words", end="", flush=True)
            os._exit(3)
        return x

    job = queue.map(die, range(3), chunksize=3, max_crashes=2)
    found = logs(job)
    assert isinstance(job[1].exception(), TaskCrashedError)
    assert found == ["task 0\n", "task 1\nlast words", "task 2\n"]


@pytest.mark.parametrize("chunksize", [1, 3])
def test_task_that_takes_too_long_has_what_it_had_written(queue: Queue, chunksize: int) -> None:
    def hang(x: int) -> int:
        print("task", x)
        if x == 1:
            subprocess.run(["echo", "from below"], check=True)
            time.sleep(LIMIT)
        return x

    job = queue.map(hang, range(3), chunksize=chunksize, timeout=1.0)
    found = logs(job)
    assert isinstance(job[1].exception(), TaskTimeoutError)
    assert found == ["task 0\n", "task 1\nfrom below\n", "task 2\n"]


def test_silent_task_that_takes_too_long_is_not_given_the_lines_of_its_mates(queue: Queue) -> None:
    def hang(x: int) -> int:
        if x == 1:
            time.sleep(LIMIT)
        print("task", x)
        return x

    assert logs(queue.map(hang, range(3), chunksize=3, timeout=1.0)) == ["task 0\n", "", "task 2\n"]


# Where it lies


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    pool = SlotPool(slots=1, secret=SECRET, node="node-1", directory=tmp_path / "node")
    pool.start()
    yield Run(pool, tmp_path)
    pids = pool.pids()
    pool.stop(0)
    assert gone(*pids)


def test_log_that_is_cut_while_a_task_runs_gives_it_nothing_of_earlier_tasks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    run.outcomes(make_lease(lambda x: print("earlier " * 11_000), [0]))
    monkeypatch.setattr(child, "_LOG_LIMIT", 100_000)

    def write(x: int) -> None:
        print("mine " * 4_000)
        begun.touch()
        while not gate.exists():
            time.sleep(0.01)
        print("the end")

    lease = make_lease(write, [0])
    run.start(lease)
    (slot,) = run.pool._slots.values()
    run.until(lambda: begun.exists() and child.size(slot.log) < 70_000)  # it is cut
    gate.touch()
    (segment,) = segments(run.ended(lease))
    assert segment.logs[0] == b"mine " * 4_000 + b"\nthe end\n"


def test_task_that_outlives_a_cut_of_its_log_has_its_end_with_a_mark(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_LOG_LIMIT", 100_000)
    monkeypatch.setattr(child, "_LOG_KEPT", 1_000)
    gate, begun = tmp_path / "gate", tmp_path / "begun"

    def write(x: int) -> None:
        print("x" * 110_000)
        begun.touch()
        while not gate.exists():
            time.sleep(0.01)
        print("the end")

    lease = make_lease(write, [0])
    run.start(lease)
    (slot,) = run.pool._slots.values()
    run.until(lambda: begun.exists() and child.size(slot.log) < 2_000)
    gate.touch()
    (segment,) = segments(run.ended(lease))
    assert segment.logs[0] == CUT + b"x" * 999 + b"\nthe end\n"


def test_segments_of_before_there_were_logs_are_read() -> None:
    segment = Segment("job", 0, 0, 1, b"", b"S", {}, b"\0" * 8, b"\0" * 8, "node")
    packed = msgspec.msgpack.encode(list(msgspec.structs.astuple(segment))[:-1])
    assert msgspec.msgpack.decode(packed, type=Segment) == segment
    assert segment.logs == {}


def test_outcomes_that_are_too_large_lose_their_logs_before_their_values() -> None:
    segment = Segment("job", 0, 0, 1, b"", b"S", {}, b"\0" * 8, b"\0" * 8, "node", logs={0: os.urandom(10_000)})
    frame = codec.encode_segment(SECRET, segment, codec.dumps(["value"]))
    bare = crash.without_logs(SECRET, frame)
    assert len(bare) < 1_000
    found, values = codec.decode_segment(SECRET, bare)
    assert found == msgspec.structs.replace(segment, logs={})
    assert codec.loads(values) == ["value"]
