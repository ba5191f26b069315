"""A snapshot: all that a card shows of a job, as one small plain dict.

The live card, the static HTML and the text are three forms of the same snapshot, and this is the one door through
which names and messages come in: whatever passes it is one short line of printable text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Final, Protocol, TypedDict, runtime_checkable

from yadtq_nb.model import JobState, Progress, WorkerView

#: Workers shown one by one; the others are summed up in one line.
MAX_WORKERS: Final = 50
MAX_ERRORS: Final = 3
_NAME_LENGTH: Final = 80
_LINE_LENGTH: Final = 200

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


@runtime_checkable
class KnowsErrors(Protocol):
    """A job that can tell its first errors."""

    def error_lines(self, limit: int) -> list[str]:
        """One line for each of the first few errors, such as "ValueError: bad item"."""


class Counts(TypedDict):
    """Tasks of a job by state; the total is None while an iterator is still being drawn."""

    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    total: int | None


class WorkerRow(TypedDict):
    """One worker; `age` is the seconds since its last heartbeat."""

    id: str
    host: str
    slots: int
    busy: int
    age: float
    status: str


class MoreWorkers(TypedDict):
    """Sum of the workers that have no line of their own."""

    count: int
    slots: int
    busy: int


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
    errors: list[str]
    #: Why the snapshot is older than it should be, or "".
    note: str


def snapshot(job: JobLike) -> Snapshot:
    """Return the job as it is now."""
    # The state before the counts: the other way round, a job that ends in between would be shown as ended with the
    # counts of a moment before, for ever.
    state = job.state
    progress = job.progress
    ended = has_ended(state, progress)
    # Who is busy now is busy with something else.
    rows, more = ([], None) if ended else _worker_rows(job.worker_views())
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
        "errors": _errors(job),
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
    words = " ".join(str(text)[: 4 * limit].split())
    shown = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) in _HIDDEN else char for char in words)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _counts(progress: Progress) -> Counts:
    return {
        "queued": progress.queued,
        "running": progress.running,
        "succeeded": progress.succeeded,
        "failed": progress.failed,
        "cancelled": progress.cancelled,
        "total": progress.total,
    }


def _errors(job: JobLike) -> list[str]:
    if not isinstance(job, KnowsErrors):
        return []
    return [plain(line) for line in job.error_lines(MAX_ERRORS)][:MAX_ERRORS]


def _worker_rows(views: Iterable[WorkerView]) -> tuple[list[WorkerRow], MoreWorkers | None]:
    """Rows in a fixed order, so that they do not jump; past the cap, the ones in trouble get their line first."""
    ordered = sorted(views, key=_place)
    shown, rest = ordered, ordered[:0]
    if len(ordered) > MAX_WORKERS:
        by_trouble = sorted(ordered, key=lambda view: view.status == "live")
        shown, rest = sorted(by_trouble[:MAX_WORKERS], key=_place), by_trouble[MAX_WORKERS:]
    more: MoreWorkers | None = None
    if rest:
        slots, busy = sum(view.info.slots for view in rest), sum(view.info.busy for view in rest)
        more = {"count": len(rest), "slots": slots, "busy": busy}
    return [_worker_row(view) for view in shown], more


def _place(view: WorkerView) -> tuple[str, str]:
    return view.info.host, view.info.id


def _worker_row(view: WorkerView) -> WorkerRow:
    return {
        "id": plain(view.info.id, _NAME_LENGTH),
        "host": plain(view.info.host, _NAME_LENGTH),
        "slots": view.info.slots,
        "busy": 0 if view.status == "lost" else view.info.busy,
        "age": round(view.heartbeat_age, 1),
        "status": plain(view.status, _NAME_LENGTH),
    }
