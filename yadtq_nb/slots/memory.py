"""The memory limit of slots: a thread that looks at what each uses, with all that it has started.

No rlimit: RLIMIT_AS counts address space, of which numpy, threads and CUDA reserve far more than they use, and all of
them are for one process, not for what it starts. Memory that is mapped from files is not counted on Linux: the kernel
takes it back when it needs it.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import psutil

from yadtq_nb.slots import processes
from yadtq_nb.slots.child import Child

#: What the reason begins with, of a slot's end that was over the limit.
OVER: Final = "stopped over the memory limit"
#: Seconds between looks, unless a look takes long: then it is so many times as long.
_EVERY: Final = 0.1
_TIMES: Final = 20

_ROUGH: Final = re.compile(rb"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB", re.MULTILINE)
_FAIR: Final = re.compile(rb"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s+(\d+) kB", re.MULTILINE)


class MemoryWatch:
    """Looks at slots from a thread of its own, since the node's main thread may wait for Redis."""

    def __init__(
        self, limit: int, slots: Callable[[], Iterable[Child]], over: Callable[[Child, object, int], None]
    ) -> None:
        """Say what is watched.

        Args:
            limit: bytes.
            slots: returns the slots that run now.
            over: is told of a slot over the limit: the slot, the lease that it had before it was looked at, its bytes.
        """
        self._limit, self._slots, self._over = limit, slots, over
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="yadtq-memory", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more, and join the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        wait = _EVERY
        while not self._closing.wait(wait):
            began = time.monotonic()
            for slot in self._slots():
                lease = slot.lease
                if slot.pid and not slot.doomed and (bytes_used := used(slot.pid, self._limit)) > self._limit:
                    self._over(slot, lease, bytes_used)
            wait = max(_EVERY, _TIMES * (time.monotonic() - began))


def used(pid: int, limit: int) -> int:
    """Return the bytes that a process and all below it use; exactly only where a rough look finds more than limit."""
    if not processes.LINUX:
        return _used_elsewhere(pid)
    pids = [pid, *processes.descendants(pid)]
    # What was forked shares pages, and the rough look counts them for each. The fair one takes long where much is used.
    rough = sum(_sum(one, "status", _ROUGH) for one in pids)
    return rough if rough <= limit else sum(_sum(one, "smaps_rollup", _FAIR) for one in pids) or rough


def over_limit(limit: int, used: int) -> str:
    """Return in words why a slot was killed that used too much."""
    return f"{OVER} of {megabytes(limit)} for each slot, since it used {megabytes(used)}"


def megabytes(size: int) -> str:
    """Return a size to be shown."""
    return f"{size / 2**20:,.0f} MiB"


def _sum(pid: int, file: str, wanted: re.Pattern[bytes]) -> int:
    try:
        text = Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:  # it may end at any moment
        return 0
    return 1024 * sum(map(int, wanted.findall(text)))


def _used_elsewhere(pid: int) -> int:
    size = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it may end at any moment
                size += one.memory_info().rss
    return size
