"""What tasks write: told apart, bounded, and kept until their outcome is sent.

    sys.stdout, sys.stderr ─▶ Stream ─▶ fds 1 and 2: the slot's log ◀── C code, and what a task starts
                                └─────▶ Capture: whose it is, and its last lines

A task that runs alone in its chunk, as every long one does, has all that was added to the log meanwhile. Where several
travel together, each has what it has written by Python's streams; the rest stands in the log only. A task that writes
nothing costs nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from yadtq_nb.slots.wire import ALONE, LOG_START, READING, WRITER

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

#: Most that is kept of one task, in bytes: of the first tasks of a job, of a later one, and of a very late one.
KEPT: Final = 64 * 1024
_OF_A_JOB: Final = 256 * 1024 * 1024
_LEAST: Final = 1024
#: Most that is kept of all tasks of a chunk that are reported together, in bytes.
_TOGETHER: Final = 1024 * 1024
#: Longest part of a line that waits for the rest, in bytes.
_LINE: Final = 8 * 1024
#: Stands where something was cut off.
CUT: Final = b"[... cut ...]\n"
#: Encoding, treatment of what it lacks, and write-through of the streams.
_HOW: Final = "utf-8", "backslashreplace", True
#: Seconds for which a log is looked at again that is just being cut.
_CUTTING: Final = 0.1

#: Offset of the task that runs in this context, where coroutines run side by side: also in threads that they wait for.
current: ContextVar[int] = ContextVar("yadtq-task")


class Stream(io.BufferedIOBase):
    """Writes to a file descriptor line by line, and tells whose it is. It cannot be closed: the next task needs it."""

    def __init__(self, fd: int, whose: Callable[[], int], note: Callable[[int, bytes], object]) -> None:
        """Take the parts that are passed in.

        Args:
            whose: returns the offset of the task that writes now.
            note: is told what a task has written.
        """
        super().__init__()
        self._fd, self._whose, self._note = fd, whose, note
        # Reentrant: a signal handler of a task may write while it writes.
        self._lock = threading.RLock()
        self._line = b""
        self._owner = READING
        #: As the interpreter's own have it.
        self.name = "<stdout>" if fd == 1 else "<stderr>"

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of it, once a line is whole, or somebody else begins to write."""
        text = bytes(data)
        with self._lock:
            owner = self._whose()
            if self._line and owner != self._owner:
                self._put()
            self._owner = owner
            self._line += text
            if b"\n" in text or b"\r" in text or len(self._line) >= _LINE:
                self._put()
        return len(text)

    def flush(self) -> None:
        """Write what there is of a line."""
        if self._line:
            with self._lock:
                self._put()

    def _put(self) -> None:
        line, self._line = self._line, b""
        self._note(self._owner, line)
        done = os.write(self._fd, line)
        while done < len(line):
            done += os.write(self._fd, line[done:])

    def leave(self) -> None:
        """In a child that a task has forked: the line is its parent's, and a thread of that may hold the lock."""
        self._lock, self._line = threading.RLock(), b""

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._fd

    def writable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Do nothing but flush."""
        self.flush()


class Capture:
    """Keeps what the tasks of one chunk write. Any thread of the slot may write, or take what is there."""

    def __init__(self, progress: memoryview, log: str) -> None:
        """Take the place of sys.stdout and sys.stderr; their file descriptors have been given to the log by then."""
        self._progress = progress
        self._path = log
        self._log = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        self._lock = threading.RLock()
        self._kept: dict[int, bytearray] = {}
        self._cut: set[int] = set()
        self._size = 0
        self._share = KEPT
        self._first = 0
        self._alone = True
        self._together = False
        self._raw = Stream(1, self._whose, self._note), Stream(2, self._whose, self._note)
        self._c_stdout = _c_stdout()
        self._open_streams()
        os.register_at_fork(after_in_child=self._stop)

    def _open_streams(self) -> None:
        encoding, errors, through = _HOW
        out = io.TextIOWrapper(self._raw[0], encoding, errors, write_through=through)
        err = io.TextIOWrapper(self._raw[1], encoding, errors, write_through=through)
        self._streams = out, err
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = self._streams  # type: ignore[misc]  # mypy thinks that they are final

    def begin(self, first: int, todo: Sequence[int]) -> None:
        """Forget the tasks before: those at offsets todo are next, of a chunk whose first has that index."""
        self._restore_fds()
        if self._is_spoilt():
            self._open_streams()
        with self._lock:
            self._first, self._together = first, False
            self._alone = len(todo) == 1
            self._progress[WRITER] = ALONE if self._alone else READING
            if self._kept or self._cut:
                self._forget()

    def _is_spoilt(self) -> bool:
        """Tell whether a task has put something in the place of the streams, or changed them, and left it so."""
        try:
            if (sys.stdout, sys.stderr) != self._streams:
                return True
            return any(
                stream.buffer is not raw or (stream.encoding, stream.errors, stream.write_through) != _HOW
                for stream, raw in zip(self._streams, self._raw, strict=True)
            )
        except (AttributeError, ValueError):  # deleted; detached
            return True

    def _restore_fds(self) -> None:
        """Have file descriptors 1 and 2 be the log, which a task may have closed, or turned elsewhere for good."""
        log = os.fstat(self._log)
        for fd in (1, 2):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), log):
                    continue
            with contextlib.suppress(OSError):  # the disk is full; the directory has gone
                opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
                if opened != fd:
                    os.dup2(opened, fd)
                    os.close(opened)
                else:
                    os.set_inheritable(fd, True)

    def run_together(self) -> None:
        """Be told that they run side by side."""
        self._together = True

    def flush_lines(self) -> None:
        """Write what there is of lines that are not whole."""
        for raw in self._raw:
            with contextlib.suppress(OSError):  # the disk is full
                raw.flush()

    def _forget(self) -> None:
        self._kept, self._cut = {}, set()
        self._size, self._share = 0, KEPT

    def flush(self) -> None:
        """Bring what lies in buffers to where it belongs."""
        for name, ours in zip(("stdout", "stderr"), self._streams, strict=True):
            stream = getattr(sys, name, ours)
            if stream is not ours:
                with contextlib.suppress(Exception):  # a task's own
                    stream.flush()
        self.flush_lines()
        if self._alone and self._c_stdout is not None:
            self._c_stdout()

    def take(self, offsets: Sequence[int]) -> dict[int, bytes]:
        """Return what those of the tasks at offsets, which have ended, have written, if anything, and forget it."""
        if self._alone:
            if not offsets:
                return {}
            self.flush()
            found = self._region(offsets[0])
            return {offsets[0]: found} if found else {}
        self.flush_lines()  # its end may lie there still
        if not self._kept:
            return {}
        with self._lock:
            taken = {offset: self._take(offset) for offset in offsets if offset in self._kept}
            if not self._kept:
                self._forget()
        return taken

    def _take(self, offset: int) -> bytes:
        self._trim(offset, self._most(offset))
        kept = self._kept.pop(offset)
        self._size -= len(kept)
        return marked(bytes(kept)) if offset in self._cut else bytes(kept)

    def _region(self, offset: int) -> bytes:
        with contextlib.suppress(OSError):
            return read_end(self._log, lambda: self._progress[LOG_START], self._most(offset))
        return b""

    def _most(self, offset: int) -> int:
        """Return how much of a task is kept: little by little less, so that a job of very many cannot fill Redis."""
        return min(self._share, max(_LEAST, _OF_A_JOB // (self._first + offset + 1)))

    def _whose(self) -> int:
        return current.get(self._progress[0])

    def _note(self, offset: int, data: bytes) -> None:
        if self._alone or offset & READING:
            return
        with self._lock:
            if offset != self._progress[WRITER]:
                self._turn_to(offset)
            kept = self._kept.get(offset)
            if kept is None:
                kept = self._kept[offset] = bytearray()
            kept += data
            self._size += len(data)
            most = self._most(offset)
            if len(kept) > 2 * most:  # not at each write
                self._trim(offset, most)
            if self._size > _TOGETHER:
                self._shrink()

    def _turn_to(self, offset: int) -> None:
        """Note where in the log the task begins, for whoever reads there when the slot has died."""
        if not self._together and self._progress[WRITER] != READING:
            self._progress[LOG_START] = min(os.fstat(self._log).st_size, 0xFFFFFFFF)
        self._progress[WRITER] = offset

    def _trim(self, offset: int, most: int) -> None:
        kept = self._kept[offset]
        over = len(kept) - most
        if over > 0:
            del kept[:over]
            self._size -= over
            self._cut.add(offset)

    def _shrink(self) -> None:
        """Have all tasks keep less, the long ones first, until they fit together."""
        self._share *= 2
        while self._size > _TOGETHER and self._share:
            self._share //= 2
            for offset in list(self._kept):
                self._trim(offset, self._most(offset))

    def _stop(self) -> None:
        """In a child that a task has forked: what it keeps, nobody reads."""
        self._alone = True
        for raw in self._raw:
            raw.leave()


def read_end(log: int, start: Callable[[], int], most: int) -> bytes:
    """Return what a log holds from a place on, its last bytes if these are more than most.

    Args:
        log: a file descriptor.
        start: returns the place, which moves when the log is cut.
    """
    until = time.monotonic() + _CUTTING
    while (begin := start()) > (size := os.fstat(log).st_size) and time.monotonic() < until:
        time.sleep(0.001)
    length = min(size - begin, most)
    if length <= 0:
        return b""
    found = os.pread(log, length, size - length)
    return marked(found) if length < size - begin else found


def marked(text: bytes) -> bytes:
    """Return the end of a text with a mark in front that the rest was cut off."""
    start = 0
    while start < min(3, len(text)) and text[start] & 0xC0 == 0x80:  # not in the middle of a character
        start += 1
    return CUT + text[start:]


def _c_stdout() -> Callable[[], object] | None:
    """Return what flushes C's own buffer of stdout, where C code has written; None where that cannot be told.

    Not all its streams: another thread may hold the lock of one for as long as it reads from it.
    """
    try:
        libc = ctypes.CDLL(None)
        stdout = ctypes.c_void_p.in_dll(libc, "__stdoutp" if sys.platform == "darwin" else "stdout")
    except (OSError, ValueError, AttributeError):
        return None
    return lambda: libc.fflush(stdout)
