"""The static HTML form of a snapshot: what a saved notebook, GitHub and nbconvert show.

It is built as a tree by the standard library, which escapes every text and attribute; no markup is put together from
strings. Its styles are those of the live card, read from card.css and written into each element, since saved
notebooks lose style sheets; so the card does not jump when the static form takes the place of the live one.
"""

from __future__ import annotations

import functools
import html
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from xml.etree.ElementTree import Element, SubElement, tostring

from yadtq_nb.notebook import words
from yadtq_nb.notebook.snapshot import (
    Counts,
    ErrorRow,
    Fleet,
    JobRow,
    MoreWorkers,
    QueueSnapshot,
    RunningRow,
    Snapshot,
    WorkerRow,
)
from yadtq_nb.notebook.text import as_text, queue_text

STATIC: Final = Path(__file__).parent / "static"

_RULE: Final = re.compile(r"^\.yadtq-([\w-]+)\s*\{([^}]*)\}", re.MULTILINE)


def as_html(shown: Snapshot | QueueSnapshot, *, now: datetime | None = None) -> str:
    """Return the job or the queue as one HTML element.

    Args:
        shown: the job or the queue.
        now: the time to print under what was still going on; the present if None.
    """
    root = _element(None, "div", "card")
    if "jobs" in shown:
        _queue_head(root, shown)
        _workers(root, shown, open_now=True)
        _jobs(root, shown)
    else:
        _job(root, shown)
    _element(root, "div", "note", _note(shown, now or datetime.now(UTC)))
    return tostring(root, encoding="unicode", method="html")


def static_bundle(shown: Snapshot | QueueSnapshot) -> dict[str, str]:
    """Return the forms that need no kernel, HTML and text, as `_repr_mimebundle_` gives them."""
    return {"text/html": as_html(shown), "text/plain": queue_text(shown) if "jobs" in shown else as_text(shown)}


def line_bundle(line: str) -> dict[str, str]:
    """Return both forms of a single line: what is said where a job cannot be asked."""
    return {"text/html": f"<pre>{html.escape(line)}</pre>", "text/plain": line}


def _job(root: Element, shown: Snapshot) -> None:
    _head(root, shown)
    _bar(_element(root, "div", "bar"), shown["counts"], "segment")
    _counts(root, shown)
    if not shown["ended"]:
        _workers(root, shown, open_now=True)
        _running(root, shown["running"])
    if shown["errors"]:
        _errors(root, shown)


def _head(root: Element, shown: Snapshot) -> None:
    head = _element(root, "div", "head")
    _element(head, "span", "name", shown["name"]).set("title", f"job {shown['id']}")
    _element(head, "span", f"dot fill-{shown['state']}")
    _element(head, "span", "state", shown["state"])
    _element(head, "span", "progress", words.headline(shown["counts"]))


def _queue_head(root: Element, shown: QueueSnapshot) -> None:
    head = _element(root, "div", "head")
    _element(head, "span", "name", shown["name"])
    _element(head, "span", "state", "queue")


def _bar(bar: Element, counts: Counts, segment: str) -> None:
    found = words.segments(counts)
    bar.set("role", "img")
    bar.set("aria-label", ", ".join(f"{count:,} {kind}" for kind, count in found) or "no tasks")
    tasks = sum(count for _, count in found)
    for kind, count in found:
        _element(bar, bar.tag, f"{segment} fill-{kind}", width=f"{100 * count / tasks:.3f}%")


def _counts(root: Element, shown: Snapshot) -> None:
    counts = _element(root, "div", "counts")
    for kind, count in words.segments(shown["counts"]):
        item = _element(counts, "span", "count")
        _element(item, "span", f"dot fill-{kind}")
        _element(item, "span", "number", f"{count:,} {kind}")
    _element(counts, "span", "timing", words.timing(shown))


def _panel(root: Element, title: str, *, open_now: bool) -> Element:
    panel = _element(root, "details", "panel")
    if open_now:
        panel.set("open", "open")
    _element(panel, "summary", "title", title)
    return panel


