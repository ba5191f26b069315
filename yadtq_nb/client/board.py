"""The board of one job in this process: which outcomes have come, and what they say.

Outcomes stay packed as they came, and are opened when someone asks: a job of a million items is some hundreds of
segments here, not a million objects.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from itertools import accumulate
from typing import Any, Final

from yadtq_nb import codec
from yadtq_nb.errors import FormatError, JobCancelledError, JobError, ResultPickleError
from yadtq_nb.model import STATE_OF_CODE, ErrorInfo, Segment, State
from yadtq_nb.salvage import Unreadable
from yadtq_nb.workbench.jobs import Stored

_SUCCEEDED: Final = ord("S")
_CANCELLED: Final = ord("C")


class Failure:
    """Stands where a task has no value; no task can return one."""

    __slots__ = ("cancelled", "info")

    def __init__(self, info: ErrorInfo | None, *, cancelled: bool = False) -> None:
        self.info = info
        self.cancelled = cancelled


class Outcomes:
    """One segment of outcomes, its values unpickled on first use."""

    def __init__(self, secret: bytes, job: str, stored: Stored) -> None:
        """Verify a segment.

        Raises:
            CodecError: it cannot be read, was signed with another secret, or belongs to another job or chunk.
        """
        self.segment, self._pickled = codec.decode_segment(secret, stored.frame)
        place = (job, stored.field.partition(".")[0])
        if (self.segment.job, str(self.segment.number)) != place:
            raise FormatError(f"outcomes of chunk {self.segment.number} of job {self.segment.job} lie at {place}")
        self._mask = stored.mask
        self._values: list[Any] | None = None
        self._unreadable = False
        self._places: Sequence[int] | None = None

    def indices(self) -> Sequence[int]:
        """Indices in the job of the tasks whose outcome counts."""
        indices = self.segment.indices()
        if not self._mask:
            return indices
        return [index for index, kept in zip(indices, self._mask, strict=True) if kept == ord("1")]

    def leave_out(self, known: Callable[[int], bool]) -> bool:
        """Have those not count that are known already; returns whether any is left."""
        kept = set(self.indices())
        fresh = [index in kept and not known(index) for index in self.segment.indices()]
        if not all(fresh):
            self._mask = bytes(ord("1") if count else ord("0") for count in fresh)
        return any(fresh)

    def keep_successes(self) -> bytes:
        """Have what has failed count no more; returns the mask from now on, or nothing when all have succeeded."""
        counted, states = set(self.indices()), self.segment.states
        good = [
            index in counted and code == _SUCCEEDED for index, code in zip(self.segment.indices(), states, strict=True)
        ]
        if sum(good) == len(counted):
            return b""
        self._mask = bytes(ord("1") if count else ord("0") for count in good)
        return self._mask

    def is_consecutive_success(self) -> bool:
        """Tell whether all tasks from first on succeeded and count: then values() is a slice of the results."""
        segment = self.segment
        whole = not self._mask and not segment.scattered and len(self.values()) == segment.count
        return whole and not self._unreadable

    def values(self) -> list[Any]:
        """Return the values of those that succeeded, in order, whether they count or not.

        Where they cannot be unpickled in this process, a Failure that says so stands for each.
        """
        if self._values is None:
            try:
                self._values = codec.loads_home(self._pickled)
            except Exception as exc:  # whatever the user's objects do when they are unpickled
                self._unreadable = True
                self._values = self._readable(exc)
            self._pickled = memoryview(b"")
        return self._values

    def _readable(self, exc: Exception) -> list[Any]:
        """Return what can be unpickled one by one; where none is to blame, all are."""
        segment = self.segment
        indices = [i for i, code in zip(segment.indices(), segment.states, strict=True) if code == _SUCCEEDED]
        try:
            values = codec.loads_each_home(self._pickled)
        except Exception:  # as above
            values = []
        if len(values) != len(indices):
            return [Failure(_why_unreadable(exc, indices)) for _ in indices]
        return [
            Failure(_why_unreadable(value.error, [index])) if type(value) is Unreadable else value
            for index, value in zip(indices, values, strict=True)
        ]

    def rows(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (index in the job, position in the segment, value or Failure) of each outcome that counts."""
        values = iter(self.values())
        segment = self.segment
        for position, (index, code) in enumerate(zip(segment.indices(), segment.states, strict=True)):
            value = next(values) if code == _SUCCEEDED else Failure(segment.errors.get(index))
            if not self._mask or self._mask[position] == ord("1"):
                yield index, position, value

    def value(self, position: int, index: int) -> Any:
        """Return the value or Failure of one, by its position in the segment and its index in the job."""
        states = self.segment.states
        if states[position] != _SUCCEEDED:
            return Failure(self.segment.errors.get(index), cancelled=states[position] == _CANCELLED)
        if self._places is None:
            # Where each value lies among those that there are.
            whole = states.count(_SUCCEEDED) == len(states)
            self._places = range(len(states)) if whole else list(accumulate(map(_SUCCEEDED.__eq__, states), initial=0))
        return self.values()[self._places[position]]


