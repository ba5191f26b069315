"""What this process has begun to send and must have sent before it ends, or before its slot may be replaced.

The client registers here and the slot asks here, so that neither knows of the other.
"""

from __future__ import annotations

import atexit
import time
from typing import Final, Protocol

#: Seconds that interpreter exit waits.
_EXIT: Final = 60.0


class Sending(Protocol):
    """Something that may still be sending."""

    def finish_sending(self, timeout: float, *, ending: bool) -> None:
        """Wait for what has an end; when the process is ending, give up the rest."""

    def is_sending(self) -> bool:
        """Tell whether there is something that finish_sending would wait for."""


_open: dict[int, Sending] = {}


def add(sending: Sending) -> None:
    """Wait for this one, too, until it is removed: whoever drops a queue may still be sending through it."""
    _open[id(sending)] = sending


def remove(sending: Sending) -> None:
    """Wait for this one no more."""
    _open.pop(id(sending), None)


def is_any() -> bool:
    """Tell whether something is being sent that has an end."""
    return any(sending.is_sending() for sending in list(_open.values()))


def finish(timeout: float = _EXIT, *, ending: bool = False) -> None:
    """Let what is being sent get out."""
    deadline = time.monotonic() + timeout
    for sending in list(_open.values()):
        sending.finish_sending(max(0.0, deadline - time.monotonic()), ending=ending)


# A script that ends right after map() must not lose its job.
atexit.register(finish, ending=True)
