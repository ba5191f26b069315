"""What chunks need of other jobs: fetched when they are run, kept as files for the slots, and not opened here."""

from __future__ import annotations

import bisect
import collections
import threading
from pathlib import Path
from typing import Final

import msgspec

from yadtq_nb import codec
from yadtq_nb.model import WHOLE, Lease, Need
from yadtq_nb.slots.wire import Supply
from yadtq_nb.workbench.jobs import JobStore

#: Files that nobody needs at the moment, kept for the next chunk of the same job.
_SPARE: Final = 4
#: Jobs of which is kept which chunk has which task: that never changes.
_JOBS: Final = 16

_encode = msgspec.msgpack.Encoder().encode


class NeedFiles:
    """The files of one node, under its directory. Any thread may ask; it has a connection of its own."""

    def __init__(self, directory: Path, store: JobStore) -> None:
        self._directory = directory
        self._store = store
        self._lock = threading.Lock()
        #: File -> the leases that it is there for.
        self._users: dict[Path, set[tuple[str, int]]] = collections.defaultdict(set)
        self._spare: collections.deque[Path] = collections.deque()
        #: Files that lack something, which may be there the next time.
        self._partial: set[Path] = set()
        #: Job -> first index, index after the last, and number of its chunks, in order.
        self._places: dict[str, list[tuple[int, int, int]]] = {}

    def path(self, lease: Lease) -> Path:
        """Return the file with what a chunk needs. Chunks that need the same share it.

        Raises:
            WorkbenchError: Redis cannot be reached.
            OSError: it cannot be written here: the disk is full, or the like.
        """
        needs = lease.head.needs
        path = self._directory / codec.content_hash(_encode(needs))
        with self._lock:
            if path in self._spare:
                self._spare.remove(path)
            if not path.exists():
                self._write(path, needs)
            self._users[path].add((lease.head.id, lease.token))
        return path

    def drop(self, lease: Lease) -> None:
        """Note that a chunk does not need its file any more."""
        path = self._directory / codec.content_hash(_encode(lease.head.needs))
        with self._lock:
            users = self._users.get(path)
            if users is None:
                return
            users.discard((lease.head.id, lease.token))
            if users:
                return
            del self._users[path]
            if path in self._partial:
                self._partial.discard(path)
                path.unlink(missing_ok=True)
                return
            self._spare.append(path)
            if len(self._spare) > _SPARE:
                self._spare.popleft().unlink(missing_ok=True)

    def close(self) -> None:
        """Close the connection."""
        self._store.close()

    def _write(self, path: Path, needs: tuple[Need, ...]) -> None:
        by_job: dict[str, list[Need]] = {}
        for need in needs:
            by_job.setdefault(need.job, []).append(need)
        found = [self._supply(job, wanted) for job, wanted in by_job.items()]
        # Somebody may have cleaned up the temporary directory.
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            path.write_bytes(_encode([supply for supply, _ in found]))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        if not all(complete for _, complete in found):
            self._partial.add(path)

    def _supply(self, job: str, needs: list[Need]) -> tuple[Supply, bool]:
        """Return what a job has, and whether nothing is missing that might come yet."""
        whole = any(need.count == WHOLE for need in needs)
        numbers = [] if whole else self._numbers(job, needs)
        facts, stored = self._store.outcomes_of(job, numbers)
        if facts is None:
            return Supply(job, job), False
        if whole or facts.reopened:
            stored = list(self._store.outcomes(job, self._store.fields(job)))
        dropped = tuple(self._store.dropped(job)) if facts.cancelled else ()
        # What has failed may be run again, and is asked for anew then.
        complete = not facts.cancelled and not facts.cancel and not facts.failed
        complete = complete and (facts.total >= 0 if whole else len(stored) >= len(numbers))
        segments = tuple((s.frame, s.mask) for s in stored)
        return Supply(job, facts.name, True, facts.total, facts.cancel, dropped, segments), complete

    def _numbers(self, job: str, needs: list[Need]) -> list[int]:
        """Return the numbers of the chunks that hold some tasks, as far as they have reached the workbench."""
        numbers, missing = _holders(self._places.get(job, []), needs)
        if missing:
            while len(self._places) >= _JOBS:
                del self._places[next(iter(self._places))]
            spans = self._store.spans(job)
            self._places[job] = sorted({(first, first + count, number) for number, first, count in spans})
            numbers, _ = _holders(self._places[job], needs)
        return numbers


def _holders(places: list[tuple[int, int, int]], needs: list[Need]) -> tuple[list[int], bool]:
    """Return the numbers of the chunks that hold some tasks, and whether some are held by none."""
    numbers: dict[int, None] = {}
    missing = False
    for need in needs:
        index, stop = need.first, need.first + need.count
        at = max(0, bisect.bisect_right(places, index, key=lambda place: place[0]) - 1)
        while index < stop and at < len(places) and places[at][0] <= index < places[at][1]:
            numbers[places[at][2]] = None
            index, at = places[at][1], at + 1
        missing = missing or index < stop
    return list(numbers), missing
