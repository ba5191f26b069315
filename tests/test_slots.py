"""Slots, with real processes: what comes out of a chunk, and that nothing outlives its slot, template or node."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from waiting import wait_until

from yadtq_nb import codec, errors
from yadtq_nb.model import WHOLE, BrokenItem, ChunkHead, Environment, ErrorInfo, Lease, Policy, Segment
from yadtq_nb.slots import pool
from yadtq_nb.slots.pool import Died, Outcomes, SlotEvent, SlotPool
from yadtq_nb.source import Tree, collect

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="slots need Unix sockets")

SECRET = b"a secret of the tests"
HERE = socket.gethostname()
PACKAGE = Path(__file__).parent.parent

# Functions and classes of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])


def make_lease(
    function: Callable[..., Any],
    items: list[Any],
    *,
    number: int = 0,
    first: int = 0,
    secret: bytes = SECRET,
    fixed: dict[str, Any] | None = None,
    environment: Environment | None = None,
    arguments: bytes | None = None,
    **options: Any,
) -> Lease:
    data = b"".join(codec.dumps((function, fixed or {})))
    head = ChunkHead(
        job="job",
        number=number,
        first=first,
        count=len(items),
        function=codec.content_hash(data),
        function_name="f",
        function_size=len(data),
        style=options.pop("style", "item"),
        concurrent=options.pop("concurrent", False),
        environment=environment or Environment(),
        by_reference=options.pop("by_reference", False),
        policy=options.pop("policy", Policy()),
    )
    body = codec.dumps(items) if arguments is None else [arguments]
    return Lease(head, 1, codec.encode_chunk(secret, head, data, body), **options)


class Run:
    """A pool with helpers that wait for events."""

    def __init__(self, pool: SlotPool, directory: Path) -> None:
        self.pool, self.directory = pool, directory
        self.events: list[SlotEvent] = []

    def start(self, lease: Lease, **paths: Any) -> None:
        assert self.pool.reserve(1) == 1
        self.pool.run(lease, **paths)

    def until(self, done: Callable[[], Any], timeout: float = 20.0) -> Any:
        end = time.monotonic() + timeout
        while not (found := done()):
            assert time.monotonic() < end, f"did not happen in time; events: {self.events}"
            self.events += self.pool.poll(0.05)
        return found

    def ended(self, lease: Lease) -> list[SlotEvent]:
        """Wait for the end of a chunk and return its events."""

        def mine() -> list[SlotEvent]:
            return [event for event in self.events if event.lease is lease]

        self.until(lambda: any(isinstance(event, Died) or event.last for event in mine()))
        return mine()

    def died(self, lease: Lease) -> Died:
        event = self.ended(lease)[-1]
        assert isinstance(event, Died), event
        return event

    def outcomes(self, lease: Lease, **paths: Any) -> dict[int, Any]:
        """Run a chunk and return index -> value or ErrorInfo."""
        self.start(lease, **paths)
        return merge(self.ended(lease))


def merge(events: list[SlotEvent]) -> dict[int, Any]:
    merged: dict[int, Any] = {}
    for event in events:
        assert isinstance(event, Outcomes), event
        segment, packed = codec.decode_segment(SECRET, event.frame)
        assert segment.states == event.states
        values = iter(codec.loads(packed))
        for index, state in zip(segment.indices(), segment.states, strict=True):
            assert index not in merged
            merged[index] = next(values) if state == ord("S") else segment.errors[index]
    return merged


def segments(events: list[SlotEvent]) -> list[Segment]:
    return [codec.decode_segment(SECRET, event.frame)[0] for event in events if isinstance(event, Outcomes)]


def raised(info: ErrorInfo) -> BaseException:
    error = codec.loads(info.pickled)
    assert isinstance(error, BaseException)
    return error


def gone(*pids: int) -> bool:
    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return not any(map(alive, pids))


def read_pids(*files: Path) -> list[int]:
    return wait_until(lambda: all(f.exists() and f.read_text().endswith("\n") for f in files)) and [
        int(f.read_text()) for f in files
    ]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    pool = SlotPool(slots=2, secret=SECRET, node="node-1", directory=tmp_path / "node")
    pool.start()
    yield Run(pool, tmp_path)
    pids = pool.pids()
    pool.stop(0)
    assert gone(*pids)


# What a chunk comes to


def test_values_come_back_in_order_with_times_and_node(run: Run) -> None:
    lease = make_lease(lambda x: x * x, list(range(100)), first=300)
    before = time.time()
    assert run.outcomes(lease) == {300 + i: i * i for i in range(100)}
    (event,), (segment,) = run.events, segments(run.events)
    assert event.last
    assert list(event.offsets) == list(range(100))
    assert segment.worker == "node-1"
    assert all(before - 1 < started < time.time() + 1 for started in array("d", segment.started))
    assert all(0 <= seconds < 5 for seconds in array("d", segment.seconds))


@pytest.mark.parametrize(
    ("style", "items"), [("item", [1, 2]), ("star", [(1,), (2,)]), ("call", [((1,), {}), ((), {"x": 2})])]
)
def test_each_call_style_gives_the_function_its_arguments(run: Run, style: str, items: list[Any]) -> None:
    lease = make_lease(lambda x, plus=0: x + plus, items, style=style, fixed={"plus": 10})
    assert run.outcomes(lease) == {0: 11, 1: 12}


def test_error_comes_back_as_itself_with_the_users_part_of_the_traceback(run: Run) -> None:
    def parse(text: str) -> int:
        return int(text)

    outcomes = run.outcomes(make_lease(parse, ["1", "one", "3"]))
    assert (outcomes[0], outcomes[2]) == (1, 3)
    error = raised(outcomes[1])
    assert type(error) is ValueError
    assert "invalid literal" in str(error)
    assert outcomes[1].type_name == "ValueError"
    assert "in parse" in outcomes[1].traceback
    assert "yadtq_nb" not in outcomes[1].traceback


def test_error_that_cannot_be_unpickled_comes_back_as_text(run: Run) -> None:
    class PickyError(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    def fail(_: int) -> None:
        raise PickyError(1, 2)

    info = run.outcomes(make_lease(fail, [0]))[0]
    assert info.pickled == b""
    assert info.message == "1 and 2"
    assert info.type_name.endswith("PickyError")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, StopIteration, GeneratorExit])
def test_exception_that_would_end_a_program_fails_just_its_task(run: Run, kind: type[BaseException]) -> None:
    def leave(x: int) -> int:
        if x == 1:
            raise kind("enough")
        return x

    outcomes = run.outcomes(make_lease(leave, [0, 1, 2]))
    assert (outcomes[0], outcomes[2]) == (0, 2)
    assert type(raised(outcomes[1])) is kind


def test_result_that_cannot_be_pickled_fails_with_its_index(run: Run) -> None:
    outcomes = run.outcomes(make_lease(lambda x: (i for i in ()) if x == 1 else x, [0, 1, 2], first=40))
    assert (outcomes[40], outcomes[42]) == (0, 2)
    error = raised(outcomes[41])
    assert isinstance(error, errors.ResultPickleError)
    assert error.index == 41
    assert "task 41" in str(error)
    assert "generator" in str(error)
    assert outcomes[41].ours == "ResultPickleError"


@pytest.mark.parametrize("concurrent", [False, True])
def test_item_that_could_not_be_pickled_fails_alone(run: Run, concurrent: bool) -> None:
    async def later(x: int) -> int:
        return x

    function = later if concurrent else lambda x: x
    lease = make_lease(function, [7, BrokenItem(51, "cannot pickle a lock"), 9], first=50, concurrent=concurrent)
    outcomes = run.outcomes(lease)
    assert (outcomes[50], outcomes[52]) == (7, 9)
    assert isinstance(raised(outcomes[51]), errors.ItemPickleError)
    assert "cannot pickle a lock" in outcomes[51].message


def test_offsets_that_are_done_or_to_be_skipped_are_not_run(run: Run) -> None:
    lease = make_lease(lambda x: x, list(range(6)), first=10, done=frozenset({1}), crashes={3: 1})
    assert run.outcomes(lease, skip=frozenset({4})) == {10: 0, 12: 2, 13: 3, 15: 5}
    assert run.events[-1].offsets == [0, 2, 3, 5]
    assert segments(run.events)[0].attempts == {13: 2}


def test_chunk_with_nothing_left_to_run_ends(run: Run) -> None:
    assert run.outcomes(make_lease(lambda x: x, [1, 2], done=frozenset({0, 1}))) == {}


def test_numpy_argument_is_writable_and_large_arrays_make_the_round_trip(run: Run) -> None:
    def add_one(a: Any) -> Any:
        a += 1
        return a

    items = [np.zeros(200_000), np.ones((300, 300))]
    outcomes = run.outcomes(make_lease(add_one, items))
    np.testing.assert_array_equal(outcomes[0], items[0] + 1)
    np.testing.assert_array_equal(outcomes[1], items[1] + 1)


def test_record_of_many_megabytes_neither_blocks_nor_breaks(run: Run) -> None:
    data = os.urandom(40_000_000)
    assert run.outcomes(make_lease(lambda x: x[::-1], [data])) == {0: data[::-1]}


def test_large_record_for_a_slot_that_is_stopped_holds_up_no_other(run: Run) -> None:
    run.until(lambda: len(run.pool.pids()) == 2)
    large = make_lease(len, [bytes(4_000_000)])
    run.start(large)
    assert merge(run.ended(large)) == {0: 4_000_000}
    os.kill(stopped := run.pool.pids()[0], signal.SIGSTOP)
    try:
        for number in (1, 2):
            run.start(make_lease(len, [bytes(4_000_000)], number=number))
        run.until(lambda: len(run.events) == 2)
        assert merge(run.events[1:]) == {0: 4_000_000}
    finally:
        os.kill(stopped, signal.SIGCONT)
    run.until(lambda: len(run.events) == 3)


class _Endless:
    def __reduce__(self) -> tuple[Any, ...]:
        return time.sleep, (300,)


@pytest.mark.parametrize("concurrent", [False, True])
def test_slot_that_does_not_end_to_read_a_chunk_is_killed_when_its_tasks_may_take_only_so_long(
    run: Run, monkeypatch: pytest.MonkeyPatch, concurrent: bool
) -> None:
    monkeypatch.setattr(pool, "_OPENING", 0.3)
    lease = make_lease(id, [0, _Endless()], policy=Policy(timeout=0.2), concurrent=concurrent)
    run.start(lease)
    death = run.died(lease)
    assert (death.offset, death.timed_out, death.ran) == (None, None, True)
    # Then it is read item by item.
    careful = msgspec.structs.replace(lease, crashes={WHOLE: 1}, token=2)
    run.start(careful)
    death = run.died(careful)
    assert (death.offset, death.timed_out, death.read) == (1, 1, True)


def test_arguments_function_and_tree_may_be_files(run: Run) -> None:
    lease = make_lease(lambda x: x + 1, [1, 2], by_reference=True, arguments=b"")
    _, function, _ = codec.decode_chunk(SECRET, lease.record)
    (run.directory / "f").write_bytes(codec.seal(SECRET, codec.FUNCTION, function))
    (run.directory / "a").write_bytes(codec.seal(SECRET, codec.ARGUMENTS, *codec.dumps([10, 20])))
    head = type(lease.head)(**{f: getattr(lease.head, f) for f in lease.head.__struct_fields__} | {"function_size": 0})
    lease = Lease(head, 1, codec.encode_chunk(SECRET, head, b"", []))
    paths = {"function_path": run.directory / "f", "arguments_path": run.directory / "a"}
    assert run.outcomes(lease, **paths) == {0: 11, 1: 21}


def test_long_chunk_reports_what_it_has_while_a_task_runs(run: Run, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def wait(x: int) -> int:
        while x == 1 and not gate.exists():
            time.sleep(0.01)
        return x

    lease = make_lease(wait, [0, 1, 2])
    run.start(lease)
    (early,) = run.until(lambda: run.events)
    assert list(early.offsets) == [0]
    assert not early.last
    assert run.pool.running()["job:0"] == (lease, 1)
    gate.touch()
    assert merge(run.ended(lease)) == {0: 0, 1: 1, 2: 2}


def test_slot_that_ends_its_chunk_though_it_was_told_to_leave_is_replaced(run: Run) -> None:
    def stubborn(_: int) -> int:
        try:
            time.sleep(30)
        except SystemExit:
            return 1
        return 0

    def is_quiet() -> bool:
        began = time.monotonic()
        run.pool.poll(2)
        return time.monotonic() - began >= 2

    run.until(is_quiet)  # the template has imported what it wants to
    lease = make_lease(stubborn, [0])
    run.start(lease)
    run.until(lambda: run.pool.running()["job:0"][1] == 0)
    run.pool.terminate("job:0", 0.3)
    assert merge(run.ended(lease)) == {0: 1}
    before, began = set(run.pool.pids()), time.monotonic()
    while before <= set(run.pool.pids()):
        run.pool.poll(20)  # as a node does that has nothing else to do
    assert time.monotonic() - began < 10


def test_coroutines_run_side_by_side_and_end_in_any_order(run: Run) -> None:
    async def nap(x: int) -> int:
        import asyncio

        if x == 3:
            raise ValueError(x)
        await asyncio.sleep(0.3 - x * 0.01)
        return x

    began = time.monotonic()
    lease = make_lease(nap, list(range(20)), first=100, concurrent=True)
    outcomes = run.outcomes(lease)
    assert time.monotonic() - began < 4
    assert type(raised(outcomes.pop(103))) is ValueError
    assert outcomes == {100 + i: i for i in range(20) if i != 3}
    assert "worker" not in segments(run.events)[0].errors[103].traceback


def test_coroutine_that_kills_its_slot_is_the_one_that_is_blamed(run: Run) -> None:
    async def nap(x: int) -> int:
        import asyncio

        await asyncio.sleep(0.01 * (10 - x))
        if x == 4:
            os._exit(3)
        await asyncio.sleep(10)
        return x

    lease = make_lease(nap, list(range(10)), concurrent=True)
    run.start(lease)
    assert run.died(lease).offset == 4


# What is refused


def test_record_with_another_secret_is_refused_and_never_unpickled(run: Run, tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (trap,)

    outcomes = run.outcomes(make_lease(lambda x: x, [Trap(), 2], secret=b"another", first=5))
    assert isinstance(raised(outcomes[5]), errors.SignatureError)
    assert isinstance(raised(outcomes[6]), errors.SignatureError)
    assert "YADTQ_SECRET" in outcomes[5].message
    assert not trap.exists()


def test_bytecode_of_another_python_is_refused(run: Run) -> None:
    outcomes = run.outcomes(make_lease(lambda x: x, [1], environment=Environment(python="3.8")))
    assert "Python 3.8" in outcomes[0].message


def test_missing_module_is_named_with_host_and_remedy(run: Run) -> None:
    def load(_: int) -> None:
        import sklearn_that_is_not_there  # noqa: F401

    info = run.outcomes(make_lease(load, [1]))[0]
    assert HERE in info.message
    assert "pip install sklearn_that_is_not_there" in info.message
    assert "pip install" in info.traceback


def test_missing_relative_file_is_named_with_host_and_directory(run: Run) -> None:
    environment = Environment(cwd="/home/ann", host="elsewhere")
    info = run.outcomes(make_lease(lambda name: open(name), ["data.csv"], environment=environment))[0]  # noqa: SIM115
    assert HERE in info.message
    assert "/home/ann" in info.message
    assert isinstance(raised(info), FileNotFoundError)


# Death


def test_killed_slot_is_reported_with_its_offset_and_replaced(run: Run, tmp_path: Path) -> None:
    mark = tmp_path / "pid"

    def hang(x: int) -> None:
        if x == 2:
            sys.stderr.write("about to hang\n")
            mark.write_text(f"{os.getpid()}\n")
            time.sleep(60)

    lease = make_lease(hang, [0, 1, 2, 3])
    run.start(lease)
    (pid,) = read_pids(mark)
    os.kill(pid, signal.SIGKILL)
    died = run.died(lease)
    assert died.offset == 2
    assert died.reason == "killed by SIGKILL"
    assert died.stderr == "about to hang"
    assert run.pool.reserve(5) == 2
    run.pool.unreserve(2)
    assert run.outcomes(make_lease(lambda x: x, [1])) == {0: 1}
    run.until(lambda: len(run.pool.pids()) == 2)
    assert pid not in run.pool.pids()


def test_kill_ends_the_slot_of_that_chunk_only(run: Run, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def wait(x: int) -> int:
        while not gate.exists():
            time.sleep(0.01)
        return x

    doomed, spared = make_lease(wait, [0]), make_lease(wait, [1], number=1)
    run.start(doomed)
    run.start(spared)
    run.pool.kill(doomed.head.id)  # perhaps before its process is there
    assert run.died(doomed).reason == "killed by SIGKILL"
    gate.touch()
    assert merge(run.ended(spared)) == {0: 1}


def test_exit_of_a_task_is_told_with_its_status(run: Run) -> None:
    lease = make_lease(lambda x: x if x < 1 else os._exit(3), [0, 1])
    run.start(lease)
    died = run.died(lease)
    assert (died.offset, died.reason) == (1, "exited with status 3")


def test_segfault_tells_where(run: Run) -> None:
    def crash(_: int) -> None:
        import ctypes

        ctypes.string_at(0)

    lease = make_lease(crash, [0])
    run.start(lease)
    died = run.died(lease)
    assert died.reason == "killed by SIGSEGV"
    assert "in crash" in died.stderr


def test_forked_child_that_returns_does_not_speak_for_the_slot(run: Run) -> None:
    assert run.outcomes(make_lease(lambda x: (os.fork(), x)[1], [1, 2])) == {0: 1, 1: 2}
    assert run.outcomes(make_lease(lambda x: x, [3], number=1)) == {0: 3}
    assert len([event for event in run.events if isinstance(event, Outcomes)]) == 2


def start_family(directory: Path) -> Callable[[int], None]:
    """Return a function that starts a child and a daemonised grandchild, writes their pids and hangs."""

    def task(_: int) -> None:
        child = subprocess.Popen(["sleep", "600"])
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.execvp("sh", ["sh", "-c", f"echo $$ > {directory}/grandchild; exec sleep 600"])
        (directory / "child").write_text(f"{child.pid}\n")
        (directory / "slot").write_text(f"{os.getpid()}\n")
        time.sleep(600)

    return task


def family(directory: Path) -> list[int]:
    return read_pids(directory / "slot", directory / "child", directory / "grandchild")


def test_what_a_task_has_started_is_gone_once_its_death_is_told(run: Run, tmp_path: Path) -> None:
    lease = make_lease(start_family(tmp_path), [0])
    run.start(lease)
    pids = family(tmp_path)
    assert not gone(*pids[1:])
    run.pool.kill(lease.head.id)
    run.died(lease)
    assert gone(*pids)


def test_what_a_task_has_started_lives_on_when_another_slot_dies(run: Run, tmp_path: Path) -> None:
    lease, other = make_lease(start_family(tmp_path), [0]), make_lease(lambda _: os._exit(1), [0], number=1)
    run.start(lease)
    pids = family(tmp_path)
    run.start(other)
    run.died(other)
    assert all(psutil.pid_exists(pid) for pid in pids)


def test_killed_template_takes_all_with_it_and_is_started_again(run: Run, tmp_path: Path) -> None:
    lease = make_lease(start_family(tmp_path), [0])
    run.start(lease)
    pids = family(tmp_path)
    os.kill(psutil.Process(pids[0]).ppid(), signal.SIGKILL)
    died = run.died(lease)
    assert died.offset == 0
    assert "template" in died.reason
    wait_until(lambda: gone(*pids))
    run.until(lambda: run.pool.reserve(2) == 2)
    run.pool.unreserve(2)
    assert run.outcomes(make_lease(lambda x: x, [5])) == {0: 5}


def test_stop_lets_work_end_within_its_grace_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    done = tmp_path / "done"

    def finish(x: int) -> int:
        time.sleep(0.2)
        done.touch()
        return x

    lease, family_lease = make_lease(finish, [1]), make_lease(start_family(tmp_path), [0], number=1)
    run.start(family_lease)
    pids = family(tmp_path)
    run.start(lease)
    events = run.pool.stop(0.7)
    assert done.exists()
    assert [event.last for event in events if event.lease is lease] == [True]
    assert gone(*pids)
    assert run.pool.stop(0) == []


OWNER = """
import sys, time
sys.path[:0] = [{package!r}, {tests!r}]
from pathlib import Path
import test_slots as t
directory = Path({directory!r})
pool = t.SlotPool(slots=2, secret=t.SECRET, node="n", directory=directory / "node")
pool.start()
pool.reserve(1)
pool.run(t.make_lease(t.start_family(directory), [0]))
while True:
    pool.poll(1.0)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_node(tmp_path: Path, signum: signal.Signals) -> None:
    code = OWNER.format(package=str(PACKAGE), tests=str(PACKAGE / "tests"), directory=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code]) as owner:
        try:
            pids = family(tmp_path)
            everything = [owner.pid, *pids, *(p.pid for p in psutil.Process(owner.pid).children(recursive=True))]
            assert len(everything) > 5
        finally:
            owner.send_signal(signum)
            owner.wait(10)
    wait_until(lambda: gone(*everything))


