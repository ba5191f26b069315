"""A slot as its pool sees it: the socket, the shared progress, and the log."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import time
from pathlib import Path
from typing import Final

from yadtq_nb import source
from yadtq_nb.model import ChunkHead, Environment, Lease, Written
from yadtq_nb.slots import wire
from yadtq_nb.slots.capture import CUT, KEPT, read_end
from yadtq_nb.slots.growth import Growth
from yadtq_nb.slots.launch import shared_memory
from yadtq_nb.slots.wire import ALONE, LOG_START, NO_OFFSET, READING, WRITER

#: A log longer than this is cut, in bytes, and how much of it is kept.
_LOG_LIMIT: Final = 8 * 1024 * 1024
_LOG_KEPT: Final = 64 * 1024
#: What of a dead slot's log is shown.
_LAST_LINES: Final = 20
_LAST_BYTES: Final = 16 * 1024


class Child:
    """One slot, from its request to its end."""

    def __init__(self, serial: int, number: int, log: Path) -> None:
        self.serial, self.number, self.log = serial, number, log
        self.sock, self.theirs = socket.socketpair()
        self.progress_fd = shared_memory()
        self.progress = memoryview(mmap.mmap(self.progress_fd, wire.PROGRESS_SIZE)).cast("I")
        self.progress[0] = NO_OFFSET
        self.inbox = wire.Inbox()
        self.sending = threading.Lock()
        self.pid: int | None = None
        self.doomed = False
        #: When it is killed, if it has not ended by then, on the monotonic clock.
        self.kill_at: float | None = None
        #: Offset of the task that was seen to run, and since when, on the monotonic clock.
        self.seen: int | None = None
        self.seen_at = 0.0
        #: Offset of the task for whose slowness it was killed.
        self.timed_out: int | None = None
        self.environment: Environment | None = None
        self.lease: Lease | None = None
        #: True while its task waits for a job that it has sent.
        self.lent = False
        #: Offset of the item of which it is only to say what it looks like.
        self.describes: int | None = None
        #: Bytes that it used when it was killed for the memory limit.
        self.used_memory = 0
        #: Tasks that it was given so far.
        self.tasks = 0
        #: When it was last given a chunk, or made, on the monotonic clock.
        self.used = time.monotonic()
        self.growth = Growth(log)

    def order(self, order: wire.Order, record: bytes) -> None:
        """Write an order without waiting for the slot, which may be stopped. The caller holds `sending`.

        What its socket does not take at once, a thread of its own writes: whoever calls has other slots to see to.
        """
        try:
            rest = wire.begin(self.sock, order, record)
        except OSError:
            rest = []  # the slot has died, as poll will tell
        if not rest:
            self.sending.release()
            return
        try:
            threading.Thread(target=self._write, args=[rest], name="yadtq-order", daemon=True).start()
        except RuntimeError:  # this machine has no room for another thread
            self._write(rest)

    def _write(self, rest: list[memoryview]) -> None:
        try:
            for part in rest:
                self.sock.sendall(part)
        except OSError:
            pass  # the slot has died, as poll will tell
        finally:
            self.sending.release()

    def handed_over(self) -> None:
        """Close the child's ends here."""
        self.theirs.close()
        os.close(self.progress_fd)

    def offset(self) -> int | None:
        """Offset of the task that runs, or whose item is being read, or None."""
        offset = self.progress[0]
        return None if offset == NO_OFFSET else offset & ~READING

    def reads(self) -> bool:
        """Tell whether the task's item is only being read."""
        return self.progress[0] != NO_OFFSET and bool(self.progress[0] & READING)

    def look(self, now: float) -> bool:
        """Note which task runs, and since when it was seen to; False when none does."""
        offset = self.offset()
        if offset != self.seen:
            self.seen, self.seen_at = offset, now
        return offset is not None

    def begin_log(self, head: ChunkHead, skip: frozenset[int]) -> None:
        """Note that what is written from now on belongs to that chunk, whose offsets in skip are not run."""
        self.progress[LOG_START], self.progress[WRITER] = min(size(self.log), 0xFFFFFFFF), READING
        self.growth.begin(self.progress[LOG_START], head, skip)

    def grown(self, jobs: frozenset[str], most: int) -> list[Written]:
        """Return what chunks of these jobs have written since the last time; see Growth.take."""
        return self.growth.take(jobs, self.offset, most, done=self.lease is None)

    def written(self, most: int = KEPT) -> bytes:
        """Return the end of what was written since its chunk began, or since the task that runs began to write."""
        try:
            log = os.open(self.log, os.O_RDONLY)
        except OSError:
            return b""
        try:
            return read_end(log, lambda: self.progress[LOG_START], most)
        finally:
            os.close(log)

    def written_by(self, offset: int) -> bytes:
        """Return the end of what a task has written that is running, as far as it can be told from that of others."""
        return self.written() if self.progress[WRITER] in (ALONE, offset) else b""

    def is_idle(self) -> bool:
        """Return whether it may be given a chunk."""
        return self.lease is None and not self.doomed

    def suits(self, environment: Environment) -> bool:
        """Return whether a chunk of environment may run here without seeing modules of another."""
        return self.environment is None or source.suits(self.environment, environment)

    def close(self) -> None:
        """Let go of the socket, also under a thread that is sending."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        with self.sending:
            self.sock.close()


def size(path: Path) -> int:
    """Return the length of a file, 0 when there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def tail(slot: Child) -> str:
    """Return the last lines of what a slot has written since its chunk began, or since its task began to write."""
    # What faulthandler adds of loaded extension modules says nothing of the task.
    text = slot.written(_LAST_BYTES).decode("utf-8", "replace").partition("\nExtension modules:")[0]
    return "\n".join(text.splitlines()[-_LAST_LINES:])


def bound(slot: Child) -> None:
    """Cut a log that is too long; those who append to it go on at its new end."""
    if size(slot.log) > _LOG_LIMIT:
        with contextlib.suppress(OSError), slot.log.open("r+b") as file:
            file.seek(-_LOG_KEPT, os.SEEK_END)
            kept = file.read()
            end = file.tell()
            file.seek(0)
            file.write(CUT + kept)
            file.truncate()
            gone = end - len(CUT) - len(kept)
            slot.growth.cut(gone)
            start = slot.progress[LOG_START] - gone
            slot.progress[LOG_START] = start if start > len(CUT) else 0
