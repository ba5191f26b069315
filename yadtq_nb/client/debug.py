"""One recorded call, run again in this process: from the same bytes as in the slot, and under pdb where it raises."""

from __future__ import annotations

import asyncio
import bdb
import functools
import os
import pdb
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Protocol

from yadtq_nb import codec, needs
from yadtq_nb.client.inbox import PATIENCE
from yadtq_nb.errors import DependencyError, FormatError, JobError, JobNotFoundError, TaskError
from yadtq_nb.model import WHOLE, BrokenItem, ChunkHead, Need
from yadtq_nb.salvage import Unreadable
from yadtq_nb.slots.calls import apply, holds_bytecode, load_function
from yadtq_nb.slots.hints import PYTHON
from yadtq_nb.slots.running import unsent
from yadtq_nb.slots.supply import Supplies, named
from yadtq_nb.slots.wire import Supply
from yadtq_nb.workbench.connection import patiently
from yadtq_nb.workbench.jobs import JobStore

#: Seconds between looks for a record that is on its way.
_PAUSE: Final = 0.05
_OURS: Final = str(Path(__file__).parent.parent) + os.sep


class _Link(Protocol):
    key: bytes

    @property
    def store(self) -> JobStore: ...


def debug(link: _Link, job: str, name: str, index: int, *, settled: bool) -> Any:
    """Run a task's call here and return its value; see TaskFuture.debug.

    Args:
        settled: it has its outcome, so that its record has been on the workbench.
    """
    head, call, item = load(link, job, name, index, settled=settled)
    try:
        if head.concurrent:
            return _await(apply(call, head.style, item))
        return apply(call, head.style, item)
    except bdb.BdbQuit:  # "q" at a breakpoint() of the function
        return None
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # SystemExit too, as in a slot
        trace = _of_the_user(exc.__traceback__)
        traceback.print_exception(type(exc), exc, trace)
        pdb.post_mortem(trace)
        return None


def load(link: _Link, job: str, name: str, index: int, *, settled: bool) -> tuple[ChunkHead, Callable[..., Any], Any]:
    """Return a task's chunk, its function and its item, unpickled here.

    Raises:
        JobNotFoundError: the job, or what it was given, is not kept any more.
        JobError: it does not reach the workbench.
        DependencyError: what it needs of other tasks has no value.
        TaskError: its function or its item cannot be unpickled here; or the item could not even be sent.
        SignatureError, FormatError: the record cannot be trusted, or read.
        WorkbenchError: Redis cannot be reached.
    """
    key = f"{name}[{index}]"
    head, function, arguments = codec.decode_chunk(link.key, _record(link.store, job, name, index, settled))
    if head.job != job or not head.first <= index < head.first + head.count:
        raise FormatError(f"the record that is kept for {key} is that of {head.job_name}, from task {head.first} on")
    if not head.function_size:
        function = _blob(link, codec.FUNCTION, head.function, name)
        if codec.content_hash(function) != head.function:
            raise FormatError(f"the function that is kept for {key} is another one")
    if head.by_reference:
        arguments = _blob(link, codec.ARGUMENTS, f"{job}-{head.number}", name)
    if head.environment.python not in ("", PYTHON) and holds_bytecode(function):
        raise TaskError(
            f"{key} was sent by Python {head.environment.python}, and this is {PYTHON}: functions travel as bytecode, "
            f"so debug it with Python {head.environment.python}",
            index=index,
        )
    supplies = Supplies(link.key, functools.partial(_supplies, link.store, head.needs))
    with needs.supplying(supplies.value):
        try:
            call, _ = load_function(function, codec.loads_home)
        except Exception as exc:  # whatever the user's objects do when they are unpickled
            _refuse(exc, f"the function of {key}", key, index)
        return head, call, _item(arguments, index - head.first, key, index)


def _item(arguments: memoryview, offset: int, key: str, index: int) -> Any:
    try:
        item = codec.loads_home(arguments)[offset]
    except Exception:  # as above; one of its mates may be to blame
        try:
            item = codec.loads_each_home(arguments)[offset]
        except Exception as exc:
            _refuse(exc, f"the item of {key}", key, index)
    if type(item) is Unreadable:
        _refuse(item.error, f"the item of {key}", key, index)
    if type(item) is BrokenItem:
        raise unsent(item, index)
    return item


