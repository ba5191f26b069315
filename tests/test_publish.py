"""What the broker says of what it was sent, and who may go by it: a seal tells where a job's last records lie."""

from __future__ import annotations

import time
from typing import Any

import confluent_kafka
import pytest
import redis
import stacks
from waiting import stopped

from yadtq_nb import JobError, JobIncompleteError, LocalCluster
from yadtq_nb.backlog import publish
from yadtq_nb.backlog.connection import Topics
from yadtq_nb.backlog.publish import Publisher, Receipts
from yadtq_nb.backlog.reader import replay_jobs
from yadtq_nb.client import link
from yadtq_nb.errors import BacklogError
from yadtq_nb.model import Seal
from yadtq_nb.workbench.bench import Cursor


def test_flush_ends_after_every_sender_was_told_where_its_records_lie(cluster: LocalCluster) -> None:
    told = []

    def slowly(error: BacklogError | None, where: str, offset: int) -> None:
        time.sleep(0.1)
        told.append((error, where, offset))

    publisher = Publisher(cluster.config, "told")
    try:
        publisher.send_chunk(b"record", slowly)
        assert publisher.flush(30)
        assert told == [(None, f"{publisher.topic.id}/0", 0)]
    finally:
        publisher.close()


def test_record_that_lies_in_the_next_life_of_the_topic_is_not_taken_for_fed_in_this_one(cluster: LocalCluster) -> None:
    """A broker in memory was killed, and others have made its topic again: the producer goes on, and is not told."""
    if cluster.config.reading != "wake":
        pytest.skip("a broker with a disk does not forget the topic")
    topics = Topics(cluster.config, "lives")
    old = topics.ensure()
    fed = {0: Cursor(old.id, 0)}
    publisher = Publisher(cluster.config, "lives", fed=lambda: ("life", fed))
    try:
        while topics.ensure().id == old.id:
            topics.delete()
        new = topics.ensure()
        fed[0] = Cursor(old.id, 5)  # others have sent some in the old life, and they were fed
        for partition in range(1, old.partitions):
            fed[partition] = Cursor(old.id, 5)
        publisher.send_chunk(b"record")
        assert publisher.flush(30)
        assert not publisher.settle(3.0), "nobody has fed it"
        assert publisher.topic == new
        for partition in range(new.partitions):
            fed[partition] = Cursor(new.id, 5)
        assert publisher.settle(30)
    finally:
        publisher.close()
        topics.close()


@pytest.mark.parametrize("to_jobs", [False, True])
def test_record_that_is_said_to_be_there_but_not_where_is_sent_again(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, to_jobs: bool
) -> None:
    """librdkafka takes it for acknowledged when a later one is, and Kafka takes a later one first: KAFKA-15591."""

    class Believing(confluent_kafka.Producer):
        def produce(self, *args: Any, on_delivery: Any = None, **more: Any) -> None:
            if on_delivery is None or believed:
                super().produce(*args, on_delivery=on_delivery, **more)
            else:
                believed.append(on_delivery)

        def poll(self, timeout: float = -1) -> int:
            if len(believed) == 1:
                believed.append(None)
                believed[0](None, Placeless())
            return super().poll(timeout)

    class Placeless:
        def partition(self) -> int:
            return 0

        def offset(self) -> None:
            return None

    believed: list[Any] = []
    monkeypatch.setattr(publish, "Producer", Believing)
    publisher = Publisher(cluster.config, "placeless")
    receipts = Receipts()
    try:
        if to_jobs:
            publisher.send_job("key", b"record", receipts)
        else:
            publisher.send_chunk(b"record", receipts)
        assert publisher.flush(30)
        assert len(believed) == 2
        assert receipts.ends == {f"{publisher.topic.id}/0": 1}
        if to_jobs:
            assert list(replay_jobs(cluster.config, "placeless")) == [("key", b"record")]
        else:
            assert sum(publisher._topics.ends(publisher.topic).values()) == 1
    finally:
        publisher.close()


def test_feeders_are_rung_for_again_once_a_slow_broker_has_what_was_sent(
    stack: stacks.Servers, cluster: LocalCluster
) -> None:
    if cluster.config.reading != "wake":
        pytest.skip("feeders wait at a broker that wakes them")
    with cluster.queue() as queue, redis.Redis.from_url(cluster.config.redis) as client:

        def rung() -> int:
            return int(client.xinfo_stream(f"{{yadtq:{queue.name}}}:bell")["entries-added"])

        assert queue.submit(abs, -1).result(30) == 1
        time.sleep(0.5)  # rung for just now, they are not again
        before = rung()
        with stopped(stack.broker.pid):
            future = queue.submit(abs, -2)
            time.sleep(1.5)  # feeders have looked, and sleep
        assert future.result(30) == 2
        assert rung() >= before + 2


def test_broker_that_goes_away_while_a_producer_is_made_is_waited_for(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unlucky(confluent_kafka.Producer):
        def list_topics(self, *_: Any, **__: Any) -> Any:
            raise confluent_kafka.KafkaException(confluent_kafka.KafkaError(confluent_kafka.KafkaError._TRANSPORT))

    monkeypatch.setattr(publish, "Producer", Unlucky)
    with cluster.queue() as queue:
        assert queue.map(abs, range(20)).results(30) == list(range(20))


def test_entry_that_kafka_refuses_is_not_taken_for_safe(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(confluent_kafka.Producer):
        def produce(self, *args: Any, on_delivery: Any = None, **more: Any) -> None:
            sent.append(on_delivery)

        def poll(self, timeout: float = -1) -> int:
            while sent:
                sent.pop()(confluent_kafka.KafkaError(confluent_kafka.KafkaError.MSG_SIZE_TOO_LARGE), None)
            return super().poll(timeout)

    sent: list[Any] = []
    with cluster.queue() as queue:
        mailer = queue._link().mailer
        mailer.send_safely(Seal("job", 0))
        monkeypatch.setattr(publish, "Producer", Refusing)
        publisher = Publisher(cluster.config, queue.name)
        try:
            monkeypatch.setattr(mailer, "_publisher", lambda lane: publisher)
            with pytest.raises(BacklogError, match="did not take it"):
                mailer.send_safely(Seal("job", 0))
        finally:
            publisher.close()


def test_who_closes_before_kafka_has_all_is_told(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent(confluent_kafka.Producer):
        def produce(self, *args: Any, **more: Any) -> None:
            pass

    monkeypatch.setattr(publish, "Producer", Silent)
    monkeypatch.setattr(Publisher.close, "__defaults__", (0.1,))
    monkeypatch.setattr(link, "_CLOSE", 0.5)
    queue = cluster.queue()
    job, future = queue.map(abs, range(100)), queue.submit(abs, 1)
    queue.close()
    with pytest.raises(JobIncompleteError, match="the queue was closed before Kafka"):
        job.results(30)
    with pytest.raises(JobError, match="was not sent: the queue was closed before Kafka"):
        future.result(30)
    assert "has not said that it has the last" in caplog.text
