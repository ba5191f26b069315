"""The floor: the same hops with no task queue in them.

A client produces records, a worker process consumes them and writes an answer for each to a Redis stream, which the
client reads. No function travels, nothing is leased, signed or retried: a real queue can only be slower.
"""

from __future__ import annotations

import multiprocessing
import pickle
import uuid
from multiprocessing.synchronize import Event
from typing import Any

import redis
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from yadtq_nb import Config

PARTITIONS = 4


class Floor:
    """The worker process and its client, for one `with` block."""

    def __init__(self, config: Config) -> None:
        name = f"floor-{uuid.uuid4().hex[:8]}"
        admin = AdminClient({"bootstrap.servers": config.kafka})
        for future in admin.create_topics([NewTopic(name, PARTITIONS, 1)]).values():
            future.result(20)
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        self._worker = context.Process(target=_work, args=(config, name, ready))
        self._worker.start()
        ready.wait(30)
        self._client = _Client(config, name)

    def __enter__(self) -> Floor:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.send(b"stop")
        self._worker.join(10)
        self._client.close()

    def there_and_back(self, items: int, chunk: int) -> None:
        """Send items in chunks, and wait for all answers."""
        self._client.there_and_back(items, chunk)


class _Client:
    def __init__(self, config: Config, name: str) -> None:
        self._redis: Any = redis.Redis.from_url(config.redis, protocol=2)
        settings = {"linger.ms": 0, "enable.idempotence": True, "queue.buffering.max.messages": 2_000_000}
        self._producer = Producer({"bootstrap.servers": config.kafka, **settings})
        self._producer.list_topics(name, timeout=10)
        self._name = name
        self._last = "0"
        self._sent = 0

    def send(self, body: bytes) -> None:
        self._producer.produce(self._name, body, partition=self._sent % PARTITIONS)
        self._producer.poll(0)
        self._sent += 1

    def there_and_back(self, items: int, chunk: int) -> None:
        for first in range(0, items, chunk):
            self.send(pickle.dumps(list(range(first, first + chunk))))
        got = 0
        while got < items:
            for _, entries in self._redis.xread({self._name: self._last}, count=5000, block=5000) or []:
                for self._last, fields in entries:  # the last one read is where reading goes on
                    got += len(pickle.loads(fields[b"v"]))

    def close(self) -> None:
        self._producer.flush(10)
        self._redis.delete(self._name)
        self._redis.close()


def _work(config: Config, name: str, ready: Event) -> None:
    store: Any = redis.Redis.from_url(config.redis)
    wait = {"fetch.wait.max.ms": 1} if config.reading == "wake" else {}
    consumer = Consumer({"bootstrap.servers": config.kafka, "group.id": name, "enable.auto.commit": False, **wait})
    consumer.assign([TopicPartition(name, partition, 0) for partition in range(PARTITIONS)])
    consumer.poll(1.0)
    ready.set()
    while True:
        first = consumer.poll(0.5)
        if first is None:
            continue
        pipe = store.pipeline(transaction=False)
        for message in [first, *consumer.consume(999, 0)]:
            body = message.value()
            if body == b"stop":
                pipe.execute()
                consumer.close()
                return
            pipe.xadd(name, {"v": pickle.dumps([x + 1 for x in pickle.loads(body)])})
        pipe.execute()
