"""The words and numbers of a card, the same in its HTML and its text; card.js says them alike."""

from __future__ import annotations

from typing import Final

from yadtq_nb.notebook.snapshot import MoreWorkers, Snapshot, WorkerRow

#: Segments of the bar, from left to right: what is done stands first and never moves back.
SEGMENTS: Final = ("succeeded", "failed", "cancelled", "running", "queued")


def headline(shown: Snapshot) -> str:
    """Say how far the job is: "62 of 100"."""
    total = shown["counts"]["total"]
    return f"{finished(shown):,} of {total:,}" if total is not None else f"{finished(shown):,} so far"


def finished(shown: Snapshot) -> int:
    """Count the tasks that have an outcome."""
    counts = shown["counts"]
    return counts["succeeded"] + counts["failed"] + counts["cancelled"]


def segments(shown: Snapshot) -> list[tuple[str, int]]:
    """List the segments of the bar with their tasks, the empty ones left out."""
    found = {
        "succeeded": shown["counts"]["succeeded"],
        "failed": shown["counts"]["failed"],
        "cancelled": shown["counts"]["cancelled"],
        "running": shown["counts"]["running"],
        "queued": shown["counts"]["queued"],
    }
    return [(kind, found[kind]) for kind in SEGMENTS if found[kind] > 0]


def timing(shown: Snapshot) -> str:
    """Say rate, elapsed time and, while it runs, the time to go."""
    parts = [rate(shown["rate"]), f"{duration(shown['elapsed'])} elapsed"]
    if not shown["ended"] and shown["eta"] is not None:
        parts.append(f"{duration(shown['eta'])} to go")
    return " · ".join(parts)


def rate(per_second: float) -> str:
    """Say a rate with three digits or so: "1,234/s", "12.3/s", "0.05/s"."""
    if per_second >= 100:
        return f"{per_second:,.0f}/s"
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{per_second:.2f}/s"


def duration(seconds: float) -> str:
    """Say a time in its two largest units: "0.4 s", "12 s", "3 min 05 s", "2 h 07 min", "3 d 04 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, smaller, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller:02d} {small_name}"
    return f"{whole} s"


def slots(row: WorkerRow | MoreWorkers) -> str:
    """Say how many slots are busy."""
    return f"{row['busy']} of {row['slots']} slots busy"


def heartbeat(row: WorkerRow, *, ended: bool) -> str:
    """Say how old the last heartbeat is; of a job that has ended, only what was wrong then."""
    status = "" if row["status"] == "live" else row["status"]
    beat = "" if ended else f"heartbeat {age(row['age'])} ago"
    return ", ".join(part for part in (status, beat) if part)


def age(seconds: float) -> str:
    """Say an age in whole seconds, so that it ticks and does not flicker."""
    return duration(seconds) if seconds >= 60 else f"{int(seconds)} s"


def more_workers(more: MoreWorkers) -> str:
    """Say how many workers have no line of their own."""
    return f"and {more['count']:,} more"
