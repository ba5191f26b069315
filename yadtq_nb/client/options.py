"""What can be said of a job when it is sent, checked once for map, starmap and submit."""

from __future__ import annotations

import datetime
import functools
import math
import operator
import time
from collections.abc import Callable
from numbers import Real
from typing import Any, Final, Literal, TypedDict, get_args

import msgspec

from yadtq_nb import lending
from yadtq_nb.client import planner
from yadtq_nb.errors import TaskTimeoutError
from yadtq_nb.model import Lane, Policy, Priority

#: Tasks that travel together, or "auto".
ChunkSize = int | str
Seconds = float | datetime.timedelta
ErrorTypes = type[BaseException] | tuple[type[BaseException], ...]
#: What is done when the name is taken.
IfExists = Literal["attach", "replace", "new"]

_PRIORITIES: Final = get_args(Priority)
_IF_EXISTS: Final = get_args(IfExists)
#: Longest time that can be asked for, in seconds: a century.
_LONGEST: Final = 100 * 365 * 86_400.0


class Given(TypedDict, total=False):
    """The options, as keyword arguments; see Queue.map."""

    name: str | None
    if_exists: IfExists | None
    chunksize: ChunkSize
    retries: int
    backoff: Seconds
    max_delay: Seconds
    retry_on: ErrorTypes
    timeout: Seconds | None
    max_crashes: int | None
    start_after: Seconds | datetime.datetime | None
    deadline: Seconds | datetime.datetime | None
    priority: Priority


class Moment(msgspec.Struct, frozen=True):
    """A time to come, as it was given."""

    #: Seconds from now.
    delay: float | None = None
    #: Seconds since the epoch, by this machine's clock.
    at: float | None = None

    def by(self, now: Callable[[], float]) -> float:
        """Return it by the workbench's clock, which now tells, or 0 when nothing was given."""
        if self.delay is not None:
            return now() + self.delay
        if self.at is not None:
            return max(1.0, self.at + now() - time.time())  # 0 would be none
        return 0.0


class JobOptions(msgspec.Struct, frozen=True):
    """The options of one job, checked."""

    name: str | None
    #: None to attach to the job that has the name when it is the same.
    if_exists: IfExists | None
    #: None to measure it.
    chunksize: int | None
    retries: int
    backoff: float
    max_delay: float
    retry_types: tuple[type[BaseException], ...]
    #: 0 for as long as it wants.
    timeout: float
    #: 0 for the queue's setting.
    max_crashes: int
    start_after: Moment
    deadline: Moment
    lane: Lane

    def policy(self, now: Callable[[], float]) -> Policy:
        """Return what travels with each chunk; now tells the workbench's clock, and is asked only for a delay."""
        return Policy(
            retries=self.retries,
            backoff=self.backoff,
            max_delay=self.max_delay,
            timeout=self.timeout,
            retry_timeouts=any(issubclass(TaskTimeoutError, cls) for cls in self.retry_types),
            max_crashes=self.max_crashes,
            start_after=self.start_after.by(now),
        )

    def ends_at(self, now: Callable[[], float]) -> float:
        """Return when the job is ended, or 0 for never."""
        return self.deadline.by(now)


