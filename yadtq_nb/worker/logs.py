"""A node's log: on standard error, and with what is said again and again while a server is away said now and then."""

from __future__ import annotations

import faulthandler
import logging
import re
import signal
import time
from typing import Final

#: Seconds for which a line that was written is not written again.
_SELDOM: Final = 10.0
#: Lines that are remembered, at most.
_MOST: Final = 200

_NUMBER: Final = re.compile(r"\d+")


class _Seldom(logging.Filter):
    """Lets a line pass that differs from those before it by more than its numbers, or comes some time after them."""

    def __init__(self) -> None:
        super().__init__()
        #: Line without its numbers -> when it was written, and how many like it were not since.
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        raised = record.exc_info[1] if record.exc_info else None
        line, now = _NUMBER.sub("", f"{record.name} {record.getMessage()} {raised!r}"), time.monotonic()
        at, more = self._seen.get(line, (float("-inf"), 0))
        if now - at < _SELDOM:
            self._seen[line] = (at, more + 1)
            return False
        if len(self._seen) >= _MOST:
            self._seen.clear()
        self._seen[line] = (now, 0)
        if more:
            record.msg, record.args = f"{record.getMessage()} (and {more} times since this was last written)", None
        return True


def set_up() -> None:
    """Write warnings to standard error; on SIGUSR1, where each thread stands."""
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_Seldom())
