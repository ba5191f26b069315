"""Waiting for a condition, processes that stand still, and a task that writes to a file outside of its system."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str = "did not happen in time", seconds: float = 30.0) -> T:
    """Wait until a condition holds, and return what it said."""
    deadline = time.monotonic() + seconds
    while not (said := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return said


def wait_for_file(path: str) -> str:
    """Wait in a task, for as long as its test lets it, and return the path."""
    while not os.path.exists(path):
        time.sleep(0.01)
    return path


def traced(x: int, *, audit: str, seconds: float = 0.01) -> int:
    """Write down what runs and in which slot, then take a moment."""
    with open(audit, "a") as file:
        file.write(f"{x} {os.getpid()}\n")
    time.sleep(seconds)
    return x * x


def runs(audit: Path) -> list[int]:
    """Return what has run, in order."""
    return [x for x, _ in runs_in_slots(audit)]


def runs_in_slots(audit: Path) -> list[tuple[int, int]]:
    """Return what has run, in order, each with the process that ran it."""
    return [(int(x), int(pid)) for x, pid in map(str.split, audit.read_text().splitlines())]


def is_running(pid: int) -> bool:
    """Whether a process has not ended, as a zombie has."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stand still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
