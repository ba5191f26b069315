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
from yadtq_nb.notebook.snapshot import MoreWorkers, Snapshot, WorkerRow
from yadtq_nb.notebook.text import as_text

STATIC: Final = Path(__file__).parent / "static"

_RULE: Final = re.compile(r"^\.yadtq-([\w-]+)\s*\{([^}]*)\}", re.MULTILINE)


def as_html(shown: Snapshot, *, now: datetime | None = None) -> str:
    """Return the job as one HTML element.

    Args:
        shown: the job.
        now: the time to print under a job that was still running; the present if None.
    """
    root = _element(None, "div", "card")
    _head(root, shown)
    _bar(root, shown)
    _counts(root, shown)
    _workers(root, shown)
    errors = _element(root, "div", "errors")
    for line in shown["errors"]:
        _element(errors, "div", "error", line)
    _element(root, "div", "note", _note(shown, now or datetime.now(UTC)))
    return tostring(root, encoding="unicode", method="html")


def static_bundle(shown: Snapshot) -> dict[str, str]:
    """Return the forms that need no kernel, HTML and text, as `_repr_mimebundle_` gives them."""
    return {"text/html": as_html(shown), "text/plain": as_text(shown)}


def line_bundle(line: str) -> dict[str, str]:
    """Return both forms of a single line: what is said where a job cannot be asked."""
    return {"text/html": f"<pre>{html.escape(line)}</pre>", "text/plain": line}


def _head(root: Element, shown: Snapshot) -> None:
    head = _element(root, "div", "head")
    _element(head, "span", "name", shown["name"]).set("title", f"job {shown['id']}")
    _element(head, "span", f"dot fill-{shown['state']}")
    _element(head, "span", "state", shown["state"])
    _element(head, "span", "progress", words.headline(shown))


def _bar(root: Element, shown: Snapshot) -> None:
    bar = _element(root, "div", "bar")
    bar.set("role", "img")
    bar.set("aria-label", ", ".join(f"{count:,} {kind}" for kind, count in words.segments(shown)) or "no tasks")
    found = words.segments(shown)
    tasks = sum(count for _, count in found)
    for kind, count in found:
        _element(bar, "div", f"segment fill-{kind}", width=f"{100 * count / tasks:.3f}%")


def _counts(root: Element, shown: Snapshot) -> None:
    counts = _element(root, "div", "counts")
    for kind, count in words.segments(shown):
        item = _element(counts, "span", "count")
        _element(item, "span", f"dot fill-{kind}")
        _element(item, "span", "number", f"{count:,} {kind}")
    _element(counts, "span", "timing", words.timing(shown))


def _workers(root: Element, shown: Snapshot) -> None:
    box = _element(root, "div", "workers")
    for row in shown["workers"]:
        _worker(box, row, ended=shown["ended"])
    if shown["more_workers"]:
        line = _element(box, "div", "worker")
        _element(line, "span", "who", words.more_workers(shown["more_workers"]))
        _gauge(line, shown["more_workers"])
    if not shown["workers"] and not shown["ended"]:
        _element(box, "div", "worker", "no worker serves this queue now")


def _worker(box: Element, row: WorkerRow, *, ended: bool) -> None:
    line = _element(box, "div", "worker")
    _element(line, "span", f"dot fill-{row['status']}")
    who = _element(line, "span", "who", f"{row['host']} ")
    _element(who, "span", "id", row["id"])
    _gauge(line, row)
    _element(line, "span", "beat", words.heartbeat(row, ended=ended))


def _gauge(line: Element, row: WorkerRow | MoreWorkers) -> None:
    gauge = _element(line, "span", "gauge")
    _element(gauge, "span", "busy fill-running", width=f"{100 * row['busy'] / max(row['slots'], 1):.0f}%")
    _element(line, "span", "slots", words.slots(row))


def _note(shown: Snapshot, now: datetime) -> str:
    if shown["note"] or shown["ended"]:
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
