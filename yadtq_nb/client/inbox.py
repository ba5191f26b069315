"""The inbox: one thread of a queue's client that hears the news and fills the boards of the jobs it is asked to watch.

The stream wakes, results decide: after a gap, a reconnect, or some seconds of silence, boards are compared with the
outcomes that really lie in the workbench.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Final

from yadtq_nb.backlog.publish import ROLLBACK
from yadtq_nb.client.board import Board
from yadtq_nb.config import Config
from yadtq_nb.errors import (
    CodecError,
    JobCancelledError,
    JobError,
    JobIncompleteError,
    JobNotFoundError,
    JobTimeoutError,
    QueueClosedError,
    WorkbenchError,
    WorkbenchFullError,
)
from yadtq_nb.model import JobState
from yadtq_nb.workbench.connection import patiently
from yadtq_nb.workbench.jobs import JobRecord, JobStore, News, Stored, deleted

log = logging.getLogger(__name__)

#: Seconds for which a call of the user's waits for Redis.
PATIENCE: Final = 5.0
#: Seconds of silence after which boards are compared with the workbench.
_SILENCE: Final = 5.0
#: Seconds between the signs of life of a client that is sending.
_SENDING: Final = 3.0
#: Seconds between tries while Redis is away.
_PAUSE: Final = 0.2
#: Seconds for which a job that the workbench has forgotten is still waited for: nodes may be filling it again.
_PATIENCE: Final = 30.0


class Inbox:
    """Watches jobs on behalf of one process."""

    def __init__(self, config: Config, queue: str, *, held: Callable[[], Iterable[str]]) -> None:
        """Note where the news is now: whatever is sent after this is heard.

        Args:
            held: tells which jobs' chunks this process would send again: see Publisher.holds.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        self._news = JobStore(config, queue)
        self._store = JobStore(config, queue)
        self._held = held
        self._boards: dict[str, Board] = {}
        #: Boards of jobs that have ended, as long as someone has them: such a job may be opened again, by anyone.
        self._ended: weakref.WeakValueDictionary[str, Board] = weakref.WeakValueDictionary()
        #: Job to how many in this process send it, or are about to.
        self._sending: collections.Counter[str] = collections.Counter()
        #: Job to when the workbench was last seen to know it.
        self._last_known: dict[str, float] = {}
        #: What the workbench was told of jobs, and when; see told.
        self._told: collections.deque[tuple[float, str, Callable[[JobStore], object]]] = collections.deque()
        #: What it is to be told again of jobs.
        self._untold: list[tuple[str, Callable[[JobStore], object]]] = []
        #: When the workbench was last heard.
        self._contact = time.monotonic()
        self._lock = threading.Lock()
        self._closing = False
        self._position = patiently(self._news.news_position, PATIENCE)
        self._life = patiently(self._news.run_id, PATIENCE)
        self._thread = threading.Thread(target=self._run, name=f"yadtq-inbox-{queue}", daemon=True)
        self._thread.start()

    def watch(self, board: Board, *, known: bool) -> Board:
        """Fill a board until its job ends, and return it, or the one that there is for this job already.

        Args:
            known: the job may have outcomes already.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        with self._lock:
            watched = self._boards.get(board.job) or self._ended.get(board.job) or board
            self._boards[board.job] = watched
        ended = watched.ended
        if ended and watched.failure is not None:
            watched.reopen()  # why it ended may hold no more
        if known and (watched is board or ended):
            patiently(lambda: self._compare(watched), PATIENCE)
        return watched

    def want(self, board: Board) -> None:
        """Fetch a board's outcomes from now on, those that were only told included.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        board.wanted = True
        patiently(lambda: self.fetch(board), PATIENCE)

    def sending(self, job: str) -> None:
        """Tell the queue now and then that this process still sends a job."""
        with self._lock:
            self._sending[job] += 1
        try:
            patiently(lambda: self._store.say_sending(job), PATIENCE)
        except WorkbenchError as exc:
            # Its name is taken by now, so sending goes on; the thread says it again.
            log.warning("the queue was not told that job %s is being sent: %s", job, exc)

    def sent(self, job: str) -> None:
        """Stop telling so."""
        with self._lock:
            self._sending[job] -= 1
            if self._sending[job] <= 0:
                del self._sending[job]

    def told(self, job: str, again: Callable[[JobStore], object]) -> None:
        """Note what the workbench was told of a job: one that comes back without its last seconds is told it again.

        Feeding brings back what they held of chunks; this is told by nobody else.
        """
        with self._lock:
            self._told.append((time.monotonic(), job, again))
            while self._told[0][0] < self._contact - ROLLBACK:
                self._told.popleft()

    def take_back(self, job: str) -> None:
        """Tell no more of a job, since its end is over, or it was never begun."""
        with self._lock:
            self._told = collections.deque(entry for entry in self._told if entry[1] != job)
            self._untold = [entry for entry in self._untold if entry[0] != job]

    def _tell_again(self) -> None:
        with self._lock:
            told = [(job, again) for at, job, again in self._told if at >= self._contact - ROLLBACK]
            self._untold = [entry for entry in self._untold if entry not in told] + told
        self._tell_rest()

    def _tell_rest(self) -> None:
        """Tell what is still to be told again; what does not get in, since Redis is full, some other time."""
        with self._lock:
            untold = self._untold
        # Between a job's manifest and its seal nobody is to take it for one whose client has died.
        self._store.say_sending(*{job for job, _ in untold})
        for entry in untold:
            try:
                entry[1](self._store)
            except WorkbenchFullError as exc:
                log.warning("job %s is not told again yet: %s", entry[0], exc)
            else:
                with self._lock:
                    self._untold = [other for other in self._untold if other is not entry]

    def close(self, why: str) -> None:
        """Stop listening: whoever waits for a job is told why."""
        self._closing = True
        self._thread.join()
        with self._lock:
            boards = list(self._boards.values())
        for board in boards:
            if board.failure is not None:  # it does not go on: it was not sent whole
                continue
            self._end(board, QueueClosedError(f"{why} while job {board.name!r} ran", job=board.name))
        self._news.close()
        self._store.close()

    def _run(self) -> None:
        heard_at = said_at = time.monotonic()
        # Compared before the next news is waited for: a connection that is cut again and again never brings any.
        shaken = False
        while not self._closing:
            try:
                if shaken:
                    self._catch_up()
                    shaken, heard_at = False, time.monotonic()
                if time.monotonic() - said_at > _SENDING:
                    self._say_sending()
                    self._tell_rest()
                    said_at = time.monotonic()
                self._position, news, missed = self._news.wait_for_news(self._position, 0.5)
                self._contact = now = time.monotonic()
                if missed or now - heard_at > _SILENCE:
                    # Before hearing: news of a job's end ends its board, and what was missed must be on it by then.
                    heard_at = now
                    self._catch_up()
                if news:
                    self._hear(news)
                    heard_at = now
            except WorkbenchError as exc:
                log.warning("news waits: %s", exc)
                shaken = True
                time.sleep(_PAUSE)
            except Exception:  # a defect in one job's news must not silence those of all others
                log.exception("news could not be used")
                shaken = True
                time.sleep(_PAUSE)

    def _say_sending(self) -> None:
        with self._lock:
            sending = set(self._sending)
        self._store.say_sending(*sending.union(self._held()))

    def _hear(self, news: list[News]) -> None:
        told: dict[str, Board] = {}
        ended: list[tuple[Board, str]] = []
        for entry in news:
            board = self._boards.get(entry.job)
            if board is None and entry.reopened:
                board = self._ended.get(entry.job)
            if board is None:
                continue
            if entry.reopened > board.life:
                self.reopen(board)
            if entry.dropped:
                board.drop(entry.dropped)
            if entry.field and entry.frame is not None and board.wanted:
                self._put(board, Stored(entry.field, entry.frame, b""))
            elif entry.field:
                board.tell(entry.field, entry.count)
                told[entry.job] = board
            if entry.ended:
                ended.append((board, entry.cancel))
        for board in told.values():
            if board.wanted:
                self.fetch(board)
        for board, reason in ended:
            if reason == "lost":
                self._compare(board)
                continue
            self._end(board, stopped(board.name, reason) if reason else None)

    def fetch(self, board: Board) -> None:
        """Fetch the outcomes that a board was told of.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        asked = list(board.told)
        for stored in self._store.outcomes(board.job, asked):
            self._put(board, stored)
        board.give_up(asked)

    def _put(self, board: Board, stored: Stored) -> None:
        try:
            board.put(stored)
        except CodecError as exc:
            failure = JobError(f"outcomes of job {board.name!r} cannot be read: {exc}", job=board.name)
            failure.__cause__ = exc
            self._end(board, failure)

    def _end(self, board: Board, failure: JobError | None = None) -> None:
        self.forget(board)
        board.end(failure)

    def reopen(self, board: Board) -> None:
        """Fill a board again whose job was opened again.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        board.reopen()
        with self._lock:
            self._boards[board.job] = board
        patiently(lambda: self._compare(board), PATIENCE)

    def forget(self, board: Board) -> None:
        """Watch a board no more."""
        with self._lock:
            self._boards.pop(board.job, None)
            self._last_known.pop(board.job, None)
            self._ended[board.job] = board

    # When the news cannot be trusted to be whole.

    def _catch_up(self) -> None:
        life = self._news.run_id()
        renewed = life != self._life
        if renewed:
            self._tell_again()
            self._life = life
        newest = self._news.news_position()
        if _place(newest) < _place(self._position):
            # Redis came back older, or empty.
            self._position, renewed = newest, True
        with self._lock:
            boards = list(self._boards.values())
        if boards:
            self._store.end_late()  # no node may be there that does
        for board in boards:
            if renewed:
                board.renew()
            self._compare(board)

    def _compare(self, board: Board) -> None:
        try:
            record = self._store.record(board.job)
        except JobNotFoundError:
            self._end(board, deleted(board.name))
            return
        if record is not None and record.life > board.life:
            board.reopen()
            board.life, board.total = record.life, record.total
        for field in board.missing(self._store.fields(board.job)):
            board.tell(field, 0)
        if board.wanted:
            self.fetch(board)
        if record is None:
            self._doubt(board)
            return
        self._last_known[board.job] = time.monotonic()
        if record.cancelled and not record.cancel:
            board.drop(self._store.dropped(board.job))
        board.count(record.done)
        if record.cancel == "lost":
            whole = board.wanted and board.holds(record.total)  # this process has heard them in time
            self._end(board, None if whole else lost(record))
        elif record.ended is not None:
            self._end(board, stopped(record.name, record.cancel) if record.cancel else None)
        elif board.ended:
            self.forget(board)
        elif board.failure is None and self._is_abandoned(record) and record.done >= record.fed:
            self._end(board, incomplete(record))

    def _is_abandoned(self, record: JobRecord) -> bool:
        # After a stop of this process or of Redis nobody has said for long that the job is being sent, and yet we do.
        with self._lock:
            return record.id not in self._sending and is_incomplete(record)

    def _doubt(self, board: Board) -> None:
        """Give up a job that the workbench knew once. One that it never knew still waits in the backlog."""
        known = self._last_known.get(board.job)
        if known is not None and time.monotonic() - known > _PATIENCE:
            self._end(board, JobNotFoundError(f"the queue does not know job {board.name!r} any more", job=board.name))


