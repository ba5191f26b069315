"""Producing: chunks round robin over the partitions, jobs to the compacted topic, events to the flight recorder."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from confluent_kafka import KafkaError, Message, Producer

from yadtq_nb.backlog.connection import (
    TIMEOUT,
    Topic,
    events_topic,
    jobs_topic,
    settings,
    translate_kafka_errors,
)
from yadtq_nb.config import Config
from yadtq_nb.errors import BacklogError

#: Called in the publisher's thread when the broker has a record, with its place, or with the error.
Acknowledged = Callable[[BacklogError | None, int, int], None]

#: Largest record that is sent; larger arguments and functions go by reference. Kafka's own default limit is 1 MiB.
MAX_RECORD: Final = 900_000

_encode = msgspec.json.Encoder().encode


class Publisher:
    """An idempotent producer of one queue, with a thread that hears the acknowledgements."""

    def __init__(self, config: Config, queue: str, topic: Topic) -> None:
        self._config = config
        self._queue = queue
        self._topic = topic
        with translate_kafka_errors(config):
            self._producer = Producer(
                settings(
                    config,
                    **{
                        "enable.idempotence": True,
                        "acks": "all",
                        "linger.ms": 0,
                        "compression.type": "none",
                        "message.max.bytes": 2 * MAX_RECORD,
                        "queue.buffering.max.messages": 100_000,
                        "queue.buffering.max.kbytes": 256 * 1024,
                        "delivery.timeout.ms": 120_000,
                    },
                )
            )
            # The producer's id is asked for at once: on demand it takes librdkafka half a second.
            self._producer.list_topics(topic.name, timeout=TIMEOUT)
        self._partitions = itertools.cycle(range(topic.partitions))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._hear, name=f"yadtq-publisher-{queue}", daemon=True)
        self._thread.start()

    @property
    def topic(self) -> Topic:
        """The tasks topic that is written to."""
        return self._topic

    def send_chunk(self, record: bytes, acknowledged: Acknowledged | None = None) -> None:
        """Produce a chunk's record; waits while the buffer is full.

        Raises:
            BacklogError: the record is refused before it is sent.
        """
        # librdkafka's own partitioner would stick to one partition for a while.
        self._produce(self._topic.name, record, next(self._partitions), None, acknowledged)

    def send_job(self, key: str, value: bytes, acknowledged: Acknowledged | None = None) -> None:
        """Produce to the compacted topic of jobs: the last value of a key is kept."""
        self._produce(jobs_topic(self._queue), value, 0, key.encode(), acknowledged)

    def send_event(self, event: str, **facts: Any) -> None:
        """Write a line to the flight recorder. Never waits: events are worth less than work."""
        line = _encode({"event": event, "time": time.time(), **facts})
        try:
            self._producer.produce(events_topic(self._queue), line, partition=0)
        except BufferError:
            return

    def _produce(
        self, topic: str, value: bytes, partition: int, key: bytes | None, acknowledged: Acknowledged | None
    ) -> None:
        def on_delivery(error: KafkaError | None, message: Message) -> None:
            if acknowledged is not None:
                failed = self._failed(error) if error is not None else None
                acknowledged(failed, message.partition() or 0, message.offset() or 0)

        while True:
            try:
                with translate_kafka_errors(self._config):
                    self._producer.produce(topic, value, key=key, partition=partition, on_delivery=on_delivery)
                return
            except BufferError:
                # Full: the hearing thread makes room as the broker acknowledges.
                if self._closing.wait(0.005):
                    raise BacklogError("the queue is being closed, but Kafka has not taken all records yet") from None

    def _failed(self, error: KafkaError) -> BacklogError:
        return BacklogError(f"Kafka at {self._config.kafka} did not take a record: {error.str()}")

    def _hear(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(0.2)

    def flush(self, timeout: float) -> bool:
        """Wait until the broker has everything. False when it has not within timeout seconds."""
        return int(self._producer.flush(timeout)) == 0

    def close(self, timeout: float = TIMEOUT) -> bool:
        """Flush and stop. False when some records were not taken."""
        taken = self.flush(timeout)
        self._closing.set()
        self._thread.join()
        return taken