def test_group_wide_sigterm_leaves_running_work_to_the_node(run: Run, tmp_path: Path) -> None:
    mark, gate = tmp_path / "pid", tmp_path / "gate"

    def wait(_: int) -> int:
        mark.write_text(f"{os.getpid()}\n")
        while not gate.exists():
            time.sleep(0.01)
        child = subprocess.Popen(["sleep", "600"])
        child.terminate()  # what a task starts can still be terminated
        return -child.wait(10)

    lease = make_lease(wait, [1])
    run.start(lease)
    (pid,) = read_pids(mark)
    for target in (pid, psutil.Process(pid).ppid()):
        os.kill(target, signal.SIGTERM)
        os.kill(target, signal.SIGINT)
    gate.touch()
    assert merge(run.ended(lease)) == {0: signal.SIGTERM}


def test_template_that_cannot_start_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SlotPool(slots=1, secret=SECRET, node="n", directory=tmp_path / "node")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/bin/false")
        pool.start()
    run = Run(pool, tmp_path)
    run.until(lambda: run.events)
    run.until(lambda: pool.reserve(1))
    pool.unreserve(1)
    assert run.outcomes(make_lease(lambda x: x, [1])) == {0: 1}
    pool.stop(0)


def test_order_without_a_living_slot_is_told_as_death(tmp_path: Path) -> None:
    pool = SlotPool(slots=1, secret=SECRET, node="n", directory=tmp_path / "node")  # never started
    lease = make_lease(lambda x: x, [1])
    pool.run(lease)
    assert pool.poll(0) == [Died(lease, None, "no slot was alive to run it", "", ran=False)]
    pool.stop(0)


