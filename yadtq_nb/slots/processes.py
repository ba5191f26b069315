"""Making sure that processes end: with their parent, with their group, and with whatever they have started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Final

#: Only Linux has the means (prctl, /proc) that the template is built on.
LINUX: Final = sys.platform.startswith("linux")

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


def die_with_parent(parent: int, signum: signal.Signals) -> bool:
    """Have the kernel send signum when the parent's thread that made this process ends.

    Returns:
        False when the parent is gone already, so that the signal will never come.
    """
    _prctl(_PR_SET_PDEATHSIG, signum)
    return os.getppid() == parent


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, however well it has daemonised itself."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def offer_to_oom_killer() -> None:
    """When memory runs out, have the kernel end this process rather than a node, a broker or a notebook."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def children() -> list[int]:
    """Return the children of this process, which must be single-threaded; empty where /proc does not tell."""
    pid = os.getpid()
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_bytes().split()))
    except OSError:
        return [child for child in _processes() if _parent(child) == pid]


def descendants(pid: int) -> list[int]:
    """Return what a process has started, and what that has, and so on. On Linux only."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        try:
            threads = os.listdir(f"/proc/{parent}/task")
        except OSError:
            continue
        below = [int(child) for thread in threads for child in _read(parent, f"task/{thread}/children").split()]
        found += below
        waiting += below
    return found


def kill(pid: int, *, group: bool = False) -> None:
    """SIGKILL a process, and its process group if asked, unless it is gone."""
    if group:  # first, since it may be our own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def terminate(pid: int) -> None:
    """SIGTERM a process, unless it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGTERM)


def marked(mark: str) -> list[int]:
    """Return the processes, other than this one, that were started with mark ("NAME=value") in their environment."""
    needle = b"\0" + mark.encode() + b"\0"
    return [pid for pid in _processes() if pid != os.getpid() and needle in b"\0" + _read(pid, "environ")]


def peak(usage: resource.struct_rusage) -> int:
    """Return the most that an ended process had resident, in bytes."""
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def describe(status: int) -> str:
    """Return in words how a process ended, from its wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"killed by {signal.Signals(number).name}"
        except ValueError:
            return f"killed by signal {number}"
    return f"exited with status {os.waitstatus_to_exitcode(status)}"


def _prctl(option: int, value: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def _processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else -1
