"""What a task's item looks like, in a few words: for the error of a task that can say nothing any more."""

from __future__ import annotations

import reprlib
from typing import Any, Final

from yadtq_nb.model import BrokenItem, CallStyle
from yadtq_nb.slots.hints import sendable

#: Longest text, in characters.
_LONGEST: Final = 500
_NOTHING: Final = "no arguments"


def shown(item: Any, style: CallStyle) -> str:
    """Return an item as text: as it would be written, or as the arguments of a call."""
    if type(item) is BrokenItem:
        return f"<{item.message}>" if item.message else "<it cannot be unpickled>"
    if style == "call":
        named = [f"{name}={_show(value)}" for name, value in item[1].items()]
        return _shorten(", ".join([*map(_show, item[0]), *named])) or _NOTHING
    if style == "star":
        return _shorten(", ".join(map(_show, item))) or _NOTHING
    return _shorten(_show(item))


def _show(value: Any) -> str:
    # Not repr(): of a list of a million numbers it would take long, and need memory that there may not be.
    brief = reprlib.Repr()
    brief.maxlevel = 4
    brief.maxdict = brief.maxlist = brief.maxtuple = brief.maxset = brief.maxfrozenset = brief.maxdeque = 10
    brief.maxarray = 10
    brief.maxstring = brief.maxlong = brief.maxother = 200
    return brief.repr(value)


def _shorten(text: str) -> str:
    text = sendable(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