def _workers(root: Element, shown: Snapshot | QueueSnapshot, *, open_now: bool) -> None:
    fleet: Fleet = shown["fleet"]
    box = _element(_panel(root, words.fleet(fleet), open_now=open_now), "div", "workers")
    for row in shown["workers"]:
        _worker(box, row, ended=shown["ended"])
    if shown["more_workers"]:
        line = _element(box, "div", "worker")
        _element(_element(line, "span", "who"), "span", "host", words.more_workers(shown["more_workers"]))
        _gauge(line, shown["more_workers"])
    if not shown["workers"]:
        _element(box, "div", "worker", "no worker serves this queue now")


def _worker(box: Element, row: WorkerRow, *, ended: bool) -> None:
    line = _element(box, "div", "worker")
    who = _element(line, "span", "who")
    _element(who, "span", f"dot fill-{row['status']}")
    _element(who, "span", "host", row["host"])
    _element(who, "span", "id", words.short_id(row))
    _gauge(line, row)
    _element(line, "span", "load", words.load(row))
    _element(line, "span", "beat", words.heartbeat(row, ended=ended))


def _gauge(line: Element, row: WorkerRow | MoreWorkers) -> None:
    gauge = _element(line, "span", "gauge")
    _element(gauge, "span", "busy fill-running", width=f"{100 * row['busy'] / max(row['slots'], 1):.0f}%")
    _element(line, "span", "slots", words.slots(row))


def _running(root: Element, rows: list[RunningRow]) -> None:
    if rows:
        panel = _panel(root, f"slowest now: {words.running(rows[0])}", open_now=False)
        for row in rows:
            _element(panel, "div", "line", f"{words.running(row)} · {row['worker']}")


def _errors(root: Element, shown: Snapshot) -> None:
    box = _element(root, "div", "errors")
    for row in shown["errors"]:
        _error(box, row)
    for text in (words.errors_seen(shown), words.way_out(shown)):
        if text:
            _element(box, "div", "note", text)


def _error(box: Element, row: ErrorRow) -> None:
    group = _element(box, "details", "error")
    summary = _element(group, "summary", "title")
    _element(summary, "span", "type", words.error_head(row))
    _element(summary, "span", "message", row["message"])
    _element(group, "div", "line", f"first in task {row['first']:,}")
    _element(group, "pre", "traceback", row["traceback"] or row["message"])


def _jobs(root: Element, shown: QueueSnapshot) -> None:
    jobs = shown["jobs"]
    panel = _panel(root, words.plural(len(jobs) + shown["more_jobs"], "job") + " in the last day", open_now=True)
    box = _element(panel, "div", "jobs")
    for row in jobs:
        _job_row(box, row)
    if shown["more_jobs"]:
        _element(box, "div", "job", f"and {shown['more_jobs']:,} more")


def _job_row(box: Element, row: JobRow) -> None:
    line = _element(box, "div", "job")
    who = _element(line, "span", "who")
    _element(who, "span", f"dot fill-{row['state']}")
    _element(who, "span", "host", row["name"]).set("title", f"job {row['id']}")
    _bar(_element(line, "span", "small-bar"), row["counts"], "small-segment")
    _element(line, "span", "done", words.headline(row["counts"]))
    _element(line, "span", "job-state", row["state"])
    _element(line, "span", "times", words.job_age(row))


def _note(shown: Snapshot | QueueSnapshot, now: datetime) -> str:
    if shown["note"] or (shown["ended"] and "jobs" not in shown):
        return shown["note"]
    return f"as of {now.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _element(parent: Element | None, tag: str, names: str, text: str = "", *, width: str = "") -> Element:
    """Make an element whose style is that of the classes named; names that card.css does not know are ignored."""
    rules = styles()
    style = "".join(rules[name] for name in names.split() if name in rules) + (f"width:{width}" if width else "")
    made = Element(tag) if parent is None else SubElement(parent, tag)
    if style:
        made.set("style", style)
    made.text = text or None
    if tag == "span" and text:
        # Where styles are lost, as on GitHub, words would stick together.
        made.tail = " "
    return made


@functools.cache
def styles() -> dict[str, str]:
    """Return the style of each class of card.css, as one line."""
    sheet = re.sub(r"/\*.*?\*/", "", (STATIC / "card.css").read_text(encoding="utf-8"), flags=re.DOTALL)
    return {name: re.sub(r"\s*([;:])\s*", r"\1", body).strip() for name, body in _RULE.findall(sheet)}
