"""The text form of a snapshot: a few lines for a terminal, a log, or a notebook without a browser."""

from __future__ import annotations

from typing import Final

from yadtq_nb.notebook import words
from yadtq_nb.notebook.snapshot import Counts, JobRow, QueueSnapshot, Snapshot

_WIDTH: Final = 40
_LINE_WIDTH: Final = 20
_JOB_WIDTH: Final = 12
_GLYPHS: Final = {"succeeded": "█", "failed": "▚", "cancelled": "╳", "lost": "?", "running": "▒", "queued": "░"}


def as_text(shown: Snapshot) -> str:
    """Return the job in a few lines, without a line break at the end."""
    lines = [
        f"{shown['name']}  {shown['state']}  {words.headline(shown['counts'])}",
        f"{bar(shown['counts'], shown['state'])}  {words.timing(shown)}",
        "  ".join(f"{_GLYPHS[kind]} {count:,} {kind}" for kind, count in words.segments(shown["counts"])),
        *([] if shown["ended"] else _worker_lines(shown)),
        *(f"… {words.running(row)} on {row['worker']}" for row in shown["running"][:1]),
        *error_lines(shown),
        f"({shown['note']})" if shown["note"] else "",
    ]
    return "\n".join(line for line in lines if line)


def error_lines(shown: Snapshot) -> list[str]:
    """Return a line for each group of errors, and what can be done about them."""
    seen, way_out = words.errors_seen(shown), words.way_out(shown)
    return [
        *(f"! {words.error_head(row)}: {row['message']}" for row in shown["errors"]),
        *([f"  {seen}"] if seen else []),
        *([f"({way_out})"] if way_out else []),
    ]


def queue_text(shown: QueueSnapshot) -> str:
    """Return the queue in a few lines, without a line break at the end."""
    width = max((len(row["name"]) for row in shown["jobs"]), default=0)
    lines = [
        f"queue {shown['name']}  {words.fleet(shown['fleet'])}",
        *_worker_lines(shown),
        *(_job_line(row, width) for row in shown["jobs"]),
        f"and {words.plural(shown['more_jobs'], 'job')} more" if shown["more_jobs"] else "",
        "" if shown["jobs"] else "no jobs in the last day",
        f"({shown['note']})" if shown["note"] else "",
    ]
    return "\n".join(line for line in lines if line)


def line(shown: Snapshot) -> str:
    """Return the job as one line of progress: "sweep  62% ████▒░░  62 of 100, 1 failed  5.0/s · 12 s elapsed"."""
    counts = shown["counts"]
    share = f"{100 * words.finished(counts) // counts['total']:3}% " if counts["total"] else ""
    state = "" if shown["state"] == "running" else f"{shown['state']}  "
    failed = f", {counts['failed']:,} failed" if counts["failed"] else ""
    drawn = bar(counts, shown["state"], _LINE_WIDTH)
    return f"{shown['name']}  {share}{drawn}  {state}{words.headline(counts)}{failed}  {words.timing(shown)}"


def bar(counts: Counts, state: str, width: int = _WIDTH) -> str:
    """Draw the bar in unicode blocks; a state with any task at all gets at least one block."""
    found = words.segments(counts)
    tasks = sum(count for _, count in found)
    if not tasks:
        return _GLYPHS["succeeded" if state == "succeeded" else "queued"] * width
    blocks = {kind: max(1, count * width // tasks) for kind, count in found}
    # What rounding has left over, or taken too much, goes to the widest segment, where it shows least.
    widest = max(blocks, key=lambda kind: blocks[kind])
    blocks[widest] += width - sum(blocks.values())
    return "".join(_GLYPHS[kind] * blocks[kind] for kind in blocks)


def _job_line(row: JobRow, width: int) -> str:
    drawn = bar(row["counts"], row["state"], _JOB_WIDTH)
    return f"{row['name'].ljust(width)}  {drawn}  {row['state']}  {words.headline(row['counts'])}  {words.job_age(row)}"


def _worker_lines(shown: Snapshot | QueueSnapshot) -> list[str]:
    rows = shown["workers"]
    if not rows:
        return ["no worker serves this queue now"]
    names = [f"{row['host']} {words.short_id(row)}" for row in rows]
    width = max(map(len, names))
    lines = [
        f"{name.ljust(width)}  {words.slots(row)}  {words.load(row)}  {words.heartbeat(row, ended=shown['ended'])}"
        for name, row in zip(names, rows, strict=True)
    ]
    if shown["more_workers"]:
        lines.append(f"{words.more_workers(shown['more_workers'])}  {words.slots(shown['more_workers'])}")
    return [text.rstrip() for text in lines]
