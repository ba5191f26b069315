"""A slot: the process that runs tasks, one chunk at a time, and the only one that unpickles.

It may be killed at any moment; it then leaves its progress in memory that it shares with the pool. Nothing is
unpickled before its signature is verified, and no error of a task or of a chunk ends the slot.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from yadtq_nb import codec, errors, lending, needs, pending, source
from yadtq_nb.model import BrokenItem, ChunkHead, Environment
from yadtq_nb.salvage import Unreadable
from yadtq_nb.slots import hints, processes, running, wire
from yadtq_nb.slots.calls import Loaded, holds_bytecode, load_function
from yadtq_nb.slots.capture import Capture
from yadtq_nb.slots.outcomes import Outcomes, info
from yadtq_nb.slots.show import shown
from yadtq_nb.slots.supply import Supplies, named, read
from yadtq_nb.slots.wire import Order, Report, Setup

if TYPE_CHECKING:
    import asyncio

#: A chunk that runs for longer reports what it has this often, in seconds.
_REPORT_EVERY: Final = 0.2
#: Ticks without work after which the reporter sleeps until it is woken.
_PARK_AFTER: Final = 10
#: Functions that a slot keeps.
_FUNCTIONS: Final = 16

_decode_setup = msgspec.msgpack.Decoder(Setup).decode
_decode_order = msgspec.msgpack.Decoder(Order).decode


class Slot:
    """Serves its socket until that closes."""

    def __init__(self, sock: socket.socket, progress: memoryview, capture: Capture) -> None:
        self._sock, self._progress, self._capture = sock, progress, capture
        self._pid = os.getpid()
        self._setup = Setup(b"", "", "")
        self._functions: dict[str, Loaded] = {}
        #: Those of them that bring classes of the notebook along.
        self._with_classes: set[str] = set()
        self._entered: Environment | None = None
        self._home = ""
        self._path: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reporter = Reporter(self._send, capture)

    def serve(self) -> NoReturn:
        """Run chunk after chunk; the process ends when the pool closes the socket."""
        lending.serve(self._reporter.lend)
        first = wire.receive(self._sock)
        if first is None:
            os._exit(0)
        self._setup = _decode_setup(first[0])
        while self._serve_one():
            pass
        os._exit(0)

    def _serve_one(self) -> bool:
        frame = wire.receive(self._sock)
        if frame is None:
            return False
        order, record = _decode_order(frame[0]), frame[1]
        del frame  # a chunk is not to be held twice, nor longer than it runs
        if order.describe < 0:
            self._run(order, record)
        else:
            self._describe(order, record)
        return True

    def _describe(self, order: Order, record: bytearray) -> None:
        """Say what the item of a task looks like that has crashed; the pool ends this slot when that takes too long."""
        try:
            head, _, items = self._open(order, record)
            text = shown(items[order.describe], head.style)
        except Exception as exc:
            text = f"<it cannot be read: {type(exc).__qualname__}: {hints.message(exc)}>"
        self._send(Report(order.describe, 0, b"", b"", last=True, item=text), b"")

    def _run(self, order: Order, record: bytearray) -> None:
        skip = frozenset(order.skip)
        todo: Sequence[int] = range(order.count)
        if skip:
            todo = [offset for offset in todo if offset not in skip]
        outcomes = Outcomes(order, self._setup.node, self._setup.secret, self._capture.take)
        self._capture.begin(order.first, todo)
        try:
            head, (call, types), items = self._open(order, record)
        except BaseException as exc:
            outcomes.fail_rest(todo, exc)
        else:
            del record
            lending.depth = head.depth
            lending.forget()
            outcomes.retry_on(head.policy, types)
            self._reporter.begin(outcomes)
            try:
                self._run_tasks(head, call, items, todo, outcomes)
            finally:
                if os.getpid() != self._pid:
                    os._exit(0)  # a task has forked, and the child has come back: it must not speak for the slot
        pending.finish()  # once the chunk is told done, this slot may be replaced
        self._capture.flush()  # what a task has put in the place of sys.stdout may hold something back
        self._reporter.finish(outcomes)

    def _run_tasks(
        self, head: ChunkHead, call: Callable[..., Any], items: Sequence[Any], todo: Sequence[int], outcomes: Outcomes
    ) -> None:
        outcomes.environment = head.environment
        runnable = running.fail_broken(outcomes, head.first, items, todo)
        if head.concurrent:
            self._capture.run_together()
            running.run_together(self._event_loop(), call, head.style, items, runnable, self._progress, outcomes)
        else:
            running.run_each(call, head.style, items, runnable, self._progress, outcomes)

    def _open(self, order: Order, record: bytearray) -> tuple[ChunkHead, Loaded, Sequence[Any]]:
        """Verify and unpickle a chunk, in the environment where it is to run."""
        head, function, arguments = codec.decode_chunk(self._setup.secret, record)
        if (head.job, head.number, head.first, head.count) != (order.job, order.number, order.first, order.count):
            raise errors.FormatError(f"record of chunk {head.id} came for chunk {order.job}:{order.number}")
        if not 0 <= head.function_size <= len(function):
            raise errors.FormatError(f"chunk {head.id} is cut short within its function: send it again")
        self._enter(head.environment, order.tree)
        supplies = Supplies(self._setup.secret, functools.partial(read, order.needs))
        with _explained(head), needs.supplying(supplies.value):
            try:
                call = self._function(head, function, order.function)
            except errors.DependencyError as exc:
                raise named(exc, f"a task of {head.job_name}") from exc.__cause__
            if head.by_reference:
                arguments = self._blob(codec.ARGUMENTS, order.arguments)
            items = self._items(arguments, head, order)
        if len(items) != head.count:
            raise errors.FormatError(f"chunk {head.id} says {head.count} tasks and holds {len(items)}")
        return head, call, items

    def _items(self, arguments: memoryview, head: ChunkHead, order: Order) -> list[Any]:
        """Unpickle a chunk's items; one that cannot be read fails its own task only."""
        if order.careful:
            items = codec.loads_each(arguments, follow=self._tell_reading, poison=order.poison)
            self._progress[0] = wire.NO_OFFSET
        else:
            try:
                return codec.loads(arguments)  # type: ignore[no-any-return]
            except Exception as exc:  # whatever the user's objects do when they are unpickled
                if head.count == 1 and not isinstance(exc, errors.DependencyError):
                    raise
                items = codec.loads_each(arguments)
        return [
            _broken(head, offset, item.error) if type(item) is Unreadable else item for offset, item in enumerate(items)
        ]

    def _tell_reading(self, offset: int) -> None:
        self._progress[0] = offset | wire.READING

    def _enter(self, environment: Environment, tree_path: str) -> None:
        if self._entered is not None and source.suits(self._entered, environment):
            os.chdir(self._home)  # a task may have gone elsewhere
            # What it has put on the path stays, as a module that was imported may count on it, but hides nothing.
            sys.path[:] = dict.fromkeys([*self._path, *sys.path])
            return
        tree = bytes(self._blob(codec.TREE, tree_path, environment.tree)) if tree_path else None
        self._home = source.enter(environment, tree, Path(self._setup.directory) / "trees")
        self._entered, self._path = environment, sys.path.copy()

    def _function(self, head: ChunkHead, inline: memoryview, path: str) -> Loaded:
        call = self._functions.get(head.function)
        if call is None:
            data = inline if head.function_size else self._blob(codec.FUNCTION, path, head.function)
            call = _load_function(data, head.environment)
            if codec.sets_classes(data):
                # The notebook's classes are now as this function wants them, and no more as others want them.
                for other in self._with_classes:
                    self._functions.pop(other, None)
                self._with_classes = {head.function}
            while len(self._functions) >= _FUNCTIONS:
                del self._functions[next(iter(self._functions))]
            self._functions[head.function] = call
        return call

    def _blob(self, kind: bytes, path: str, expected: str = "") -> memoryview:
        if not path:
            raise errors.FormatError("the chunk's function or its arguments neither travel with it nor lie in a file")
        body = codec.unseal(self._setup.secret, kind, Path(path).read_bytes())
        if expected and codec.content_hash(body) != expected:
            raise errors.FormatError(f"{path} holds something else than {expected}")
        return body

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            import asyncio

            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return self._loop

    def _send(self, report: Report, frame: bytes) -> None:
        try:
            wire.send(self._sock, report, frame)
        except OSError:
            os._exit(0)  # the pool has gone


