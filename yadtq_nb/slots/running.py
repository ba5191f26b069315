"""Running the tasks of one chunk: one after another in a tight loop, or coroutines side by side."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from itertools import starmap
from operator import methodcaller
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from yadtq_nb import errors
from yadtq_nb.model import BrokenItem, CallStyle
from yadtq_nb.slots import capture
from yadtq_nb.slots.calls import apply
from yadtq_nb.slots.outcomes import Outcomes, ours
from yadtq_nb.slots.wire import LEAVE

if TYPE_CHECKING:
    import asyncio

#: Coroutines that run at a time in one slot.
AT_A_TIME: Final = 100


def fail_broken(outcomes: Outcomes, first: int, items: Sequence[Any], todo: Sequence[int]) -> Sequence[int]:
    """Fail the tasks whose items could not be sent or read, and return the offsets of the others."""
    if BrokenItem not in map(type, items):
        return todo
    broken = [offset for offset in todo if type(items[offset]) is BrokenItem]
    for offset in broken:
        outcomes.failures[offset] = items[offset].info or ours(unsent(items[offset], first + offset))
    outcomes.offsets = broken
    outcomes.values += [None] * len(broken)
    gone = set(broken)
    return [offset for offset in todo if offset not in gone]


def unsent(item: BrokenItem, index: int) -> errors.TaskError:
    """Return the error of a task whose item could not be sent."""
    kind: type[errors.TaskError] = getattr(errors, item.error)
    return kind(f"the item of task {index} cannot be sent: {item.message}", index=index)


def run_each(
    call: Callable[..., Any],
    style: CallStyle,
    items: Sequence[Any],
    todo: Sequence[int],
    progress: memoryview,
    outcomes: Outcomes,
) -> None:
    """Run the tasks at the offsets todo one after another. progress[0] is the offset of the task that runs."""
    chosen: Iterable[Any] = items if len(todo) == len(items) else [items[offset] for offset in todo]
    broken = outcomes.offsets
    outcomes.offsets = [*broken, *todo] if broken else todo
    # map and starmap make the call in C, with no frame of ours in between, and go on after an exception.
    step = _steps(call, style, chosen)
    keep, mark, clock = outcomes.values.append, outcomes.marks.append, perf_counter
    for _ in range(len(broken) + 1):
        mark(clock())
    for offset in todo:
        if progress[1]:  # anything but GO_ON
            outcomes.hold()
            break
        progress[0] = offset
        try:
            keep(step())
        except BaseException as exc:  # SystemExit and KeyboardInterrupt too: a task ends, not the slot
            if progress[1] == LEAVE:
                raise  # the node wants this slot to end
            outcomes.fail(offset, exc)
            keep(None)
        mark(clock())


def run_together(
    loop: asyncio.AbstractEventLoop,
    call: Callable[..., Any],
    style: CallStyle,
    items: Sequence[Any],
    todo: Sequence[int],
    progress: memoryview,
    outcomes: Outcomes,
) -> None:
    """Run the coroutines of the tasks at the offsets todo side by side, up to AT_A_TIME."""
    import asyncio  # loaded by whoever made the loop

    done = list(outcomes.offsets)
    limit = outcomes.policy.timeout or None
    spans = [(perf_counter(),) * 2 for _ in done]
    outcomes.offsets, outcomes.spans = done, spans
    waiting = iter(todo)

    async def attempt(offset: int) -> tuple[Any, BaseException | None]:
        capture.current.set(offset)
        allowed = asyncio.timeout(limit)
        try:
            async with allowed:
                return await _followed(apply(call, style, items[offset]), offset, progress), None
        except BaseException as exc:  # also a cancellation that the task has brought on itself
            return None, outcomes.timeout(offset) if allowed.expired() else exc

    async def work() -> None:
        for offset in waiting:
            if progress[1]:
                outcomes.held = True
                return
            began = perf_counter()
            # A task of its own: its context variables and its cancellations are not those of its neighbours.
            value, error = await loop.create_task(attempt(offset))
            if error is not None:
                outcomes.fail(offset, error)
            outcomes.values.append(value)
            done.append(offset)
            spans.append((began, perf_counter()))

    async def all_of_them() -> None:
        for worker in [loop.create_task(work()) for _ in range(min(AT_A_TIME, len(todo)))]:
            await worker

    loop.run_until_complete(all_of_them())


def _steps(call: Callable[..., Any], style: CallStyle, items: Iterable[Any]) -> Callable[[], Any]:
    if style == "item":
        return map(call, items).__next__
    if style == "star":
        return starmap(call, items).__next__
    if style == "part":
        return map(call, map(methodcaller("open"), items)).__next__
    return map(functools.partial(apply, call, style), items).__next__


@types.coroutine
def _followed(awaitable: Any, offset: int, progress: memoryview) -> Generator[Any, Any, Any]:
    """Await awaitable, and note at each of its steps that this task runs: so that a crash has a culprit."""
    steps: Coroutine[Any, Any, Any] = awaitable if hasattr(awaitable, "send") else awaitable.__await__()
    sent, error = None, None
    while True:
        progress[0] = offset
        try:
            waited = steps.send(sent) if error is None else steps.throw(error)
        except StopIteration as stop:
            return stop.value
        sent, error = None, None
        try:
            sent = yield waited
        except BaseException as exc:
            error = exc
