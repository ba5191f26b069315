"""The heart: tells each second that this node lives, renews its leases, and reaps what other nodes left.

A thread of its own, with a connection of its own, so that a long feed or a large outcome never looks like death.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from yadtq_nb.config import Config
from yadtq_nb.errors import WorkbenchError
from yadtq_nb.model import Lane, Lease, WorkerInfo
from yadtq_nb.workbench.bench import Cursor, Heard, Share, Workbench

log = logging.getLogger(__name__)

#: A mark is committed to Kafka once it is this old: by then the append-only file has it on disk. Seconds.
_SETTLED: Final = 3.0
#: Offsets of a group without members expire: they are committed anew this often. Seconds.
_RENEW_COMMIT: Final = 3_600.0


#: Lane and partition to what is finished there.
Marks: TypeAlias = dict[tuple[Lane, int], Cursor]


class Heart:
    """One thread that beats and reaps."""

    def __init__(
        self,
        config: Config,
        workbench: Workbench,
        *,
        info: Callable[[], WorkerInfo],
        leases: Callable[[], list[tuple[Lease, int]]],
        lanes: Callable[[], dict[Lane, tuple[int, bool]]],
        heard: Callable[[Heard, Marks], None],
        reaped: Callable[[list[tuple[str, str]]], None],
    ) -> None:
        """Take the parts that are passed in.

        Args:
            info: what the node says of itself.
            leases: what it holds, with the offset that runs now, or -1.
            lanes: which lanes it feeds: the partitions of each, and whether its feeder really reads.
            heard: is told the answer, and which marks are due to be committed.
            reaped: is told which chunks of which nodes went back to the line.
        """
        self._config = config
        self._bench = workbench
        self._info = info
        self._leases = leases
        self._lanes = lanes
        self._heard = heard
        self._reaped = reaped
        self._run_id = ""
        self._marks: collections.deque[tuple[float, Marks]] = collections.deque()
        self._committed: Marks = {}
        self._renew_at = 0.0
        self._closing = False
        self._hurried = threading.Event()
        self._thread = threading.Thread(target=self._run, name="yadtq-heart", daemon=True)

    def start(self) -> None:
        """Start the thread, after a first beat by hand."""
        self._thread.start()

    def close(self) -> None:
        """Stop beating, and join the thread."""
        self._closing = True
        self._hurried.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._bench.close()

    def hurry(self) -> None:
        """Beat as soon as possible: something was cancelled, and the answer says whether it runs here. Thread-safe."""
        self._hurried.set()

    def beat(self) -> None:
        """Beat once.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        # Asked before: a mark of before a restart in between must not be taken for one of after it.
        run_id = self._bench.run_id()
        heard = self._bench.beat(self._info(), self._lanes(), self._leases())
        self._heard(heard, self._due(heard.shares, run_id))

    def reap(self, dead: str = "") -> None:
        """Return lapsed chunks to the line.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        lapsed = self._bench.reap(dead)
        if lapsed:
            self._reaped(lapsed)

    def _run(self) -> None:
        # Reaping twice for each beat finds a dead node sooner, and costs one small script.
        for turn in iter(self._turns(), None):
            try:
                if turn % 2 == 0:
                    self.beat()
                self.reap()
            except WorkbenchError as exc:
                log.warning("heartbeat waits: %s", exc)

    def _turns(self) -> Callable[[], int | None]:
        """Count half heartbeats, without drifting, until closed."""
        start, turn = time.monotonic(), 0

        def next_turn() -> int | None:
            nonlocal start, turn
            turn += 1
            late = time.monotonic() - (start + turn * self._config.heartbeat / 2)
            if late > self._config.heartbeat:
                start += late
            if self._hurried.wait(max(0.0, -late)) and not self._closing:
                self._hurried.clear()
                # The rest of this half heartbeat is made up for in the next.
                turn += turn % 2
            return None if self._closing else turn

        return next_turn

    def _due(self, shares: list[Share], run_id: str) -> Marks:
        """Return the marks that Redis has on disk by now, to be committed.

        A mark of before a restart of Redis says nothing: what it calls finished may be forgotten.
        """
        now = time.monotonic()
        if run_id != self._run_id:
            self._run_id = run_id
            self._marks.clear()
        self._marks.append(
            (now, {(share.lane, share.partition): share.low for share in shares if share.low is not None})
        )
        settled: Marks = {}
        while self._marks and now - self._marks[0][0] >= _SETTLED:
            settled = self._marks.popleft()[1]
        if now >= self._renew_at:
            self._renew_at = now + _RENEW_COMMIT
            self._committed.clear()
        due = {place: low for place, low in settled.items() if self._committed.get(place) != low}
        self._committed.update(due)
        return due
