"""A snapshot: all that a card shows of a job or a queue, as one small plain dict.

The live card, the static HTML and the text are three forms of the same snapshot, and this is the one door through
which names and messages come in: whatever passes it is printable text of bounded length.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final, Protocol, TypedDict, final, runtime_checkable

from yadtq_nb.model import ErrorGroup, JobState, JobView, Progress, WorkerView

#: Workers shown one by one on a job's card and on a queue's; the others are summed up in one line.
MAX_WORKERS: Final = 50
MAX_QUEUE_WORKERS: Final = 250
#: Groups of errors and running tasks that are shown.
MAX_ERRORS: Final = 5
MAX_RUNNING: Final = 5
#: Segments with failures that are fetched at a look, so that it stays short; at the last look, all that are kept.
_ERRORS_PER_LOOK: Final = 8
_ERRORS_AT_END: Final = 200
_NAME_LENGTH: Final = 80
_LINE_LENGTH: Final = 200
#: Longest traceback on a card, in characters; what is left out is in its middle.
_BLOCK_LENGTH: Final = 3_000

#: Unicode categories that are not text to look at: control, format (among them the signs that reverse the direction of
#: writing, with which a name can be made to read as another), surrogate, line and paragraph separators.
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class JobLike(Protocol):
    """What a job must offer to be shown."""

    @property
    def name(self) -> str:
        """Name of the job, unique in its queue."""

    @property
    def id(self) -> str:
        """Id of the job."""

    @property
    def state(self) -> JobState:
        """State of the whole job."""

    @property
    def progress(self) -> Progress:
        """Counts, rate and times; after the state said that the job has ended, the final ones."""

    def worker_views(self) -> Iterable[WorkerView]:
        """Nodes that serve the queue and are live, or were lost in the last minutes."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end of the job, at most so many seconds; True when it has ended. With 0 it asks nobody."""

    def cancel(self) -> int:
        """End it; returns how many tasks had no outcome."""


@runtime_checkable
class KnowsErrors(Protocol):
    """A job that can tell its first errors."""

    def error_groups(self, segments: int) -> tuple[list[ErrorGroup], int]:
        """The first failures by type and line, and how many were looked at; so many segments are fetched at most."""


@runtime_checkable
class Retries(Protocol):
    """A job that can run tasks again."""

    @property
    def retryable(self) -> int:
        """How many tasks retry() would run again now."""

    def retry(self) -> int:
        """Run them again; returns how many."""


class QueueLike(Protocol):
    """What a queue must offer to be shown."""

    @property
    def name(self) -> str:
        """Name of the queue."""

    def worker_views(self) -> Iterable[WorkerView]:
        """Nodes that serve the queue and are live, or were lost of late."""

    def job_views(self) -> tuple[list[JobView], int]:
        """The newest jobs of the last day, and how many there are."""


class Counts(TypedDict):
    """Tasks of a job by state; the total is None while an iterator is still being drawn."""

    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    lost: int
    total: int | None


class WorkerRow(TypedDict):
    """One worker; `age` is the seconds since its last heartbeat, `cpu` percent of a core, `memory` in MB."""

    id: str
    host: str
    slots: int
    busy: int
    age: float
    status: str
    done: int
    cpu: int
    memory: int


class MoreWorkers(TypedDict):
    """Sum of the workers that have no line of their own."""

    count: int
    slots: int
    busy: int


class Fleet(TypedDict):
    """All workers together; the lost ones count in `lost` only."""

    live: int
    lost: int
    slots: int
    busy: int
    cpu: int
    memory: int


class RunningRow(TypedDict):
    """A task that runs, and for how many seconds."""

    index: int
    seconds: float
    worker: str


class ErrorRow(TypedDict):
    """Failures of one type at one line; message and traceback are those of the first."""

    type: str
    place: str
    message: str
    first: int
    count: int
    traceback: str


class JobRow(TypedDict):
    """A job in a list of jobs; `age` is the seconds since it was made."""

    id: str
    name: str
    state: str
    ended: bool
    counts: Counts
    age: float
    elapsed: float


