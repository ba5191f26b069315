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
        for holding in _that_hold(found):
            _restore(store, holding)
    finally:
        store.close()


def _that_hold(entries: list[_OfJob]) -> list[_OfJob]:
    """Leave out what has been overtaken, and put the rest in an order in which it can be said again.

    A job that was opened again after its end is cancelled no more, and has no deadline: told of these first, whoever
    waits for it would give up. A name belongs to the last job that has claimed it.
    """
    again: set[str] = set()
    manifests, others = list[_OfJob](), list[_OfJob]()
    for entry in reversed(entries):
        if isinstance(entry, journal.Manifest):
            manifests.append(msgspec.structs.replace(entry, deadline=0.0) if entry.id in again else entry)
            continue
        if isinstance(entry, journal.Reopen) and (entry.ended or entry.floor):
            again.add(entry.id)
        if not (isinstance(entry, journal.Cancel) and entry.reason != "deleted" and entry.id in again):
            others.append(entry)
    return manifests + others[::-1]


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