def test_chunks_survive_a_storm_of_kills(run: Run) -> None:
    """Every chunk ends with its outcomes or a death, whenever the kill comes; no slot is lost."""
    import random
    import threading

    chance = random.Random(7)
    leases = [make_lease(lambda x: time.sleep(0.001) or x, list(range(10)), number=n) for n in range(60)]  # type: ignore[func-returns-value]
    waiting, stop = list(leases), threading.Event()

    def kill_at_random() -> None:
        while not stop.wait(chance.random() * 0.03):
            for pid in run.pool.pids()[:1]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def give() -> bool:
        while waiting and run.pool.reserve(1):
            run.pool.run(waiting.pop())
        return not waiting and not run.pool.running()

    killer = threading.Thread(target=kill_at_random)
    killer.start()
    run.until(give)
    stop.set()
    killer.join()
    for lease in leases:
        events = [event for event in run.events if event.lease is lease]
        ends = [event for event in events if isinstance(event, Died) or event.last]
        assert ends == events[-1:]
    run.until(lambda: len(run.pool.pids()) == 2)
    assert run.pool.reserve(9) == 2


def test_slots_that_are_spawned_run_chunks_die_and_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yadtq_nb.slots.processes.LINUX", False)
    pool = SlotPool(slots=2, secret=SECRET, node="n", directory=tmp_path / "node")
    pool.start()
    run = Run(pool, tmp_path)
    assert run.outcomes(make_lease(lambda x: x + 1, [1, 2])) == {0: 2, 1: 3}
    lease = make_lease(lambda x: x or os._exit(4), [1, 0])
    run.start(lease)
    died = run.died(lease)
    assert (died.offset, died.reason) == (1, "exited with status 4")
    hanging = make_lease(time.sleep, [600], number=5)
    run.start(hanging)
    run.until(lambda: len(pool.pids()) == 2)
    pids = pool.pids()
    pool.kill(hanging.head.id)
    assert run.died(hanging).reason == "killed by SIGKILL"
    pool.stop(0)
    wait_until(lambda: gone(*pids))


