"""Sending a job: its items become chunks, and the chunks records in Kafka, in a thread beside the notebook.

manifest ─▶ a few tasks alone ─▶ (measure) ─▶ chunks … ─▶ seal
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from yadtq_nb import codec, journal, needs
from yadtq_nb.backlog.publish import MAX_RECORD, Acknowledged, Publisher, Receipts
from yadtq_nb.client import planner
from yadtq_nb.client.board import Board
from yadtq_nb.client.drawer import Drawer
from yadtq_nb.client.inbox import PATIENCE, Inbox
from yadtq_nb.config import Config
from yadtq_nb.errors import (
    BacklogError,
    JobCancelledError,
    JobError,
    JobIncompleteError,
    JobNotFoundError,
    JobTimeoutError,
    TooLargeError,
    WorkbenchError,
    YadtqError,
)
from yadtq_nb.model import (
    LIFE,
    BrokenItem,
    CallStyle,
    Cancel,
    ChunkHead,
    Environment,
    Lane,
    Manifest,
    Need,
    Policy,
    Reopen,
    Seal,
)
from yadtq_nb.workbench.connection import patiently
from yadtq_nb.workbench.jobs import JobStore

log = logging.getLogger(__name__)

#: Functions up to this size travel in every chunk, larger ones once; in bytes.
_INLINE_FUNCTION: Final = 16 * 1024
#: Bytes that a need has in a chunk's head, at most.
_NEED: Final = 40
#: Seconds after which feeders are rung for again: less than they stay awake.
_RING_AGAIN: Final = 0.4
#: Seconds for which a function or source tree that was put in place is taken to be there.
_KEPT: Final = 60.0
#: Seconds for which sending waits for Redis.
_PATIENCE: Final = 60.0
#: Seconds for which the thread of a job that is given up is waited for.
_ABANDON: Final = 2.0
#: Seconds to wait for the broker to take everything.
FLUSH: Final = 120.0


class Packet(msgspec.Struct, frozen=True):
    """What all chunks of a job have in common."""

    job: str
    name: str
    #: Whether someone chose the name.
    named: bool
    #: The pickle of the function and its fixed keyword arguments.
    function: bytes
    #: Its content hash.
    function_id: str
    function_name: str
    style: CallStyle
    concurrent: bool
    environment: Environment
    created: float
    #: Names of the function's parameters.
    parameters: tuple[str, ...] = ()
    policy: Policy = Policy()
    deadline: float = 0.0
    lane: Lane = "normal"
    depth: int = 0
    #: What the function and its fixed keyword arguments need of other jobs.
    needs: tuple[Need, ...] = ()
    #: What it is compared by, packed; empty when nobody chose its name.
    sameness: bytes = b""

    def manifest(self, total: int | None, client: str) -> Manifest:
        """Return what the queue is told before the first chunk."""
        return Manifest(
            id=self.job,
            name=self.name,
            function_name=self.function_name,
            created=self.created,
            total=-1 if total is None else total,
            style=self.style,
            client=client,
            parameters=self.parameters,
            deadline=self.deadline,
            lane=self.lane,
            sameness=self.sameness,
        )

    def head(
        self,
        number: int,
        first: int,
        count: int,
        *,
        total: int = -1,
        by_reference: bool = False,
        needs: tuple[Need, ...] = (),
    ) -> ChunkHead:
        """Return the head of one chunk; needs are those of its items."""
        return ChunkHead(
            job=self.job,
            number=number,
            first=first,
            count=count,
            function=self.function_id,
            function_name=self.function_name,
            function_size=0 if self.by_blob else len(self.function),
            style=self.style,
            concurrent=self.concurrent,
            environment=self.environment,
            job_name=self.name,
            total=total,
            created=self.created,
            by_reference=by_reference,
            policy=self.policy,
            depth=self.depth,
            needs=self.needs + needs,
        )

    @property
    def by_blob(self) -> bool:
        """Whether the function travels beside the chunks."""
        return len(self.function) > _INLINE_FUNCTION


class Mailer:
    """Makes records of chunks and hands them to the publisher. Shared by all jobs of a queue's client."""

    def __init__(
        self,
        config: Config,
        store: JobStore,
        publisher: Callable[[Lane], Publisher],
        inbox: Inbox,
        *,
        is_ours: Callable[[object], bool],
    ) -> None:
        """Take the parts that are passed in; is_ours tells whether a job's client belongs to this queue."""
        self._config = config
        self._store = store
        self._publisher = publisher
        self._inbox = inbox
        self._is_ours = is_ours
        #: Blobs, and when they were last put on the workbench, and on the jobs topic.
        self._kept: dict[str, float] = {}
        self._journaled: dict[str, float] = {}
        self._rung_at = 0.0

    def keep_blob(self, kind: bytes, name: str, data: bytes) -> None:
        """Put a function or source tree where nodes find it: the workbench, and the jobs topic for when that is lost.

        Raises:
            WorkbenchError, BacklogError: a server cannot be reached.
        """
        now = time.monotonic()
        if now - self._kept.get(name, float("-inf")) < _KEPT:
            return
        sealed = codec.seal(self._config.key, kind, data)
        # Once more before the topic lets go of it by its age.
        late = now - self._journaled.get(name, float("-inf")) > self._config.keep
        if patiently(lambda: self._store.put_blob(name, sealed), PATIENCE) or late:
            key, value = journal.encode(self._config.key, journal.Blob(name, sealed))
            if len(value) <= MAX_RECORD:
                self._publisher("normal").send_job(key, value)
            self._journaled[name] = now
        self._kept[name] = now

    def send(
        self,
        packet: Packet,
        number: int,
        first: int,
        items: Sequence[Any],
        acknowledged: Acknowledged | None,
        *,
        total: int = -1,
    ) -> tuple[int, int]:
        """Send items as one chunk, or as several when they are too large together.

        Returns:
            The number of chunks that were sent, and the bytes of their arguments.

        Raises:
            TooLargeError: the only item of its job is larger than Redis takes; among others just its task fails.
            JobError: the only item of its job holds a future of another queue; likewise.
            WorkbenchError, BacklogError: a server cannot be reached, or is full.
        """
        arguments, needed = self._pickle_items(items, first, strict=total >= 0)
        size = sum(map(len, arguments))
        if (size > MAX_RECORD // 2 or len(needed) > needs.MOST) and len(items) > 1:
            half = len(items) // 2
            sent, _ = self.send(packet, number, first, items[:half], acknowledged)
            more, _ = self.send(packet, number + sent, first + half, items[half:], acknowledged)
            return sent + more, size
        if len(needed) > needs.MOST:
            broken = BrokenItem(first, needs.too_many(len(needed)))
            return self.send(packet, number, first, [broken], acknowledged, total=total)
        by_reference = size > MAX_RECORD - 2 * _INLINE_FUNCTION - _NEED * (len(needed) + len(packet.needs))
        head = packet.head(number, first, len(items), total=total, by_reference=by_reference, needs=needed)
        if by_reference:
            sealed = codec.seal(self._config.key, codec.ARGUMENTS, *arguments)
            try:
                patiently(lambda: self._store.put_arguments(packet.job, number, sealed), _PATIENCE)
            except TooLargeError as exc:
                if total >= 0:  # the only task of its job, sent by the caller's own thread
                    raise
                broken = BrokenItem(first, str(exc), error=TooLargeError.__name__)
                return self.send(packet, number, first, [broken], acknowledged)
            arguments = []
        function = b"" if packet.by_blob else packet.function
        record = codec.encode_chunk(self._config.key, head, function, arguments)
        self._publisher(packet.lane).send_chunk(record, acknowledged, job=packet.job)
        return 1, size

    def _pickle_items(
        self, items: Sequence[Any], first: int, *, strict: bool
    ) -> tuple[list[codec.Buffer], tuple[Need, ...]]:
        """Pickle items together; one that cannot be pickled is replaced by what its task will fail with.

        Returns:
            The pickle, and the tasks of other jobs whose values the items need.

        Raises:
            JobError: when strict, for a future of another queue.
        """
        try:
            return self._pickle(list(items))
        except Exception as exc:  # whatever the user's objects do when they are pickled
            if strict and isinstance(exc, JobError):
                raise
            with needs.collecting(self._is_ours):
                checked = [_checked(item, first + n) for n, item in enumerate(items)]
            return self._pickle(checked)

    def _pickle(self, items: list[Any]) -> tuple[list[codec.Buffer], tuple[Need, ...]]:
        with needs.collecting(self._is_ours) as met:
            return codec.dumps(items), met.needs()

    def send_entry(self, entry: Manifest | Reopen | Seal | Cancel, acknowledged: Acknowledged | None = None) -> None:
        """Write an entry to the jobs topic."""
        self._publisher("normal").send_job(*journal.encode(self._config.key, entry), acknowledged)

    def send_safely(self, entry: Reopen | Seal) -> None:
        """Write an entry to the jobs topic, and wait until Kafka has it.

        Raises:
            BacklogError: it has not taken it.
        """
        receipts = Receipts()
        self.send_entry(entry, receipts)
        self.settle("normal", receipts)

    def seal(self, seal: Seal, patience: float) -> None:
        """Say that a job was sent whole, waiting so many seconds for Redis.

        Raises:
            BacklogError, WorkbenchError: Kafka or Redis has not taken it.
        """
        # Before the workbench knows: one that is emptied right then must find it in Kafka.
        self.send_safely(seal)
        patiently(lambda: self._store.seal(seal), patience)
        self._inbox.told(seal.id, lambda store: store.seal(seal))

    def ring(self) -> None:
        """Wake feeders that do not wait at Kafka; once awake they stay so for a while."""
        now = time.monotonic()
        if self._config.reading == "wake" and now - self._rung_at > _RING_AGAIN:
            self._rung_at = now
            try:
                self._store.ring()
            except WorkbenchError as exc:
                # What was sent is sent: feeders look by themselves now and then.
                log.warning("nobody was rung for: %s", exc)

    def flush(self, lane: Lane = "normal", *, timeout: float = FLUSH) -> bool:
        """Wait until Kafka has taken everything of a lane; what is told of jobs goes with the normal one."""
        return self._publisher(lane).flush(timeout)

    def settle(self, lane: Lane, receipts: Receipts) -> None:
        """Wait until Kafka has taken everything of a lane, and says where.

        Raises:
            BacklogError: it has not in time, or has refused a record.
        """
        if not self.flush(lane):
            raise BacklogError("Kafka has not taken all records in time; is the broker up?")
        if receipts.refused is not None:
            raise receipts.refused


class Sender:
    """Sends one job, in a thread of its own."""

    def __init__(
        self,
        packet: Packet,
        items: Sequence[Any] | Iterator[Any],
        *,
        total: int | None,
        chunksize: int | None,
        mailer: Mailer,
        inbox: Inbox,
        store: JobStore,
        board: Board,
        slots: Callable[[], int],
        first: int = 0,
        life: int = 0,
        ends: Mapping[str, int] | None = None,
    ) -> None:
        """Take the parts that are passed in.

        Args:
            total: how many tasks the job has when all are sent, or None.
            first: index of the first of these items.
            life: that of the job which they are sent in.
            ends: where the last chunks of earlier lives lie.
        """
        self._packet = packet
        self._items = iter(items)
        self._known_total = total
        self._first = first
        self._earlier = dict(ends or {})
        self._chunksize = chunksize
        self._mailer = mailer
        self._inbox = inbox
        self._store = store
        self._board = board
        self._slots = slots
        self._life = life
        self._number = life * LIFE
        #: Index of the next item.
        self._sent = first
        self._bytes = 0
        self._receipts = Receipts()
        self._drawer: Drawer | None = None
        self._abandoned: JobError | None = None
        self._over = False
        self._hurried = False
        #: True once the queue has everything, or never will.
        self.finished = threading.Event()
        #: True when the input has an end that is known: then interpreter exit waits for it.
        self.bounded = total is not None
        self._thread = threading.Thread(target=self._run, name=f"yadtq-sender-{packet.name}", daemon=True)

    def start(self) -> None:
        """Start sending."""
        self._inbox.sending(self._packet.job)
        self._thread.start()

    @property
    def job(self) -> str:
        """Id of the job."""
        return self._packet.job

    def stop(self, *, over: bool = False) -> None:
        """Send no more, and draw no more; over says that the queue has ended the job, and tells so by itself."""
        self._over |= over
        self._abandoned = JobError("the queue was closed while its items were being drawn", job=self._packet.job)
        if self._drawer is not None:
            self._drawer.close(self._abandoned)
        self._board.wake()

    def hurry(self) -> None:
        """Send the rest without waiting to see how long the tasks take: this process is about to end."""
        self._hurried = True
        self._board.wake()

    def abandon(self) -> None:
        """Send no more: the queue is closed, or this process ends and its iterator with it."""
        self.stop()
        if not self.finished.wait(_ABANDON):
            self._inbox.sent(self._packet.job)
            with contextlib.suppress(WorkbenchError):  # then the queue will see by itself
                self._store.stop_sending(self._packet.job)

    def _run(self) -> None:
        try:
            self._send_all()
            self._seal()
        except BaseException as exc:  # a server is away, or the user's iterator raised, whatever it may be
            self._give_up(exc)
        finally:
            self._inbox.sent(self._packet.job)
            self.finished.set()

    def _give_up(self, exc: BaseException) -> None:
        if self._over or isinstance(self._board.failure, JobCancelledError | JobTimeoutError | JobNotFoundError):
            return  # ended for everyone, as the queue knows
        log.warning("job %s was not sent whole: %s", self._packet.name, exc)
        failure = JobIncompleteError(
            f"job {self._packet.name!r} is incomplete: after item {self._sent} {type(exc).__name__}: {exc}; "
            "the outcomes of those that were sent are kept (errors='skip', to_frame())",
            job=self._packet.name,
        )
        failure.__cause__ = exc
        lacking = isinstance(exc, YadtqError) or not self._mailer.flush(self._packet.lane)
        if lacking or self._receipts.refused is not None:
            self._board.end(failure)
        else:
            self._board.cut(failure, self._sent)
        try:
            self._store.stop_sending(self._packet.job)
        except WorkbenchError:
            log.warning("the queue will see by itself that job %s is incomplete", self._packet.name)

    def _send_all(self) -> None:
        if self._chunksize is not None:
            measured = planner.Measured(None, 0.0, self._slots())
            self._send_rest(self._chunksize, 4 * self._chunksize * max(1, measured.slots))
            return
        slots = self._slots()
        probes = planner.probes(slots if self._known_total is None else self._known_total - self._first, slots)
        for item in itertools.islice(self._items, probes):
            self._send([item])
        if self._sent == self._known_total or self._sent - self._first < probes:
            return
        measured = self._measure(slots)
        left = None if self._known_total is None else self._known_total - self._sent
        size = planner.chunk_size(left, measured)
        self._send_rest(size, planner.window(measured))

    def _send_rest(self, size: int, window: int) -> None:
        if self._known_total is not None:
            while items := list(itertools.islice(self._items, size)):
                self._send(items)
            return
        with contextlib.closing(Drawer(self._items, f"yadtq-drawer-{self._packet.name}")) as drawer:
            self._drawer = drawer
            if self._abandoned is not None:
                raise self._abandoned
            while items := drawer.take(size):
                self._send(items)
                self._wait_for_room(window)

    def _send(self, items: Sequence[Any]) -> None:
        if (stop := self._abandoned or self._receipts.refused) is not None:
            raise stop
        if self._board.ended and self._board.failure is not None:
            raise self._board.failure
        chunks, size = self._mailer.send(self._packet, self._number, self._sent, items, self._receipts)
        self._number += chunks
        self._sent += len(items)
        self._bytes += size
        self._mailer.ring()

    def _measure(self, slots: int) -> planner.Measured:
        """Wait a moment for the first outcomes; what they took is what the others will take."""
        self._mailer.ring()
        board = self._board
        sent = self._sent
        began = time.monotonic()
        board.wait(lambda: board.done >= sent or board.ended, began + planner.PATIENCE)
        queued = not (board.done or board.ended or self._has_begun())
        while queued and not self._hurried and time.monotonic() < began + planner.QUEUED:
            self._mailer.ring()
            board.wait(lambda: board.done > 0 or board.ended or self._hurried, time.monotonic() + planner.PATIENCE)
            queued = not (board.done or board.ended or self._has_begun())
            if not queued:
                board.wait(lambda: board.done >= sent or board.ended, time.monotonic() + planner.PATIENCE)
        seconds = None
        if board.done:
            with contextlib.suppress(WorkbenchError):  # then nothing is measured
                self._inbox.fetch(board)
            told = [s for outcomes in board.segments() for s in memoryview(outcomes.segment.seconds).cast("d")]
            taken = [s for s in told if not math.isnan(s)]  # those that were cancelled have not run
            seconds = sum(taken) / len(taken) if taken else None
        return planner.Measured(
            seconds, self._bytes / max(1, sent - self._first), slots, self._packet.concurrent, queued
        )

    def _has_begun(self) -> bool:
        """Tell whether a task of this job has been given to a slot."""
        try:
            record = self._store.record(self._packet.job)
        except WorkbenchError:
            return False
        return record is not None and record.running + record.done > 0

    def _wait_for_room(self, window: int) -> None:
        """Draw from an iterator only as fast as its tasks are done."""
        board, limit = self._board, self._sent - window
        if board.done < limit:
            self._mailer.ring()
            board.wait(lambda: board.done >= limit or board.ended or self._abandoned is not None, None)
            if board.failure is not None:
                raise board.failure

    def _seal(self) -> None:
        self._mailer.ring()
        self._mailer.settle(self._packet.lane, self._receipts)
        seal = Seal(self._packet.job, self._sent, self._earlier | self._receipts.ends, self._life)
        self._mailer.seal(seal, _PATIENCE)


def _checked(item: Any, index: int) -> Any:
    try:
        codec.dumps(item)
    except Exception as exc:  # whatever the user's object does when it is pickled
        return BrokenItem(index, f"it cannot be pickled: {type(exc).__name__}: {exc}")
    return item
