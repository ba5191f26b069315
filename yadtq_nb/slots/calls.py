"""A task's call: its function as it travels, and how an item is given to it. The same in a slot and in a notebook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

from yadtq_nb import codec
from yadtq_nb.model import CallStyle

#: What can be called, and the types of errors after which a task of it is tried again.
Loaded: TypeAlias = "tuple[Callable[..., Any], tuple[type[BaseException], ...]]"


def load_function(data: codec.Buffer, loads: Callable[[codec.Buffer], Any] = codec.loads) -> Loaded:
    """Unpickle a function with what is the same for all its tasks.

    Raises:
        FormatError: cut short.
        Exception: whatever unpickling raises.
    """
    function, fixed, *types = loads(data)
    return functools.partial(function, **fixed) if fixed else function, types[0] if types else ()


def holds_bytecode(data: codec.Buffer) -> bool:
    """Tell whether a function travels by value: the interpreter may crash on another one's bytecode."""
    return b"_make_function" in bytes(data)


def apply(call: Callable[..., Any], style: CallStyle, item: Any) -> Any:
    """Call a function with a task's item."""
    if style == "item":
        return call(item)
    if style == "star":
        return call(*item)
    if style == "part":
        return call(item.open())
    return call(*item[0], **item[1])