@pytest.mark.parametrize("fork", [True, False])
def test_busy_slots_end_when_their_node_is_killed(tmp_path: Path, fork: bool) -> None:
    code = OWNER.format(package=str(PACKAGE), tests=str(PACKAGE / "tests"), directory=str(tmp_path))
    code = f"import sys; sys.path[:0] = [{str(PACKAGE)!r}]\nfrom yadtq_nb.slots import processes\n" + (
        code if fork else "processes.LINUX = False\n" + code
    )
    with subprocess.Popen([sys.executable, "-c", code]) as owner:
        slot, child, grandchild = family(tmp_path)
        owner.kill()
    wait_until(lambda: gone(slot, child))
    if not fork:  # nobody can adopt it there
        os.kill(grandchild, signal.SIGKILL)
    wait_until(lambda: gone(grandchild))


# Speed


def test_template_imports_the_common_libraries_without_keeping_anybody_waiting(run: Run) -> None:
    def loaded(_: int) -> bool:
        return "pandas" in sys.modules

    environment = Environment(cwd="/", host=HERE)
    assert run.outcomes(make_lease(lambda x: x, [1], environment=environment)) == {0: 1}

    def fresh() -> bool:
        other = Environment(cwd="/", host=HERE, path=(str(time.monotonic()),))
        return run.outcomes(make_lease(loaded, [0], environment=other)) == {0: True} or not run.pool.poll(0.1)

    run.until(fresh)


