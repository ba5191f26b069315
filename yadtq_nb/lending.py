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
    begin()
    try:
        yield
    finally:
        end()


def begin() -> None:
    """Lend this process's slot, if it is one, until end is called as often.

    Raises:
        RecursionError: jobs that wait for jobs are nested too deep.
    """
    if _lend is not None and depth >= MOST:
        raise RecursionError(f"tasks wait for jobs of their own, {depth} levels deep: is there an end to it?")
    _count(1)


def end() -> None:
    """Have the slot back, once for each begin."""
    _count(-1)


def _count(step: int) -> None:
    global _waiting
    with _lock:
        before, _waiting = _waiting, _waiting + step
        if _lend is not None and bool(before) != bool(_waiting):
            _lend(bool(_waiting))
