"""What the tasks of one chunk came to: kept while they run, and packed into sealed segments."""

from __future__ import annotations

import contextlib
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from itertools import compress, repeat
from operator import sub
from pathlib import Path
from typing import Any, Final, TypeAlias

from yadtq_nb import codec, errors, pending
from yadtq_nb.model import Environment, ErrorInfo, Policy, Retry, Segment
from yadtq_nb.slots import hints
from yadtq_nb.slots.wire import Order, Report

Send: TypeAlias = Callable[[Report, bytes], None]
_Types: TypeAlias = tuple[type[BaseException], ...]
#: Given offsets: what each of these tasks has written, that has written anything.
TakeLogs: TypeAlias = Callable[[Sequence[int]], dict[int, bytes]]

_OURS: Final = str(Path(__file__).parent)
#: Longest traceback and message that travel, in characters; more is cut out of the middle.
_TEXT: Final = 32 * 1024
#: An exception that pickles to more than this travels as text, in bytes.
_PICKLED: Final = 1024 * 1024
#: Longest note of an earlier attempt, in characters.
_NOTE: Final = 500
_SUCCEEDED: Final = b"S"
_FAILED: Final = ord("F")


class Outcomes:
    """Outcomes of one chunk in the order in which its tasks ended.

    The thread that runs tasks fills values and failures first and marks last; another thread may report what is
    marked at any time. Whoever reports holds the reporter's lock.
    """

    #: Offset of each task in the chunk, in the order of values.
    offsets: Sequence[int]

    def __init__(self, order: Order, node: str, secret: bytes, take_logs: TakeLogs) -> None:
        self._order, self._node, self._secret = order, node, secret
        self._take_logs = take_logs
        #: Where its tasks run, once that is known.
        self.environment = Environment()
        self.values: list[Any] = []
        self.failures: dict[int, ErrorInfo] = {}
        #: When each task ended, preceded by when the first began; when tasks run side by side: (began, ended) of each.
        self.marks: list[float] = []
        self.spans: list[tuple[float, float]] | None = None
        self.offsets = ()
        #: True when the node wanted no more of its tasks to be started.
        self.held = False
        #: What is to be tried again, by offset.
        self.again: dict[int, Retry] = {}
        self.policy = Policy()
        self._retry_on: _Types = ()
        self._reported = 0
        self._epoch = time.time() - time.perf_counter()

    def retry_on(self, policy: Policy, types: _Types) -> None:
        """Have tasks that raise one of these types tried again, as often as the policy allows."""
        self.policy, self._retry_on = policy, types

    def fail(self, offset: int, error: BaseException) -> None:
        """Record that the task at offset raised error."""
        tries = self._order.tries.get(offset, 0)
        try:
            again = tries < self.policy.retries and isinstance(error, self._retry_on)
        except Exception:  # a metaclass of the user's
            again = False
        if again:
            self.again[offset] = Retry(offset, tries + 1, self.policy.delay(tries), self._note(offset, error))
            return
        for note in self._order.notes.get(offset, ()):
            with contextlib.suppress(Exception):  # an error that takes no notes
                error.add_note(note)
        self.failures[offset] = info(error, self.environment)

    def hold(self) -> None:
        """Note that the tasks which have not begun will not be run here."""
        self.held = True
        self.offsets = self.offsets[: len(self.values)]

    def timeout(self, offset: int) -> errors.TaskTimeoutError:
        """Return the error of a task that has taken too long."""
        index = self._order.first + offset
        return errors.TaskTimeoutError(
            f"task {index} took longer than its timeout of {self.policy.timeout:g} s", index=index
        )

    def _note(self, offset: int, error: BaseException) -> str:
        attempt = self._order.attempts.get(offset, 1)
        text = f"attempt {attempt} on {self._node}: {_type_name(type(error))}: {hints.message(error)}"
        return text if len(text) <= _NOTE else f"{text[:_NOTE]} [...]"

    def fail_rest(self, todo: Sequence[int], error: BaseException) -> None:
        """Record that no task can run, for a reason that is the chunk's."""
        self.offsets, self.spans = todo, None
        self.values = [None] * len(todo)
        self.failures = dict.fromkeys(todo, info(error, self.environment))
        self.marks = [time.perf_counter()] * (len(todo) + 1)

    def report(self, send: Send, *, last: bool) -> None:
        """Send what has not been sent.

        Raises:
            Exception: values cannot be pickled together, when it is not the last report: nothing is sent then.
        """
        start, stop = self._reported, self._ended()
        if start == stop and not last:
            return
        # Looked at after the outcomes: with the last of these the chunk is closed, and whoever runs it may be stopped,
        # but a task that has sent a job is done only when that is safe.
        if not last and pending.is_any():
            return
        offsets = self.offsets[start:stop]
        kept = self.values[start:stop]
        again = [self.again[offset] for offset in offsets if offset in self.again] if self.again else []
        if again:
            kept = [value for offset, value in zip(offsets, kept, strict=True) if offset not in self.again]
        began, seconds = self._times(start, stop, offsets)
        if again:
            offsets = [offset for offset in offsets if offset not in self.again]
        values = self._pickle(offsets, kept, last)
        report, segment = self._pack(offsets, began, seconds, last, again)
        frame = codec.encode_segment(self._secret, segment, values)
        self._reported = stop
        self.values[start:stop] = repeat(None, stop - start)  # a long chunk need not keep what it has sent
        send(report, frame)

    def _ended(self) -> int:
        return max(len(self.marks) - 1, 0) if self.spans is None else len(self.spans)

    def _pickle(self, offsets: Sequence[int], values: list[Any], last: bool) -> list[codec.Buffer]:
        failures = self.failures
        if failures:
            values = [value for offset, value in zip(offsets, values, strict=True) if offset not in failures]
        try:
            return codec.dumps(values)
        except BaseException:
            if not last:
                raise  # a task that is running may be changing what an earlier one has returned
        good = []
        for offset, value in zip([o for o in offsets if o not in failures], values, strict=True):
            try:
                codec.dumps(value)
                good.append(value)
            except BaseException as exc:
                self.failures[offset] = self._unpicklable(self._order.first + offset, value, exc)
        return codec.dumps(good)

    def _unpicklable(self, index: int, value: object, error: BaseException) -> ErrorInfo:
        text = (
            f"the result of task {index} cannot be pickled: it is of type {type(value).__qualname__}, and pickling "
            f"says {type(error).__qualname__}: {hints.message(error)}"
        )
        return ours(errors.ResultPickleError(text, index=index))

    def _pack(
        self,
        offsets: Sequence[int],
        began: array[float],
        seconds: array[float],
        last: bool,
        again: Sequence[Retry],
    ) -> tuple[Report, Segment]:
        order, count = self._order, len(offsets)
        states = _SUCCEEDED * count
        failures = (
            {offset: self.failures[offset] for offset in offsets if offset in self.failures} if self.failures else {}
        )
        if failures:
            states = bytes(_FAILED if offset in failures else _SUCCEEDED[0] for offset in offsets)
        first = offsets[0] if count else 0
        consecutive = isinstance(offsets, range) or list(offsets) == list(range(first, first + count))
        segment = Segment(
            job=order.job,
            number=order.number,
            first=order.first + first,
            count=count,
            scattered=b"" if consecutive else array("I", [order.first + offset for offset in offsets]).tobytes(),
            states=states,
            errors={order.first + offset: failure for offset, failure in failures.items()},
            started=began.tobytes(),
            seconds=seconds.tobytes(),
            worker=self._node,
            attempts=self._attempts(offsets),
            logs={order.first + offset: log for offset, log in self._take_logs(offsets).items()},
        )
        packed = b"" if consecutive else array("I", offsets).tobytes()
        return Report(
            first, count, packed, states, last, tuple(again), last and (bool(self.again) or self.held)
        ), segment

    def _times(self, start: int, stop: int, offsets: Sequence[int]) -> tuple[array[float], array[float]]:
        epoch = self._epoch
        if self.spans is not None:
            begins, ends = [a for a, _ in self.spans[start:stop]], [b for _, b in self.spans[start:stop]]
        else:
            begins, ends = self.marks[start:stop], self.marks[start + 1 : stop + 1]
        if self.again:
            final = [offset not in self.again for offset in offsets]
            begins, ends = list(compress(begins, final)), list(compress(ends, final))
        return array("d", [epoch + mark for mark in begins]), array("d", map(sub, ends, begins))

    def _attempts(self, offsets: Sequence[int]) -> dict[int, int]:
        attempts = self._order.attempts
        if not attempts:
            return {}
        return {self._order.first + offset: attempts[offset] for offset in offsets if offset in attempts}


