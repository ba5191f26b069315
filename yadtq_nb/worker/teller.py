"""The teller: sends what tasks write to those who follow their jobs, and sleeps while nobody does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

import msgspec

from yadtq_nb.errors import WorkbenchError
from yadtq_nb.model import Written
from yadtq_nb.slots.capture import marked
from yadtq_nb.workbench.bench import Workbench

log = logging.getLogger(__name__)

#: Seconds between looks at what was written.
_EVERY: Final = 0.25
#: Most that waits while Redis is away, in bytes.
_WAITING: Final = 256 * 1024


class Teller:
    """One thread, started when a job of this queue is followed for the first time."""

    def __init__(self, connect: Callable[[], Workbench], grown: Callable[[frozenset[str]], list[Written]]) -> None:
        """Take the parts that are passed in.

        Args:
            connect: opens a connection of its own.
            grown: returns what tasks of these jobs have written since the last call.
        """
        self._connect, self._grown = connect, grown
        self._jobs: frozenset[str] = frozenset()
        self._changed = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def follow(self, jobs: frozenset[str]) -> None:
        """Send what tasks of these jobs write from now on, and of no others. Called with each heartbeat."""
        if jobs == self._jobs:
            return
        self._jobs = jobs
        self._changed.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="yadtq-teller", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what is left, and join the thread."""
        self._closing = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        bench, waiting = self._connect(), list[Written]()
        while True:
            self._changed.wait(_EVERY if self._jobs else None)
            self._changed.clear()
            waiting += self._grown(self._jobs)
            if waiting:
                try:
                    bench.tell(waiting)
                    waiting = []
                except WorkbenchError as exc:
                    log.warning("what tasks write waits: %s", exc)
                    waiting = _end_of(waiting)
            if self._closing:
                break
        bench.close()


def _end_of(written: list[Written]) -> list[Written]:
    """Return the last of it, with a mark where something was left out."""
    kept, size = list[Written](), 0
    for one in reversed(written):
        size += len(one.text)
        if kept and size > _WAITING:
            kept[-1] = msgspec.structs.replace(kept[-1], text=marked(kept[-1].text))
            break
        kept.append(one)
    return kept[::-1]
