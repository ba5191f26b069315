"""The text form of a snapshot: a few lines for a terminal, a log, or a notebook without a browser."""

from __future__ import annotations

from typing import Final

from yadtq_nb.notebook import words
from yadtq_nb.notebook.snapshot import Snapshot

_WIDTH: Final = 40
_GLYPHS: Final = {"succeeded": "█", "failed": "▚", "cancelled": "╳", "running": "▒", "queued": "░"}


def as_text(shown: Snapshot) -> str:
    """Return the job in a few lines, without a line break at the end."""
    lines = [
        f"{shown['name']}  {shown['state']}  {words.headline(shown)}",
        f"{bar(shown)}  {words.timing(shown)}",
        "  ".join(f"{_GLYPHS[kind]} {count:,} {kind}" for kind, count in words.segments(shown)),
        *_worker_lines(shown),
        *(f"! {line}" for line in shown["errors"]),
        f"({shown['note']})" if shown["note"] else "",
    ]
    return "\n".join(line for line in lines if line)


def bar(shown: Snapshot) -> str:
    """Draw the bar in unicode blocks; a state with any task at all gets at least one block."""
    found = words.segments(shown)
    tasks = sum(count for _, count in found)
    if not tasks:
        return _GLYPHS["succeeded" if shown["state"] == "succeeded" else "queued"] * _WIDTH
    blocks = {kind: max(1, count * _WIDTH // tasks) for kind, count in found}
    # What rounding has left over, or taken too much, goes to the widest segment, where it shows least.
    widest = max(blocks, key=lambda kind: blocks[kind])
    blocks[widest] += _WIDTH - sum(blocks.values())
    return "".join(_GLYPHS[kind] * width for kind, width in blocks.items())


def _worker_lines(shown: Snapshot) -> list[str]:
    rows = shown["workers"]
    if not rows:
        return [] if shown["ended"] else ["no worker serves this queue now"]
    width = max(len(f"{row['host']} {row['id']}") for row in rows)
    lines = [
        f"{row['host']} {row['id']}".ljust(width)
        + f"  {words.slots(row)}  {words.heartbeat(row, ended=shown['ended'])}".rstrip()
        for row in rows
    ]
    if shown["more_workers"]:
        lines.append(f"{words.more_workers(shown['more_workers'])}  {words.slots(shown['more_workers'])}")
    return lines
