"""The checker: what was to be done, what was recorded, and what the audit file says, compared task by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import load
import msgspec

from yadtq_nb import codec
from yadtq_nb.client.board import Failure, Outcomes
from yadtq_nb.config import Config
from yadtq_nb.workbench.jobs import JobRecord, JobStore

#: Findings of each kind that are printed.
_SHOWN: Final = 8
#: Seconds for which a call of a client waits for a server.
_PATIENCE: Final = 5.0
#: In the head of a chunk: a task of it that is not to be run.
_DONE: Final = ord("1")


class Sent(msgspec.Struct):
    """A job as its clients' ledgers tell of it."""

    name: str
    #: Whether map() had returned.
    claimed: bool = False
    #: Whether the client that sent it was killed, or was told that a server is away.
    orphan: bool = False
    #: Seconds after which the client was told so, or None.
    refused: float | None = None
    #: Whether its repair has begun.
    repaired: bool = False
    #: What each client that waited to the end was given.
    given: list[list[str]] = []


class Found(msgspec.Struct):
    """A job as the store has it."""

    total: int
    sealed: bool
    ended: bool
    #: Whether someone has cancelled it: tasks may have no outcome.
    cancelled: bool
    succeeded: int
    failed: int
    fed: int
    running: int
    #: Index of each task that has reached the workbench, once for each record.
    arrived: list[int]
    #: Index of each task and its outcome, once for each that is recorded.
    outcomes: list[tuple[int, str]]