def test_matrices_can_be_multiplied_in_a_slot(run: Run) -> None:
    def multiply(n: int) -> float:
        a = np.ones((n, n))
        return float((a @ a).sum())

    assert run.outcomes(make_lease(multiply, [300, 300])) == {0: 300.0**3, 1: 300.0**3}


def test_a_tasks_overhead_in_a_chunk_is_below_a_microsecond(run: Run) -> None:
    seconds = []
    for number in range(10):
        run.outcomes(make_lease(lambda _: None, list(range(1000)), number=number))
        seconds.append(sum(array("d", segments(run.events)[-1].seconds)))
    assert min(seconds) < 1e-3  # measured 0.2 ms; a shared machine gets some room


# Environments


def tree_of(root: Path, function: Callable[..., Any], host: str) -> tuple[Environment, Tree]:
    tree = collect(function, roots=[root])
    assert tree is not None
    return Environment(cwd=str(root), path=("",), host=host, tree=tree.hash, tree_root=tree.root), tree


def sealed(tree: Tree, directory: Path) -> Path:
    path = directory / tree.hash
    path.write_bytes(codec.seal(SECRET, codec.TREE, tree.archive))
    return path


@pytest.mark.parametrize("host", [HERE, "elsewhere"])
def test_edited_module_is_never_stale(run: Run, tmp_path: Path, host: str) -> None:
    root = tmp_path / "notebook"
    root.mkdir()

    def answer(_: int) -> int:
        import edited_module

        return edited_module.value()

    for version in (1, 2, 3):  # edits of the same length in the same second, which a .pyc does not notice
        (root / "edited_module.py").write_text(f"def value(): return {version}\n")
        environment, tree = tree_of(root, answer, host)
        lease = make_lease(answer, [0], environment=environment)
        assert run.outcomes(lease, tree_path=sealed(tree, tmp_path)) == {0: version}


