"""Functions, source trees and large arguments that travel by name: fetched once, kept as files for the slots."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from yadtq_nb import codec
from yadtq_nb.errors import BacklogError, CodecError, TaskError, WorkbenchError
from yadtq_nb.workbench.bench import Workbench

#: Seconds for which a blob that was found nowhere is not looked for in the jobs topic again.
_GONE: Final = 10.0
_WHAT: Final = {
    codec.FUNCTION: "the function",
    codec.TREE: "the source tree",
    codec.ARGUMENTS: "the arguments",
}


class BlobFiles:
    """The files of one node, under its directory."""

    def __init__(self, directory: Path, secret: bytes, search: Callable[[str], bytes | None]) -> None:
        """Take the parts that are passed in.

        Args:
            secret: what blobs are verified with.
            search: looks for a blob in the jobs topic.
        """
        self._directory = directory
        self._secret = secret
        self._search = search
        self._gone: dict[str, float] = {}
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, name: str, workbench: Workbench, kind: bytes) -> Path:
        """Return the file of a blob, fetched if it is not here yet.

        Raises:
            TaskError: nobody has it (any more), or it cannot be read.
            WorkbenchError: Redis cannot be reached.
            OSError: it cannot be written here: the disk is full, or the like.
        """
        path = self._directory / name
        if not path.exists():
            data = self._fetch(name, workbench, kind)
            # Somebody may have cleaned up the temporary directory.
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Renamed when whole, so that no slot reads half a file.
            partial = self._directory / f".{name}.{os.getpid()}.{threading.get_ident()}"
            try:
                partial.write_bytes(data)
                partial.replace(path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
        return path

    def _fetch(self, name: str, workbench: Workbench, kind: bytes) -> bytes:
        data = workbench.blob(name)
        if data is None and kind != codec.ARGUMENTS:
            data = self._found(name)
        if data is None:
            raise TaskError(
                f"{_WHAT[kind]} of this task, {name}, is neither in Redis nor on the jobs topic: it expired, or was "
                "deleted; send the job again"
            )
        if kind != codec.ARGUMENTS:  # these are large, and no other task asks for them: the slot will see
            try:
                codec.unseal(self._secret, kind, data)
            except CodecError as exc:
                # Not kept: a good one may come under the same name.
                raise TaskError(f"{_WHAT[kind]} of this task, {name}, cannot be read: {exc}") from exc
        return data

    def _found(self, name: str) -> bytes | None:
        """Look on the jobs topic, but not for every chunk of a job that has lost its function."""
        now = time.monotonic()
        if now - self._gone.get(name, float("-inf")) < _GONE:
            return None
        try:
            data = self._search(name)
        except BacklogError as exc:
            # To be tried again: the tasks are not to fail because Kafka is away.
            raise WorkbenchError(f"{name} is not in Redis, and the jobs topic cannot be read: {exc}") from exc
        if data is None:
            self._gone[name] = now
        return data

    def drop(self, name: str) -> None:
        """Remove a file that no other chunk will ask for."""
        (self._directory / name).unlink(missing_ok=True)
