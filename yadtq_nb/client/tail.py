"""Following what a job's tasks write, line by line, as tail -f does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

from yadtq_nb.client.future import waiting
from yadtq_nb.errors import CodecError, WorkbenchError
from yadtq_nb.model import Written
from yadtq_nb.workbench.jobs import JobStore, place_written

#: Seconds between the signs that this process still follows.
_SAY: Final = 3.0
#: Seconds without a word after which nothing more is expected of a job that has ended.
_SILENCE: Final = 0.8
#: Seconds between tries while Redis is away.
_PAUSE: Final = 0.2
#: Stands where something was missed.
_MISSED = "[... missed: it was written faster than it could be read here; job[i].log has the end of it ...]"


def tail(store: JobStore, job: str, name: str, ended: Callable[[], bool], timeout: float | None) -> None:
    """Print what a job's tasks write until it has ended; see Job.tail.

    Args:
        store: of its own, since reading blocks it.
        ended: tells whether the job has.
    """
    if ended():
        sys.stdout.write(f"job {name!r} has ended: what its tasks have written is in job[i].log\n")
        return
    until = None if timeout is None else time.monotonic() + timeout
    with waiting(name):
        for lines in _follow(store, job, ended, until):
            # All at once: each call is a message to the notebook.
            sys.stdout.write("".join(f"{line}\n" for line in lines))
            sys.stdout.flush()


def _follow(store: JobStore, job: str, ended: Callable[[], bool], until: float | None) -> Iterator[list[str]]:
    position, said_at, heard_at = "", float("-inf"), time.monotonic()
    while until is None or time.monotonic() < until:
        over = ended()
        try:
            now = time.monotonic()
            if now - said_at > _SAY:
                newest = store.follow(job)
                if not position:
                    store.ring("follow")
                    position = newest
                elif place_written(newest) < place_written(position):
                    position = "0-0"  # Redis was emptied: all that is there is new
                said_at = now
            position, written, missed = store.written(job, position, 0.25)
        except CodecError:
            raise
        except WorkbenchError:
            said_at = float("-inf")  # it may have forgotten that we follow
            time.sleep(_PAUSE)
            continue
        if written:
            heard_at = time.monotonic()
            yield ([_MISSED] if missed else []) + [line for one in written for line in _lines(one)]
        elif over and time.monotonic() - heard_at > _SILENCE:
            return


def _lines(written: Written) -> Iterator[str]:
    whose = f"{written.first}" if written.first == written.last else f"{written.first}-{written.last}"
    for line in written.text.decode("utf-8", "replace").rstrip("\r\n").split("\n"):
        # Of a progress bar, what it has come to.
        yield f"[{whose}] {line.rstrip(chr(13)).rpartition(chr(13))[2]}"
