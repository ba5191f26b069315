"""A job that does what the test tells it, for the card's tests; kernels import it too."""

from __future__ import annotations

import threading
import time

from yadtq_nb.model import ErrorGroup, JobState, JobView, Progress, RunningTask, WorkerInfo, WorkerView


def group(
    type_name: str, message: str, count: int = 1, *, place: str = "cell, line 3", traceback: str = ""
) -> ErrorGroup:
    """Return a group of errors."""
    return ErrorGroup(type_name, place, message, traceback or f"Traceback\n  {type_name}: {message}\n", 17, count)


class FakeJob:
    """A job of `total` tasks, of which some are done."""

    def __init__(
        self, total: int = 100, *, name: str = "sweep", workers: int = 2, errors: tuple[ErrorGroup, ...] = ()
    ) -> None:
        self.name = name
        self.id = "0123456789abcdef"
        self.total = total
        self.succeeded = 0
        self.failed = 0
        self.cancelled = 0
        self.lost = 0
        self.age = 0.4
        self.workers = workers
        #: Numbers of workers that are lost.
        self.gone: set[int] = set()
        self.errors = errors
        self.slowest: tuple[RunningTask, ...] = ()
        self.retryable = 0
        #: What was asked of it.
        self.asked: list[str] = []
        self.broken: Exception | None = None
        #: Seconds that a look takes, as from a server far away.
        self.delay = 0.0
        #: How often it was looked at.
        self.looks = 0
        self._changed = threading.Condition()

    @property
    def state(self) -> JobState:
        if self.cancelled:
            return JobState.CANCELLED
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
        left = self.total - self.succeeded - self.failed - self.cancelled - self.lost
        running = min(left, 2 * self.workers)
        counts = (left - running, running, self.succeeded, self.failed, self.cancelled, self.total)
        return Progress(*counts, 5.0, left / 5.0, 3.0, self.lost)

    def worker_views(self) -> list[WorkerView]:
        return [self._view(n) for n in range(self.workers)]

    def _view(self, n: int) -> WorkerView:
        slowest = self.slowest if n == 0 else ()
        info = WorkerInfo(f"w-{n:03}", f"node-{n:03}", 1, 2, 2, 10 * n, 0.0, "3.11", 98.6, 123_456_789, slowest=slowest)
        return WorkerView(info, self.age, 0.0, "lost" if n in self.gone else "live")

    def error_groups(self, segments: int) -> tuple[list[ErrorGroup], int]:
        return list(self.errors), sum(error.count for error in self.errors)

    def cancel(self) -> int:
        self.asked.append("cancel")
        with self._changed:
            self.cancelled = self.total - self.succeeded - self.failed
            self._changed.notify_all()
        return self.cancelled

    def retry(self) -> int:
        self.asked.append("retry")
        with self._changed:
            count, self.failed, self.retryable = self.failed, 0, 0
        return count

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


class FakeQueue:
    """A queue with some jobs."""

    def __init__(self, *jobs: FakeJob, name: str = "default") -> None:
        self.name = name
        self.jobs = jobs
        self.more = 0
        self.looks = 0

    def worker_views(self) -> list[WorkerView]:
        self.looks += 1
        return self.jobs[0].worker_views() if self.jobs else []

    def job_views(self) -> tuple[list[JobView], int]:
        views = [JobView(f"{n}", job.name, job.state, job.progress, 60.0) for n, job in enumerate(self.jobs)]
        return views, len(views) + self.more
