"""Filling an emptied workbench again from the jobs topic, before any chunk is fed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from yadtq_nb import journal
from yadtq_nb.config import Config
from yadtq_nb.errors import CodecError
from yadtq_nb.workbench.jobs import JobStore

log = logging.getLogger(__name__)

_OfJob: TypeAlias = journal.Manifest | journal.Reopen | journal.Seal | journal.Cancel


def restore_jobs(config: Config, queue: str, entries: Iterable[tuple[str, bytes | None]]) -> None:
    """Write manifests, seals and the like to the workbench; what is there already stays as it is.

    Raises:
        BacklogError, WorkbenchError: a server cannot be reached.
    """
    store = JobStore(config, queue)
    found: list[_OfJob] = []
    try:
        for key, value in entries:
            if value is not None:
                try:
                    entry = journal.decode(config.key, key, value)
                except CodecError as exc:
                    log.error("entry %s of the jobs topic is passed by: %s", key, exc)
                    continue
                if isinstance(entry, journal.Blob):
                    store.put_blob(entry.name, entry.data)
                else:
                    found.append(entry)
        for holding in _that_hold(found, store.now()):
            _restore(store, holding)
    finally:
        store.close()


def _that_hold(entries: list[_OfJob], now: float) -> list[_OfJob]:
    """Leave out what has been overtaken, in the order in which it was said.

    A job that was opened again is cancelled no more, nor ended by the deadline that it had before: told of that first,
    whoever waits for it would give up. A job whose name another one has by now was deleted, or has expired.
    """
    names = {entry.name: entry.id for entry in entries if isinstance(entry, journal.Manifest)}
    floors: dict[str, int] = {}
    gone = {e.id for e in entries if isinstance(e, journal.Manifest) and names[e.name] != e.id}
    holding: list[_OfJob] = []
    for entry in reversed(entries):
        deleted = isinstance(entry, journal.Cancel) and entry.reason == "deleted"
        if not deleted and entry.id in gone:
            continue
        if isinstance(entry, journal.Reopen):
            floors[entry.id] = max(entry.floor, floors.get(entry.id, 0))
        elif isinstance(entry, journal.Cancel) and not deleted and entry.id in floors:
            continue
        elif isinstance(entry, journal.Manifest) and entry.id in floors and (floors[entry.id] or entry.deadline <= now):
            entry = msgspec.structs.replace(entry, deadline=0.0)
        holding.append(entry)
    return holding[::-1]


def find_blob(config: Config, entries: Iterable[tuple[str, bytes | None]], name: str) -> bytes | None:
    """Return a function or source tree as the jobs topic has it, or None.

    Raises:
        BacklogError: Kafka cannot be reached.
    """
    found = None
    for key, value in entries:
        if key == f"blob/{name}" and value is not None:
            with contextlib.suppress(CodecError):  # what cannot be read is as good as not there
                entry = journal.decode(config.key, key, value)
                found = entry.data if isinstance(entry, journal.Blob) else found
    return found


def _restore(store: JobStore, entry: _OfJob) -> None:
    if isinstance(entry, journal.Manifest | journal.Reopen):
        # Until its seal comes, later in the topic, nobody is to take it for one whose client has died.
        store.say_sending(entry.id)
    if isinstance(entry, journal.Manifest):
        store.create(entry)
    elif isinstance(entry, journal.Cancel) and entry.reason == "deleted":
        store.delete(entry.id)
    elif isinstance(entry, journal.Cancel):
        store.cancel(entry)
    elif isinstance(entry, journal.Reopen):
        store.restore_reopened(entry)
    else:
        store.seal(entry)
