"""Futures and jobs as arguments: they travel as a call of `needed`, and are values where the task runs.

    client   a future or job is pickled ─▶ meet ─▶ noted by the collector, pickled as needed(job, index)
    slot     the item is unpickled ─▶ needed ─▶ asks the supplier ─▶ the value, or what its task has raised

Client and slot meet only here. Neither the collector nor the supplier of one thread is seen by another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from yadtq_nb.errors import JobError
from yadtq_nb.model import WHOLE, Need

_here = threading.local()

#: Most needs of one item, or of what is the same for all, after consecutive tasks were put together.
MOST: Final = 8_000

#: Given a job's id, and the index of one of its tasks or WHOLE: the value.
Supplier = Callable[[str, int], Any]


class Collector:
    """What was met while arguments were pickled."""

    def __init__(self, is_ours: Callable[[object], bool]) -> None:
        """Take what tells whether a job's client belongs to the queue that the arguments go to."""
        self._is_ours = is_ours
        self._found: dict[str, set[int]] = {}

    def note(self, link: object, job: str, index: int, name: str) -> None:
        """Note that a task's value is needed, or a whole job's.

        Raises:
            JobError: it belongs to another queue.
        """
        if not self._is_ours(link):
            raise JobError(
                f"job {name!r} belongs to queue {getattr(link, 'queue', '?')!r}, and its values cannot be awaited by a "
                "task of another queue: send both to the same queue, or pass result() or results()",
                job=name,
            )
        self._found.setdefault(job, set()).add(index)

    def needs(self) -> tuple[Need, ...]:
        """Return what was met, with consecutive tasks put together."""
        return tuple(need for job, indices in self._found.items() for need in _ranges(job, indices))


def _ranges(job: str, indices: set[int]) -> Iterator[Need]:
    if WHOLE in indices:
        yield Need(job, 0, WHOLE)
        return
    ordered = sorted(indices)
    start = 0
    for place in range(1, len(ordered) + 1):
        if place == len(ordered) or ordered[place] != ordered[place - 1] + 1:
            yield Need(job, ordered[start], place - start)
            start = place


def too_many(count: int) -> str:
    """Return what to say of more than MOST."""
    return (
        f"it needs {count:,} tasks that do not follow one another in their jobs, and at most {MOST:,} such can be "
        "awaited: give whole jobs, or slices of them, instead of single futures"
    )


@contextlib.contextmanager
def collecting(is_ours: Callable[[object], bool]) -> Iterator[Collector]:
    """Note the futures and jobs that are pickled in this thread meanwhile."""
    before = getattr(_here, "collector", None)
    _here.collector = collector = Collector(is_ours)
    try:
        yield collector
    finally:
        _here.collector = before


@contextlib.contextmanager
def supplying(supplier: Supplier) -> Iterator[None]:
    """Have what is unpickled in this thread meanwhile get its values from a supplier."""
    before = getattr(_here, "supplier", None)
    _here.supplier = supplier
    try:
        yield
    finally:
        _here.supplier = before


def meet(link: object, job: str, index: int, name: str) -> tuple[Any, ...]:
    """Return how a future or job is pickled, and note that it is needed.

    Raises:
        JobError: it belongs to another queue.
        TypeError: it is not pickled as an argument of a task.
    """
    collector: Collector | None = getattr(_here, "collector", None)
    if collector is None:
        raise TypeError(
            f"job {name!r} and its futures can be pickled only as arguments of map, starmap and submit: "
            f"elsewhere pass the name, and ask for queue.job({name!r})"
        )
    collector.note(link, job, index, name)
    return needed, (job, index)


def needed(job: str, index: int) -> Any:
    """Return the value of a task, or those of a whole job: what a pickled future or job is where its task runs.

    Raises:
        JobError: this is no task's argument.
        DependencyError: there is no such value.
    """
    supplier: Supplier | None = getattr(_here, "supplier", None)
    if supplier is None:
        raise JobError(
            f"a future or job that was an argument of a task was unpickled outside of that task; ask for "
            f"queue.job({job!r})",
            job=job,
        )
    return supplier(job, index)


class Later:
    """Stands for a future of a job where only its value is asked for, where the task runs."""

    __slots__ = ("index", "job", "link", "name")

    def __init__(self, link: object, job: str, index: int, name: str) -> None:
        self.link, self.job, self.index, self.name = link, job, index, name

    def __reduce__(self) -> tuple[Any, ...]:
        return meet(self.link, self.job, self.index, self.name)

    def __repr__(self) -> str:
        return self.name if self.index == WHOLE else f"{self.name}[{self.index}]"