def test_work_without_local_modules_shares_a_slot_with_work_that_has_them(run: Run, tmp_path: Path) -> None:
    (tmp_path / "shared_module.py").write_text("")

    def pid(_: int) -> int:
        import shared_module  # noqa: F401

        return os.getpid()

    environment, tree = tree_of(tmp_path, pid, HERE)
    plain = msgspec.structs.replace(environment, tree="", tree_root="")
    pids = set()
    for _ in range(3):
        pids |= set(
            run.outcomes(make_lease(pid, [0], environment=environment), tree_path=sealed(tree, tmp_path)).values()
        )
        pids |= set(run.outcomes(make_lease(lambda _: os.getpid(), [0], environment=plain)).values())
    assert len(pids) == 1


def test_module_edited_after_the_job_was_sent_runs_as_it_was(run: Run, tmp_path: Path) -> None:
    def answer(_: int) -> int:
        import later_module

        return later_module.value()

    module = tmp_path / "later_module.py"
    module.write_text("def value(): return 1\n")
    environment, tree = tree_of(tmp_path, answer, HERE)
    module.write_text("def value(): return 2\n")
    lease = make_lease(answer, [0], environment=environment)
    assert run.outcomes(lease, tree_path=sealed(tree, tmp_path)) == {0: 1}


