"""How a job or a queue is displayed, and kept up to date.

    cell:    display_job ── one bundle: widget, HTML, text ──▶ the cell's output
    thread:  snapshot three times a second ── traits, changes only ──▶ the widget in it
             the end ── update of the same display: HTML and text ──▶ what is saved
    buttons: the widget ── message ──▶ heard when no cell runs ── a thread: job.cancel ── trait ──▶ the widget

At its end the display loses its widget: opened again without a kernel, JupyterLab would show "model not found" in
the widget's place and hide the HTML behind it.

nbclient listens only to messages that belong to the cell it is executing: whatever comes between two cells, it drops.
So a cell that has waited for the job does not end before the card has, and an end that came between two cells is sent
once more in the next one.
"""

from __future__ import annotations

import atexit
import contextvars
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

from yadtq_nb.errors import YadtqError
from yadtq_nb.notebook.card import Card, live_bundle, parts
from yadtq_nb.notebook.markup import line_bundle, static_bundle
from yadtq_nb.notebook.snapshot import (
    JobLike,
    QueueLike,
    QueueSnapshot,
    Retries,
    Snapshot,
    plain,
    queue_snapshot,
    snapshot,
)

#: Seconds between two looks at a job, and at a queue.
INTERVAL: Final = 1 / 3
QUEUE_INTERVAL: Final = 1.0
#: Seconds after which a part is sent though nothing but its clocks has changed: it is also the card's sign of life.
_CLOCKS: Final = 1.0
#: The same for heartbeats of more workers than this.
_MANY: Final = 50
_MANY_CLOCKS: Final = 2.0
#: Seconds that a cell which has waited for the job waits for the card.
_CELL_PATIENCE: Final = 1.0
#: Seconds without a running job, a change or a sign of a front end after which a queue's display is made static.
QUIET: Final = 600.0
#: What changes by the mere passing of time.
_CLOCK_KEYS: Final = frozenset({"rate", "eta", "elapsed", "age", "time"})
#: Parts that wait for their clock, whatever has changed.
_UNHURRIED: Final = frozenset({"beats", "running", "errors"})


def display_job(job: JobLike, earlier: JobCard | None = None) -> JobCard | None:
    """Display a job in the current cell and return at once.

    Args:
        job: the job.
        earlier: what this function returned for the same job before; if it is still live, it gets a second view
            instead of a second thread.

    Returns:
        The live card, or None when there is nothing to keep up to date: the job has ended, or this is a terminal.
    """
    try:
        shown = snapshot(job)
    except YadtqError as exc:  # its servers are gone
        _publish(line_bundle(f"<Job {job.name!r}: {exc}>"), {}, uuid.uuid4().hex)
        return earlier
    if shown["ended"] or not _in_kernel():
        _publish(static_bundle(shown), {}, uuid.uuid4().hex)
        return None
    live = earlier if earlier is not None and earlier.is_alive() else JobCard(job, shown)
    live.show()
    return live


def display_queue(queue: QueueLike, earlier: QueueCard | None = None) -> QueueCard | None:
    """Display a queue in the current cell and return at once; see display_job."""
    try:
        shown = queue_snapshot(queue)
    except YadtqError as exc:
        _publish(line_bundle(f"<Queue {queue.name!r}: {exc}>"), {}, uuid.uuid4().hex)
        return earlier
    if not _in_kernel():
        _publish(static_bundle(shown), {}, uuid.uuid4().hex)
        return None
    live = earlier if earlier is not None and earlier.is_alive() else QueueCard(queue, shown)
    live.show()
    return live


