"""Following a job where there is no front end: one line of progress, as tqdm's."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Final, TextIO

from yadtq_nb.notebook.snapshot import JobLike, plain, snapshot
from yadtq_nb.notebook.text import error_lines, line

#: Seconds between two lines: in a terminal, where one takes the other's place, and elsewhere, as in a log.
_TERMINAL: Final = 0.5
_LOG: Final = 5.0
#: Clears the line from here on.
_CLEAR: Final = "\x1b[K"


def follow(job: JobLike, timeout: float | None, file: TextIO | None = None) -> bool:
    """Block until the job has ended, and write how far it is.

    Args:
        job: the job.
        timeout: seconds to wait at most; None for no limit.
        file: where to write; standard error if None.

    Returns:
        True when it has ended, False when that was not so in time.

    Raises:
        BacklogError, WorkbenchError: Kafka or Redis cannot be reached.
    """
    out = sys.stderr if file is None else file
    pen = _Pen(out)
    until = None if timeout is None else time.monotonic() + timeout
    try:
        while True:
            shown = snapshot(job)
            if shown["ended"] or (until is not None and time.monotonic() >= until):
                break
            pen.write(line(shown))
            left = _TERMINAL if until is None else min(_TERMINAL, max(0.0, until - time.monotonic()))
            job.wait(left)
        pen.end(line(shown))
    except KeyboardInterrupt:
        pen.end(f"stopped following; job {plain(job.name)!r} goes on")
        raise
    for text in error_lines(shown):
        out.write(f"{text}\n")
    return shown["ended"]


class _Pen:
    """Writes a line over the one before it, or, where that cannot be, one every few seconds."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._next = 0.0

    def write(self, text: str) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._out.write(f"\r{text[:width]}{_CLEAR}")
            self._out.flush()
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + _LOG
            self._out.write(f"{text}\n")
            self._out.flush()

    def end(self, text: str) -> None:
        self._next = 0.0
        self.write(text)
        if self._terminal:
            self._out.write("\n")
            self._out.flush()