def info(error: BaseException, environment: Environment) -> ErrorInfo:
    """Return error as it travels, with notes about what differs between notebook and worker."""
    hints.annotate(error, environment)
    return ErrorInfo(
        type_name=_type_name(type(error)),
        message=_shorten(hints.message(error)),
        traceback=_shorten(_traceback(error)),
        pickled=_pickle_error(error),
    )


def ours(error: errors.TaskError) -> ErrorInfo:
    """Return an error of this package about one task, as it travels."""
    name = type(error).__name__
    error.type_name = f"yadtq_nb.errors.{name}"
    return ErrorInfo(error.type_name, _shorten(str(error)), "", _pickle_error(error), name)


def _type_name(cls: type) -> str:
    return hints.sendable(cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}")


def _traceback(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS):
        trace = trace.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, trace))
    except Exception as exc:  # the error's own __str__ or a lying __cause__
        return f"{_type_name(type(error))}: its traceback cannot be shown: {type(exc).__qualname__}\n"


def _pickle_error(error: BaseException) -> bytes:
    try:
        data = b"".join(codec.dumps(error.with_traceback(None)))
        if len(data) <= _PICKLED and type(codec.loads(data)) is type(error):
            return data
    except BaseException:  # whatever its __reduce__ or constructor raises: it travels as text
        pass
    return b""


def _shorten(text: str) -> str:
    text = hints.sendable(text)
    if len(text) <= _TEXT:
        return text
    half = _TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