def job_state(record: JobRecord) -> JobState:
    """Return the state of a whole job."""
    if record.cancel:
        return JobState.INCOMPLETE if record.cancel == "lost" else JobState.CANCELLED
    if record.ended is not None:
        return JobState.FAILED if record.failed else JobState.SUCCEEDED
    return JobState.INCOMPLETE if is_incomplete(record) else JobState.RUNNING


def stopped(job: str, reason: str) -> JobError:
    """Say why a job was ended before its time."""
    if reason == "deleted":
        return deleted(job)
    kept = "the outcomes that came before are kept (errors='skip', to_frame())"
    if reason == "deadline":
        return JobTimeoutError(f"job {job!r} was ended by its deadline; {kept}", job=job)
    return JobCancelledError(f"job {job!r} was cancelled; {kept}", job=job)


def lost(record: JobRecord) -> JobIncompleteError:
    """Say how many of a job's tasks went with a server's data."""
    return JobIncompleteError(
        f"job {record.name!r} is incomplete: {record.lost} of its {record.total} tasks have no outcome, since Redis or "
        "Kafka has lost data, or their client was gone before it had sent them; job.retry() runs again those of them "
        "that are kept, errors='skip' and to_frame() give the others",
        job=record.name,
    )


def is_incomplete(record: JobRecord) -> bool:
    """Tell whether a job's client is gone before it had sent everything."""
    return not record.sealed and not record.sending and record.now - record.created > _SENDING


def incomplete(record: JobRecord) -> JobIncompleteError:
    """Say from where a job's tasks are missing."""
    return JobIncompleteError(
        f"job {record.name!r} is incomplete: its client was gone before it had sent more than {record.fed} tasks; "
        "their outcomes are kept (errors='skip', to_frame()); map it anew with another name or if_exists='replace'",
        job=record.name,
    )


def _place(position: str) -> tuple[int, int]:
    milliseconds, _, sequence = position.partition("-")
    return int(milliseconds), int(sequence or 0)
