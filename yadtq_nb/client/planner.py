"""How many tasks travel in one chunk: measured, not guessed.

A few tasks are sent alone; their run time and size set the rest, so that a chunk takes some 150 ms, all slots are busy
to the end, and a job is at most some thousands of chunks.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

#: Seconds that a chunk should take.
_AIM: Final = 0.15
#: Most tasks in one chunk.
MOST: Final = 2_000
#: A job is about this many chunks at most, however long its tasks take.
_MOST_CHUNKS: Final = 4_096
#: Chunks left for each slot near the end, so that all end together.
_TAIL: Final = 4
#: Bytes of arguments that a chunk should not exceed.
_BYTES: Final = 256 * 1024
#: Seconds to wait for the first outcomes. What has not come back by then is slow.
PATIENCE: Final = 0.05
#: Seconds to wait for them while all slots are busy with other work: then nothing is known, and nothing is lost.
QUEUED: Final = 1.0
#: Chunks for each slot when nothing is known of the tasks.
_BLIND: Final = 64
#: Coroutine tasks of one chunk run at the same time, so that their chunks may be longer.
_CONCURRENT: Final = 100


class Measured(msgspec.Struct, frozen=True):
    """What is known of the tasks so far."""

    #: Seconds that one takes, or None when none has come back within PATIENCE.
    seconds: float | None
    #: Bytes of arguments of one.
    size: float
    #: Slots that serve the queue.
    slots: int
    concurrent: bool = False
    #: True when none has even begun: they may be quick.
    queued: bool = False


def probes(total: int, slots: int) -> int:
    """Return how many tasks to send alone, to be measured."""
    return min(total, max(1, slots))


def chunk_size(left: int | None, measured: Measured) -> int:
    """Return how many of the tasks that are left should travel together; None when nobody knows how many there are."""
    slots = max(1, measured.slots)
    by_time = 1.0 if measured.seconds is None else _AIM / max(measured.seconds, 1e-7)
    by_size = _BYTES / max(1.0, measured.size)
    if measured.queued:
        by_time = max(1.0, MOST / _BLIND if left is None else left / (slots * _BLIND))
    if measured.concurrent:
        by_time = max(by_time, _CONCURRENT)
    size = min(by_time, by_size, MOST)
    if left is not None:
        size = max(min(size, math.ceil(left / (slots * _TAIL))), min(by_size, left / _MOST_CHUNKS))
    return max(1, math.ceil(size) if size < 1 else int(size))


def window(measured: Measured) -> int:
    """Return how many tasks of an iterator may be unfinished at a time."""
    slots = max(1, measured.slots)
    return max(2 * slots, 4 * slots * chunk_size(None, measured))
