"""A task that waits for a job which it has sent itself lends its slot to others, so that nested jobs never deadlock.

The client says here when it waits, and the slot hears it, so that neither knows of the other.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

_T = TypeVar("_T")


class InTurn(Generic[_T]):
    """Handles things one at a time, in the order in which they are put.

    One may be put while another is handled, by a finaliser that interrupts just that: it is handled next. With a lock
    around all, it would wait for itself for ever.
    """

    def __init__(self, handle: Callable[[_T], None]) -> None:
        self._handle = handle
        self._things: collections.deque[_T] = collections.deque()
        self._busy = threading.Lock()

    def put(self, thing: _T) -> None:
        """Handle a thing, or leave it to whoever is at it."""
        self._things.append(thing)
        self._work_off()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Handle nothing while the block runs, but afterwards."""
        try:
            with self._busy:
                yield
        finally:
            self._work_off()

    def _work_off(self) -> None:
        while self._things and self._busy.acquire(blocking=False):
            try:
                while self._things:
                    self._handle(self._things.popleft())
            finally:
                self._busy.release()


#: The present chunk; that for which is counted; and how many wait in it.
_chunk = 0
_counted = 0
_waiting = 0
_lend: Callable[[bool], None] | None = None

#: How deep the job of the task that runs here is nested.
depth = 0
#: Deepest nesting at which a task may wait for a job: each level takes one more process for each slot.
MOST: Final = 16


def serve(lend: Callable[[bool], None]) -> None:
    """Make this process a slot's: lend is told when the first of its threads waits, and when none does any more."""
    global _lend
    _lend = lend


def in_slot() -> bool:
    """Tell whether this process runs tasks."""
    return _lend is not None


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Lend this process's slot, if it is one, while the block waits for a job.

    Raises:
        RecursionError: jobs that wait for jobs are nested too deep.
    """
    chunk = begin()
    try:
        yield
    finally:
        end(chunk)


def begin() -> int:
    """Lend this process's slot, if it is one, until end is called as often with what this returns.

    Raises:
        RecursionError: jobs that wait for jobs are nested too deep.
    """
    if _lend is not None and depth >= MOST:
        raise RecursionError(f"tasks wait for jobs of their own, {depth} levels deep: is there an end to it?")
    chunk = _chunk
    _steps.put((chunk, 1))
    return chunk


def end(chunk: int) -> None:
    """Have the slot back, once for each begin."""
    _steps.put((chunk, -1))


def forget() -> None:
    """Begin another chunk: what an earlier one has left waiting, such as a generator that it keeps, is of no account.

    Whoever the slot is lent to counts it as free by then.
    """
    global _chunk
    _chunk += 1


def _count(step: tuple[int, int]) -> None:
    global _counted, _waiting
    chunk, change = step
    if chunk != _chunk:
        return  # what has waited there has gone with its chunk
    if chunk != _counted:
        _counted, _waiting = chunk, 0
    before, _waiting = _waiting, _waiting + change
    if _lend is not None and bool(before) != bool(_waiting):
        _lend(bool(_waiting))


_steps: Final = InTurn(_count)
