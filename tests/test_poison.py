"""Tasks that kill what runs them: how they end, what is told of them, and the limits that slots have."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from stacks import MakeCluster
from test_slots import SECRET, Run, gone, make_lease, merge, raised, read_pids

from yadtq_nb import ConfigError, Crash, LocalCluster, TaskCrashedError
from yadtq_nb.config import parse_memory_limit, parse_size
from yadtq_nb.model import BrokenItem
from yadtq_nb.slots import pool as slot_pool
from yadtq_nb.slots.memory import used
from yadtq_nb.slots.pool import Described, Died, SlotPool
from yadtq_nb.slots.show import shown

MB = 1024 * 1024
LIMIT = 200 * MB

# Functions and classes of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """Make a pool with limits."""
    made: list[SlotPool] = []

    def make(slots: int = 1, **limits: int) -> Run:
        pool = SlotPool(slots=slots, secret=SECRET, node="node-1", directory=tmp_path / f"node-{len(made)}", **limits)
        made.append(pool)
        pool.start()
        return Run(pool, tmp_path)

    yield make
    for pool in made:
        pids = pool.pids()
        pool.stop(0)
        assert gone(*pids)


def audited(audit: Path) -> Counter[int]:
    return Counter(map(int, audit.read_text().split()))


def hog(megabytes: int) -> int:
    """Use so much memory, and hold it until somebody minds, if anybody does."""
    held = b"x" * (megabytes * MB)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        time.sleep(0.01)
    return len(held)


# What is told of a task that has crashed, on both stacks


def test_crashed_task_tells_its_item_and_host_reason_and_memory_of_each_time(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    audit = tmp_path / "audit"

    def run(x: dict[str, Any]) -> int:
        with audit.open("a") as file:
            file.write(f"{x['n']}\n")
        if x["n"] == 3:
            held = b"x" * (120 * MB)
            print("about to crash", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGKILL)
            return len(held)
        return int(x["n"])

    job = cluster.queue().map(run, [{"n": n, "why": "for science"} for n in range(8)], chunksize=8)
    results = job.results(timeout=30, errors="return")
    assert [x for x in results if isinstance(x, int)] == [0, 1, 2, 4, 5, 6, 7]
    error = pickle.loads(pickle.dumps(results[3]))
    assert isinstance(error, TaskCrashedError)
    assert (error.index, error.item, error.stderr) == (3, "{'n': 3, 'why': 'for science'}", "about to crash")
    assert len(error.crashes) == 2
    for crash in error.crashes:
        assert type(crash) is Crash
        assert crash.host == os.uname().nodename
        assert crash.node == cluster.workers[0].node_id
        assert crash.reason == "killed by SIGKILL"
        assert 120 * MB < crash.memory < 1000 * MB
        assert abs(crash.time - time.time()) < 60
    assert error.crashes[0].time < error.crashes[1].time
    for fact in (error.item, error.stderr, "killed by SIGKILL", error.crashes[0].node, "dmesg"):
        assert fact in str(error)
    assert audited(audit)[3] == 2
    assert job.to_frame().attempt[3] == 2


def test_second_attempt_is_alone_in_a_slot_in_which_nothing_has_run(cluster: LocalCluster, tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    def run(x: int) -> int:
        with audit.open("a") as file:
            file.write(f"{x} {os.getpid()}\n")
        if x == 2:
            os._exit(3)
        return x

    cluster.queue().map(run, range(6), chunksize=6).results(timeout=30, errors="return")
    runs = [tuple(map(int, line.split())) for line in audit.read_text().splitlines()]
    first, second = [pid for x, pid in runs if x == 2]
    assert first != second
    assert [x for x, pid in runs if pid == second] == [2], "alone, and last"


def test_task_that_crashes_at_the_first_allowed_time_tells_its_item_as_well(cluster: LocalCluster) -> None:
    def run(x: int, *, colour: str) -> None:
        os._exit(x)

    with pytest.raises(TaskCrashedError) as caught:
        cluster.queue().options(max_crashes=1).submit(run, 7, colour="red").result(30)
    assert caught.value.item == "7, colour='red'"
    assert [crash.reason for crash in caught.value.crashes] == ["exited with status 7"]


def test_item_that_kills_whoever_reads_it_ends_its_task_and_the_error_says_so(cluster: LocalCluster) -> None:
    class Mine:
        def __reduce__(self) -> tuple[Any, ...]:
            return os._exit, (5,)

    with pytest.raises(TaskCrashedError) as caught:
        cluster.queue().submit(type, Mine()).result(30)
    assert caught.value.item == ""
    assert "its item: cannot be shown" in str(caught.value)
    assert [crash.reason for crash in caught.value.crashes] == ["exited with status 5, before its task had begun"] * 2


@pytest.mark.parametrize("place", [0, 5])
def test_item_that_kills_whoever_reads_it_leaves_its_mates_alone(
    cluster: LocalCluster, tmp_path: Path, place: int
) -> None:
    class Mine:
        def __init__(self, n: int) -> None:
            self.n = n

        def __setstate__(self, state: dict[str, int]) -> None:
            self.n = state["n"]
            if self.n == place:
                os._exit(5)

    audit = tmp_path / "audit"

    def run(x: Mine) -> int:
        with audit.open("a") as file:
            file.write(f"{x.n}\n")
        return x.n

    results = cluster.queue().map(run, map(Mine, range(8)), chunksize=8).results(timeout=30, errors="return")
    error = results.pop(place)
    assert isinstance(error, TaskCrashedError)
    assert error.index == place
    assert [crash.reason for crash in error.crashes] == ["exited with status 5, before its task had begun"] * 2
    assert results == [x for x in range(8) if x != place]
    assert audited(audit) == Counter(results)


def test_function_that_kills_whoever_reads_it_ends_all_tasks_of_its_chunk_soon(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    audit = tmp_path / "audit"

    class Function:
        def __call__(self, x: int) -> int:
            return x

        def __setstate__(self, state: object) -> None:
            with audit.open("a") as file:
                file.write("0\n")
            os._exit(6)

        def __getstate__(self) -> object:
            return 1

    results = cluster.queue().map(Function(), range(50), chunksize=50).results(timeout=30, errors="return")
    assert {type(error) for error in results} == {TaskCrashedError}
    assert [error.index for error in results] == list(range(50))
    assert "before its task had begun" in str(results[7])
    assert audited(audit)[0] == 3


def test_crash_by_the_death_of_a_node_names_that_node(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=1, workers=2)

    def kill_node(x: int) -> int:
        if x == 1:
            for process in psutil.Process().parents():
                if "yadtq_nb.worker" in process.cmdline() and "--slots" in process.cmdline():
                    process.kill()
            time.sleep(30)
        return x

    results = cluster.queue().map(kill_node, range(3), chunksize=3).results(timeout=60, errors="return")
    assert (results[0], results[2]) == (0, 2)
    error = results[1]
    assert isinstance(error, TaskCrashedError)
    assert error.item == "1"
    assert [crash.reason for crash in error.crashes] == ["its node died or was cut off"] * 2
    assert len({crash.node for crash in error.crashes}) == 2
    assert {crash.host for crash in error.crashes} == {os.uname().nodename}


def test_item_whose_description_kills_its_node_costs_one_node_only(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=1, workers=2)

    class Mine:
        def __repr__(self) -> str:
            for process in psutil.Process().parents():
                if "yadtq_nb.worker" in process.cmdline() and "--slots" in process.cmdline():
                    process.kill()
            time.sleep(30)
            return ""

    def run(x: Mine | int) -> int:
        if isinstance(x, Mine):
            os._exit(3)
        return x

    results = cluster.queue().map(run, [0, Mine(), 2], chunksize=3).results(timeout=60, errors="return")
    assert (results[0], results[2]) == (0, 2)
    reasons = [crash.reason for crash in results[1].crashes]
    assert reasons == ["exited with status 3", "exited with status 3", "its node died or was cut off"]


# A slot that only says what an item looks like


def test_slot_describes_an_item_and_runs_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    run, mark = make_run(), tmp_path / "mark"
    lease = make_lease(lambda x: mark.touch(), ["no", "yes"], crashes={1: 2})
    assert run.pool.reserve(1)
    run.pool.run(lease, skip=frozenset({0}), describe=1)
    run.until(lambda: run.events)
    assert run.events == [Described(lease, 1, "'yes'")]
    assert not mark.exists()
    assert run.outcomes(make_lease(lambda x: x, [1])) == {0: 1}


def test_slot_that_takes_too_long_over_an_item_is_killed(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_pool, "_DESCRIBING", 0.5)

    class Slow:
        def __repr__(self) -> str:
            time.sleep(60)
            return ""

    run = make_run()
    lease = make_lease(lambda x: x, [Slow()], crashes={0: 2})
    assert run.pool.reserve(1)
    run.pool.run(lease, describe=0)
    died = run.until(lambda: run.events)[0]
    assert isinstance(died, Died)
    assert (died.describes, died.told) == (0, False)


@pytest.mark.parametrize(
    ("item", "style", "text"),
    [
        ("text", "item", "'text'"),
        ((1, "two"), "star", "1, 'two'"),
        (((1, 2), {"x": 3}), "call", "1, 2, x=3"),
        (BrokenItem(3, "no"), "item", "<no>"),
        ("\ud800", "item", "'\\ud800'"),
        (((), {}), "call", "no arguments"),
        ((), "star", "no arguments"),
    ],
)
def test_item_is_shown_as_it_would_be_written(item: Any, style: Any, text: str) -> None:
    assert shown(item, style) == text


def test_large_item_and_one_whose_repr_raises_are_shown_in_a_few_words() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    began = time.monotonic()
    assert len(shown(["x" * 10_000_000] * 1_000_000, "item")) <= 503
    assert len(shown(range(3), "item")) == len("range(0, 3)")
    assert time.monotonic() - began < 1
    assert "Rude instance" in shown(Rude(), "item")


# The memory limit


def test_task_over_the_memory_limit_ends_with_limit_use_and_remedy_and_its_mates_go_on(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(slots=2, memory_limit="200M")
    job = cluster.queue().map(lambda x: x if x != 2 else hog(400), range(6), chunksize=6)
    results = job.results(timeout=60, errors="return")
    assert [x for x in results if isinstance(x, int)] == [0, 1, 3, 4, 5]
    error = results[2]
    assert isinstance(error, TaskCrashedError)
    assert len(error.crashes) == 2
    for crash in error.crashes:
        assert "memory limit of 200 MiB" in crash.reason
        assert crash.memory > LIMIT
        assert f"used {crash.memory / MB:,.0f} MiB" in crash.reason
    assert "--memory-limit" in str(error)


def test_what_a_task_has_started_counts_and_ends_with_it(make_run: MakeRun, tmp_path: Path) -> None:
    run, note = make_run(memory_limit=LIMIT), tmp_path / "pid"

    def start(_: int) -> None:
        code = f"held = b'x' * {400 * MB}; import time; time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        note.write_text(f"{child.pid}\n")
        time.sleep(60)

    lease = make_lease(start, [0])
    run.start(lease)
    died = run.died(lease)
    assert died.memory > LIMIT
    assert "memory limit" in died.reason
    assert gone(*read_pids(note))
    assert run.outcomes(make_lease(lambda x: x, [1])) == {0: 1}


def test_task_below_the_limit_and_without_one_is_left_alone(make_run: MakeRun) -> None:
    assert make_run(memory_limit=LIMIT).outcomes(make_lease(lambda x: len(b"x" * (100 * MB)), [0])) == {0: 100 * MB}
    assert make_run().outcomes(make_lease(hog, [250])) == {0: 250 * MB}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system does not tell them apart")
def test_pages_of_files_and_pages_that_are_shared_do_not_count(make_run: MakeRun, tmp_path: Path) -> None:
    run, file, big = make_run(memory_limit=LIMIT), tmp_path / "file", 150 * MB

    def read_and_fork(_: int) -> int:
        with file.open("w+b") as opened:
            opened.truncate(big)
            mapped = mmap.mmap(opened.fileno(), big)
            mapped[:] = b"x" * big
        held = bytearray(100 * MB)
        children = []
        for _ in range(4):
            if not (pid := os.fork()):
                time.sleep(1.5)
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        return len(held) + mapped[0]

    make = make_lease(read_and_fork, [0])
    assert run.outcomes(make) == {0: 100 * MB + ord("x")}


def test_idle_slot_that_has_kept_too_much_is_replaced_and_nobody_blamed(make_run: MakeRun) -> None:
    run = make_run(memory_limit=LIMIT)

    def leak(x: int) -> int:
        import threading

        def keep() -> None:
            sys.leaked = bytearray(b"x") * (x * MB)  # type: ignore[attr-defined]

        threading.Timer(0.3, keep).start()
        return os.getpid()

    (pid,) = run.outcomes(make_lease(leak, [400])).values()
    died = run.until(lambda: [event for event in run.events if isinstance(event, Died)])[0]
    assert (died.lease, died.offset) == (None, None)
    assert run.outcomes(make_lease(lambda _: os.getpid(), [0], number=1)) != {0: pid}


def test_slot_that_runs_another_task_by_the_time_it_is_stopped_is_left_alone(make_run: MakeRun) -> None:
    run = make_run(memory_limit=LIMIT)
    before, lease = make_lease(lambda x: x, [0]), make_lease(lambda x: time.sleep(0.3) or x, [1], number=1)
    assert run.outcomes(before) == {0: 0}
    run.start(lease)
    (slot,) = run.pool._alive()
    run.pool._stop_fat(slot, before, LIMIT + 1)
    assert merge(run.ended(lease)) == {0: 1}


def test_memory_error_of_python_is_an_ordinary_failure(make_run: MakeRun) -> None:
    run = make_run(memory_limit=LIMIT)
    outcomes = run.outcomes(make_lease(lambda x: len(bytearray(x)), [1, 2**62, 3]))
    assert (outcomes[0], outcomes[2]) == (1, 3)
    assert type(raised(outcomes[1])) is MemoryError


def test_coroutines_over_the_limit_together_are_charged_one_at_a_time(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=1, memory_limit="200M")

    async def hold(megabytes: int) -> int:
        import asyncio

        held = b"x" * (megabytes * MB)
        await asyncio.sleep(0.5)
        return len(held) // MB

    assert cluster.queue().map(hold, [90, 90, 90], chunksize=3, max_crashes=3).results(timeout=60) == [90, 90, 90]


def test_use_of_a_process_counts_what_it_holds() -> None:
    before = used(os.getpid(), 0)
    with mmap.mmap(-1, 50 * MB) as held:  # new pages: an object could lie in what this process has freed before
        for _ in range(50):
            held.write(bytes(MB))
        assert 45 * MB < used(os.getpid(), 0) - before < 60 * MB


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = ["2G", "2GB", "2 GiB", "1.5g", "512M", "1500000", "64k", "1T", "10B"]
    expected = [2 << 30, 2 << 30, 2 << 30, 3 << 29, 512 << 20, 1_500_000, 64 << 10, 1 << 40, 10]
    assert [parse_size(size) for size in sizes] == expected
    assert parse_memory_limit(None) is None
    assert parse_memory_limit(1 << 30) == parse_memory_limit("1G") == 1 << 30


@pytest.mark.parametrize("size", ["", "much", "2X", "-2G", "0", "G", "2GG", "1e9", "10M"])
def test_what_is_no_size_or_too_little_is_refused_with_a_remedy(size: str) -> None:
    with pytest.raises(ConfigError, match="give"):
        parse_memory_limit(size)
    with pytest.raises(ConfigError):
        LocalCluster(memory_limit=size)


# Recycling


def test_slot_is_replaced_once_it_has_run_so_many_tasks_and_its_chunk_is_finished_first(make_run: MakeRun) -> None:
    run = make_run(max_tasks_per_slot=5)
    leases = [make_lease(lambda _: os.getpid(), list(range(3)), number=number) for number in range(6)]
    pids = []
    for lease in leases:
        run.until(lambda: run.pool.has_free())
        pids.append(set(run.outcomes(lease).values()))
    assert all(len(chunk) == 1 for chunk in pids), "a chunk in hand stays where it is"
    assert [pids[n] == pids[n + 1] for n in range(5)] == [True, False, True, False, True]
    assert not [event for event in run.events if isinstance(event, Died)]


def test_slots_live_on_where_no_number_of_tasks_is_given(make_run: MakeRun) -> None:
    run = make_run()
    leases = [make_lease(lambda _: os.getpid(), list(range(300)), number=number) for number in range(3)]
    assert len({pid for lease in leases for pid in run.outcomes(lease).values()}) == 1


def test_map_on_slots_that_are_replaced_after_each_task_gives_all_results(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=2, max_tasks_per_slot=1)
    pids = cluster.queue().map(lambda _: os.getpid(), range(30), chunksize=1).results(timeout=60)
    assert len(set(pids)) == 30


@pytest.mark.parametrize("most", [0, -1])
def test_number_of_tasks_that_makes_no_sense_is_refused(most: int) -> None:
    with pytest.raises(ValueError, match="max_tasks_per_slot"):
        LocalCluster(max_tasks_per_slot=most)


def test_chunks_are_not_lost_when_slots_are_replaced_while_they_are_killed(make_run: MakeRun) -> None:
    run = make_run(slots=2, max_tasks_per_slot=3)
    leases = [make_lease(lambda x: x, list(range(2)), number=number) for number in range(40)]
    waiting = list(leases)
    for number in range(2_000):
        while waiting and run.pool.reserve(1):
            run.pool.run(waiting.pop())
        if number % 7 == 3 and (pids := run.pool.pids()):
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.kill(pids[0], signal.SIGKILL)
        run.events += run.pool.poll(0.01)
        if not waiting and not run.pool.running():
            break
    for lease in leases:
        events = [event for event in run.events if event.lease is lease]
        assert isinstance(events[-1], Died) or merge(events) == {0: 0, 1: 1}
    run.until(lambda: len(run.pool.pids()) == 2)
    run.until(lambda: run.pool.reserve(9) == 2 or run.pool.unreserve(0))