def _refuse(error: Exception, what: str, key: str, index: int) -> NoReturn:
    """Raise what says why a task cannot be run here."""
    if isinstance(error, DependencyError):
        raise named(error, key, index) from error.__cause__
    raise TaskError(
        f"{what} cannot be unpickled here: {type(error).__name__}: {error}; it needs the modules that it had when it "
        "was sent",
        index=index,
    ) from error


def _record(store: JobStore, job: str, name: str, index: int, settled: bool) -> bytes:
    """Return the newest record that holds a task; wait some seconds for one that is on its way."""
    deadline = time.monotonic() + (0.0 if settled else PATIENCE)
    while not (numbers := _holders(store, job, index)):
        if time.monotonic() < deadline:
            time.sleep(_PAUSE)
        elif settled:
            raise _gone(name)
        else:
            raise JobError(
                f"{name}[{index}] has not reached the workbench: it is still being sent, or no worker feeds it",
                job=name,
            )
    for number in sorted(numbers, reverse=True):
        record = patiently(functools.partial(store.input, job, number), PATIENCE)
        if record is not None:
            return record
    raise _gone(name)


def _holders(store: JobStore, job: str, index: int) -> list[int]:
    """Return the numbers of the chunks on the workbench that hold a task.

    Raises:
        JobNotFoundError: the job was deleted.
    """
    patiently(lambda: store.record(job), PATIENCE)
    spans = patiently(lambda: store.spans(job), PATIENCE)
    return [number for number, first, count in spans if first <= index < first + count]


def _blob(link: _Link, kind: bytes, blob: str, name: str) -> memoryview:
    sealed = patiently(lambda: link.store.blob(blob), PATIENCE)
    if sealed is None:
        raise _gone(name)
    return codec.unseal(link.key, kind, sealed)


def _gone(name: str) -> JobNotFoundError:
    return JobNotFoundError(
        f"what job {name!r} was given is not kept any more: it has expired, or Redis has lost its data; map it anew",
        job=name,
    )


def _supplies(store: JobStore, wanted: tuple[Need, ...]) -> list[Supply]:
    """Fetch what a chunk needs of other jobs."""
    jobs = dict.fromkeys(need.job for need in wanted)
    return [
        patiently(functools.partial(_supply, store, job, [need for need in wanted if need.job == job]), PATIENCE)
        for job in jobs
    ]


def _supply(store: JobStore, job: str, wanted: list[Need]) -> Supply:
    whole = any(need.count == WHOLE for need in wanted)
    facts, stored = store.outcomes_of(job, [] if whole else _numbers(store, job, wanted))
    if facts is None:
        return Supply(job, job)
    if whole:
        stored = list(store.outcomes(job, store.fields(job)))
    dropped = tuple(store.dropped(job)) if facts.cancelled else ()
    return Supply(job, facts.name, True, facts.total, facts.cancel, dropped, tuple((s.frame, s.mask) for s in stored))


def _numbers(store: JobStore, job: str, wanted: list[Need]) -> list[int]:
    """Return the numbers of the chunks that hold what is needed."""
    return [
        number
        for number, first, count in store.spans(job)
        if any(need.first < first + count and first < need.first + need.count for need in wanted)
    ]


def _await(awaitable: Any) -> Any:
    """Return what an awaitable comes to; in a thread where this one's event loop runs already, as in a notebook."""

    async def awaited() -> tuple[Any, BaseException | None]:
        try:
            return await awaitable, None
        except BaseException as exc:  # brought out by hand, without asyncio's frames
            return None, exc

    value, error = _run(awaited())
    if error is not None:
        raise error
    return value


def _run(coroutine: Coroutine[Any, Any, tuple[Any, BaseException | None]]) -> tuple[Any, BaseException | None]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    found: list[tuple[Any, BaseException | None]] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(coroutine)), name="yadtq-debug", daemon=True)
    thread.start()
    thread.join()
    return found[0]


def _of_the_user(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the user's first frame on; where there is none, the call was wrong: all of it."""
    found = trace
    while found is not None and found.tb_frame.f_code.co_filename.startswith(_OURS):
        found = found.tb_next
    return found or trace
