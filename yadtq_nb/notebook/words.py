"""The words and numbers of a card, the same in its HTML and its text; card.js says them alike."""

from __future__ import annotations

from typing import Final

from yadtq_nb.notebook.snapshot import Counts, ErrorRow, Fleet, JobRow, MoreWorkers, RunningRow, Snapshot, WorkerRow

#: Segments of the bar, from left to right: what is done stands first and never moves back.
SEGMENTS: Final = ("succeeded", "failed", "cancelled", "lost", "running", "queued")


def headline(counts: Counts) -> str:
    """Say how far the job is: "62 of 100"."""
    total = counts["total"]
    return f"{finished(counts):,} of {total:,}" if total is not None else f"{finished(counts):,} so far"


def finished(counts: Counts) -> int:
    """Count the tasks that have an outcome."""
    return counts["succeeded"] + counts["failed"] + counts["cancelled"]


def segments(counts: Counts) -> list[tuple[str, int]]:
    """List the segments of the bar with their tasks, the empty ones left out."""
    found = {
        "succeeded": counts["succeeded"],
        "failed": counts["failed"],
        "cancelled": counts["cancelled"],
        "lost": counts["lost"],
        "running": counts["running"],
        "queued": counts["queued"],
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


def slots(row: WorkerRow | MoreWorkers | Fleet) -> str:
    """Say how many slots are busy."""
    return f"{row['busy']} of {row['slots']} slots busy"


def fleet(shown: Fleet) -> str:
    """Say what all workers are together: "3 workers · 5 of 6 slots busy · CPU 480 % · 1.2 GB · 1 lost"."""
    parts = [plural(shown["live"], "worker")]
    if shown["live"]:
        parts += [slots(shown), f"CPU {shown['cpu']:,} %", memory(shown["memory"])]
    if shown["lost"]:
        parts.append(f"{shown['lost']:,} lost")
    return " · ".join(parts)


def plural(count: int, noun: str) -> str:
    """Say a number of things: "1 task", "2 tasks"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def memory(megabytes: int) -> str:
    """Say a size in memory: "96 MB", "1.2 GB"."""
    return f"{megabytes} MB" if megabytes < 1000 else f"{megabytes / 1000:,.1f} GB"


def short_id(row: WorkerRow) -> str:
    """Return a worker's id without its host, which stands beside it."""
    return row["id"].removeprefix(f"{row['host']}-")


def load(row: WorkerRow) -> str:
    """Say what a worker has done and what it uses: "1,204 done · CPU 98 % · 120 MB"."""
    done = f"{row['done']:,} done"
    return done if row["status"] == "lost" else f"{done} · CPU {row['cpu']} % · {memory(row['memory'])}"


def heartbeat(row: WorkerRow, *, ended: bool) -> str:
    """Say how old the last heartbeat is; of a job that has ended, only what was wrong then."""
    if row["status"] == "live":
        return "" if ended else f"heartbeat {age(row['age'])} ago"
    return row["status"] if ended else f"{row['status']}, {age(row['age'])} ago"


def age(seconds: float) -> str:
    """Say an age in whole seconds, so that it ticks and does not flicker."""
    return duration(seconds) if seconds >= 60 else f"{int(seconds)} s"


def more_workers(more: MoreWorkers) -> str:
    """Say how many workers have no line of their own."""
    return f"and {more['count']:,} more"


def running(row: RunningRow) -> str:
    """Say which task runs and for how long: "task 17 · 1 min 03 s"."""
    return f"task {row['index']:,} · {age(row['seconds'])}"


def error_head(row: ErrorRow) -> str:
    """Say which error it is, how often and where: "12 × ValueError (fit.py, line 3, in load)"."""
    where = f" ({row['place']})" if row["place"] else ""
    return f"{row['count']:,} × {row['type']}{where}"


def errors_seen(shown: Snapshot) -> str:
    """Say that the errors are not all there are, where that is so."""
    counted, failed = sum(row["count"] for row in shown["errors"]), shown["counts"]["failed"]
    if counted >= failed or not shown["errors"]:
        return ""
    return f"counted over the first {shown['errors_seen']:,} of {failed:,} failures"


def way_out(shown: Snapshot) -> str:
    """Say what can be done about a job that has ended and not succeeded, or ""."""
    counts = shown["counts"]
    if not shown["ended"]:
        return ""
    if shown["retryable"]:
        return f"job.retry() runs {plural(shown['retryable'], 'task')} again"
    if counts["failed"]:
        return 'results(errors="return") gives the exceptions, to_frame() a row for each task'
    return ""


def job_age(row: JobRow) -> str:
    """Say for how long a job has run, or how long it took and when it was made."""
    return f"took {duration(row['elapsed'])}, {age(row['age'])} ago" if row["ended"] else f"for {age(row['age'])}"
