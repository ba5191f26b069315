"""A node's temporary directory, which is gone with the node: where that was killed, the next node here removes it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

_PREFIX: Final = "yadtq-node-"
_LOCK: Final = "lock"
#: Seconds within which a directory may have been made and not locked yet.
_YOUNG: Final = 60.0


class NodeDirectory:
    """Made, and locked for as long as this process lives."""

    def __init__(self, node: str) -> None:
        self._made = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{node}-")  # the keeper knows it by this
        self.path = Path(self._made.name)
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can take it for one that was left
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        self._made.cleanup()
        os.close(self._lock)


def remove_left() -> None:
    """Remove the directories of nodes that were killed, of this user and on this machine."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid() and time.time() - path.stat().st_mtime > _YOUNG and _is_left(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_left(path: Path) -> bool:
    lock = os.open(path / _LOCK, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
