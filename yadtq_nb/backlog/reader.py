"""Reading: an assigned consumer without group membership, commits, and the replay of the jobs topic."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from yadtq_nb.backlog.connection import (
    TIMEOUT,
    Topic,
    Topics,
    jobs_topic,
    let_go,
    passes_by_itself,
    reading,
    translate_kafka_errors,
)
from yadtq_nb.config import Config
from yadtq_nb.errors import BacklogError
from yadtq_nb.model import Lane

#: Milliseconds that a fetch may wait at a broker that does not wake it, by the number of records that lie before it:
#: it looks through them all, and gives up with nothing when that takes longer.
_FETCH_WAITS: Final = ((500, 1), (3_000, 5), (10_000, 20), (50_000, 100))
_LONGEST_WAIT: Final = 500
#: Seconds without a record after which a replay has come to the end.
_SILENCE: Final = 0.5


class Record(msgspec.Struct, frozen=True):
    """A record of the tasks topic. value is None for a tombstone."""

    partition: int
    offset: int
    value: bytes | None


class OffsetLostError(Exception):
    """The offset that should be read next is not in the log: the topic was made again, or records were deleted."""

    def __init__(self, partition: int) -> None:
        super().__init__(partition)
        self.partition = partition


class Reader:
    """Reads given partitions from given offsets. For one thread."""

    def __init__(self, config: Config, queue: str, topic: Topic, *, to_ends: bool = False) -> None:
        """Connect; to_ends says that the ends of partitions are to be noted: see reached."""
        self._config = config
        #: Partition -> its end, once it was reached.
        self._reached: dict[int, int] | None = {} if to_ends else None
        self._topic = topic
        self._queue = queue
        self._wait = 0
        self._open(0)

    def _open(self, behind: int) -> None:
        """Open a consumer whose fetches suit a partition with so many records behind."""
        config = self._config
        self._wait = next((wait for records, wait in _FETCH_WAITS if behind < records), _LONGEST_WAIT)
        more = {"fetch.wait.max.ms": self._wait} if config.reading == "wake" else {}
        with translate_kafka_errors(config):
            self._consumer = Consumer(
                reading(
                    config,
                    self._group(),
                    **{
                        "enable.auto.offset.store": False,
                        # A silent jump to either end would skip or repeat chunks: an error is handled.
                        "auto.offset.reset": "error",
                        "enable.partition.eof": self._reached is not None,
                        "queued.max.messages.kbytes": 65_536,
                        **more,
                    },
                )
            )

    def _group(self) -> str:
        """Return whose commits these are: a broker that keeps no metadata must not take an earlier topic's for ours."""
        group = f"yadtq.{self._queue}"
        return f"{group}.{self._topic.id}" if self._config.reading == "wake" else group

    def assign(self, offsets: Mapping[int, int]) -> None:
        """Read these partitions from these offsets, and no others."""
        if offsets and self._config.reading == "wake" and not self.suits(max(offsets.values())):
            let_go([self._consumer], Consumer.close)
            self._open(max(offsets.values()))
        with translate_kafka_errors(self._config):
            if offsets:
                self._consumer.assign([TopicPartition(self._topic.name, p, o) for p, o in offsets.items()])
            else:
                self._consumer.unassign()

    def suits(self, behind: int) -> bool:
        """Tell whether fetches still find what comes after so many records."""
        if self._config.reading != "wake":
            return True
        return self._wait == next((wait for records, wait in _FETCH_WAITS if behind < records), _LONGEST_WAIT)

    def poll(self, timeout: float, most: int) -> list[Record]:
        """Wait for a record, and return it with what else is there.

        Raises:
            OffsetLostError: a partition cannot be read from where it should.
            BacklogError: Kafka refuses for good; being away for a while is waited out.
        """
        with translate_kafka_errors(self._config):
            # consume(n, t) waits the whole t for n records: wait for one, then take what is there.
            first = self._consumer.poll(timeout)
            if first is None:
                return []
            messages = [first, *self._consumer.consume(most - 1, 0)]
        return [self._record(message) for message in messages if self._is_record(message)]

    def reached(self) -> dict[int, int]:
        """Return the ends that were reached: there may lie no record before them, but the end of a transaction."""
        return dict(self._reached or {})

    def _is_record(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        if error.code() == KafkaError._PARTITION_EOF and self._reached is not None:
            self._reached[message.partition() or 0] = message.offset() or 0
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            raise OffsetLostError(message.partition() or 0)
        if error.fatal() or not passes_by_itself(error):
            raise BacklogError(f"Kafka at {self._config.kafka} cannot be read: {error.str()}")
        return False

    def _record(self, message: Message) -> Record:
        partition, offset, value = message.partition(), message.offset(), message.value()
        assert partition is not None
        assert offset is not None
        return Record(partition, offset, value if isinstance(value, bytes) else None)

    def log_start(self, partition: int) -> int:
        """Return the first offset that is still in the log."""
        if self._config.reading == "wake":
            # It keeps all. Of a topic that was made again while someone wrote to it, Tansu may say what was before.
            return 0
        with translate_kafka_errors(self._config):
            low, _ = self._consumer.get_watermark_offsets(TopicPartition(self._topic.name, partition), timeout=TIMEOUT)
        return int(low)

    def committed(self, partition: int) -> int | None:
        """Return the offset that was committed for this life of the topic, or None."""
        with translate_kafka_errors(self._config):
            (found,) = self._consumer.committed([TopicPartition(self._topic.name, partition)], timeout=TIMEOUT)
        if found.offset < 0:
            return None
        ours = found.metadata == self._topic.id or self._config.reading == "wake"
        return int(found.offset) if ours else None

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Commit low-water marks, naming the topic's life, without waiting for the answer."""
        with translate_kafka_errors(self._config):
            self._consumer.commit(
                offsets=[TopicPartition(self._topic.name, p, o, metadata=self._topic.id) for p, o in offsets.items()],
                asynchronous=True,
            )

    def close(self) -> None:
        """Close the consumer."""
        let_go([self._consumer], Consumer.close)


def replay_jobs(config: Config, queue: str) -> Iterator[tuple[str, bytes | None]]:
    """Yield the last values of the jobs topic, (key, value or None), up to its present end.

    Raises:
        BacklogError: Kafka cannot be reached.
    """
    with translate_kafka_errors(config):
        # The last offset may be that of no record, but of the end of a transaction.
        more = {"enable.partition.eof": config.reading == "poll"}
        consumer = Consumer(reading(config, f"yadtq.{queue}.replay", **more))
        try:
            place = TopicPartition(jobs_topic(queue), 0)
            low, high = consumer.get_watermark_offsets(place, timeout=TIMEOUT)
            if low >= high:
                return
            consumer.assign([TopicPartition(jobs_topic(queue), 0, low)])
            reached = low
            while reached < high or config.reading == "wake":
                message = consumer.poll(TIMEOUT if reached < high else _SILENCE)
                # Not "if message": a tombstone has no value and so is false.
                if message is None and reached >= high:
                    return  # of batches of several records Tansu says a smaller end than it has
                if message is None:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
                if (error := message.error()) is None:
                    key, value = message.key(), message.value()
                    # Whoever wrote it: a key that is no text must not end the node that reads it.
                    yield (key.decode(errors="replace") if isinstance(key, bytes) else str(key)), value
                    reached = (message.offset() or 0) + 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    reached = max(reached, message.offset() or 0)
        finally:
            let_go([consumer], Consumer.close)


def replay_tasks(config: Config, queue: str, lane: Lane) -> Iterator[bytes]:
    """Yield the records of a lane's tasks topic that are still in the log, up to its present end.

    Raises:
        BacklogError: Kafka cannot be reached.
    """
    topics = Topics(config, queue, lane)
    topic = topics.ensure()
    reader = Reader(config, queue, topic, to_ends=config.reading == "poll")
    try:
        positions = {partition: reader.log_start(partition) for partition in range(topic.partitions)}
        ends = topics.ends(topic)
        reader.assign(positions)
        silent_since = time.monotonic()
        while True:
            records = reader.poll(_SILENCE, 500)
            # Silence, too: of batches of several records Tansu says a smaller end than it has.
            reached = reader.reached()
            if not records and all(max(positions[p], reached.get(p, 0)) >= end for p, end in ends.items()):
                return
            now = time.monotonic()
            if records:
                silent_since = now
            elif now - silent_since > TIMEOUT:
                raise BacklogError(f"Kafka at {config.kafka} does not give the tasks that it has")
            for record in records:
                positions[record.partition] = record.offset + 1
                if record.value is not None:
                    yield record.value
            if not reader.suits(max(positions.values())):
                reader.assign(positions)
    finally:
        reader.close()
        topics.close()