class LiveCard:
    """Keeps a card up to date, from a thread, until there is nothing more to tell."""

    kind = "job"

    def __init__(self, name: str, shown: Snapshot | QueueSnapshot) -> None:
        self._shown = shown
        self._card = Card(kind=self.kind, **parts(shown))
        self._card.hear(self._hear)
        self._sent = dict.fromkeys(parts(shown), time.monotonic())
        self._displays: list[str] = []
        #: How often a front end has begun to show the card. More often than displayed: its page was loaded again.
        self._views = 0
        self._stop = threading.Event()
        self._ended = threading.Event()
        #: Held while the end is sent or a cell ends, so that each knows of the other.
        self._lock = threading.Lock()
        self._in_cell = True
        self._repeat = False
        self._thread = threading.Thread(target=self._run, name=f"yadtq-card-{name}", daemon=True)

    # What kinds of cards do each in their way.

    def _take(self) -> Snapshot | QueueSnapshot:
        raise NotImplementedError

    def _pause(self) -> bool:
        """Wait for the next look: return whether it is expected to find the end."""
        raise NotImplementedError

    def _waited_for(self) -> bool:
        """Tell whether the end has come, though the card may not show it yet."""
        raise NotImplementedError

    def _act(self, _asked: str) -> str:
        """Do what a button asks for, and return what there is to say."""
        return ""

    # Life.

    def show(self) -> None:
        """Display the card in the current cell; the first time, start the thread."""
        display_id = uuid.uuid4().hex
        with self._lock:
            self._displays.append(display_id)
        data, metadata = live_bundle(self._shown, self._card)
        _publish(data, metadata, display_id)
        if self._thread.ident is None:
            self._start()

    def is_alive(self) -> bool:
        """Whether the card is still kept up to date."""
        return self._thread.is_alive() and not self._stop.is_set()

    def stop(self, timeout: float = 2.0) -> None:
        """End the thread, at most a look later; the display stays as it is. It may be called twice."""
        self._stop.set()
        self._watch_cells(False)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _start(self) -> None:
        self._watch_cells(True)
        self._card.comm.on_close(lambda _message: self._stop.set())
        # A daemon thread that sends while the interpreter is torn down may bring it down with a crash.
        atexit.register(self.stop)
        _start_detached(self._thread)

    def _run(self) -> None:
        told = False
        while not self._stop.is_set() and self._card.comm is not None:
            self._look()
            if self._shown["ended"]:
                self._end()
                break
            # A job that says it has ended, but does not show it yet, must not make a busy loop.
            told = self._stop.wait(INTERVAL) if told or self._shown["note"] else self._pause()
        atexit.unregister(self.stop)

    def _look(self) -> None:
        try:
            shown = self._take()
        except Exception as error:  # printed from a thread it would stand under some other cell
            shown = self._shown.copy()
            shown["note"] = f"cannot be read now: {plain(error)}"
        self._send(shown)
        self._shown = shown

    def _send(self, shown: Snapshot | QueueSnapshot) -> None:
        """Send the parts that have changed, and those whose clocks are due."""
        now, before = time.monotonic(), parts(self._shown)
        with self._card.hold_sync():
            for name, part in parts(shown).items():
                many = name == "beats" and len(part["rows"]) > _MANY
                due = shown["ended"] or now - self._sent[name] >= (_MANY_CLOCKS if many else _CLOCKS)
                if due or _must_hurry(name, before[name], part):
                    self._card.set_trait(name, part)
                    self._sent[name] = now
                    if name == "roster":
                        # Rows of the one belong to rows of the other.
                        self._card.set_trait("beats", parts(shown)["beats"])

    # The end.

    def _end(self) -> None:
        with self._lock:
            self._show_end()
            self._repeat = not self._in_cell
        self._ended.set()

    def _show_end(self) -> None:
        for display_id in self._displays:
            _publish(static_bundle(self._shown), {}, display_id, update=True)

    def _watch_cells(self, on: bool) -> None:
        events = getattr(_shell(), "events", None)
        if events is None:
            return
        for name, callback in (("pre_run_cell", self._cell_begins), ("post_run_cell", self._cell_ends)):
            if on:
                events.register(name, callback)
            elif callback in events.callbacks[name]:
                events.unregister(name, callback)

    def _cell_begins(self, *_: object) -> None:
        with self._lock:
            self._in_cell = True
            if not self._repeat:
                return
            self._repeat = False
            self._card.send_state(list(parts(self._shown)))
            self._show_end()
        self._retire()

    def _cell_ends(self, *_: object) -> None:
        if self.is_alive() and self._waited_for():
            self._ended.wait(_CELL_PATIENCE)
        with self._lock:
            self._in_cell = False
            over = not self._thread.is_alive() or self._ended.is_set()
        if over and not self._repeat:
            self._retire()

    def _retire(self) -> None:
        """Let go of everything: the display holds no widget any more."""
        self._watch_cells(False)
        if self._views > len(self._displays):
            # A page that was loaded again does not know which output our update was for, and still shows the widget.
            return
        # A widget brings a layout, which is a model of its own, and ipywidgets keeps both until they are closed.
        self._card.layout.close()
        self._card.close()

    # What the front end says. It is heard in the main thread, when no cell runs there.

    def _hear(self, said: dict[str, Any]) -> None:
        asked, number = said.get("do"), said.get("number")
        if asked == "seen":
            self._views += bool(said.get("first"))
            self._seen()
        elif isinstance(asked, str) and isinstance(number, int):
            acting = threading.Thread(target=self._answer, args=(asked, number), name="yadtq-card-act", daemon=True)
            _start_detached(acting)

    def _seen(self) -> None:
        """A front end shows the card."""

    def _answer(self, asked: str, number: int) -> None:
        try:
            text = self._act(asked)
        except Exception as error:  # printed from a thread it would stand under some other cell
            text = f"{asked} failed: {plain(error)}"
        self._card.set_trait("answer", {"number": number, "text": text})


