"""Unpickling a list item by item, where the whole of it cannot be unpickled: one bad item costs only itself.

The pickle of a list is one program, in which items share what they have in common. Here it is run step by step by
the standard library's unpickler in Python: what a step raises stands where its result would be, and whatever is made
with it becomes it, up to the list itself. Some fifty times slower than unpickling in C: for when that has failed.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Final, TypeAlias

Step: TypeAlias = "Callable[[Any], None]"


class Unreadable:
    """Stands for what could not be unpickled."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


def load_each(pickled: bytes | memoryview, buffers: Iterable[Any], classes: type[Any] | None = None) -> list[Any]:
    """Unpickle a list; an Unreadable stands for each of its items that cannot be.

    Args:
        classes: in front of the unpickler, a class whose find_class is to be used.

    Raises:
        Exception: what is wrong is not within one item.
    """
    cls: Any = _Each if classes is None else type("Each", (classes, _Each), {})
    items = cls(io.BytesIO(pickled), buffers=buffers).load()
    if type(items) is not list:
        raise pickle.UnpicklingError("not the pickle of a list")
    return items


class _Each(pickle._Unpickler):
    """An unpickler that goes on after an error."""

    stack: list[Any]
    metastack: list[list[Any]]
    memo: dict[int, Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Step]] = dict(pickle._Unpickler.dispatch)

    def is_outermost(self, target: object) -> bool:
        """Tell whether an object is the list whose items may fail."""
        bottom = self.metastack[0] if self.metastack else self.stack
        return target is bottom[0]

    def spoil(self, target: object, unreadable: Unreadable) -> None:
        """Forget an object that is half made, wherever it would be looked up."""
        for key in [key for key, value in self.memo.items() if value is target]:
            self.memo[key] = unreadable


def _first_unreadable(operands: Iterable[Any]) -> Unreadable | None:
    return next((operand for operand in operands if type(operand) is Unreadable), None)


def _fixed(step: Step, count: int, *, changes: bool = False) -> Step:
    """Guard a step that takes so many operands from the stack and leaves one; changes: it is the first of them."""

    def guarded(self: _Each) -> None:
        operands = self.stack[-count:] if count else []
        depth = len(self.stack) - count
        if changes and self.is_outermost(operands[0]):
            step(self)
            return
        unreadable = _first_unreadable(operands)
        if unreadable is None:
            try:
                step(self)
                return
            except Exception as exc:  # whatever the user's objects do when they are unpickled
                unreadable = Unreadable(exc)
        if changes:
            self.spoil(operands[0], unreadable)
        del self.stack[depth:]
        self.stack.append(unreadable)

    return guarded


def _marked(step: Step, *, changes: bool = False) -> Step:
    """Guard a step that takes all operands since the mark; changes: what lies before the mark is changed."""

    def guarded(self: _Each) -> None:
        operands = self.stack
        target = self.metastack[-1][-1] if changes else None
        if changes and self.is_outermost(target):
            step(self)
            return
        unreadable = _first_unreadable([target, *operands])
        if unreadable is None:
            try:
                step(self)
                return
            except Exception as exc:  # as above
                unreadable = Unreadable(exc)
        if self.stack is operands:
            self.pop_mark()
        if changes:
            self.spoil(target, unreadable)
            self.stack[-1] = unreadable
        else:
            self.stack.append(unreadable)

    return guarded


_FIXED: Final = {
    pickle.GLOBAL: 0,
    pickle.STACK_GLOBAL: 2,
    pickle.REDUCE: 2,
    pickle.NEWOBJ: 2,
    pickle.NEWOBJ_EX: 3,
    pickle.TUPLE1: 1,
    pickle.TUPLE2: 2,
    pickle.TUPLE3: 3,
}
_CHANGING: Final = {pickle.BUILD: 2, pickle.APPEND: 2, pickle.SETITEM: 3}

for _op, _count in _FIXED.items():
    _Each.dispatch[_op[0]] = _fixed(_Each.dispatch[_op[0]], _count)
for _op, _count in _CHANGING.items():
    _Each.dispatch[_op[0]] = _fixed(_Each.dispatch[_op[0]], _count, changes=True)
for _op in (pickle.TUPLE, pickle.LIST, pickle.DICT, pickle.FROZENSET):
    _Each.dispatch[_op[0]] = _marked(_Each.dispatch[_op[0]])
for _op in (pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS):
    _Each.dispatch[_op[0]] = _marked(_Each.dispatch[_op[0]], changes=True)
