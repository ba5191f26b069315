"""A job as the notebook holds it: a sequence of futures, all views on one board."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import operator
import os
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, overload

from yadtq_nb import codec, needs
from yadtq_nb.backlog.publish import Publisher
from yadtq_nb.client import options, repair
from yadtq_nb.client.board import Board, Failure, Table, cancelled
from yadtq_nb.client.future import TaskFuture, waiting
from yadtq_nb.client.inbox import PATIENCE, Inbox, job_state
from yadtq_nb.client.options import Seconds
from yadtq_nb.client.sender import Mailer, Packet
from yadtq_nb.client.shown import FirstErrors, progress
from yadtq_nb.config import Config
from yadtq_nb.errors import (
    JobCancelledError,
    JobError,
    JobIncompleteError,
    JobNotFoundError,
    JobTimeoutError,
    QueueClosedError,
    YadtqError,
)
from yadtq_nb.model import (
    WHOLE,
    BrokenItem,
    CallStyle,
    Environment,
    ErrorGroup,
    JobState,
    Lane,
    Progress,
    State,
    WorkerView,
)
from yadtq_nb.workbench.connection import patiently
from yadtq_nb.workbench.jobs import JobRecord, JobStore, deleted

if TYPE_CHECKING:
    import pandas as pd

    from yadtq_nb.client.columns import Backend
    from yadtq_nb.notebook.live import JobCard
    from yadtq_nb.notebook.timeline import Timeline

#: What results() does with tasks that failed.
Errors = Literal["raise", "return", "skip"]

#: Failures of a job that was ended before its time: its other tasks are cancelled.
_STOPPED: Final = (JobCancelledError, JobTimeoutError)
#: Failures of a job after which what it has is still given.
_PARTIAL: Final[dict[Errors, tuple[type[Exception], ...]]] = {
    "skip": (JobIncompleteError, *_STOPPED),
    "return": _STOPPED,
}

#: Seconds for which a lost node is still shown.
_SHOW_LOST: Final = 600.0


class Link(Protocol):
    """What a job needs of its queue's client."""

    queue: str
    inbox: Inbox
    key: bytes
    config: Config
    mailer: Mailer

    @property
    def store(self) -> JobStore: ...
    def wake(self) -> None: ...
    def publisher(self, lane: Lane = "normal") -> Publisher: ...
    def environment(self, fn: Callable[..., Any]) -> Environment: ...
    def fixed(
        self, seen: JobRecord, fn: Callable[..., Any], kwargs: dict[str, Any] | None, where: Environment
    ) -> Packet: ...
    def cancel(self, job: str) -> int: ...
    def delete(self, job: str) -> bool: ...
    def extend(self, job: str, name: str, board: Board, items: list[Any]) -> None: ...


