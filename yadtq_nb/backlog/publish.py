"""Producing: chunks round robin over the partitions, jobs to the compacted topic, events to the flight recorder, and
what was refused to the dead topic.

A record that was handed over is held here until the broker has acknowledged it; a client holds it until it has been
fed to the workbench, on a broker with a disk up to some bytes. When the producer cannot go on (the topic was made
again, the broker in memory was restarted), a new one sends what is held once more: a chunk is known by its id, so that
one that arrives twice runs once.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from yadtq_nb.backlog import dead
from yadtq_nb.backlog.connection import (
    TIMEOUT,
    Topic,
    Topics,
    dead_topic,
    events_topic,
    jobs_topic,
    let_go,
    settings,
    translate_kafka_errors,
)
from yadtq_nb.config import Config
from yadtq_nb.errors import BacklogError, YadtqError
from yadtq_nb.model import Lane

log = logging.getLogger(__name__)

#: Called in the publisher's thread when the broker has a record: with where ("topic id/partition"), and its offset; or
#: with the error.
Acknowledged = Callable[[BacklogError | None, str, int], None]

#: Largest record that is sent; larger arguments and functions go by reference. Kafka's own default limit is 1 MiB.
MAX_RECORD: Final = 900_000
#: Seconds after which a record that the broker does not take is given up.
GIVE_UP: Final = 120.0
#: Seconds for which a producer that is ended says what it has not sent.
_LAST: Final = 1.0
#: Seconds between tries to make a new producer while the broker is away.
_PAUSE: Final = 0.2
#: Seconds between looks at what has been fed, from a broker that forgets it when it is restarted, and from others.
_LOOK_WAKE: Final = 0.1
_LOOK_POLL: Final = 1.0
#: Seconds between such looks while someone waits for it.
_LOOK_SOON: Final = 0.005
#: Seconds for which what was fed is held on: a Redis that is killed right then comes back without its last second, or
#: two where its disk was busy, and a broker in memory may be gone by then.
ROLLBACK: Final = 3.0
#: Bytes that are held of what was fed, or lies with a broker that has it on disk.
_HELD: Final = 64 * 1024 * 1024

_encode = msgspec.json.Encoder().encode


class Fed(Protocol):
    """How far one partition has been fed to the workbench."""

    @property
    def topic_id(self) -> str:
        """The topic's life that is meant."""

    @property
    def offset(self) -> int:
        """What lies before it has been fed."""


class Receipts:
    """What the broker says of the records of one sender: given to send_chunk with each of them."""

    def __init__(self) -> None:
        #: Why one was refused.
        self.refused: BacklogError | None = None
        #: Topic id and partition, as in model.Seal -> the offset after the last of them.
        self.ends: dict[str, int] = {}

    def __call__(self, error: BacklogError | None, where: str, offset: int) -> None:
        """Take note of one."""
        if error is not None:
            self.refused = error
        else:
            self.ends[where] = max(self.ends.get(where, 0), offset + 1)


class _Letter:
    """A record that was handed over, until it is safe or given up."""

    __slots__ = ("acknowledged", "deadline", "fed", "job", "key", "note", "place", "to_jobs", "value")

    def __init__(
        self,
        value: bytes,
        key: bytes | None,
        acknowledged: Acknowledged | None,
        *,
        note: bytes | None = None,
        job: str = "",
    ) -> None:
        self.value = value
        #: Whose chunk it is, if somebody asks for it; see Publisher.holds.
        self.job = job
        self.key = key
        #: Why it was refused, for the dead topic.
        self.note = note
        self.to_jobs = key is not None and note is None
        self.acknowledged = acknowledged
        self.deadline = time.monotonic() + GIVE_UP
        #: Topic id, partition and offset, once the broker has it.
        self.place = ("", -1, -1)
        #: True once it was seen to be fed: then its sender is not told what becomes of it later.
        self.fed = False