def _why_unreadable(exc: Exception, indices: Sequence[int]) -> ErrorInfo:
    which = f"task {indices[0]}" if len(indices) == 1 else f"tasks {min(indices)} to {max(indices)}"
    message = f"the results of {which} cannot be unpickled here: {type(exc).__name__}: {exc}"
    return ErrorInfo("yadtq_nb.errors.ResultPickleError", message, "", ours=ResultPickleError.__name__)


class Dropped(Outcomes):
    """Tasks that were cancelled one by one: an outcome that the queue keeps without a segment."""

    def __init__(self, job: str, indices: Sequence[int]) -> None:
        nothing = array("d", [float("nan")] * len(indices)).tobytes()
        self.segment = Segment(
            job=job,
            number=-1,
            first=indices[0],
            count=len(indices),
            scattered=array("I", indices).tobytes(),
            states=b"C" * len(indices),
            errors={},
            started=nothing,
            seconds=nothing,
            worker="",
            attempts=dict.fromkeys(indices, 0),
        )
        self._mask = b""
        self._values = []
        self._unreadable = False

    def rows(self) -> Iterator[tuple[int, int, Any]]:
        """See Outcomes.rows."""
        for position, index in enumerate(self.segment.indices()):
            if not self._mask or self._mask[position] == ord("1"):
                yield index, position, Failure(None, cancelled=True)


class Table:
    """Outcomes by index, column by column: what a DataFrame is made from."""

    def __init__(self, total: int) -> None:
        import numpy as np

        #: A Failure stands where there is no value.
        self.values: list[Any] = [Failure(None)] * total
        #: One byte a task, as in STATE_CODES; "Q" where nothing has come.
        self.states = bytearray(b"Q" * total)
        #: Index to one line.
        self.errors: dict[int, str] = {}
        self.workers = [""] * total
        #: Seconds since the epoch.
        self.started = np.full(total, np.nan)
        self.seconds = np.full(total, np.nan)
        self.attempts = np.zeros(total, dtype=np.int64)

    def add(self, outcomes: Outcomes) -> None:
        """Write a segment into the columns."""
        import numpy as np

        segment = outcomes.segment
        started, seconds = np.frombuffer(segment.started), np.frombuffer(segment.seconds)
        if outcomes.is_consecutive_success():
            block = slice(segment.first, segment.first + segment.count)
            self.values[block] = outcomes.values()
            self.states[block] = segment.states
            self.workers[block] = [segment.worker] * segment.count
            self.started[block], self.seconds[block], self.attempts[block] = started, seconds, 1
        for index, position, value in () if outcomes.is_consecutive_success() else outcomes.rows():
            self.values[index] = value
            self.states[index] = segment.states[position]
            if isinstance(value, Failure) and value.info is not None:
                self.errors[index] = value.info.line(value.info.type_name.rpartition(".")[2])
            self.workers[index] = segment.worker
            self.started[index], self.seconds[index], self.attempts[index] = started[position], seconds[position], 1
        for index, attempt in segment.attempts.items():
            self.attempts[index] = attempt