def test_modules_that_import_each_other_and_imports_inside_functions_work_elsewhere(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "notebook"
    (root / "circle").mkdir(parents=True)
    (root / "circle" / "__init__.py").write_text("")
    (root / "circle" / "left.py").write_text("import circle.right\ndef f(): return circle.right.g()\n")
    (root / "circle" / "right.py").write_text(
        textwrap.dedent("""
            import circle.left
            def g():
                import lonely
                return lonely.NAME
        """)
    )
    (root / "lonely.py").write_text("NAME = __file__\n")

    def call(_: int) -> tuple[str, str]:
        from circle import left

        return left.f(), os.getcwd()

    environment, tree = tree_of(root, call, "elsewhere")
    path = sealed(tree, tmp_path)
    __import__("shutil").rmtree(root)
    name, cwd = run.outcomes(make_lease(call, [0], environment=environment), tree_path=path)[0]
    assert Path(name).parent == Path(cwd)
    assert Path(cwd).is_relative_to(tmp_path / "node")


def test_task_runs_in_the_submitters_directory_on_the_same_host(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("hello")
    environment = Environment(cwd=str(tmp_path), host=HERE)

    def read(name: str) -> str:
        text = Path(name).read_text()
        os.chdir("/")
        return text

    for number in range(3):  # the next chunk is not disturbed by a task that goes elsewhere
        assert run.outcomes(make_lease(read, ["data.txt"], number=number, environment=environment)) == {0: "hello"}


def test_slots_do_not_draw_the_same_random_numbers(run: Run) -> None:
    def draw(_: int) -> float:
        import numpy

        time.sleep(0.1)
        return float(numpy.random.random())

    leases = [make_lease(draw, [0], number=number) for number in range(2)]
    for lease in leases:
        run.start(lease)
    assert merge(run.ended(leases[0])) != merge(run.ended(leases[1]))
