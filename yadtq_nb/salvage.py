"""Unpickling a list item by item, where the whole of it cannot be unpickled: one bad item costs only itself.

The pickle of a list is one program, in which items share what they have in common. Here it is run step by step by
the standard library's unpickler in Python: what a step raises stands where its result would be, and whatever is made
with it becomes it, up to the list itself. Some fifty times slower than unpickling in C: for when that has failed.

What kills the process is found in the same way: whoever follows is told of each item before its first step, and an item
that is known to be poison is not made at all.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar, Final, TypeAlias

Step: TypeAlias = "Callable[[Any], None]"


class Unreadable:
    """Stands for what could not be unpickled."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


class PoisonError(Exception):
    """What would be here kills the process that makes it."""


def load_each(
    pickled: bytes | memoryview,
    buffers: Iterable[Any],
    classes: type[Any] | None = None,
    *,
    follow: Callable[[int], object] | None = None,
    poison: Collection[int] = (),
) -> list[Any]:
    """Unpickle a list; an Unreadable stands for each of its items that cannot be.

    Args:
        classes: in front of the unpickler, a class whose find_class is to be used.
        follow: is told of each item before anything of it is made.
        poison: items of which nothing is made that would run code of the user's. Nor can others be read that share
            such an object with one.

    Raises:
        Exception: what is wrong is not within one item.
    """
    cls: Any = _Each if classes is None else type("Each", (classes, _Each), {})
    unpickler = cls(io.BytesIO(pickled), buffers=buffers)
    if follow is not None:
        unpickler.dispatch = _Followed(unpickler, _first_steps(pickled), follow, poison)
    items = unpickler.load()
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
    #: While it stands in an item of which nothing is to be made.
    poisoned = False

    def is_outermost(self, target: object) -> bool:
        """Tell whether an object is the list whose items may fail."""
        bottom = self.metastack[0] if self.metastack else self.stack
        return target is bottom[0]

    def spoil(self, target: object, unreadable: Unreadable) -> None:
        """Forget an object that is half made, wherever it would be looked up."""
        for key in [key for key, value in self.memo.items() if value is target]:
            self.memo[key] = unreadable


class _Followed(dict[int, Step]):
    """The steps of an unpickler, which looks each of them up here: so that somebody knows where it is."""

    def __init__(
        self, unpickler: _Each, first_steps: dict[int, int], follow: Callable[[int], object], poison: Collection[int]
    ) -> None:
        super().__init__(unpickler.dispatch)
        self._unpickler, self._first_steps, self._follow, self._poison = unpickler, first_steps, follow, poison
        self._step = 0

    def __getitem__(self, opcode: int) -> Step:
        item = self._first_steps.get(self._step)
        self._step += 1
        if item is not None:
            self._unpickler.poisoned = item in self._poison
            self._follow(item)
        return super().__getitem__(opcode)


def _first_steps(pickled: bytes | memoryview) -> dict[int, int]:
    """Return the number of each item's first step -> the item, of the pickle of a list. Nothing is made."""
    first_steps: dict[int, int] = {}
    #: Depth of the stack -> the last step that left it so deep.
    last: dict[int, int] = {}
    marks: list[int] = []
    depth, begun, items = 0, 0, 0
    for step, (opcode, _, _) in enumerate(pickletools.genops(bytes(pickled))):
        if opcode.name in ("APPEND", "APPENDS") and depth - (opcode.name == "APPENDS") >= 2:
            bottom = marks[-1] if opcode.name == "APPENDS" else depth - 1
            if bottom == (2 if opcode.name == "APPENDS" else 1):
                # An item is whole when the stack has grown by it for good.
                for whole in range(bottom + 1, depth + 1):
                    first_steps[begun], items = items, items + 1
                    begun = last[whole] + 1
        before, after = opcode.stack_before, opcode.stack_after
        pops = len(before)
        if pickletools.markobject in before or (opcode.name == "POP" and marks and marks[-1] == depth):
            depth = marks.pop() - 1
            pops = before.index(pickletools.markobject) if pickletools.markobject in before else 0
        depth += len(after) - pops
        if opcode.name == "MARK":
            marks.append(depth)
        last[depth] = step
        if depth == 1 or (opcode.name == "MARK" and depth == 2):
            begun = step + 1
    return first_steps


def _first_unreadable(operands: Iterable[Any]) -> Unreadable | None:
    return next((operand for operand in operands if type(operand) is Unreadable), None)


def _is_of_cloudpickle(function: object) -> bool:
    # Functions and classes of a notebook are made in the first item that needs them, and the others share them.
    return (getattr(function, "__module__", None) or "").startswith("cloudpickle")


def _never(_: object) -> bool:
    return False


#: Steps that run code of the user's, as pickles are made today -> whether it is harmless, by the first operand.
_CALLING: Final = {
    pickle.REDUCE: _is_of_cloudpickle,
    pickle.NEWOBJ: _never,
    pickle.NEWOBJ_EX: _never,
    pickle.BUILD: _never,
}


def _fixed(step: Step, count: int, *, changes: bool = False, harmless: Callable[[object], bool] | None = None) -> Step:
    """Guard a step that takes so many operands from the stack and leaves one; changes: it is the first of them."""

    def guarded(self: _Each) -> None:
        operands = self.stack[-count:] if count else []
        depth = len(self.stack) - count
        if changes and self.is_outermost(operands[0]):
            step(self)
            return
        unreadable = _first_unreadable(operands)
        if unreadable is None and self.poisoned and harmless is not None and not harmless(operands[0]):
            unreadable = Unreadable(PoisonError("reading this item, or one that it shares an object with, kills"))
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
    _Each.dispatch[_op[0]] = _fixed(_Each.dispatch[_op[0]], _count, harmless=_CALLING.get(_op))
for _op, _count in _CHANGING.items():
    _Each.dispatch[_op[0]] = _fixed(_Each.dispatch[_op[0]], _count, changes=True, harmless=_CALLING.get(_op))
for _op in (pickle.TUPLE, pickle.LIST, pickle.DICT, pickle.FROZENSET):
    _Each.dispatch[_op[0]] = _marked(_Each.dispatch[_op[0]])
for _op in (pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS):
    _Each.dispatch[_op[0]] = _marked(_Each.dispatch[_op[0]], changes=True)
