"""Drawing an iterator in a thread of its own, so that what was drawn is sent while the next item takes its time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

#: Seconds after which a chunk that is not full is sent as it is.
_HOLD: Final = 0.05


class Drawer:
    """Draws no more than is asked for."""

    def __init__(self, items: Iterator[Any], name: str) -> None:
        self._items = items
        #: Filled by the thread that draws, without the lock.
        self._drawn: deque[Any] = deque()
        self._taken = 0
        self._changed = threading.Condition()
        #: How many items are being drawn.
        self._asked = 0
        self._over = False
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def take(self, size: int) -> list[Any]:
        """Return up to size items: those that are there after a moment. An empty list is the end.

        Raises:
            BaseException: what the iterator raised, once everything before it was taken.
        """
        with self._changed:
            while not self._over:
                self._ask(size)
                self._changed.wait_for(lambda: not self._asked, _HOLD)
                if self._drawn:
                    break
            items = [self._drawn.popleft() for _ in range(min(size, len(self._drawn)))]
            self._taken += len(items)
            if not items and self._error is not None:
                raise self._error
            return items

    def close(self, error: BaseException | None = None) -> None:
        """Draw no more; whoever takes gets what was drawn, and then the error."""
        with self._changed:
            self._over = True
            self._error = self._error or error
            self._changed.notify_all()

    def _ask(self, size: int) -> None:
        if not self._asked:
            self._asked = max(0, size - len(self._drawn))
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._over:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._over)
                wanted = self._taken + len(self._drawn) + self._asked
            error = self._draw(self._asked)
            with self._changed:
                self._asked, self._error = 0, self._error or error
                self._over |= self._taken + len(self._drawn) < wanted
                self._changed.notify_all()

    def _draw(self, count: int) -> BaseException | None:
        try:
            # In C: no Python is run between two items but the iterator's own.
            self._drawn.extend(islice(self._items, count))
        except BaseException as exc:  # whatever the user's iterator raises
            return exc
        return None