class Board:
    """What has come of one job. Filled by the inbox's thread, read and waited on by any."""

    def __init__(self, job: str, secret: bytes, name: str, total: int | None = None) -> None:
        self.job = job
        #: What people know the job by.
        self.name = name
        self._secret = secret
        #: Number of tasks, where it is known; whoever has opened the job again may have added some.
        self.total = total
        #: How often the job had been opened again when this was last brought up to date.
        self.life = 0
        self._changed = threading.Condition()
        self._segments: dict[str, Outcomes] = {}
        self._order: list[Outcomes] = []
        self._starts: list[int] = []
        self._by_start: list[Outcomes] = []
        self._scattered: dict[int, tuple[Outcomes, int]] = {}
        self._futures: dict[int, Future[Any]] = {}
        self._waiters: list[tuple[int, Future[None]]] = []
        self._dropped: set[int] = set()
        #: True once the workbench may have forgotten what it had told: then outcomes may come a second time.
        self._renewed = False
        self._first_failed: int | None = None
        #: Tasks with an outcome, as the news has told.
        self.done = 0
        #: Names of outcomes that have been told but not fetched.
        self.told: dict[str, int] = {}
        #: True once someone wants the outcomes, and not just their number.
        self.wanted = False
        #: True once the last outcome has come, or will never come.
        self.ended = False
        #: Why the rest will never come.
        self.failure: JobError | None = None
        #: How many tasks there will be after all, once the sender has given up.
        self._cut_at: int | None = None

    # What the inbox tells.

    def tell(self, field: str, count: int) -> None:
        """Note that outcomes are there to be fetched."""
        with self._changed:
            if field not in self._segments and field not in self.told:
                self.told[field] = count
                self.done += 0 if self._renewed else count
                self._changed.notify_all()
        self._end_if_cut()

    def count(self, done: int) -> None:
        """Note how many tasks have their outcome."""
        with self._changed:
            self.done = max(self.done, done)
        self._end_if_cut()

    def renew(self) -> None:
        """Keep the outcomes but not their names: Redis was restarted, and may give the names to others now."""
        with self._changed:
            self._renewed = True
            self._segments = {}
            self.told.clear()
            self.done = self._held()

    def reopen(self) -> None:
        """Go on: the job was opened again. What has failed is expected anew; what counts still is fetched again."""
        with self._changed:
            self.ended, self.failure, self._cut_at = False, None, None
            self._dropped.clear()
            failed = {id(outcomes): outcomes for outcomes in self._order if outcomes.keep_successes()}
            if failed:
                self._renewed = True
                self._segments = {field: held for field, held in self._segments.items() if id(held) not in failed}
                self._first_failed = None
                self._starts, self._by_start, self._scattered = [], [], {}
                for outcomes in self._order:
                    self._index(outcomes)
            self.done = self._held()  # the rest is counted by whoever has called this
            for index, future in list(self._futures.items()):
                if future.done() and (future.cancelled() or future.exception() is not None):
                    del self._futures[index]
            self._changed.notify_all()

    def holds(self, total: int) -> bool:
        """Tell whether so many outcomes are here."""
        return self._held() >= total

    def _held(self) -> int:
        return sum(len(outcomes.indices()) for outcomes in self._order)

    def missing(self, fields: Sequence[str]) -> list[str]:
        """Return those of the names that have not been put here yet."""
        with self._changed:
            return [field for field in fields if field not in self._segments]

    def put(self, stored: Stored) -> None:
        """Add outcomes that were fetched.

        Raises:
            CodecError: they cannot be read.
        """
        self._put(stored.field, Outcomes(self._secret, self.job, stored))

    def drop(self, indices: Sequence[int]) -> None:
        """Note tasks that were cancelled one by one."""
        with self._changed:
            fresh = [index for index in indices if index not in self._dropped]
            self._dropped.update(fresh)
        if fresh:
            self._put(f"dropped-{fresh[0]}", Dropped(self.job, fresh))

    def _put(self, field: str, outcomes: Outcomes) -> None:
        with self._changed:
            if field in self._segments:
                return
            self._segments[field] = outcomes
            if self._renewed and not outcomes.leave_out(lambda index: self._find(index) is not None):
                self.told.pop(field, None)
                self._changed.notify_all()
                return
            if self.told.pop(field, None) is None or self._renewed:
                self.done += len(outcomes.indices())
            self._order.append(outcomes)
            self._index(outcomes)
            asked = self._asked(outcomes)
            self._changed.notify_all()
            due = self._due()
        _release(due)
        if asked:
            self._resolve(outcomes, asked)
        self._end_if_cut()

    def give_up(self, fields: Sequence[str]) -> None:
        """Expect no more those that were fetched but were not there: they have expired, or Redis was emptied."""
        with self._changed:
            for field in fields:
                self.told.pop(field, None)
            self._changed.notify_all()

    def cut(self, failure: JobError, sent: int) -> None:
        """Note that only so many tasks were sent, and why; the job ends when these have their outcome."""
        with self._changed:
            self.failure, self._cut_at = failure, sent
            orphans = [future for index, future in self._futures.items() if index >= sent]
            self._changed.notify_all()
        for orphan in orphans:
            _fail(orphan, failure)
        self._end_if_cut()

    def _end_if_cut(self) -> None:
        with self._changed:
            if self._cut_at is None or self.ended or self.done < self._cut_at:
                return
            due = self._end()
        _release(due)

    def end(self, failure: JobError | None = None) -> None:
        """Note that nothing more will come; with a failure, that some never will."""
        with self._changed:
            self.failure, self._cut_at = failure, None
            due = self._end()
            orphans = list(self._futures.values())
        _release(due)
        if failure is not None:
            for orphan in orphans:
                _fail(orphan, failure)

    def _end(self) -> list[Future[None]]:
        self.ended = True
        self._changed.notify_all()
        due = [future for _, future in self._waiters]
        self._waiters.clear()
        return due

    def _index(self, outcomes: Outcomes) -> None:
        segment = outcomes.segment
        if segment.scattered or outcomes._mask:  # the board and its outcomes are one room
            values = outcomes.indices()
            positions = {index: position for position, index in enumerate(segment.indices())}
            self._scattered.update((index, (outcomes, positions[index])) for index in values)
        else:
            place = bisect.bisect(self._starts, segment.first)
            self._starts.insert(place, segment.first)
            self._by_start.insert(place, outcomes)
        if segment.errors:
            counted = set(outcomes.indices())
            codes = zip(segment.indices(), segment.states, strict=True)
            failed = min((i for i, code in codes if code != _SUCCEEDED and i in counted), default=None)
            if failed is not None and (self._first_failed is None or failed < self._first_failed):
                self._first_failed = failed

    # Futures.

    def future(self, index: int, make: Callable[[int], Future[Any]]) -> Future[Any]:
        """Return the one future of a task, made when it is first asked for."""
        with self._changed:
            known = self._futures.get(index)
            if known is not None:
                return known
            future = self._futures[index] = make(index)
            found = self._find(index)
            failure = None if self._cut_at is not None and index < self._cut_at else self.failure
        if found is not None:
            _settle(future, index, found[0].value(found[1], index))
        elif failure is not None:
            _fail(future, failure)
        return future

    def _asked(self, outcomes: Outcomes) -> list[int]:
        return [index for index in outcomes.indices() if index in self._futures] if self._futures else []

    def _resolve(self, outcomes: Outcomes, asked: Sequence[int]) -> None:
        wanted = set(asked)
        for index, _, value in outcomes.rows():
            if index in wanted:
                _settle(self._futures[index], index, value)

    def _find(self, index: int) -> tuple[Outcomes, int] | None:
        """Return the outcomes that hold a task's, and its position in them."""
        if index in self._scattered:
            return self._scattered[index]
        place = bisect.bisect(self._starts, index) - 1
        if place >= 0:
            outcomes = self._by_start[place]
            position = index - outcomes.segment.first
            if position < outcomes.segment.count:
                return outcomes, position
        return None

    # Waiting.

    def wait(self, ready: Callable[[], bool], deadline: float | None) -> bool:
        """Block until ready, or until the deadline on the monotonic clock. Ctrl-C gets through."""
        with self._changed:
            while not ready():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def wake(self) -> None:
        """Let whoever waits look again."""
        with self._changed:
            self._changed.notify_all()

    def has_arrived(self, place: int) -> bool:
        """Tell whether the segment of that place in order of arrival has come, or none will come any more."""
        return self.arrived() > place or self.complete()

    def when_arrived(self, count: int) -> Future[None]:
        """Return a future that is done once so many segments have come, or the job has ended."""
        future: Future[None] = Future()
        with self._changed:
            if len(self._order) < count and not self.ended:
                self._waiters.append((count, future))
                return future
        future.set_result(None)
        return future

    def _due(self) -> list[Future[None]]:
        due = [future for count, future in self._waiters if count <= len(self._order)]
        self._waiters = [(count, future) for count, future in self._waiters if count > len(self._order)]
        return due

    # Reading.

    def arrived(self) -> int:
        """Number of segments that have come."""
        return len(self._order)

    def segment(self, place: int) -> Outcomes:
        """Return a segment in order of arrival."""
        return self._order[place]

    def segments(self) -> list[Outcomes]:
        """Return all segments that have come."""
        with self._changed:
            return list(self._order)

    def complete(self) -> bool:
        """Tell whether everything that was told is here and nothing more will come."""
        return self.ended and not self.told

    def failed_in_order(self) -> bool:
        """Tell whether a task has failed and all before it have their outcome: results in order stop there."""
        first = self._first_failed
        if first is None:
            return False
        before = sum(1 for index in self._scattered if index < first)
        for start, outcomes in zip(self._starts, self._by_start, strict=True):
            before += max(0, min(outcomes.segment.count, first - start))
        return before == first

    def results(self, total: int) -> list[Any]:
        """Return values by index; a Failure stands where a task failed or nothing has come."""
        found: list[Any] = [Failure(None)] * total
        for outcomes in self.segments():
            if outcomes.is_consecutive_success():
                first = outcomes.segment.first
                found[first : first + outcomes.segment.count] = outcomes.values()
            else:
                for index, _, value in outcomes.rows():
                    found[index] = value
        return found

    def table(self, total: int) -> Table:
        """Return what is known of each task, column by column."""
        table = Table(total)
        for outcomes in self.segments():
            table.add(outcomes)
        return table

    def log(self, index: int) -> bytes:
        """Return the end of what a task has written; nothing while it has no outcome."""
        with self._changed:
            found = self._find(index)
        return found[0].segment.logs.get(index, b"") if found else b""

    def state(self, index: int) -> State | None:
        """Return a task's final state, or None while it has none."""
        with self._changed:
            found = self._find(index)
        return STATE_OF_CODE[found[0].segment.states[found[1]]] if found else None


def _release(waiters: Sequence[Future[None]]) -> None:
    for waiter in waiters:
        # A coroutine that was cancelled has cancelled its waiter, too.
        if waiter.set_running_or_notify_cancel():
            waiter.set_result(None)


def cancelled(index: int) -> CancelledError:
    """Return what stands for the outcome of a task that was cancelled, as in the standard library."""
    return CancelledError(f"task {index} was cancelled")


def _settle(future: Future[Any], index: int, value: Any) -> None:
    if future.done():
        return
    if isinstance(value, Failure):
        _fail(future, cancelled(index) if value.cancelled else codec.revive(value.info, index))
    else:
        with contextlib.suppress(InvalidStateError):
            future.set_result(value)


def _fail(future: Future[Any], error: BaseException) -> None:
    if isinstance(error, JobCancelledError | CancelledError):
        # Not TaskFuture.cancel, which asks the queue. One that was cancelled before says yes, but is not told twice.
        if not future.done() and Future.cancel(future):
            with contextlib.suppress(RuntimeError):  # another thread was first
                future.set_running_or_notify_cancel()
        return
    # Whoever was first has settled it: two threads may end a board, and one may hear an outcome meanwhile.
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