class Job(Sequence[Future[Any]]):
    """The tasks of one map: a sequence of real concurrent.futures.Future, and more.

    The job belongs to the queue, not to this process: another one finds it by queue.job(name).

    As an argument of a task it is awaited on the queue, and passed as the list that results() gives; mapped over, each
    item is one of its values, as soon as that is there.

    Attributes:
        id: what the queue knows it by.
        name: what people know it by.
    """

    def __init__(
        self,
        link: Link,
        board: Board,
        *,
        id: str,
        name: str,
        style: CallStyle,
        created: float,
        parameters: Sequence[str] = (),
    ) -> None:
        self.id = id
        self.name = name
        self._link = link
        self._board = board
        self._style = style
        self._created = created
        self._parameters = parameters
        self._live: JobCard | None = None
        self._first_errors = FirstErrors(link.store, link.key, id)
        #: Id -> name of the jobs whose values were arguments.
        self._names: dict[str, str] = {}
        self._pid = os.getpid()

    # A sequence of futures.

    def __len__(self) -> int:
        """Return the number of tasks.

        Raises:
            TypeError: the iterator that it is made from is still being drawn.
        """
        total = self._known_total()
        if total is None:
            raise TypeError(f"job {self.name!r} is still drawing its iterator: its length is not known yet")
        return total

    @overload
    def __getitem__(self, index: int) -> Future[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Future[Any]]: ...
    def __getitem__(self, index: int | slice) -> Future[Any] | list[Future[Any]]:
        """Return the future of a task, or a list of them."""
        if isinstance(index, slice):
            return [self._future(i) for i in range(*index.indices(len(self)))]
        index, total = operator.index(index), self._known_total()
        if index < 0:
            index += len(self)
        if index < 0 or (total is not None and index >= total):
            raise IndexError(f"job {self.name!r} has {total} tasks, and no task {index}")
        return self._future(index)

    def __iter__(self) -> Iterator[Future[Any]]:
        """Yield futures by index; while an iterator is being drawn, as it is drawn."""
        index = 0
        while self._has(index):
            yield self._future(index)
            index += 1

    async def __aiter__(self) -> AsyncIterator[Future[Any]]:
        """Yield futures by index; while an iterator is being drawn, as it is drawn."""
        index = 0
        while self._has(index) if self._known_total() is not None else await asyncio.to_thread(self._has, index):
            yield self._future(index)
            index += 1

    def _has(self, index: int) -> bool:
        board = self._board
        if board.total is None and index < board.done:
            return True
        total = self._known_total()
        if total is None:
            self._wait(lambda: board.done > index or board.ended, None)
            total = self._known_total()
        if total is not None:
            return index < total
        if index >= board.done:
            self._raise_failure()
        return index < board.done

    def _future(self, index: int) -> Future[Any]:
        self.want()
        return self._board.future(index, lambda index: TaskFuture(self, index))

    def __reduce__(self) -> tuple[Any, ...]:
        return needs.meet(self._link, self.id, WHOLE, self.name)

    @property
    def link(self) -> Link:
        """The client of its queue."""
        return self._link

    def later(self) -> Iterable[needs.Later]:
        """Return what stands for the value of each task, without asking for any here: a list, if their number is known.

        Otherwise an iterator: the items are those that there will be.
        """
        total = self._known_total()
        if total is None:
            return (needs.Later(self._link, self.id, index, self.name) for index, _ in enumerate(self))
        return [needs.Later(self._link, self.id, index, self.name) for index in range(total)]

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    # Results.

    def results(self, timeout: float | None = None, errors: Errors = "raise") -> list[Any]:
        """Block until the results are there, and return them in order.

        A task that failed stops no other: the job goes on when this raises. It also does after Ctrl-C (JobInterrupt, a
        KeyboardInterrupt); job.cancel() ends it.

        Args:
            timeout: seconds to wait at most; None for no limit.
            errors: "raise" raises the first failure in order, as soon as all before it are done; "return" puts
                exceptions in their place; "skip" leaves failed tasks out, and those that were never sent.

        Raises:
            JobTimeoutError: not done in time.
            JobIncompleteError: its client died or its iterator raised, and everything that was sent is done.
            JobCancelledError: it was cancelled.
            Exception: what the first failed task raised, with the worker's traceback as its cause.
        """
        if errors not in ("raise", "return", "skip"):
            raise ValueError(f"errors must be 'raise', 'return' or 'skip', not {errors!r}")
        board = self._board
        self.want()
        stop = (lambda: board.complete() or board.failed_in_order()) if errors == "raise" else board.complete
        if not self._wait(stop, _deadline(timeout)):
            raise JobTimeoutError(f"job {self.name!r} was not done within {timeout} s: {self}", job=self.name)
        # What was sent and failed tells more than that the rest is missing.
        if errors != "raise" or not board.failed_in_order():
            self._raise_failure(errors)
        return self._collect(errors)

    def _raise_failure(self, errors: Errors = "raise") -> None:
        failure = self._board.failure
        if failure is not None and not (errors != "raise" and isinstance(failure, _PARTIAL[errors])):
            raise failure

    def _collect(self, errors: Errors) -> list[Any]:
        total = self._known_total()
        found = self._board.results(self._highest() if total is None else total)
        if not any(type(value) is Failure for value in found):
            return found
        if self._board.failure is None and any(isinstance(v, Failure) and v.info is None for v in found):
            self._record()  # were they deleted before this process had fetched them?
        if errors == "skip":
            return [value for value in found if not isinstance(value, Failure)]
        if errors == "raise":
            index = next(i for i, value in enumerate(found) if isinstance(value, Failure))
            raise self._error(found[index], index)
        return [self._error(v, i) if isinstance(v, Failure) else v for i, v in enumerate(found)]

    def _error(self, failure: Failure, index: int) -> BaseException:
        ended = self._board.failure
        if failure.cancelled:
            return cancelled(index)
        return ended if failure.info is None and ended is not None else codec.revive(failure.info, index)

    def _highest(self) -> int:
        return max((max(outcomes.indices(), default=-1) for outcomes in self._board.segments()), default=-1) + 1

    def wait(self, timeout: float | None = None) -> bool:
        """Block until every task has its outcome. False when that was not so within timeout seconds.

        Raises:
            QueueClosedError: the queue was closed in this process meanwhile.
            JobNotFoundError: the job was deleted.
        """
        self._check_process()
        ended = self._wait(lambda: self._board.ended, _deadline(timeout))
        if isinstance(self._board.failure, QueueClosedError | JobNotFoundError):
            raise self._board.failure
        return ended

    def _wait(self, ready: Callable[[], bool], deadline: float | None) -> bool:
        if ready():
            return True
        with waiting(self.name):
            return self._board.wait(ready, deadline)

    def cancel(self) -> int:
        """Cancel every task that has no outcome yet, and return how many there were.

        Those that wait never start. Those that run are stopped, on every worker: SystemExit is raised in them, and
        shortly afterwards their slot is killed. What they have done so far is done. Outcomes that came before are kept.

        Raises:
            BacklogError, WorkbenchError: Kafka or Redis cannot be reached.
        """
        return self._link.cancel(self.id)

    def keep(self, seconds: Seconds) -> None:
        """Have the queue keep this job for so long: from now when it has ended, else from its end.

        Its inputs, outcomes, large arguments and name go together. queue.jobs() shows what they take and when they go.

        Args:
            seconds: or a timedelta; more than 0.

        Raises:
            JobNotFoundError: it has expired, or was deleted.
            WorkbenchError: Redis cannot be reached.
        """
        wanted = options.positive("seconds", seconds)
        if not patiently(lambda: self._link.store.keep(self.id, wanted), PATIENCE):
            raise JobNotFoundError(f"job {self.name!r} is not kept any more: there is nothing to keep", job=self.name)

    def delete(self) -> None:
        """Have the queue forget this job, its inputs and outcomes, and give its name back; cancels it if it runs.

        Whoever waits for it, in any process, gets JobNotFoundError. May be called twice.

        Raises:
            BacklogError, WorkbenchError: Kafka or Redis cannot be reached.
        """
        self._link.delete(self.id)
        self._board.end(deleted(self.name))

    @property
    def lost(self) -> list[int]:
        """Indices of the tasks whose outcome, or whose record, was lost with a server's data."""
        record = self._record()
        if record is None or not record.lost:
            return []
        self.want()
        states = self._board.table(record.total).states
        return [index for index, state in enumerate(states) if state == ord("Q")]

    def retry(self, fn: Callable[..., Any] | None = None, *, kwargs: dict[str, Any] | None = None) -> int:
        """Run again what has failed, and nothing else; returns how many tasks.

        Of a job that has ended, what was cancelled or lost with a server's data runs again, too. Indices, items, name
        and options stay. Futures that have failed stay as they are; job[i] gives new ones.

        The records are taken from Redis, and from Kafka's log where they lie there only. What is no longer there stays
        lost, and the job says so again.

        Args:
            fn: to be called for these instead, mended perhaps.
            kwargs: keyword arguments that are the same for every call; with fn only, and by default those of before.

        Raises:
            JobNotFoundError: nothing of the job is kept any more.
            JobError: it was not sent whole: it is being sent still, or its client has died (then cancel() it first).
            TypeError: fn cannot be called, or not be sent.
            BacklogError, WorkbenchError: Kafka or Redis cannot be reached.
        """
        if kwargs is not None and fn is None:
            raise TypeError("kwargs go with a function: job.retry(fn, kwargs=...)")
        fixed = None
        if fn is not None:
            if not callable(fn):
                raise TypeError(f"what is called instead must be callable, not {type(fn).__name__}")
            seen = repair.known(self._link, self.id, self.name)
            fixed = self._link.fixed(seen, fn, kwargs, self._link.environment(fn))
        count = repair.retry(self._link, self.id, self.name, fixed)
        if count:
            self._first_errors = FirstErrors(self._link.store, self._link.key, self.id)
            self._link.inbox.reopen(self._board)
        return count

    def extend(self, iterable: Iterable[Any]) -> None:
        """Add tasks for more items, with the same function and options, at the end of this job. Returns at once.

        Whether it runs or has ended: progress, results() and to_frame() are those of all tasks then.

        Args:
            iterable: items as those that it was made from: rows for starmap, or for map with several iterables.

        Raises:
            JobNotFoundError: nothing of the job is kept any more.
            JobError: it was cancelled, was not sent whole, or draws an iterator still.
            BacklogError, WorkbenchError: Kafka or Redis cannot be reached.
        """
        items = list(iterable)
        if self._style not in ("item", "star"):
            raise JobError(f"job {self.name!r} is not one of map or starmap: it cannot be extended", job=self.name)
        if items:
            self._link.extend(self.id, self.name, self._board, items)
            self._link.inbox.reopen(self._board)

    def cancel_tasks(self, indices: Iterable[int]) -> list[int]:
        """Cancel single tasks, as cancel() does with all; returns the indices of those that had no outcome yet.

        The futures of these are cancelled. A chunk-mate that ran in the same slot may be run once more.

        Raises:
            IndexError: the job has no such task.
            BacklogError, WorkbenchError: Kafka or Redis cannot be reached.
        """
        wanted = [range(len(self))[index] for index in indices]
        if not wanted:
            return []
        if len(wanted) == len(self) == 1:
            return wanted if self.cancel() else []
        dropped = self._link.store.drop(self.id, wanted)
        self._board.drop(dropped)
        return dropped

    def as_completed(self) -> Completed:
        """Return the futures in order of completion, for both `for` and `async for`."""
        self.want()
        return Completed(self.name, self._board, self._future)

    def __await__(self) -> Generator[Any, None, list[Any]]:
        """Wait without blocking the event loop, and give what results() gives."""
        return self._await().__await__()

    async def _await(self) -> list[Any]:
        self.want()
        arrived = 0
        while not (self._board.complete() or self._board.failed_in_order()):
            arrived = self._board.arrived()
            with waiting(self.name):
                await asyncio.wrap_future(self._board.when_arrived(arrived + 1))
            if self._board.ended and not self._board.complete():
                await asyncio.sleep(0.005)
        return self.results(timeout=0)

    def want(self) -> None:
        """Have outcomes fetched as they come, and not just counted."""
        self._check_process()
        self._link.wake()
        board = self._board
        # Once a job has ended, nobody else fetches what Redis would not give when it was asked for.
        if not board.wanted or (board.ended and board.told):
            self._link.inbox.want(board)

    def _check_process(self) -> None:
        """Refuse in a forked child: no thread of it hears the news, so that it would wait for ever."""
        if os.getpid() != self._pid:
            raise JobError(
                f"job {self.name!r} was sent or found before this process was forked: ask a queue for it here, by "
                f"queue.job({self.name!r})",
                job=self.name,
            )

    # Where it stands.

    @property
    def state(self) -> JobState:
        """State of the whole job."""
        record = self._record()
        state = JobState.RUNNING if record is None else job_state(record)
        failure = self._board.failure
        missing = failure is not None and not isinstance(failure, QueueClosedError)
        return JobState.INCOMPLETE if state is JobState.RUNNING and missing else state

    @property
    def progress(self) -> Progress:
        """Counts of tasks by state, with rate and estimated time to the end."""
        record = self._record()
        if record is None:
            total = self._board.total
            return Progress(total or 0, 0, 0, 0, 0, total, 0.0, None, max(0.0, time.time() - self._created))
        return progress(record, self._board.total)

    def task_state(self, index: int) -> State:
        """Return a task's state, as far as this process has heard."""
        stopped = isinstance(self._board.failure, _STOPPED)
        return self._board.state(index) or (State.CANCELLED if stopped else State.QUEUED)

    def task_log(self, index: int) -> str:
        """Return what a task has written, as far as it is kept and this process has heard."""
        self.want()
        return self._board.log(index).decode("utf-8", "replace")

    def debug_task(self, index: int) -> Any:
        """Run a task's call in this process; see TaskFuture.debug."""
        from yadtq_nb.client import debug

        return debug.debug(self._link, self.id, self.name, index, settled=self._board.state(index) is not None)

    def worker_views(self) -> list[WorkerView]:
        """Return the nodes that serve the queue, and those that were lost while this job was there, if not long ago."""
        views = [view for view in self._link.store.workers() if view.status != "stopped"]
        return [view for view in views if view.status != "lost" or self._was_hit_by(view)]

    def _was_hit_by(self, lost: WorkerView) -> bool:
        return lost.heartbeat_age < _SHOW_LOST and lost.last_heartbeat > self._created

    def _record(self) -> JobRecord | None:
        return self._link.store.record(self.id)

    def _known_total(self) -> int | None:
        board = self._board
        if board.total is None:
            record = patiently(self._record, PATIENCE)
            if record is not None and record.total >= 0:
                board.total = record.total
        return board.total

    # As a table.

    def to_frame(
        self, *, partial: bool = False, meta: bool | None = None, dtype_backend: Backend | None = None
    ) -> pd.DataFrame:
        """Block until the job is done, and return one row for each task, indexed by the task's index.

        Columns: the item (`input`, or a column for each part of it: parameters, keys of a dict, fields of a row), the
        value (`value`, or a column for each key of a dict, record or Series), `state`, `error`, `worker`, `started`
        (UTC), `seconds`, `attempt`. Arrays and lists stay whole in their column. Inputs that have gone are left out.

        Where every value is a DataFrame (or None, for no rows), their rows are put one below the other, indexed by
        (task's index, the frame's own index), in the frames' columns alone; a warning tells of tasks that have none.
        Where some values are frames and others not, all stay whole in the column `value`.

        A job of queue.map_frame gives its frame put together again; see there.

        Args:
            partial: do not wait; what has no outcome yet is `queued`, its value missing.
            meta: True for `state` and what follows it also where values are frames, with the columns of the input,
                repeated beside each row, and one row for each task that gave none; False for never.
            dtype_backend: "numpy_nullable" or "pyarrow" as pandas names them; None for numpy's dtypes where they fit.

        Raises:
            ImportError: pyarrow is asked for and not installed.
            JobError: the job's outcomes cannot be had. Failed tasks, and those that were cancelled, raise nothing.
        """
        from yadtq_nb.client import columns, frame

        columns.check_backend(dtype_backend)
        table = self._table(partial)
        items = self._inputs(len(table.states))
        values = [None if isinstance(value, Failure) else value for value in table.values]
        if self._style == "part" and items is not None:
            from yadtq_nb.client import fan

            succeeded = frame.succeeded(table.states)
            whole = None
            if not meta:
                whole = fan.put_together(
                    items, values, succeeded, table.errors, dtype_backend=dtype_backend, silent=partial
                )
            if whole is not None:
                return whole
            items = fan.labels(items)
        return frame.build_frame(
            items,
            values,
            table.states,
            table.errors,
            table.workers,
            table.started,
            table.seconds,
            table.attempts,
            style="item" if self._style == "part" else self._style,
            parameters=self._parameters,
            meta=meta,
            dtype_backend=dtype_backend,
            silent=partial,
        )

    def timeline(self) -> Timeline:
        """Return a matplotlib figure of when which worker ran what: a bar for each task that has its outcome by now.

        A worker has as many lanes as it ran tasks at a time. Only the last attempt of a task is recorded. As the last
        expression of a cell the figure shows itself; timeline().savefig("timeline.svg") keeps it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from yadtq_nb.notebook import timeline
        except ImportError as exc:
            raise ImportError("job.timeline() needs matplotlib: pip install matplotlib") from exc
        table = self._table(partial=True)
        return timeline.draw(self.name, table.states, table.workers, table.started, table.seconds)

    def _table(self, partial: bool) -> Table:
        """Return the outcomes, all of them or what there is."""
        self.want()
        if partial:
            patiently(lambda: self._link.inbox.fetch(self._board), PATIENCE)
        else:
            self._wait(self._board.complete, None)
            self._raise_failure("skip")
        total = self._known_total()
        table = self._board.table(self._highest() if total is None else total)
        if isinstance(self._board.failure, _STOPPED):
            table.states = table.states.replace(b"Q", b"C")
        elif self.lost:
            table.states = table.states.replace(b"Q", b"L")
        return table

    def _inputs(self, total: int) -> list[Any] | None:
        """Return the items, or None when none is there; a BrokenItem stands for one that is not."""
        items: list[Any] | None = None
        for record in self._link.store.inputs(self.id):
            head, _, arguments = codec.decode_chunk(self._link.key, record)
            if head.by_reference:
                sealed = self._link.store.blob(f"{head.job}-{head.number}")
                arguments = codec.unseal(self._link.key, codec.ARGUMENTS, sealed) if sealed else memoryview(b"")
            try:
                with needs.supplying(self._shown):
                    found = codec.loads_home(arguments) if len(arguments) else None
            except Exception:  # whatever the user's objects do when they are unpickled here
                found = None
            if found is not None and head.first + head.count <= total:
                items = [BrokenItem(index, "") for index in range(total)] if items is None else items
                items[head.first : head.first + head.count] = found
        return [] if not total else items

    def _shown(self, job: str, index: int) -> needs.Later:
        """Return what stands in a table for a future or job that was an argument."""
        if job not in self._names:
            record = self._link.store.record(job)
            self._names[job] = record.name if record is not None else job
        return needs.Later(self._link, job, index, self._names[job])

    # How it looks.

    def __repr__(self) -> str:
        from yadtq_nb.notebook.snapshot import snapshot
        from yadtq_nb.notebook.text import as_text

        try:
            return as_text(snapshot(self))
        except YadtqError as exc:
            return f"<Job {self.name!r}: {exc}>"

    def __str__(self) -> str:
        try:
            p = self.progress
        except YadtqError as exc:
            return f"<Job {self.name!r}: {exc}>"
        total = "?" if p.total is None else p.total
        return f"<Job {self.name!r}: {p.succeeded} of {total} succeeded, {p.failed} failed, {p.running} running>"

    def follow(self, timeout: float | None = None) -> bool:
        """Block until the job has ended, and show how far it is: for scripts, terminals and logs.

        It writes one line to standard error, which is written over in a terminal, and repeated every 5 s elsewhere.
        Ctrl-C ends the following, and the job goes on.

        Args:
            timeout: seconds to wait at most; None for no limit.

        Returns:
            True when it has ended, False when that was not so in time.

        Raises:
            BacklogError, WorkbenchError: Kafka or Redis cannot be reached.
        """
        from yadtq_nb.notebook.follow import follow

        return follow(self, timeout)

    def tail(self, timeout: float | None = None) -> None:
        """Print what the job's tasks write to stdout and stderr, line by line while they run, until the job has ended.

        Each line begins with the index of its task, as in "[17] loading", or with several, as in "[40-43] loading",
        where short tasks have run one after another in less than half a second, and with the whole chunk's where
        coroutines run side by side. It begins with what the tasks that run now have written so far. What tasks write
        faster than it can be read is left out, and said so: job[17].log has the end of all of it, by task, afterwards.
        Of a job that has ended nothing is printed but that.

        Ctrl-C ends the following, and the job goes on. Also in several notebooks at a time.

        Args:
            timeout: seconds to follow at most; None for no limit.

        Raises:
            JobInterrupt: Ctrl-C, or the kernel was interrupted.
            QueueClosedError: the queue was closed in this process meanwhile.
            JobNotFoundError: the job was deleted.
            SignatureError: what was written is not signed with this queue's secret.
        """
        from yadtq_nb.client.tail import tail

        with contextlib.closing(JobStore(self._link.config, self._link.queue)) as store:
            tail(store, self.id, self.name, lambda: self.wait(0), timeout)

    def _ipython_display_(self) -> None:
        from yadtq_nb.notebook.live import display_job

        self._live = display_job(self, self._live)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Return the HTML and text forms, for hosts that do not ask for _ipython_display_."""
        from yadtq_nb.notebook.markup import line_bundle, static_bundle
        from yadtq_nb.notebook.snapshot import snapshot

        try:
            return static_bundle(snapshot(self))
        except YadtqError as exc:
            return line_bundle(f"<Job {self.name!r}: {exc}>")

    def errors(self, *, grouped: bool = False) -> pd.DataFrame:
        """Return one row for each task that has failed so far, without waiting for others.

        Columns: `type`, `message`, `where` (file, line and function that raised it), `traceback`, `worker`, `started`
        (UTC), `seconds`, `attempt`; the index is the task's index. Grouped: one row for each type and place, the most
        frequent first, with `count`, the `first` task and its `message`.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        from yadtq_nb.client import tables

        self.want()
        return tables.errors(self._board.segments(), grouped=grouped)

    def error_groups(self, segments: int) -> tuple[list[ErrorGroup], int]:
        """Return the first failures by type and line, the largest group first, and how many failures were looked at.

        Each call fetches what lies in so many segments more, at most.
        """
        record = self._record()
        return self._first_errors.look(0 if record is None else record.failed, segments)

    @property
    def retryable(self) -> int:
        """How many tasks retry() would run again now."""
        record = self._record()
        if record is None or (record.ended is None and not record.sealed):
            return 0
        return record.failed if record.ended is None else record.failed + record.cancelled + record.lost


class Completed:
    """Futures of a job in order of completion."""

    def __init__(self, job: str, board: Board, future: Callable[[int], Future[Any]]) -> None:
        self._job = job
        self._board = board
        self._future = future

    def __iter__(self) -> Iterator[Future[Any]]:
        board, place = self._board, 0
        while True:
            if not board.has_arrived(place):
                with waiting(self._job):
                    board.wait(functools.partial(board.has_arrived, place), None)
            if board.arrived() <= place:
                self._raise_failure()
                return
            yield from map(self._future, board.segment(place).indices())
            place += 1

    async def __aiter__(self) -> AsyncIterator[Future[Any]]:
        board, place = self._board, 0
        while True:
            with waiting(self._job):
                await asyncio.wrap_future(board.when_arrived(place + 1))
            if board.arrived() <= place:
                if not board.complete():
                    await asyncio.sleep(0.005)
                    continue
                self._raise_failure()
                return
            for index in board.segment(place).indices():
                yield self._future(index)
            place += 1

    def _raise_failure(self) -> None:
        if self._board.failure is not None:
            raise self._board.failure


def attach(link: Link, record: JobRecord) -> Job:
    """Return a job that is known to the queue, whoever has sent it."""
    total = record.total if record.total >= 0 else None
    return Job(
        link,
        link.inbox.watch(Board(record.id, link.key, record.name, total), known=True),
        id=record.id,
        name=record.name,
        style=record.style,
        created=record.created,
        parameters=record.parameters,
    )


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
