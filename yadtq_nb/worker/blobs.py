"""Functions, source trees and large arguments that travel by name: fetched once, kept as files for the slots."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from yadtq_nb.errors import TaskError
from yadtq_nb.workbench.bench import Workbench


class BlobFiles:
    """The files of one node, under its directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, name: str, workbench: Workbench) -> Path:
        """Return the file of a blob, fetched if it is not here yet.

        Raises:
            TaskError: the workbench does not have it (any more).
            WorkbenchError: Redis cannot be reached.
            OSError: it cannot be written here: the disk is full, or the like.
        """
        path = self._directory / name
        if not path.exists():
            data = workbench.blob(name)
            if data is None:
                raise TaskError(
                    f"the workbench has lost {name}, which this task needs: it expired, or Redis was emptied; "
                    "send the job again"
                )
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

    def drop(self, name: str) -> None:
        """Remove a file that no other chunk will ask for."""
        (self._directory / name).unlink(missing_ok=True)
