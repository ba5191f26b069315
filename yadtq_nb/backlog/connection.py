"""Settings and errors at Kafka's door, and the topics of a queue."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, NewTopic

from yadtq_nb.config import Config
from yadtq_nb.errors import BacklogError

#: Seconds that Kafka may take to answer before it counts as away.
TIMEOUT: Final = 10.0


class Topic(msgspec.Struct, frozen=True):
    """The tasks topic of a queue, in its present life: made again, it has another id and its offsets start at 0."""

    name: str
    id: str
    partitions: int


@contextlib.contextmanager
def translate_kafka_errors(config: Config) -> Iterator[None]:
    """Raise ours, from theirs."""
    try:
        yield
    except KafkaException as exc:
        error = exc.args[0] if exc.args else exc
        reason = error.str() if isinstance(error, KafkaError) else str(error)
        raise BacklogError(
            f"Kafka at {config.kafka} cannot be used: {reason}; check YADTQ_KAFKA (or kafka=) and the broker"
        ) from exc
    except TimeoutError as exc:
        raise BacklogError(
            f"Kafka at {config.kafka} did not answer in time; check YADTQ_KAFKA (or kafka=) and the broker"
        ) from exc


def settings(config: Config, **more: Any) -> dict[str, Any]:
    """Return librdkafka's settings: ours, then the user's."""
    quiet = {"log_level": 2, "log.connection.close": False}
    return {"bootstrap.servers": config.kafka, **quiet, **more, **config.kafka_options}


def tasks_topic(queue: str) -> str:
    """Chunks that wait."""
    return f"yadtq.{queue}.tasks"


def jobs_topic(queue: str) -> str:
    """Manifests, seals and blobs, compacted: what a wiped workbench is filled from again."""
    return f"yadtq.{queue}.jobs"


def events_topic(queue: str) -> str:
    """The flight recorder."""
    return f"yadtq.{queue}.events"


def ensure_topics(config: Config, queue: str) -> Topic:
    """Make the queue's topics where they are missing, and return the tasks topic as it is.

    Raises:
        BacklogError: Kafka cannot be reached or refuses.
    """
    with translate_kafka_errors(config):
        # The futures of these calls fail once the client is collected: it is kept until the end.
        admin = AdminClient(settings(config))
        found = _describe(admin, tasks_topic(queue))
        if found is None:
            _create(admin, config, queue)
            found = _describe(admin, tasks_topic(queue))
        if found is None:
            raise BacklogError(f"topic {tasks_topic(queue)} was made on {config.kafka}, but is not shown there")
        return found


def _describe(admin: AdminClient, name: str) -> Topic | None:
    (future,) = admin.describe_topics(TopicCollection([name]), request_timeout=TIMEOUT).values()
    try:
        found = future.result(TIMEOUT)
    except KafkaException as exc:
        if exc.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return None
        raise
    return Topic(name, str(found.topic_id), len(found.partitions)) if found.partitions else None


def _create(admin: AdminClient, config: Config, queue: str) -> None:
    replication = config.replication or -1
    kept: dict[str, str] = {"retention.ms": "-1", "retention.bytes": "-1"}
    # What waits must never vanish by age; only what happened may.
    topics = [
        NewTopic(tasks_topic(queue), config.partitions, replication, config=kept),
        NewTopic(jobs_topic(queue), 1, replication, config={"cleanup.policy": "compact"}),
        NewTopic(events_topic(queue), 1, replication),
    ]
    for future in admin.create_topics(topics, request_timeout=TIMEOUT).values():
        try:
            future.result(TIMEOUT)
        except KafkaException as exc:
            # Another node or client was first.
            if exc.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
