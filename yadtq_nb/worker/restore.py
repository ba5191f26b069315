"""Filling an emptied workbench again from the jobs topic, before any chunk is fed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable

from yadtq_nb import journal
from yadtq_nb.config import Config
from yadtq_nb.errors import CodecError
from yadtq_nb.workbench.jobs import JobStore

log = logging.getLogger(__name__)


def restore_jobs(config: Config, queue: str, entries: Iterable[tuple[str, bytes | None]]) -> None:
    """Write manifests, seals and the like to the workbench; what is there already stays as it is.

    Raises:
        BacklogError, WorkbenchError: a server cannot be reached.
    """
    store = JobStore(config, queue)
    try:
        for key, value in entries:
            if value is not None:
                try:
                    _restore(store, journal.decode(config.key, key, value))
                except CodecError as exc:
                    log.error("entry %s of the jobs topic is passed by: %s", key, exc)
    finally:
        store.close()


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


def _restore(store: JobStore, entry: journal.Entry) -> None:
    if isinstance(entry, journal.Manifest | journal.Reopen):
        # Until its seal comes, later in the topic, nobody is to take it for one whose client has died.
        store.say_sending(entry.id)
    if isinstance(entry, journal.Blob):
        store.put_blob(entry.name, entry.data)
    elif isinstance(entry, journal.Manifest):
        store.create(entry)
    elif isinstance(entry, journal.Cancel) and entry.reason == "deleted":
        store.delete(entry.id)
    elif isinstance(entry, journal.Cancel):
        store.cancel(entry)
    elif isinstance(entry, journal.Reopen):
        store.restore_reopened(entry)
    else:
        store.seal(entry)
