"""A task that waits for a job which it has sent itself lends its slot to others, so that nested jobs never deadlock.

The client says here when it waits, and the slot hears it, so that neither knows of the other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Final

_lock = threading.Lock()
_waiting = 0
_chunk = 0
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
    with _lock:
        _count(1)
        return _chunk


def end(chunk: int) -> None:
    """Have the slot back, once for each begin."""
    with _lock:
        if chunk == _chunk:  # else what has waited there has gone with its chunk
            _count(-1)


def forget() -> None:
    """Begin another chunk: what an earlier one has left waiting, such as a generator that it keeps, is of no account.

    Whoever the slot is lent to counts it as free by then.
    """
    global _chunk, _waiting
    with _lock:
        _chunk, _waiting = _chunk + 1, 0


def _count(step: int) -> None:
    global _waiting
    before, _waiting = _waiting, _waiting + step
    if _lend is not None and bool(before) != bool(_waiting):
        _lend(bool(_waiting))