class Tally(msgspec.Struct):
    """What the checker has found."""

    jobs: int = 0
    #: Tasks that must have an outcome.
    tasks: int = 0
    #: Jobs that were refused since a server was away for longer than a call waits.
    refused: int = 0
    #: Jobs of killed clients that were never made known.
    unborn: int = 0
    #: Jobs of killed clients that are incomplete, and their tasks that were never sent.
    incomplete: int = 0
    unsent: int = 0
    #: Tasks that a broker without a disk forgot together with their client.
    forgotten: int = 0
    #: Starts of tasks, and tasks that were started more than once.
    starts: int = 0
    rerun: int = 0
    #: Outcomes that came late and were dropped.
    late: int = 0
    lost: list[str] = []
    doubled: list[str] = []
    wrong: list[str] = []
    #: Counters that do not agree, things left over, errors in clients that were not killed.
    odd: list[str] = []

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        return not (self.lost or self.doubled or self.wrong or self.odd)

    def findings(self) -> str:
        """Return what is wrong, a line each."""
        lines = []
        for kind in ("lost", "doubled", "wrong", "odd"):
            found: list[str] = getattr(self, kind)
            lines += [f"{kind}: {line}" for line in found[:_SHOWN]]
            lines += [f"{kind}: {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        return "\n".join(lines)


def read_audit(lines: Iterable[str]) -> Counter[tuple[str, int]]:
    """Count the starts of each task."""
    return Counter((job, int(index)) for job, index, *_ in map(str.split, lines))


def read_ledgers(clients: Iterable[tuple[bool, Sequence[Mapping[str, Any]]]]) -> dict[str, Sent]:
    """Gather what clients, killed or not, have said of each job."""
    jobs: dict[str, Sent] = {}
    for killed, lines in clients:
        for line in lines:
            job = jobs.setdefault(line["job"], Sent(line["job"]))
            match line["what"]:
                case "sends":
                    job.orphan = killed
                case "refused":
                    job.orphan, job.refused = True, line["after"]
                case "waits":
                    job.claimed = True
                case "mends":
                    job.repaired = True
                case "done":
                    job.given.append(line["outcomes"])
    return jobs


def find(config: Config, store: JobStore, record: JobRecord, running: int) -> Found:
    """Read a job from the store as it is, without any of the client's own checks."""
    arrived: list[int] = []
    for chunk in store.inputs(record.id):
        head, *_ = codec.decode_chunk(config.key, chunk)
        arrived += [head.first + offset for offset in range(head.count) if not head.done or head.done[offset] != _DONE]
    outcomes = [
        (index, _digest(value))
        for stored in store.outcomes(record.id, store.fields(record.id))
        for index, _, value in Outcomes(config.key, record.id, stored).rows()
    ]
    r = record
    over = r.ended is not None
    return Found(
        r.total, r.sealed, over, r.cancel == "cancelled", r.succeeded, r.failed, r.fed, running, arrived, outcomes
    )


def _digest(value: Any) -> str:
    if isinstance(value, Failure):
        return value.info.type_name.rpartition(".")[2] if value.info else "?"
    return load.digest(value)


def check_job(
    tally: Tally, sent: Sent, found: Found | None, audit: Mapping[tuple[str, int], int], *, forgetful: bool
) -> None:
    """Compare one job.

    Args:
        forgetful: whether the broker has lost its records, so that those of a killed client may be gone.
    """
    items, name = load.items_of(sent.name), sent.name
    tally.jobs += 1
    if sent.refused is not None:
        tally.refused += 1
        if sent.refused < _PATIENCE:
            tally.odd.append(f"{name}: refused after {sent.refused:.1f} s, which is too soon")
    if found is None:
        if sent.orphan and not sent.claimed:
            tally.unborn += 1
        else:
            tally.lost.append(f"{name}: the queue does not know it")
        return
    times = Counter(index for index, _ in found.outcomes)
    arrived = set(found.arrived)
    # One whose client was killed just before its seal has ended all the same, when its total was known before.
    whole = found.sealed or found.ended
    due = set(range(len(items))) if whole else arrived
    if found.cancelled:
        due = set(times)
    if not whole:
        tally.incomplete += 1
        tally.unsent += len(items) - len(due)
        if not sent.orphan:
            tally.odd.append(f"{name}: not sealed, and its client was not killed")
    missing = sorted(due - set(times))
    gone = [index for index in missing if index not in arrived] if forgetful and sent.orphan else []
    tally.forgotten += len(gone)
    tally.tasks += len(due) - len(gone)
    if len(missing) > len(gone):
        unfed = len(set(missing) - arrived) - len(gone)
        tally.lost.append(f"{name}: {len(missing) - len(gone)} tasks without an outcome, {unfed} of them never fed")
    tally.doubled += [f"{name}[{index}]: {count} outcomes" for index, count in times.items() if count > 1]
    for index, outcome in found.outcomes:
        if index >= len(items) or outcome != load.expected(name, items[index], repaired=sent.repaired):
            tally.wrong.append(f"{name}[{index}]: {outcome}")
        elif not audit.get((name, index)):
            tally.wrong.append(f"{name}[{index}]: has an outcome and never ran")
    right = [load.expected(name, item, repaired=sent.repaired) for item in items]
    for given in sent.given:
        ok = zip(given, right, strict=True) if len(given) == len(right) else [("", "all of it")]
        apart = [
            f"[{i}] {one} and not {other}"
            for i, (one, other) in enumerate(ok)
            if one != other and not (found.cancelled and one == "JobCancelledError")
        ]
        if apart:
            tally.wrong.append(f"{name}: a client was given something else: {len(apart)}, such as {apart[0]}")
    if load.shape_of(name) in ("mended", "revived"):
        found.arrived = sorted(arrived)  # some are sent twice
    _check_counters(tally, name, found, len(items), complete=whole and not missing, forgotten=bool(gone))


def _check_counters(tally: Tally, name: str, found: Found, count: int, *, complete: bool, forgotten: bool) -> None:
    pairs = {
        "outcomes counted and there": (found.succeeded + found.failed, len(found.outcomes)),
        "tasks fed and there": (found.fed, len(found.arrived)),
        "running at the end": (found.running, 0),
        "ended": (found.ended, complete),
        "total": (found.total if found.sealed or found.ended else count, count),
    }
    if forgotten:
        del pairs["ended"]  # it may be known by now that the rest is lost
    if found.cancelled:
        pairs = {what: pairs[what] for what in ("outcomes counted and there",)}
    tally.odd += [f"{name}: {what}: {a} and {b}" for what, (a, b) in pairs.items() if a != b]


def count_runs(tally: Tally, audit: Mapping[tuple[str, int], int]) -> None:
    """Count what was started more than once, which is allowed, and shown."""
    tally.starts = sum(audit.values())
    tally.rerun = sum(count > 1 for count in audit.values())
