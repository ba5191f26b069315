"""The values of other jobs' tasks that are arguments here: verified, and opened when an item asks for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Final

import msgspec

from yadtq_nb import codec
from yadtq_nb.errors import (
    DependencyError,
    FormatError,
    JobCancelledError,
    JobIncompleteError,
    JobNotFoundError,
    JobTimeoutError,
    ResultPickleError,
)
from yadtq_nb.model import WHOLE, Segment
from yadtq_nb.salvage import Unreadable
from yadtq_nb.slots import hints
from yadtq_nb.slots.wire import Supply

#: Longest reason that is handed on, in characters.
_REASON: Final = 500
#: Tasks of a chain that are named at each of its ends.
_NAMED: Final = 5
_SUCCEEDED: Final = ord("S")

_decode = msgspec.msgpack.Decoder(list[Supply]).decode


class Supplies:
    """What one chunk needs; it is loaded when the first is asked for."""

    def __init__(self, secret: bytes, load: Callable[[], list[Supply]]) -> None:
        self._secret, self._load = secret, load
        self._jobs: dict[str, _Values] | None = None

    def value(self, job: str, index: int) -> Any:
        """Return the value of a task, or the list of a whole job's.

        Raises:
            DependencyError: there is none.
        """
        if self._jobs is None:
            self._jobs = {supply.job: _Values(self._secret, supply) for supply in self._load()}
        values = self._jobs.get(job)
        if values is None:
            raise FormatError(f"an item needs job {job}, which its chunk does not name: send it again")
        return values.all() if index == WHOLE else values.one(index)


def read(path: str) -> list[Supply]:
    """Return what lies in the file that the node has written for a chunk; nothing where there is none."""
    return _decode(Path(path).read_bytes()) if path else []


class _Values:
    """The outcomes of one job's tasks, as far as they are needed."""

    def __init__(self, secret: bytes, supply: Supply) -> None:
        self._supply = supply
        self._dropped = frozenset(supply.dropped)
        self._segments: list[_Opened] = []
        #: Index -> segment and position in it.
        self._places: dict[int, tuple[_Opened, int]] = {}
        self._list: list[Any] | None = None
        for frame, mask in supply.segments:
            opened = _Opened(secret, supply.job, frame)
            for position, index in enumerate(opened.segment.indices()):
                if not mask or mask[position] == ord("1"):
                    self._places[index] = opened, position

    def all(self) -> list[Any]:
        supply, name = self._supply, repr(self._supply.name)
        if not supply.known:
            self._fail(f"job {name}", JobNotFoundError(f"job {name} is not known to this queue (any more)"))
        values = []
        # As results() does: the first in order that failed, before whatever happened to the rest.
        for index in range(max(supply.total, max(self._places, default=-1) + 1)):
            if index not in self._places and index not in self._dropped:
                break
            values.append(self.one(index))
        if supply.cancel or supply.total != len(values):
            self._fail(f"job {name}", self._ended() or self._incomplete())
        return values

    def one(self, index: int) -> Any:
        what = f"{self._supply.name}[{index}]"
        if index in self._dropped:
            self._fail(what, CancelledError(f"task {index} was cancelled"))
        if index not in self._places:
            self._fail(what, self._ended() or self._missing(index))
        opened, position = self._places[index]
        if opened.segment.states[position] != _SUCCEEDED:
            self._fail(what, codec.revive(opened.segment.errors.get(index), index))
        value = opened.values()[position]
        if type(value) is Unreadable:
            error = ResultPickleError(f"the result of task {index} cannot be unpickled", index=index)
            error.__cause__ = value.error
            self._fail(what, error)
        return value

    def _ended(self) -> Exception | None:
        """Return what the end of the job raises, where it was ended before its time."""
        name, id = self._supply.name, self._supply.job
        if self._supply.cancel == "lost":
            return JobIncompleteError(
                f"outcomes of job {name!r} were lost with a server's data; its retry() brings them back", job=name
            )
        if self._supply.cancel == "deadline":
            return JobTimeoutError(f"job {name!r} was ended by its deadline", job=name)
        if self._supply.cancel == "deleted":
            return JobNotFoundError(f"job {id} was deleted by job.delete(): nothing of it is kept", job=id)
        if self._supply.cancel:
            return JobCancelledError(f"job {name!r} was cancelled", job=name)
        if not self._supply.known:
            return JobNotFoundError(f"no job {id} is known to this queue: it has expired, or never came", job=id)
        return None

    def _incomplete(self) -> Exception:
        name = self._supply.name
        if self._supply.total < 0:
            return JobIncompleteError(f"job {name!r} was not sent whole: its client has died", job=name)
        return JobIncompleteError(f"outcomes of job {name!r} are not there any more", job=name)

    def _missing(self, index: int) -> Exception:
        name = self._supply.name
        if self._supply.total < 0:
            return self._incomplete()
        return JobIncompleteError(f"task {index} of job {name!r} has no outcome (any more)", job=name)

    def _fail(self, what: str, error: BaseException) -> None:
        """Raise what a task fails with that needs this, from what was raised there."""
        if isinstance(error, DependencyError) and error.needs:
            needs, reason = (what, *error.needs), error.reason
        else:
            text = hints.message(error)
            needs, reason = (what,), f"{type(error).__name__}: {text[:_REASON]}"
        raise DependencyError(explain("it needs", needs, reason), needs=needs, reason=reason) from error


class _Opened:
    """One segment, its values unpickled on first use."""

    def __init__(self, secret: bytes, job: str, frame: bytes) -> None:
        self.segment: Segment
        self.segment, self._pickled = codec.decode_segment(secret, frame)
        if self.segment.job != job:
            raise FormatError(f"outcomes of job {self.segment.job} came for job {job}")
        self._values: list[Any] | None = None

    def values(self) -> list[Any]:
        """Return by position the values of those that succeeded; an Unreadable stands for what cannot be unpickled."""
        if self._values is None:
            try:
                # Classes that are known here stay as the chunk's function has brought them.
                good = codec.loads_home(self._pickled)
            except Exception:  # whatever the user's objects do when they are unpickled
                good = codec.loads_each_home(self._pickled)
            succeeded = iter(good)
            self._values = [next(succeeded) if code == _SUCCEEDED else None for code in self.segment.states]
        return self._values


def explain(who: str, needs: tuple[str, ...], reason: str) -> str:
    """Return in a sentence who could not have what."""
    named = list(needs)
    if len(named) > 2 * _NAMED:
        named[_NAMED:-_NAMED] = [f"... {len(named) - 2 * _NAMED} more"]
    return f"{who} {', which needs '.join(named)}, which has no value: {reason}"


def named(error: DependencyError, who: str, index: int | None = None) -> DependencyError:
    """Return the error of who could not be run, which names it."""
    message = explain(f"{who} was not run: it needs", error.needs, error.reason)
    told = DependencyError(message, index=index, needs=error.needs, reason=error.reason)
    told.__cause__ = error.__cause__
    return told
