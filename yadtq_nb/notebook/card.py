"""The live card: a thin widget around a snapshot. The looks are in static/card.js and static/card.css.

Importing this module imports anywidget: import it where a card is first shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anywidget
import traitlets

from yadtq_nb.notebook.markup import STATIC, static_bundle
from yadtq_nb.notebook.snapshot import Snapshot

#: The parts of a snapshot that have a trait of their own: many workers are sent less often than the counts.
_WORKER_KEYS = ("workers", "more_workers")


class Card(anywidget.AnyWidget):
    """A view of one job. It only shows: whoever holds it sets `snapshot` and `workers`."""

    _esm = STATIC / "card.js"
    _css = STATIC / "card.css"

    #: A Snapshot without its workers.
    snapshot = traitlets.Dict().tag(sync=True)
    #: The workers of that snapshot, and the sum of those without a line.
    workers = traitlets.Dict().tag(sync=True)


def parts(shown: Snapshot) -> dict[str, dict[str, Any]]:
    """Split a snapshot into the values of the card's traits."""
    return {
        "snapshot": {key: value for key, value in shown.items() if key not in _WORKER_KEYS},
        "workers": {key: value for key, value in shown.items() if key in _WORKER_KEYS},
    }


def live_bundle(shown: Snapshot, card: Card) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return one bundle with all three forms, and its metadata."""
    made = card._repr_mimebundle_()
    # Colab wants to be told in the metadata where the widget manager is, and only then is there any.
    data, metadata = made if isinstance(made, tuple) else (made, {})
    return {**(data or {}), **static_bundle(shown)}, metadata
