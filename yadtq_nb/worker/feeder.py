"""The feeder: brings chunks from Kafka to the workbench, for the partitions that this node was given.

    heartbeat ──▶ shares ──▶ assign ──▶ poll ──▶ verify ──▶ feed (one script, fenced by the cursor) ──▶ leases ──▶ slots

A batch counts only if the cursor in Redis is where the batch began. So the feeder never has to be right about where it
is: told that the cursor is elsewhere, it goes there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from yadtq_nb import codec
from yadtq_nb.backlog.connection import TIMEOUT, Topic, Topics
from yadtq_nb.backlog.reader import OffsetLostError, Reader, Record
from yadtq_nb.config import Config
from yadtq_nb.errors import BacklogError, CodecError, FormatError, WorkbenchError
from yadtq_nb.model import ChunkHead, Lane, Lease
from yadtq_nb.workbench.bench import Batch, Cursor, Fed, NotLiveError, Share, Workbench

log = logging.getLogger(__name__)


#: Most chunks in one feed: the script unpacks them on a stack of 8,000.
_MOST: Final = 400
#: Seconds without a record after which a feeder on a broker that must be asked stops asking.
_LINGER: Final = 1.0
#: Seconds between looks at a broker that must be asked, in case a wake-up was lost.
_SLOW_POLL: Final = 5.0
#: Seconds between looks at the topic, on a broker that forgets it when it restarts, and on others.
_LOOK_WAKE: Final = 1.0
_LOOK_POLL: Final = 10.0
#: Records of a partition past which a broker in memory is relieved of them.
_LONG: Final = 500
#: Seconds without a record that are enough to do so, also between the tasks of someone who sends one after another.
_GAP: Final = 0.001
#: Longest time between looks at what may be deleted of the topic, in seconds, and how often that is looked at while it
#: is kept.
_TRIM: Final = 3_600.0
_TRIMS: Final = 24
#: Seconds to wait before the next try when a server is away, or the workbench is full.
_PAUSE: Final = 0.1
#: Seconds to wait at a time for Kafka to take what was refused.
_SETTLE: Final = 2.0


class _Opened(msgspec.Struct, frozen=True):
    """A record that was read and verified. chunk is None for one that is passed by."""

    partition: int
    offset: int
    chunk: tuple[ChunkHead, bytes] | None


class Feeder:
    """One thread that reads this node's partitions of one lane."""

    def __init__(
        self,
        config: Config,
        queue: str,
        lane: Lane,
        workbench: Workbench,
        *,
        restore: Callable[[], None],
        reserve: Callable[[int], int],
        unreserve: Callable[[int], None],
        start: Callable[[Lease, Workbench], None],
        refuse: Callable[[Record, str, CodecError], None],
        settle: Callable[[float], bool],
        found: Callable[[frozenset[Lane]], None],
        slots: int,
    ) -> None:
        """Take the parts that are passed in.

        Args:
            restore: replays the jobs topic into a workbench that has lost its cursors.
            reserve, unreserve: claim free slots, and give them back.
            start: runs a leased chunk in a reserved slot.
            refuse: puts aside a record that cannot be fed, of this life of the topic.
            settle: waits so many seconds until what was put aside is safe, and tells whether it is.
            found: is told which other lanes are in use.
            slots: how many this node has.

        Raises:
            BacklogError: Kafka cannot be reached.
        """
        self._config = config
        self._topics = Topics(config, queue, lane)
        self._topic = topic = self._topics.ensure(TIMEOUT)
        self._look_at = 0.0
        self._bench = workbench
        self._queue = queue
        self._reader = Reader(config, queue, topic)
        self._long_seen_at = float("-inf")
        self._restore = restore
        self._reserve = reserve
        self._unreserve = unreserve
        self._start = start
        self._refuse = refuse
        self._settle = settle
        self._found = found
        #: True while something that was refused may not be safe yet.
        self._refused = False
        self._slots = slots
        self._positions: dict[int, int] = {}
        self._held: list[_Opened] = []
        #: Partitions and offsets at which no record was found.
        self._gaps: set[tuple[int, int]] = set()
        #: Partitions that could not be read where their cursor is.
        self._lost: set[int] = set()
        self._assigned = False
        self._last_record = 0.0
        self._rung = threading.Event()
        self._closing = False
        self._lock = threading.Lock()
        self._shares: list[Share] | None = None
        self._marks: dict[int, Cursor] = {}
        #: What was committed last, and when it is next seen what of it may be deleted.
        self._finished: dict[int, int] = {}
        self._trim_at = 0.0
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"yadtq-feeder-{lane}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def ring(self) -> None:
        """Wake the feeder: there may be something to read. From any thread."""
        self._rung.set()

    @property
    def partitions(self) -> int:
        """How many the topic has."""
        return self._topic.partitions

    def look(self) -> None:
        """Look at the topics now: another lane has come into use. From any thread."""
        self._look_at = 0.0
        self._rung.set()

    def share(self, shares: list[Share], marks: dict[int, Cursor]) -> None:
        """Hand over what a heartbeat brought: the partitions to read, and the marks to commit. From any thread."""
        with self._lock:
            self._shares = shares
            self._marks.update(marks)
        here = {p: Cursor(self._topic.id, offset) for p, offset in self._positions.copy().items()}
        if {s.partition: s.cursor for s in shares} != here:
            self._rung.set()

    def is_polling(self) -> bool:
        """Tell whether the thread has really gone round lately; if not, its partitions should go to another node."""
        return not self._closing and time.monotonic() - self._alive_at < 2 * _SLOW_POLL + self._config.lease

    def close(self) -> None:
        """Stop reading, and join the thread."""
        self._closing = True
        self._rung.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._reader.close()
        self._topics.close()

    def _run(self) -> None:
        while not self._closing:
            self._alive_at = time.monotonic()
            try:
                self._round()
            except NotLiveError:
                self._pause()
            except (BacklogError, WorkbenchError) as exc:
                log.warning("feeding waits: %s", exc)
                self._assigned = False
                self._pause()
            except OffsetLostError as exc:
                log.warning("partition %d cannot be read where the cursor is", exc.partition)
                self._lost.add(exc.partition)
                self._look_at = 0.0
                self._assigned = False
                self._pause()

    def _round(self) -> None:
        self._look_at_topic()
        self._leave_lost()
        self._take_shares()
        if not self._held:
            if self._is_idle():
                self._sleep()
                return
            self._read()
        if self._held and not self._feed(self._held):
            self._pause()

    def _pause(self) -> None:
        self._rung.wait(_PAUSE)
        self._rung.clear()

    def _look_at_topic(self) -> None:
        """Notice that the topic was made again, or is gone: its records must not be taken for those of the old one."""
        now = time.monotonic()
        if now < self._look_at:
            return
        # Before looking: what is asked for meanwhile must not be forgotten.
        self._look_at = now + (_LOOK_WAKE if self._config.reading == "wake" else _LOOK_POLL)
        try:
            topic = self._topics.ensure()
        except BacklogError:
            self._look_at = 0.0
            raise
        self._found(self._topics.others)
        if topic.id != self._topic.id:
            log.warning("topic %s has been made again", topic.name)
            self._reader.close()
            self._turn_to(topic)
        elif topic.partitions != self._topic.partitions:
            log.warning("topic %s has %d partitions now", topic.name, topic.partitions)
            self._topic = topic  # the next heartbeat shares them out

    def _turn_to(self, topic: Topic) -> None:
        """Read another life of the topic, from its cursors, once the old reader is closed."""
        self._topic = topic
        self._reader = Reader(self._config, self._queue, topic)
        self._held, self._gaps, self._lost, self._assigned = [], set(), set(), False
        self._finished = {}
        self._positions = {p: self._find(p, self._bench.cursor(p)) for p in self._positions}

    def _leave_lost(self) -> None:
        """Go on where there is a log, if records were deleted or the broker has lost its last ones.

        Jobs of deleted records will say what is lost. What is read once more, since others may lie now at the places of
        those that the broker has lost, is known by its id.
        """
        while self._lost:
            partition = min(self._lost)
            offset = self._positions.get(partition)
            start, end = self._reader.log_start(partition), self._topics.ends(self._topic).get(partition, 0)
            if offset is not None and not start <= offset <= end:
                done = self._reader.committed(partition) or 0
                there = min(max(start, 0 if offset < start else done), end)
                log.error(
                    "partition %d of %s should be read at %d, but its log has %d to %d only: go on at %d",
                    *(partition, self._topic.name, offset, start, end, there),
                )
                cursors = Cursor(self._topic.id, offset), Cursor(self._topic.id, there)
                self._positions[partition] = self._find(partition, self._bench.init(partition, *cursors))
            self._lost.discard(partition)

    # Which partitions, and from where.

    def _take_shares(self) -> None:
        with self._lock:
            shares, self._shares = self._shares, None
            marks, self._marks = self._marks, {}
        if shares is not None:
            self._follow(shares)
        if marks:
            # A mark of an earlier life of the topic would pass records of this one.
            ours = {p: mark.offset for p, mark in marks.items() if mark.topic_id == self._topic.id}
            ours = {p: offset for p, offset in ours.items() if p in self._positions}
            self._reader.commit(ours)
            self._finished.update(ours)
            self._trim()

    def _trim(self) -> None:
        """Delete records of what was finished long ago, on a broker with a disk."""
        self._finished = {p: mark for p, mark in self._finished.items() if p in self._positions}
        now = time.monotonic()
        if self._config.reading == "wake" or now < self._trim_at or not self._finished:
            return
        self._trim_at = now + max(1.0, min(_TRIM, self._config.keep / _TRIMS))
        try:
            # As long as a job is kept that has not ended: after a wipe, job.retry() finds its inputs there.
            self._topics.trim(self._topic, self._finished, time.time() - 4 * self._config.keep)
        except BacklogError as exc:
            log.warning("what was finished long ago is not deleted from %s: %s", self._topic.name, exc)

    def _follow(self, shares: list[Share]) -> None:
        """Read what was given, and compare with the cursors: Redis may have come back a second older."""
        given = {share.partition: share.cursor for share in shares}
        if given.keys() != self._positions.keys():
            self._held = [record for record in self._held if record.partition in given]
            kept = self._positions
            self._positions = {p: kept[p] if p in kept else self._find(p, cursor) for p, cursor in given.items()}
            self._assigned = False
        if self._held:
            return
        apart = [p for p, cursor in given.items() if cursor != Cursor(self._topic.id, self._positions[p])]
        if apart:
            # The share may be older than what was fed since: only an empty feed tells.
            self._send([Batch(p, self._topic.id, self._positions[p], self._positions[p], []) for p in apart], 0)

    def _find(self, partition: int, cursor: Cursor | None) -> int:
        """Return where to read a partition: at its cursor, which is set if it is missing or of another topic."""
        if cursor is not None and cursor.topic_id == self._topic.id:
            return cursor.offset
        offset = self._reader.committed(partition)
        if offset is None:
            offset = self._reader.log_start(partition)
        while (now := self._bench.init(partition, cursor, Cursor(self._topic.id, offset))) is None:
            # What a wiped workbench must know comes before its chunks: a cancelled job must not come back to life.
            if not self._bench.begin_restore():
                self._restore()
                self._bench.end_restore()
        return now.offset if now.topic_id == self._topic.id else offset

    # Waiting and reading.

    def _is_idle(self) -> bool:
        if not self._positions:
            return True
        return self._config.reading == "wake" and time.monotonic() - self._last_record > _LINGER

    def _sleep(self) -> None:
        """Wait to be rung for, unassigned: a waiting fetch would keep an unfriendly broker busy."""
        if self._assigned:
            self._reader.assign({})
            self._assigned = False
        rung = self._rung.wait(_SLOW_POLL if self._positions else 1.0)
        self._rung.clear()
        # Not rung for: one short look, in case the bell was lost.
        self._last_record = time.monotonic() - (0.0 if rung else _LINGER - 0.05)

    def _read(self) -> None:
        if not self._assigned:
            self._reader.assign(self._positions)
            self._assigned = True
        long = self._is_long()
        records = self._reader.poll(_GAP if long else 0.5 if self._config.reading == "poll" else 0.1, _MOST)
        if not self._reader.suits(max(self._positions.values())):
            self._assigned = False
        if records:
            self._held = [self._open(record) for record in self._in_order(records)]
            self._last_record = time.monotonic()
        elif long:
            self._start_topic_again()

    def _in_order(self, records: list[Record]) -> list[Record]:
        """Return those that follow on what was read of these partitions; where one is missing, read on from there once.

        What is missing the second time, too, is no record, but the end of somebody's transaction.
        """
        ends: dict[int, int | None] = {**self._positions}
        found = []
        for record in records:
            end = ends.get(record.partition)
            if end is None or record.offset < end:
                continue
            if record.offset > end and (record.partition, end) not in self._gaps:
                log.warning("partition %d has %d after %d: read again", record.partition, record.offset, end)
                self._gaps.add((record.partition, end))
                ends[record.partition] = None
                self._assigned = False
                continue
            found.append(record)
            ends[record.partition] = record.offset + 1
        return found

    def _is_long(self) -> bool:
        """Tell whether a broker in memory holds much that nobody will ask for again."""
        if self._config.reading != "wake" or max(self._positions.values()) < _LONG:
            return False
        now, alone = time.monotonic(), len(self._positions) == self._topic.partitions
        due = alone and now - self._long_seen_at > _PAUSE
        self._long_seen_at = now if due else self._long_seen_at
        return due

    def _start_topic_again(self) -> None:
        """Have the memory back, and fetches quick again, when everything that was fed is finished.

        What a client sends in this very moment is forgotten; it holds it until it is fed, and sends it again.
        """
        # Of a partition with batches of several records Tansu says a smaller end than it has: then the topic is kept.
        if self._bench.open_chunks() or self._topics.ends(self._topic) != self._positions:
            return
        if not self._bench.begin_deletion():
            return
        # Closed first: librdkafka 2.16 crashes in a consumer whose topic is deleted while it is assigned.
        self._reader.close()
        try:
            self._topics.delete()
        finally:
            self._turn_to(self._topics.ensure())
            self._bench.end_deletion()

    # Feeding.

    def _feed(self, records: list[_Opened]) -> bool:
        """Feed what was read; what does not get in is kept. False when the workbench is full."""
        if self._refused:
            # Before the cursor passes them: a crash in between refuses them twice, never not at all.
            if not self._settle(_SETTLE):
                raise BacklogError("Kafka has not taken the records that were refused")
            self._refused = False
        free = self._reserve(self._slots)
        batches = self._batches(records)
        try:
            replies, used = self._send(batches, free)
        except BaseException:
            self._unreserve(free)
            raise
        self._unreserve(free - used)
        full = {batch.partition for batch, reply in zip(batches, replies, strict=True) if reply.status == "full"}
        self._held = [record for record in records if record.partition in full]
        return not full

    def _batches(self, records: list[_Opened]) -> list[Batch]:
        by_partition: dict[int, list[_Opened]] = {}
        for record in records:
            by_partition.setdefault(record.partition, []).append(record)
        return [
            Batch(
                partition,
                self._topic.id,
                self._positions[partition],
                found[-1].offset + 1,
                [(record.offset, *record.chunk) for record in found if record.chunk is not None],
            )
            for partition, found in by_partition.items()
        ]

    def _open(self, record: Record) -> _Opened:
        """Verify a record. One that cannot be read is passed by, or it would stop every record behind it."""
        chunk = None
        if record.value is not None:
            try:
                head, *_ = codec.decode_chunk(self._config.key, record.value, most=codec.MAX_CHUNK)
                chunk = head, record.value
            except CodecError as exc:
                self._put_aside(record, exc)
            except Exception as exc:  # a defect of ours: no record may end the node, or those behind it would end all
                log.exception("partition %d, offset %d", record.partition, record.offset)
                self._put_aside(record, FormatError(f"record cannot be read: {type(exc).__name__}: {exc}"))
        return _Opened(record.partition, record.offset, chunk)

    def _put_aside(self, record: Record, error: CodecError) -> None:
        self._refuse(record, self._topic.id, error)
        self._refused = True

    def _send(self, batches: list[Batch], free: int) -> tuple[list[Fed], int]:
        replies, leases = self._bench.feed(batches, free)
        for batch, reply in zip(batches, replies, strict=True):
            self._heed(batch, reply)
        for lease in leases:
            self._start(lease, self._bench)
        return replies, len(leases)

    def _heed(self, batch: Batch, reply: Fed) -> None:
        if reply.status == "fed":
            self._positions[batch.partition] = batch.next
        elif reply.status != "full":
            # Another feeder was here, or Redis came back older, or empty: go where the cursor is.
            self._positions[batch.partition] = self._find(batch.partition, reply.cursor)
            self._assigned = False
            self._last_record = time.monotonic()