@final
class Snapshot(TypedDict):
    """A job at one moment. Times are in seconds; `rate` is in tasks a second."""

    name: str
    id: str
    state: str
    #: True when nothing will change any more.
    ended: bool
    counts: Counts
    rate: float
    eta: float | None
    elapsed: float
    workers: list[WorkerRow]
    more_workers: MoreWorkers | None
    fleet: Fleet
    #: The tasks that have run for the longest, the slowest first.
    running: list[RunningRow]
    errors: list[ErrorRow]
    #: How many failures the errors were taken from.
    errors_seen: int
    #: How many tasks "Retry failed" would run again now.
    retryable: int
    #: Why the snapshot is older than it should be, or "".
    note: str


@final
class QueueSnapshot(TypedDict):
    """A queue at one moment: its workers, and its jobs of the last day."""

    name: str
    ended: bool
    workers: list[WorkerRow]
    more_workers: MoreWorkers | None
    fleet: Fleet
    jobs: list[JobRow]
    #: How many jobs have no line of their own.
    more_jobs: int
    #: Seconds since the epoch, by this machine's clock.
    time: float
    note: str


def snapshot(job: JobLike) -> Snapshot:
    """Return the job as it is now."""
    # The state before the counts: the other way round, a job that ends in between would be shown as ended with the
    # counts of a moment before, for ever.
    state = job.state
    progress = job.progress
    ended = has_ended(state, progress)
    # Who is busy now is busy with something else.
    views = [] if ended else list(job.worker_views())
    rows, more = _worker_rows(views, MAX_WORKERS)
    errors, seen = _errors(job, progress.failed, ended=ended)
    return {
        "name": plain(job.name, _NAME_LENGTH),
        "id": plain(job.id, _NAME_LENGTH),
        "state": str(state),
        "ended": ended,
        "counts": _counts(progress),
        "rate": round(progress.rate, 3),
        "eta": None if progress.eta is None else round(progress.eta, 1),
        "elapsed": round(progress.elapsed, 1),
        "workers": rows,
        "more_workers": more,
        "fleet": _fleet(views),
        "running": _running(job.id, views),
        "errors": errors,
        "errors_seen": seen,
        "retryable": job.retryable if isinstance(job, Retries) else 0,
        "note": "",
    }


def queue_snapshot(queue: QueueLike) -> QueueSnapshot:
    """Return the queue as it is now."""
    views = list(queue.worker_views())
    rows, more = _worker_rows(views, MAX_QUEUE_WORKERS)
    jobs, count = queue.job_views()
    return {
        "name": plain(queue.name, _NAME_LENGTH),
        "ended": False,
        "workers": rows,
        "more_workers": more,
        "fleet": _fleet(views),
        "jobs": [_job_row(job) for job in jobs],
        "more_jobs": max(0, count - len(jobs)),
        "time": round(time.time(), 1),
        "note": "",
    }


def has_ended(state: JobState, progress: Progress) -> bool:
    """Whether nothing will change any more. What did arrive of an INCOMPLETE job may still be running."""
    if state is JobState.RUNNING:
        return False
    return state is not JobState.INCOMPLETE or not (progress.queued or progress.running)


def plain(text: object, limit: int = _LINE_LENGTH) -> str:
    """Return one line of at most `limit` printable characters.

    Names and messages come from users and from the code they run. A terminal obeys escape sequences, so what is not
    to look at becomes a visible replacement character.
    """
    shown = _visible(" ".join(str(text)[: 4 * limit].split()))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def plain_block(text: str, limit: int = _BLOCK_LENGTH) -> str:
    """Return lines of printable characters, at most `limit` of them and a few; what is too much goes from the middle.

    The last lines of a traceback say what went wrong, its first where it began.
    """
    if len(text) > limit:
        text = f"{text[: limit // 3]}\n[...]\n{text[-(2 * limit // 3) :]}"
    return "\n".join(_visible(line.expandtabs(4)) for line in text.splitlines())


