"""Futures as views on a job: real ones, made when they are asked for."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Final, Protocol

from yadtq_nb import lending, needs
from yadtq_nb.errors import JobInterrupt
from yadtq_nb.model import State

log = logging.getLogger(__name__)


@contextlib.contextmanager
def waiting(job: str) -> Iterator[None]:
    """Wait for a job in the block: a task's slot is lent meanwhile, and Ctrl-C says that the job goes on.

    So does the cancellation of a coroutine, which is what an interrupted kernel makes of a cell that awaits.

    Raises:
        JobInterrupt: Ctrl-C, or the kernel was interrupted.
    """
    try:
        with lending.waiting():
            yield
    except KeyboardInterrupt:
        raise JobInterrupt(_goes_on(job)) from None
    except asyncio.CancelledError as exc:
        exc.args = exc.args or (_goes_on(job),)
        raise


def _goes_on(job: str) -> str:
    return (
        f"job {job!r} goes on: end it with job.cancel(), or wait for it again, here or elsewhere, "
        f"with queue.job({job!r})"
    )


class _Owner(Protocol):
    id: str
    name: str

    @property
    def link(self) -> object: ...
    def want(self) -> None: ...
    def task_state(self, index: int) -> State: ...
    def task_log(self, index: int) -> str: ...
    def debug_task(self, index: int) -> Any: ...
    def cancel_tasks(self, indices: Iterable[int]) -> list[int]: ...


class _Waiters(list[Any]):
    """Who waits by concurrent.futures.wait or as_completed, which note it here: the slot is lent meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._lent: dict[int, int] = {}

    def append(self, waiter: Any) -> None:
        self._lent[id(waiter)] = lending.begin()
        super().append(waiter)

    def remove(self, waiter: Any) -> None:
        super().remove(waiter)
        lending.end(self._lent.pop(id(waiter)))


class _Caller:
    """Calls done callbacks in a thread of its own: one that waits for a task must not keep us from hearing of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._due: queue.SimpleQueue[tuple[Callable[[Any], object], Future[Any]]] = queue.SimpleQueue()

    def call(self, fn: Callable[[Any], object], future: Future[Any]) -> None:
        """Call fn with a future that is done, after those that were given before."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._due = os.getpid(), queue.SimpleQueue()
                threading.Thread(target=self._run, args=(self._due,), name="yadtq-callbacks", daemon=True).start()
        self._due.put((fn, future))

    def _run(self, due: queue.SimpleQueue[tuple[Callable[[Any], object], Future[Any]]]) -> None:
        while True:
            fn, future = due.get()
            try:
                fn(future)
            except Exception:
                log.exception("exception calling callback for %r", future)
            del fn, future  # not to be held until there is another


_caller: Final = _Caller()


class TaskFuture(Future[Any]):
    """The future of one task. concurrent.futures.wait and as_completed take it, and so does asyncio.wrap_future.

    As an argument of map, starmap or submit it is awaited on the queue, and passed by value.

    Attributes:
        job: the job it belongs to.
        index: its index in the job, from 0.
    """

    def __init__(self, job: _Owner, index: int) -> None:
        super().__init__()
        if lending.in_slot():
            self._waiters = _Waiters()
        self.job = job
        self.index = index

    @property
    def key(self) -> str:
        """Name of the task, the same in every process and every attempt."""
        return f"{self.job.name}[{self.index}]"

    @property
    def state(self) -> State:
        """State of the task, as far as this process has heard."""
        return self.job.task_state(self.index)

    @property
    def log(self) -> str:
        """What the task has written to stdout and stderr, warnings and logging included: the end of it, some 64 KiB.

        It comes with the task's outcome, whether that is a value or an error, and is of the last attempt: "" before,
        and for a task that was cancelled. Logging is as Python has it where nobody has configured it, so that warnings
        and errors are shown; call logging.basicConfig(level=...) in the function for more.

        A task that has run alone in its chunk, as a long one does, has all that was written meanwhile, by C code and by
        what it has started, and also by what an earlier task has left running there. One that has travelled with others
        has what Python code in its own process has written to sys.stdout and sys.stderr, and it has less of that where
        they have written more than 1 MiB together. Of a task that has killed its slot there are the last lines. Beyond
        the first 4096 tasks of a job less and less is kept of each, down to 1 KiB.
        """
        return self.job.task_log(self.index)

    def debug(self) -> Any:
        """Run this task's call here, in this process, and return its value; where it raises, open pdb's post-mortem.

        Function and item are unpickled from the bytes that the worker was given; what the task needs of other tasks is
        fetched. Whether the task has run, and how that ended, does not matter, and nothing is told to the queue. The
        working directory, sys.path and imported modules are those of this process; retries and timeout do not count.
        A coroutine runs in an event loop of its own: in a notebook, whose loop runs already, in a thread of its own, so
        that a breakpoint() in it may not find the keyboard.

        Post-mortem, as with %debug: the traceback is printed, then pdb asks for commands where the error was raised,
        and None is returned when you leave it by "q". Also after "q" at a breakpoint() of the function.

        Raises:
            JobNotFoundError: the job has expired or was deleted, and what it was given with it.
            JobError: the task has not reached the workbench within 5 s.
            DependencyError: what it needs of another task has no value.
            TaskError: its function or item cannot be unpickled here; ItemPickleError where it could not even be sent.
            WorkbenchError: Redis cannot be reached.
        """
        return self.job.debug_task(self.index)

    def result(self, timeout: float | None = None) -> Any:
        """See concurrent.futures.Future. A task that waits for another lends its slot meanwhile."""
        with contextlib.nullcontext() if self.done() else waiting(self.job.name):
            return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See concurrent.futures.Future, and result."""
        with contextlib.nullcontext() if self.done() else waiting(self.job.name):
            return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """See concurrent.futures.Future. Callbacks are called in one thread of the process, and may wait for tasks."""
        # What asyncio adds waits for nothing, and is waited for.
        at_once = self.done() or getattr(fn, "__module__", None) == "asyncio.futures"
        super().add_done_callback(fn if at_once else functools.partial(_caller.call, fn))

    def cancel(self) -> bool:
        """Cancel the task on the queue, whether it waits or runs. False when it has its outcome already.

        Raises:
            BacklogError, WorkbenchError: Kafka or Redis cannot be reached.
        """
        if self.cancelled():
            return True
        return not self.done() and bool(self.job.cancel_tasks([self.index]))

    def __reduce__(self) -> tuple[Any, ...]:
        return needs.meet(self.job.link, self.job.id, self.index, self.job.name)

    def __repr__(self) -> str:
        return f"<TaskFuture {self.key} {self.state}>"