class JobCard(LiveCard):
    """The card of a job that runs."""

    def __init__(self, job: JobLike, shown: Snapshot) -> None:
        self._job = job
        super().__init__(shown["id"], shown)

    def _take(self) -> Snapshot:
        return snapshot(self._job)

    def _pause(self) -> bool:
        try:
            return self._job.wait(INTERVAL)
        except YadtqError:
            # The next look meets the same error, and the card says it.
            return True

    def _waited_for(self) -> bool:
        try:
            return self._job.wait(0)
        except YadtqError:
            return False

    def _act(self, asked: str) -> str:
        if asked == "cancel":
            return f"{_tasks(self._job.cancel())} cancelled"
        if asked == "retry" and isinstance(self._job, Retries):
            return f"{_tasks(self._job.retry())} will run again"
        return ""


class QueueCard(LiveCard):
    """The card of a queue, until nothing has happened and nobody has looked for a while."""

    kind = "queue"

    def __init__(self, queue: QueueLike, shown: QueueSnapshot) -> None:
        self._queue = queue
        self._moved_at = time.monotonic()
        self._ids: set[str] = set()
        super().__init__(f"queue-{shown['name']}", shown)

    def _take(self) -> QueueSnapshot:
        shown = queue_snapshot(self._queue)
        ids = {job["id"] for job in shown["jobs"]}
        if ids != self._ids or not all(job["ended"] for job in shown["jobs"]):
            self._moved_at, self._ids = time.monotonic(), ids
        if time.monotonic() - self._moved_at > QUIET:
            shown["ended"] = True
        return shown

    def _pause(self) -> bool:
        self._stop.wait(QUEUE_INTERVAL)
        return False

    def _waited_for(self) -> bool:
        return False

    def _seen(self) -> None:
        self._moved_at = time.monotonic()


def without_clocks(value: Any) -> Any:
    """Return a part of a snapshot without what changes by the mere passing of time."""
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in _CLOCK_KEYS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def _must_hurry(name: str, before: Any, part: Any) -> bool:
    return name not in _UNHURRIED and without_clocks(part) != without_clocks(before)


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count:,} tasks"


def _start_detached(thread: threading.Thread) -> None:
    # With no context of its own, ipykernel takes a thread's messages for those of the cell that runs now. A thread
    # that inherits the context of this cell, as in newer Pythons, would go on sending for a cell long over.
    contextvars.Context().run(thread.start)


def _publish(data: Mapping[str, Any], metadata: Mapping[str, Any], display_id: str, *, update: bool = False) -> None:
    from IPython.display import display

    display(dict(data), metadata=dict(metadata), raw=True, display_id=display_id, update=update)  # type: ignore[no-untyped-call]  # IPython does not type it


def _in_kernel() -> bool:
    return getattr(_shell(), "kernel", None) is not None


def _shell() -> Any:
    from IPython.core.getipython import get_ipython

    return get_ipython()
