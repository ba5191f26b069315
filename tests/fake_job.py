"""A job that does what the test tells it, for the card's tests; kernels import it too."""

from __future__ import annotations

import threading
import time

from yadtq_nb.model import JobState, Progress, WorkerInfo, WorkerView


class FakeJob:
    """A job of `total` tasks, of which some are done."""

    def __init__(
        self, total: int = 100, *, name: str = "sweep", workers: int = 2, errors: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.id = "0123456789abcdef"
        self.total = total
        self.succeeded = 0
        self.failed = 0
        self.age = 0.4
        self.workers = workers
        self.errors = errors
        self.broken: Exception | None = None
        #: Seconds that a look takes, as from a server far away.
        self.delay = 0.0
        #: How often it was looked at.
        self.looks = 0
        self._changed = threading.Condition()

    @property
    def state(self) -> JobState:
        if self.succeeded + self.failed < self.total:
            return JobState.RUNNING
        return JobState.FAILED if self.failed else JobState.SUCCEEDED

    @property
    def progress(self) -> Progress:
        if self.broken is not None:
            raise self.broken
        time.sleep(self.delay)
        with self._changed:
            self.looks += 1
            self._changed.notify_all()
        left = self.total - self.succeeded - self.failed
        running = min(left, 2 * self.workers)
        return Progress(left - running, running, self.succeeded, self.failed, 0, self.total, 5.0, left / 5.0, 3.0)

    def worker_views(self) -> list[WorkerView]:
        return [
            WorkerView(WorkerInfo(f"w-{n:03}", f"node-{n:03}", 1, 2, 2, 0, 0.0, "3.11"), self.age, 0.0, "live")
            for n in range(self.workers)
        ]

    def error_lines(self, limit: int) -> list[str]:
        return list(self.errors[:limit])

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.state is not JobState.RUNNING, timeout)

    def step(self, succeeded: int = 0, failed: int = 0) -> None:
        """Let some tasks end."""
        with self._changed:
            self.succeeded += succeeded
            self.failed += failed
            self._changed.notify_all()

    def wait_for_looks(self, more: int, timeout: float = 10.0) -> None:
        """Wait until it was looked at so many times more."""
        with self._changed:
            goal = self.looks + more
            assert self._changed.wait_for(lambda: self.looks >= goal, timeout), "nobody looks at the job any more"