def _visible(text: str) -> str:
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) in _HIDDEN else char for char in text)


def _counts(progress: Progress) -> Counts:
    return {
        "queued": progress.queued,
        "running": progress.running,
        "succeeded": progress.succeeded,
        "failed": progress.failed,
        "cancelled": progress.cancelled,
        "lost": progress.lost,
        "total": progress.total,
    }


def _errors(job: JobLike, failed: int, *, ended: bool) -> tuple[list[ErrorRow], int]:
    if not failed or not isinstance(job, KnowsErrors):
        return [], 0
    groups, seen = job.error_groups(_ERRORS_AT_END if ended else _ERRORS_PER_LOOK)
    return [_error_row(group) for group in groups[:MAX_ERRORS]], seen


def _error_row(group: ErrorGroup) -> ErrorRow:
    return {
        "type": plain(group.type_name.rpartition(".")[2], _NAME_LENGTH),
        "place": plain(group.place, _NAME_LENGTH),
        "message": plain(group.message),
        "first": group.first,
        "count": group.count,
        "traceback": plain_block(group.traceback),
    }


def _running(job: str, views: Iterable[WorkerView]) -> list[RunningRow]:
    """The slowest tasks of a job, by what the nodes have told with their last heartbeats."""
    found: list[RunningRow] = [
        {
            "index": task.index,
            "seconds": round(task.seconds + view.heartbeat_age, 1),
            "worker": plain(view.info.id, _NAME_LENGTH),
        }
        for view in views
        if view.status != "lost"
        for task in view.info.slowest
        if task.job == job
    ]
    return sorted(found, key=lambda row: -row["seconds"])[:MAX_RUNNING]


def _fleet(views: Sequence[WorkerView]) -> Fleet:
    infos = [view.info for view in views if view.status != "lost"]
    return {
        "live": len(infos),
        "lost": len(views) - len(infos),
        "slots": sum(info.slots for info in infos),
        "busy": sum(info.busy for info in infos),
        "cpu": round(sum(info.cpu for info in infos)),
        "memory": round(sum(info.memory for info in infos) / 1e6),
    }


def _worker_rows(views: Iterable[WorkerView], most: int) -> tuple[list[WorkerRow], MoreWorkers | None]:
    """Rows in a fixed order, so that they do not jump; past the cap, the ones in trouble get their line first."""
    ordered = sorted(views, key=_place)
    shown, rest = ordered, ordered[:0]
    if len(ordered) > most:
        by_trouble = sorted(ordered, key=lambda view: view.status == "live")
        shown, rest = sorted(by_trouble[:most], key=_place), by_trouble[most:]
    more: MoreWorkers | None = None
    if rest:
        slots, busy = sum(view.info.slots for view in rest), sum(view.info.busy for view in rest)
        more = {"count": len(rest), "slots": slots, "busy": busy}
    return [_worker_row(view) for view in shown], more


def _place(view: WorkerView) -> tuple[str, str]:
    return view.info.host, view.info.id


def _worker_row(view: WorkerView) -> WorkerRow:
    info, lost = view.info, view.status == "lost"
    return {
        "id": plain(info.id, _NAME_LENGTH),
        "host": plain(info.host, _NAME_LENGTH),
        "slots": info.slots,
        "busy": 0 if lost else info.busy,
        "age": round(view.heartbeat_age, 1),
        "status": plain(view.status, _NAME_LENGTH),
        "done": info.done,
        "cpu": 0 if lost else round(info.cpu),
        "memory": 0 if lost else round(info.memory / 1e6),
    }


def _job_row(job: JobView) -> JobRow:
    return {
        "id": plain(job.id, _NAME_LENGTH),
        "name": plain(job.name, _NAME_LENGTH),
        "state": str(job.state),
        "ended": has_ended(job.state, job.progress),
        "counts": _counts(job.progress),
        "age": round(job.age, 1),
        "elapsed": round(job.progress.elapsed, 1),
    }
