"""What a slot's log has grown by, told apart by the chunks, and the tasks, that ran meanwhile.

chunk a begins          chunk b begins         now
|-- what a wrote -------|-- what b wrote ------|
          ^ read so far: what comes next of a is of its tasks from the one that ran then to its last
"""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from yadtq_nb.model import ChunkHead, Written
from yadtq_nb.slots.capture import marked

#: Most that is told of one chunk at a time, in bytes, and the longest line that is waited for.
MOST: Final = 16 * 1024
#: Seconds after which what was read is old: whoever follows then begins anew.
_STALE: Final = 5.0
#: Seconds that a line which is not whole waits for its rest.
_WHOLE: Final = 1.0
#: Chunks of a slot whose beginnings are known.
_CHUNKS: Final = 64


class _Begun(msgspec.Struct):
    """A chunk, and where in the log it begins."""

    start: int
    head: ChunkHead
    #: Offsets of the first and the last of its tasks that were to run.
    lowest: int
    high: int
    #: Of the first that may have written what was not read yet.
    low: int


class Growth:
    """Reads one slot's log for whoever follows its jobs. Not thread-safe."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._begun: collections.deque[_Begun] = collections.deque(maxlen=_CHUNKS)
        self._jobs: frozenset[str] = frozenset()
        self._read = 0
        self._read_at = time.monotonic()
        self._partial_since: float | None = None

    def begin(self, start: int, head: ChunkHead, skip: frozenset[int]) -> None:
        """Note that a chunk begins at that place of the log, in which the offsets of skip are not run."""
        left = [offset for offset in range(head.count) if offset not in skip] if skip else range(head.count)
        low, high = (left[0], left[-1]) if left else (0, head.count - 1)
        self._begun.append(_Begun(start, head, low, high, low))

    def cut(self, bytes: int) -> None:
        """Note that the log has lost so many bytes at its beginning."""
        self._read = max(0, self._read - bytes)
        for begun in self._begun:
            begun.start = max(0, begun.start - bytes)

    def take(
        self, jobs: frozenset[str], running: Callable[[], int | None], most: int = MOST, *, done: bool
    ) -> list[Written]:
        """Return what chunks of these jobs have added to the log since the last time, line by line.

        The first time: of the chunk that runs, and what it has written so far.

        Args:
            jobs: those that are followed.
            running: tells the offset of the task that runs.
            most: bytes of each chunk; the end of it, if there is more.
            done: no chunk runs there now, so that nothing is added to a line.
        """
        now = time.monotonic()
        if not self._begun:
            return []
        # What lies before the size was written by the task that ran before it was looked at, up to that of after it.
        before, size, after = running(), self._size(), running()
        latest, fresh = self._begun[-1], jobs - self._jobs
        if now - self._read_at > _STALE:
            self._read, latest.low = size if done else latest.start, latest.lowest
        elif latest.head.job in fresh and not done:
            self._read, latest.low = min(self._read, latest.start), latest.lowest
        self._read_at, self._jobs = now, jobs
        self._read = max(self._read, self._begun[0].start)
        found: list[Written] = []
        while True:
            begun, last = self._begun[0], len(self._begun) == 1
            end = size if last else min(size, self._begun[1].start)
            here = end if begun.head.job not in jobs else self._whole(end, now, keep=last and not done)
            if here > self._read and begun.head.job in jobs:
                high = begun.high
                if last and not done and after is not None and not begun.head.concurrent:
                    high = min(after, high)
                first = begun.head.first
                text = self._text(here, most)
                found.append(Written(begun.head.job, first + min(begun.low, high), first + high, text))
            self._read = max(self._read, here)
            if last:
                if here == end and before is not None and not begun.head.concurrent:
                    begun.low = max(begun.low, before)
                return found
            self._begun.popleft()

    def _whole(self, end: int, now: float, *, keep: bool) -> int:
        """Return where the last whole line ends; the end itself where nothing more will come, or only after long."""
        if end <= self._read or not keep:
            self._partial_since = None
            return end
        text = self._bytes(max(self._read, end - MOST), end)
        whole = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        if whole == len(text):
            self._partial_since = None
            return end
        since = self._partial_since = self._partial_since or now
        if now - since < _WHOLE and (whole or len(text) < MOST):
            return max(self._read, end - len(text) + whole) if whole else self._read
        self._partial_since = None
        return end

    def _text(self, end: int, most: int) -> bytes:
        text = self._bytes(max(self._read, end - most), end)
        return marked(text) if end - self._read > most else text

    def _size(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0

    def _bytes(self, start: int, end: int) -> bytes:
        with contextlib.suppress(OSError), self._log.open("rb") as file:
            return os.pread(file.fileno(), end - start, start)
        return b""