def check(
    *,
    name: str | None = None,
    if_exists: IfExists | None = None,
    chunksize: ChunkSize = "auto",
    retries: int = 0,
    backoff: Seconds = 1.0,
    max_delay: Seconds = 60.0,
    retry_on: ErrorTypes = Exception,
    timeout: Seconds | None = None,
    max_crashes: int | None = None,
    start_after: Seconds | datetime.datetime | None = None,
    deadline: Seconds | datetime.datetime | None = None,
    priority: Priority = "normal",
    **unknown: object,
) -> JobOptions:
    """Check the options of a job.

    Raises:
        TypeError, ValueError: one is not what it must be, or there is none of that name; the message names it.
    """
    if unknown:
        known = ", ".join(sorted(Given.__annotations__))
        raise TypeError(f"there is no option {min(unknown)!r}; those of a job are {known}")
    types = retry_on if isinstance(retry_on, tuple) else (retry_on,)
    if not types or not all(isinstance(cls, type) and issubclass(cls, BaseException) for cls in types):
        raise TypeError(f"retry_on must be an exception class or a tuple of them, not {retry_on!r}")
    return JobOptions(
        name=_name(name),
        if_exists=_if_exists(if_exists, name),
        chunksize=_chunk_size(chunksize),
        retries=_count("retries", retries, 0),
        backoff=_seconds("backoff", backoff),
        max_delay=_seconds("max_delay", max_delay),
        retry_types=types,
        timeout=0.0 if timeout is None else positive("timeout", timeout),
        max_crashes=0 if max_crashes is None else _count("max_crashes", max_crashes, 1),
        start_after=_moment("start_after", start_after),
        deadline=_moment("deadline", deadline),
        lane=_lane(priority),
    )


def _lane(priority: Any) -> Lane:
    if priority not in _PRIORITIES:
        raise ValueError(f"priority must be 'high', 'normal' or 'low', not {priority!r}")
    # Whoever waits for it has a slot: no priority may hold it up.
    return "nested" if lending.in_slot() else priority


@functools.cache
def _plain(_in_slot: bool) -> JobOptions:
    return check()


def defaults() -> JobOptions:
    """Return what holds when nothing is said."""
    return _plain(lending.in_slot())


def _name(name: str | None) -> str | None:
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"the name of a job must be a string, not {type(name).__name__}")
    if not name or name != name.encode("utf-8", "replace").decode():
        raise ValueError(f"{name!r} cannot be the name of a job: it is empty, or no valid text")
    return name


def _if_exists(if_exists: Any, name: str | None) -> IfExists | None:
    if if_exists is not None and if_exists not in _IF_EXISTS:
        raise ValueError(f"if_exists must be 'attach', 'replace', 'new' or None, not {if_exists!r}")
    if if_exists is not None and name is None:
        raise ValueError("if_exists goes with name=: a job whose name is made up has one that nobody else has")
    return if_exists  # type: ignore[no-any-return]  # checked


def _chunk_size(chunksize: Any) -> int | None:
    """Return how many tasks shall travel together, or None when that is to be measured."""
    if chunksize == "auto":
        return None
    try:
        size = operator.index(chunksize)
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"chunksize must be 'auto' or at least 1, not {chunksize!r}")
    return min(size, planner.MOST)


def _count(option: str, value: Any, least: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{option} must be a whole number, not {value!r}") from None
    if not least <= count <= 1_000_000:
        raise ValueError(f"{option} must be from {least} to 1,000,000, not {value!r}")
    return count


def _seconds(option: str, value: Any) -> float:
    seconds = value.total_seconds() if isinstance(value, datetime.timedelta) else value
    if not isinstance(seconds, int | float | Real) or isinstance(seconds, bool):
        raise TypeError(f"{option} must be seconds or a timedelta, not {value!r}")
    seconds = float(seconds)
    if not (math.isfinite(seconds) and 0 <= seconds <= _LONGEST):
        raise ValueError(f"{option} must not be negative, nor more than a century, not {value!r}")
    return seconds


def _moment(option: str, value: Any) -> Moment:
    if value is None:
        return Moment()
    if isinstance(value, datetime.datetime):
        try:
            return Moment(at=value.timestamp())
        except (ValueError, OverflowError, OSError):
            raise ValueError(f"{option} is further away than this machine's clock can tell: {value!r}") from None
    if not isinstance(value, datetime.timedelta | Real) or isinstance(value, bool):
        raise TypeError(f"{option} must be seconds, a timedelta or a datetime, not {value!r}")
    return Moment(delay=_seconds(option, value))


def positive(option: str, value: Any) -> float:
    """Return seconds or a timedelta as seconds.

    Raises:
        TypeError, ValueError: it is neither, or not more than 0.
    """
    seconds = _seconds(option, value)
    if not seconds:
        raise ValueError(f"{option} must be more than 0; None sets no limit")
    return seconds