class Reporter:
    """Reports what a long chunk has, from a thread of its own, since a task may run for hours after a quick one."""

    def __init__(self, send: Callable[[Report, bytes], None], capture: Capture) -> None:
        self._send, self._capture = send, capture
        #: What is told of lending, in turn with what is reported.
        self._lent = lending.InTurn(self._tell)
        self._wanted = threading.Event()
        self._parked = True
        self._outcomes: Outcomes | None = None
        self._began = 0.0
        threading.Thread(target=self._tick, name="yadtq-reporter", daemon=True).start()

    def begin(self, outcomes: Outcomes) -> None:
        """Report these from time to time."""
        self._began = time.monotonic()
        self._outcomes = outcomes
        if self._parked:
            self._wanted.set()

    def finish(self, outcomes: Outcomes) -> None:
        """Report the rest."""
        with self._lent.alone():
            self._outcomes = None
            outcomes.report(self._send, last=True)

    def lend(self, lent: bool) -> None:
        """Tell that the task which runs waits for a job, or does no more."""
        self._lent.put(lent)

    def _tell(self, lent: bool) -> None:
        self._send(Report(0, 0, b"", b"", False, lent=lent), b"")

    def _tick(self) -> None:
        idle = _PARK_AFTER
        while True:
            if idle >= _PARK_AFTER:
                self._park()
                idle = 0
            time.sleep(_REPORT_EVERY)
            idle = idle + 1 if self._outcomes is None else 0
            with self._lent.alone():
                outcomes = self._outcomes
                if outcomes is not None and time.monotonic() - self._began > _REPORT_EVERY:
                    # What cannot be pickled now is left to the last report.
                    with contextlib.suppress(Exception):
                        self._capture.flush_lines()
                        outcomes.report(self._send, last=False)

    def _park(self) -> None:
        # Clear before looking: begin() sets outcomes before it looks at parked, so one of the two sees the other.
        self._wanted.clear()
        self._parked = True
        if self._outcomes is None:
            self._wanted.wait()
        self._parked = False


