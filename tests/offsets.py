"""What is committed to Kafka."""

from __future__ import annotations

from confluent_kafka import Consumer, TopicPartition

from yadtq_nb import LocalCluster, Queue
from yadtq_nb.backlog.connection import Topic


def committed(cluster: LocalCluster, queue: Queue, topic: Topic) -> dict[int, int | None]:
    """Return the committed offset of each partition."""
    group = f"yadtq.{queue.name}" + (f".{topic.id}" if cluster.config.reading == "wake" else "")
    consumer = Consumer({"bootstrap.servers": cluster.config.kafka, "group.id": group, "enable.auto.commit": False})
    try:
        found = consumer.committed([TopicPartition(topic.name, p) for p in range(topic.partitions)], timeout=10)
    finally:
        consumer.close()
    return {place.partition: place.offset if place.offset >= 0 else None for place in found}