class Publisher:
    """A producer of one lane of a queue, with a thread that hears the acknowledgements."""

    def __init__(
        self,
        config: Config,
        queue: str,
        lane: Lane = "normal",
        *,
        fed: Callable[[], tuple[str, Mapping[int, Fed]]] | None = None,
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect, and make the queue's topics if they are missing.

        Args:
            fed: tells the workbench's present life, another one after a restart, and how far each partition has been
                fed; given by a client, which sends what was lost before that.
            arrived: called in the publisher's thread when the broker has a chunk.

        Raises:
            BacklogError: Kafka cannot be reached or refuses.
        """
        self._config = config
        self._queue = queue
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)
        #: What the broker has not acknowledged yet, in the order of sending.
        self._letters: dict[int, _Letter] = {}
        #: What it has acknowledged, but would forget with its memory, or with its topic.
        self._unsafe: list[_Letter] = []
        self._unsafe_bytes = 0
        #: What was fed a moment ago, in this life of the workbench, and when that was seen.
        self._resting: collections.deque[tuple[float, _Letter]] = collections.deque()
        self._resting_bytes = 0
        self._life = ""
        self._fed = fed
        self._arrived = arrived
        self._forgets = config.reading == "wake"
        self._fed_seen_at = 0.0
        self._looking = threading.Lock()
        self._broken = threading.Event()
        self._closing = threading.Event()
        self._topics = Topics(config, queue, lane)
        self._start(self._topics.ensure(TIMEOUT))
        self._thread = threading.Thread(target=self._hear, name=f"yadtq-publisher-{queue}", daemon=True)
        self._thread.start()

    @property
    def topic(self) -> Topic:
        """The tasks topic that is written to."""
        return self._topic

    def send_chunk(self, record: bytes, acknowledged: Acknowledged | None = None, *, job: str = "") -> None:
        """Produce a chunk's record; waits while the buffer is full.

        Args:
            job: its id, to be among those that holds() tells of.

        Raises:
            BacklogError: the record is refused before it is sent.
        """
        self._post(_Letter(record, None, acknowledged, job=job))

    def send_job(self, key: str, value: bytes, acknowledged: Acknowledged | None = None) -> None:
        """Produce to the compacted topic of jobs: the last value of a key is kept."""
        self._post(_Letter(value, key.encode(), acknowledged))

    def send_dead(self, note: dead.Dead, record: bytes) -> None:
        """Put a refused record aside. Sent again until the broker has it, as chunks are: see flush.

        Raises:
            BacklogError: it is refused before it is sent.
        """
        self._post(_Letter(record[: dead.KEPT], note.key.encode(), _told_if_lost, note=dead.encode(note)))

    def send_event(self, event: str, **facts: Any) -> None:
        """Write a line to the flight recorder. Never waits, and is not sent again: events are worth less than work."""
        line = _encode({"event": event, "time": time.time(), **facts})
        with contextlib.suppress(BufferError, KafkaException, RuntimeError):
            self._producer.produce(events_topic(self._queue), line, partition=0, on_delivery=self._heard_of_event)

    def flush(self, timeout: float) -> bool:
        """Wait until the broker has everything. False when it has not within timeout seconds."""
        with self._empty:
            return self._empty.wait_for(lambda: not self._letters, timeout)

    def unsent(self) -> int:
        """Return how many records the broker has not acknowledged."""
        with self._lock:
            return len(self._letters)

    def holds(self) -> set[str]:
        """Return the jobs of which it holds chunks that nobody has fed yet: it would send these again."""
        with self._lock:
            return {letter.job for letter in (*self._letters.values(), *self._unsafe) if letter.job}

    def settle(self, timeout: float) -> bool:
        """Wait until everything is safe: acknowledged, and fed where the broker keeps it in memory only."""
        deadline = time.monotonic() + timeout
        while self._forgets and self.flush(0.0) and self._unsafe and time.monotonic() < deadline:
            self._look_what_is_fed()
            time.sleep(_LOOK_SOON)
        with self._empty:
            left = max(0.0, deadline - time.monotonic())
            return self._empty.wait_for(self.is_settled, left)

    def is_settled(self) -> bool:
        """Tell whether everything is safe; see settle."""
        return not self._letters and not (self._forgets and self._unsafe)

    def close(self, timeout: float = TIMEOUT) -> bool:
        """Flush and stop. False when some records were not taken: given time for that, it tells their senders."""
        taken = self.flush(timeout)
        self._closing.set()
        self._thread.join()
        with self._lock:
            left = list(self._letters.values()) if timeout else []
        for letter in left:
            error = f"the queue was closed before Kafka at {self._config.kafka} said that it has it"
            self._settle(letter, BacklogError(error))
        self._producer.flush(0.5)
        # By itself it would go on looking for its broker until it is collected.
        let_go([self._producer], _end)
        self._topics.close()
        return taken

    # One record.

    def _post(self, letter: _Letter) -> None:
        with self._lock:
            self._letters[id(letter)] = letter
        while not self._closing.is_set():
            try:
                self._produce(letter)
                return
            except BufferError:
                # Full: the hearing thread makes room as the broker acknowledges.
                self._closing.wait(0.005)
            except BacklogError:
                if self._broken.is_set():
                    return  # the next producer sends it
                with self._empty:
                    self._letters.pop(id(letter), None)
                    self._empty.notify_all()
                raise
        self._settle(letter, BacklogError("the queue is being closed, but Kafka is behind"))

    def _produce(self, letter: _Letter) -> None:
        producer = self._producer

        def on_delivery(error: KafkaError | None, message: Message) -> None:
            if producer is not self._producer:
                return  # the word of a producer that was given up; its successor has sent the record again
            if error is None:
                self._take_note(letter, message.partition() or 0, message.offset())
            elif error.code() == KafkaError.MSG_SIZE_TOO_LARGE or time.monotonic() > letter.deadline:
                self._settle(letter, BacklogError(f"Kafka at {self._config.kafka} did not take it: {error.str()}"))
            else:
                self._broken.set()

        # librdkafka's own partitioner would stick to one partition for a while.
        topic, partition = (
            (jobs_topic(self._queue), 0) if letter.to_jobs else (self._topic.name, next(self._partitions))
        )
        more: dict[str, Any] = {}
        if letter.note is not None:
            topic, partition, more = dead_topic(self._queue), 0, {"headers": [(dead.HEADER, letter.note)]}
        try:
            with translate_kafka_errors(self._config):
                producer.produce(
                    topic, letter.value, key=letter.key, partition=partition, on_delivery=on_delivery, **more
                )
        except BacklogError as exc:
            if isinstance(exc.__cause__, KafkaException) and exc.__cause__.args[0].fatal():
                self._broken.set()
            raise
        except RuntimeError:
            if producer is self._producer:
                raise
            # It was given up just now; its successor sends the record.

    def _take_note(self, letter: _Letter, partition: int, offset: int | None) -> None:
        """The broker says where it has put a record."""
        if offset is None:
            # librdkafka only believes that it is there, since a later one is. Where this one came before the broker
            # knew of a topic just made, and the later one after, this one is nowhere (KAFKA-15591).
            self._broken.set()
            return
        self._settle(letter, None, partition, offset)
        if letter.key is None:
            self._arrived()

    def _settle(self, letter: _Letter, error: BacklogError | None, partition: int = 0, offset: int = 0) -> None:
        with self._empty:
            if id(letter) not in self._letters:
                return
        # Before anyone who waits for it sees that all is acknowledged.
        if letter.acknowledged is not None and not letter.fed:
            letter.acknowledged(error, f"{self._topic.id}/{partition}", offset)
        with self._empty:
            if self._letters.pop(id(letter), None) is None:
                return
            if error is None and self._is_to_be_held(letter):
                letter.place = (self._topic.id, partition, offset)
                self._unsafe.append(letter)
                self._unsafe_bytes += len(letter.value)
            if not self._letters:
                self._empty.notify_all()

    def _is_to_be_held(self, letter: _Letter) -> bool:
        if self._fed is None or letter.key is not None:
            return False
        return self._forgets or self._unsafe_bytes < _HELD

    def _heard_of_event(self, error: KafkaError | None, _: Message) -> None:
        if error is not None and error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
            self._broken.set()

    # The producer, and its successor.

    def _start(self, topic: Topic) -> None:
        self._topic = topic
        self._partitions = itertools.cycle(range(topic.partitions))
        with translate_kafka_errors(self._config):
            self._producer = Producer(
                settings(
                    self._config,
                    **{
                        # A broker in memory hands out producer ids from 1 again when it is restarted, and takes the
                        # first records of an old producer for those of a new one: acknowledged, and not kept.
                        "enable.idempotence": self._config.reading != "wake",
                        "acks": "all",
                        "linger.ms": 0,
                        "message.max.bytes": 2 * MAX_RECORD,
                        "queue.buffering.max.messages": 100_000,
                        "queue.buffering.max.kbytes": 256 * 1024,
                        "message.timeout.ms": int(GIVE_UP * 1000),
                        # A topic that is gone is told soon, and made again here.
                        "topic.metadata.propagation.max.ms": 100 if self._config.reading == "wake" else 1_000,
                    },
                )
            )
        # The producer's id comes with the first connection: on demand it takes librdkafka half a second.
        with contextlib.suppress(KafkaException):  # one that goes away just now is waited for like any other
            self._producer.list_topics(topic.name, timeout=TIMEOUT)

    def _hear(self) -> None:
        while not self._closing.is_set():
            try:
                self._hear_once()
            except Exception:  # a defect of ours: without this thread, whoever waits for Kafka waits for ever
                log.exception("the publisher goes on")
                self._broken.set()
                self._closing.wait(_PAUSE)

    def _hear_once(self) -> None:
        try:
            self._producer.poll(0.2)
        except KafkaException:
            self._broken.set()
        every = _LOOK_WAKE if self._forgets and self._unsafe else _LOOK_POLL
        if (self._unsafe or self._resting) and time.monotonic() - self._fed_seen_at > every:
            self._look_what_is_fed()
        if self._broken.is_set():
            self._renew()

    def _look_what_is_fed(self) -> None:
        """Let go of what has reached the workbench, and send again what the broker has forgotten before that."""
        with self._looking:
            self._look()

    def _look(self) -> None:
        assert self._fed is not None  # or nothing would be unsafe
        self._fed_seen_at, seen = time.monotonic(), len(self._unsafe)
        try:
            life, fed = self._fed()
            if life != self._life:
                # It was restarted, and may know less than before.
                back = [letter for _, letter in self._resting]
                with self._empty:
                    self._unsafe, seen = back + self._unsafe, seen + len(back)
                self._resting.clear()
                self._resting_bytes, self._life = 0, life
            looked_at = self._unsafe[:seen]
            held = [letter for letter in looked_at if not _is_fed(letter, fed)]
            doubtful = [letter for letter in held if _is_of_another_life(letter, fed)]
            if self._forgets and len(held) < len(looked_at):
                # A record that was taken for one of this life may lie in the next one, at the same place.
                doubtful = looked_at
            # Either side may be behind: the broker tells which life it is, and was when it took the record.
            present = self._topics.ensure().id if doubtful else ""
        except YadtqError as exc:
            log.warning("cannot see what is fed: %s", exc)
            return
        forgotten = [letter for letter in doubtful if letter.place[0] != present]
        gone = set(map(id, forgotten))
        kept = gone.union(map(id, held))
        self._rest([letter for letter in looked_at if id(letter) not in kept])
        with self._empty:
            # What was acknowledged meanwhile has come behind those that were looked at.
            self._unsafe = [*(letter for letter in held if id(letter) not in gone), *self._unsafe[seen:]]
            self._unsafe_bytes = sum(len(letter.value) for letter in self._unsafe)
            self._unsafe_bytes += self._resting_bytes
            self._letters.update({id(letter): letter for letter in forgotten})
            for letter in forgotten:
                letter.deadline = time.monotonic() + GIVE_UP
            self._empty.notify_all()
        if forgotten:
            self._broken.set()

    def _rest(self, fed: list[_Letter]) -> None:
        """Hold what was fed just now for a moment, and let go of what was fed before."""
        now = self._fed_seen_at
        for letter in fed:
            letter.fed = True
        self._resting += [(now, letter) for letter in fed]
        self._resting_bytes += sum(len(letter.value) for letter in fed)
        while self._resting and (now - self._resting[0][0] > ROLLBACK or self._resting_bytes > _HELD):
            _, letter = self._resting.popleft()
            self._resting_bytes -= len(letter.value)

    def _renew(self) -> None:
        """Put a new producer in the place of one that cannot go on, and send again what was not acknowledged."""
        self._give_up_late()
        old = [self._producer]
        try:
            self._start(self._topics.ensure())
        except BacklogError as exc:
            log.warning("Kafka is away: %s", exc)
            self._closing.wait(_PAUSE)
            return
        self._broken.clear()
        let_go(old, _end, wait=0.0)
        with self._lock:
            letters = list(self._letters.values())
        for letter in letters:
            while not self._broken.is_set():
                try:
                    self._produce(letter)
                    break
                except BufferError:
                    self._producer.poll(0.05)
                except BacklogError:
                    self._broken.set()

    def _give_up_late(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [letter for letter in self._letters.values() if letter.deadline < now]
        for letter in late:
            self._settle(letter, BacklogError(f"Kafka at {self._config.kafka} was away for {GIVE_UP:.0f} s"))


def _end(producer: Producer) -> None:
    """End a producer; what it has still to send is forgotten."""
    producer.purge()
    # Closing waits without end for what is left.
    if not producer.flush(_LAST):
        producer.close()


def _told_if_lost(error: BacklogError | None, _where: str, _offset: int) -> None:
    if error is not None:
        log.error("a refused record could not be put on the dead topic: %s", error)


def _is_fed(letter: _Letter, fed: Mapping[int, Fed]) -> bool:
    topic_id, partition, offset = letter.place
    cursor = fed.get(partition)
    return cursor is not None and cursor.topic_id == topic_id and cursor.offset > offset


def _is_of_another_life(letter: _Letter, fed: Mapping[int, Fed]) -> bool:
    topic_id, partition, _ = letter.place
    cursor = fed.get(partition)
    return cursor is not None and cursor.topic_id != topic_id