def serve_forked(sock: socket.socket, progress_fd: int, log: str, template: int) -> NoReturn:
    """Become a slot in a process that the template has just forked."""
    os.setsid()
    if not processes.die_with_parent(template, signal.SIGKILL):
        os._exit(0)
    processes.adopt_orphans()
    processes.offer_to_oom_killer()
    _reseed()
    _serve(sock, progress_fd, log)


def main() -> NoReturn:
    """Become a slot in a process of its own, where there is no template: on macOS. Arguments: three fds and a log."""
    sock_fd, progress_fd, leash = map(int, sys.argv[1:4])
    os.setsid()
    threading.Thread(target=_end_with, args=(leash,), name="yadtq-leash", daemon=True).start()
    _serve(socket.socket(fileno=sock_fd), progress_fd, sys.argv[4])


def _serve(sock: socket.socket, progress_fd: int, log: str) -> NoReturn:
    sys.argv[:] = [""]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    progress = memoryview(mmap.mmap(progress_fd, wire.PROGRESS_SIZE)).cast("I")
    os.close(progress_fd)
    capture = Capture(progress[:], log)
    # A child that a task has forked, and that comes back from it, must run no other task: what asks raises there.
    os.register_at_fork(after_in_child=progress.release)
    faulthandler.enable()  # a segfault tells where, and the pool shows it
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, functools.partial(_leave_to_node, os.getpid(), progress))
    try:
        Slot(sock, progress, capture).serve()
    except SystemExit:
        os._exit(128 + signal.SIGTERM)  # told to end: what lies below is the template's


def _leave_to_node(slot: int, progress: memoryview, signum: int, _: object) -> None:
    """Do nothing: a service manager signals the whole group, and it is the node that decides when slots end.

    When the node has decided, raise SystemExit, so that what the task has opened is closed.

    Not SIG_IGN, which would be inherited by whatever a task starts, so that it could not be terminated.
    """
    if os.getpid() != slot:  # a child that a task has forked
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    if progress[1] == wire.LEAVE:
        raise SystemExit(128 + signum)


def _reseed() -> None:
    # Forked slots would all draw the same numbers; the random module sees to itself.
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _end_with(leash: int) -> NoReturn:
    os.read(leash, 1)
    processes.kill(os.getpid(), group=True)
    os._exit(1)


def _broken(head: ChunkHead, offset: int, error: Exception) -> BrokenItem:
    """Return what stands for an item that cannot be read."""
    index = head.first + offset
    if isinstance(error, errors.DependencyError):
        error = named(error, f"{head.job_name}[{index}]", index)
    return BrokenItem(index, "", info=info(error, head.environment))


def _load_function(data: codec.Buffer, environment: Environment) -> Loaded:
    trouble = hints.wrong_python(environment)
    if trouble and holds_bytecode(data):
        raise errors.FormatError(trouble)
    return load_function(data)


class _explained:  # noqa: N801  # reads as a verb where it is used
    """Add a note to whatever unpickling raises, when another Python may be the cause."""

    def __init__(self, head: ChunkHead) -> None:
        self._head = head

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            trouble = hints.wrong_python(self._head.environment)
            if trouble:
                error.add_note(trouble)


if __name__ == "__main__":
    main()
