"""The live card: a thin widget around a snapshot. The looks are in static/card.js and static/card.css.

Importing this module imports anywidget: import it where a card is first shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import anywidget
import traitlets

from yadtq_nb.notebook.markup import STATIC, static_bundle
from yadtq_nb.notebook.snapshot import QueueSnapshot, Snapshot

#: What of a worker changes rarely, and what changes with each heartbeat.
_ROSTER: Final = ("id", "host", "slots", "status")
_BEAT: Final = ("busy", "age", "done", "cpu", "memory")
#: The parts of a snapshot that have traits of their own, since they change less often than the counts, or are larger.
_APART: Final = frozenset({"workers", "more_workers", "fleet", "running", "errors", "jobs"})


class Card(anywidget.AnyWidget):
    """A view of one job or queue. It only shows: whoever holds it sets its traits, and hears what its buttons say."""

    _esm = STATIC / "card.js"
    _css = STATIC / "card.css"

    #: "job" or "queue".
    kind = traitlets.Unicode("job").tag(sync=True)
    #: A snapshot without the parts that follow.
    snapshot = traitlets.Dict().tag(sync=True)
    #: A list for each worker: id, host, slots, status.
    roster: traitlets.List[Any] = traitlets.List().tag(sync=True)
    #: "rows": a list for each worker in the same order: slots busy, age of its heartbeat, tasks done, percent of a
    #: core, MB; "more": the sum of those without a line; "fleet": the sum of all.
    beats = traitlets.Dict().tag(sync=True)
    #: The tasks that have run for the longest.
    running: traitlets.List[Any] = traitlets.List().tag(sync=True)
    #: Groups of errors, without their tracebacks.
    errors: traitlets.List[Any] = traitlets.List().tag(sync=True)
    #: Traceback of each group, by its key.
    tracebacks = traitlets.Dict().tag(sync=True)
    #: Rows of a queue's jobs.
    jobs: traitlets.List[Any] = traitlets.List().tag(sync=True)
    #: "number" of the last message of a button that was answered, and the answer as "text".
    answer = traitlets.Dict({"number": 0, "text": ""}).tag(sync=True)

    def hear(self, heard: Callable[[dict[str, Any]], None]) -> None:
        """Have messages of the front end passed on."""
        self.on_msg(lambda _widget, content, _buffers: heard(content) if isinstance(content, dict) else None)


def parts(shown: Snapshot | QueueSnapshot) -> dict[str, Any]:
    """Split a snapshot into the values of the card's traits."""
    rows = shown["workers"]
    return {
        "snapshot": {key: value for key, value in shown.items() if key not in _APART},
        "roster": [[row[key] for key in _ROSTER] for row in rows],
        "beats": {
            "rows": [[row[key] for key in _BEAT] for row in rows],
            "more": shown["more_workers"],
            "fleet": shown["fleet"],
        },
        **(_queue_parts(shown) if "jobs" in shown else _job_parts(shown)),
    }


def _job_parts(shown: Snapshot) -> dict[str, Any]:
    rows = shown["errors"]
    return {
        "running": shown["running"],
        "errors": [
            {"key": _key(row), **{key: value for key, value in row.items() if key != "traceback"}} for row in rows
        ],
        "tracebacks": {_key(row): row["traceback"] for row in rows if row["traceback"]},
        "jobs": [],
    }


def _queue_parts(shown: QueueSnapshot) -> dict[str, Any]:
    return {"running": [], "errors": [], "tracebacks": {}, "jobs": shown["jobs"]}


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['type']} {row['place']}"


def live_bundle(shown: Snapshot | QueueSnapshot, card: Card) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return one bundle with all three forms, and its metadata."""
    made = card._repr_mimebundle_()
    # Colab wants to be told in the metadata where the widget manager is, and only then is there any.
    data, metadata = made if isinstance(made, tuple) else (made, {})
    return {**(data or {}), **static_bundle(shown)}, metadata
