"""What a card asks of a job or a queue beyond its counts: its first errors by type and line, its jobs of late."""

from __future__ import annotations

import re
import threading
from typing import Final, Protocol

from yadtq_nb.client.board import Outcomes
from yadtq_nb.client.inbox import job_state
from yadtq_nb.model import ErrorGroup, ErrorInfo, JobView, Progress, WorkerView
from yadtq_nb.workbench.jobs import JobRecord, JobStore

#: Groups that are kept; a job whose errors are all different has no use for more.
_GROUPS: Final = 100
#: Seconds for which a queue's jobs are shown, how many, and for how long a lost node is.
_DAY: Final = 86_400.0
_JOBS: Final = 50
_SHOW_LOST: Final = 3_600.0

#: With the bars that are drawn beside a group of exceptions.
_FRAME: Final = re.compile(r'^[ |]*  File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>.+)$', re.MULTILINE)
#: Files of notebook cells: ipykernel's and IPython's.
_CELL: Final = re.compile(r"ipykernel_\d+|<ipython-input|<string>")
_CELL_FILE: Final = re.compile(r'^([ |]*  File )"[^"\n]*(?:ipykernel_\d+|<ipython-input)[^"\n]*"', re.MULTILINE)
#: Where each exception of a chain begins, and where the second of a group does.
_HEAD: Final = re.compile(r"^(?:  \+ Exception Group )?Traceback ", re.MULTILINE)
_SECOND: Final = re.compile(r"^[ |]*\+-+ 2 -+$", re.MULTILINE)


class FirstErrors:
    """The first failures of a job, by type and line. Fetched bit by bit, and never twice."""

    def __init__(self, store: JobStore, secret: bytes, job: str) -> None:
        self._store, self._secret, self._job = store, secret, job
        self._lock = threading.Lock()
        #: How many of the segments with failures were looked at.
        self._place = 0
        self._groups: dict[tuple[str, str], ErrorGroup] = {}
        self._seen = 0

    def look(self, failed: int, segments: int) -> tuple[list[ErrorGroup], int]:
        """Return the groups, the largest first, and how many failures were looked at.

        Args:
            failed: how many tasks have failed by now; nothing is fetched when all were seen.
            segments: of how many segments more failures are fetched at most.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        with self._lock:
            if self._seen < failed:
                looked, found = self._store.first_failures(self._job, self._place, segments)
                self._place += looked
                for stored in found:
                    self._add(Outcomes(self._secret, self._job, stored))
            return sorted(self._groups.values(), key=lambda group: (-group.count, group.first)), self._seen

    def _add(self, outcomes: Outcomes) -> None:
        counted = set(outcomes.indices())
        for index, info in outcomes.segment.errors.items():
            if index in counted:
                self._seen += 1
                self._note(index, info)

    def _note(self, index: int, info: ErrorInfo) -> None:
        key = info.type_name, place(info.traceback)
        traceback = _CELL_FILE.sub(r'\1"cell"', info.traceback)
        known = self._groups.get(key)
        if known is None and len(self._groups) < _GROUPS:
            self._groups[key] = ErrorGroup(*key, info.message, traceback, index, 1)
        elif known is not None:
            older = known if known.first < index else ErrorGroup(*key, info.message, traceback, index, 0)
            self._groups[key] = ErrorGroup(*key, older.message, older.traceback, older.first, known.count + 1)


def place(traceback: str) -> str:
    """Return where an exception was raised, by its formatted traceback; "" when that does not say.

    Of a group of exceptions, where the first of them was.
    """
    found = None
    for found in _FRAME.finditer(_SECOND.split(_HEAD.split(traceback)[-1], maxsplit=1)[0]):  # noqa: B007  # the last one is wanted
        pass
    if found is None:
        return ""
    file = found["file"]
    name = "cell" if _CELL.search(file) else re.split(r"[/\\]", file)[-1]
    where = "" if found["function"] == "<module>" else f", in {found['function']}"
    return f"{name}, line {found['line']}{where}"


class _Link(Protocol):
    queue: str

    @property
    def store(self) -> JobStore: ...


class Overview:
    """The whole of a queue, as a card shows it: all workers, and the jobs of the last day."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self.name = link.queue

    def worker_views(self) -> list[WorkerView]:
        """Return the nodes that serve the queue, and those that were lost within the hour."""
        views = self._link.store.workers()
        return [
            view
            for view in views
            if view.status != "stopped" and (view.status != "lost" or view.heartbeat_age < _SHOW_LOST)
        ]

    def job_views(self) -> tuple[list[JobView], int]:
        """Return the newest jobs of the last day, and how many there are."""
        records, count = self._link.store.recent(_DAY, _JOBS)
        return [JobView(r.id, r.name, job_state(r), progress(r), max(0.0, r.now - r.created)) for r in records], count


def progress(record: JobRecord, known_total: int | None = None) -> Progress:
    """Return where a job stands, by what the workbench knows of it."""
    total = record.total if record.total >= 0 else known_total
    elapsed = max(0.0, (record.ended or record.now) - record.created)
    rate = (record.succeeded + record.failed) / elapsed if elapsed > 0 else 0.0
    left = None if total is None else total - record.done
    running = min(record.running, left) if left is not None else record.running
    left = None if left is None else left - record.lost
    queued = max(0, (left if left is not None else record.fed - record.done) - running)
    eta = left / rate if left and rate > 0 else (0.0 if left == 0 else None)
    return Progress(
        queued,
        running,
        record.succeeded,
        record.failed,
        record.cancelled,
        total,
        round(rate, 3),
        eta,
        elapsed,
        record.lost,
    )
