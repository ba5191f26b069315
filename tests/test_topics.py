"""What an administrator or another program does to a queue's topics on Apache Kafka: nothing stalls, all is told."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
import stacks
from confluent_kafka import KafkaError, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, OffsetSpec  # type: ignore[attr-defined]  # exported, but not in __all__
from waiting import stopped, wait_until

from yadtq_nb import JobIncompleteError, LocalCluster
from yadtq_nb.backlog.connection import Topics
from yadtq_nb.backlog.reader import replay_jobs, replay_tasks
from yadtq_nb.errors import BacklogError

#: Seconds after which something hangs.
LIMIT = 60


@pytest.fixture
def apache(stack: stacks.Servers, cluster: LocalCluster) -> LocalCluster:
    """A worker on Apache Kafka, which has run something in each partition."""
    if stack.name == "local":
        pytest.skip("the local stack's topics are its own business")
    with cluster.queue() as queue:
        assert queue.map(abs, range(20), chunksize=1).results(LIMIT) == list(range(20))
    return cluster


def test_records_that_were_deleted_before_they_were_read_are_passed_by_and_their_job_says_what_is_lost(
    apache: LocalCluster,
) -> None:
    with apache.queue() as queue:
        publisher = queue._link().publisher()
        node = psutil.Process(apache._part(apache.workers[0].name).pid)
        node.suspend()
        try:
            lost = queue.map(abs, range(20), chunksize=1)
            wait_until(lambda: sum(publisher._topics.ends(publisher.topic).values()) >= 40)
            ends = publisher._topics.ends(publisher.topic)
            places = [TopicPartition(publisher.topic.name, partition, end) for partition, end in ends.items()]
            admin = AdminClient({"bootstrap.servers": apache.config.kafka})
            for done in admin.delete_records(places).values():
                done.result(LIMIT)
        finally:
            node.resume()
        assert queue.map(abs, range(40), chunksize=1).results(LIMIT) == list(range(40))
        with pytest.raises(JobIncompleteError):
            lost.results(LIMIT)
        # Fetches that waited at the broker may have brought the first of each partition.
        assert lost.lost


def test_broker_that_has_lost_its_last_records_is_read_again_from_what_was_finished(apache: LocalCluster) -> None:
    with apache.queue() as queue:
        link = queue._link()
        node = psutil.Process(apache._part(apache.workers[0].name).pid)
        node.suspend()
        try:
            # To whoever reads there, it is the same as a log that has become shorter.
            cursors = {p: f"{c.topic_id}:{c.offset + 100}" for p, c in link.store.fed()[1].items()}
            with link.store._redis.use() as client:
                client.hset(link.store._redis.key("cursor"), mapping=cursors)
        finally:
            node.resume()
        assert queue.map(abs, range(40), chunksize=1).results(LIMIT) == list(range(40))


def test_records_of_what_was_finished_long_ago_are_deleted_and_no_others(
    stack: stacks.Servers, make_cluster: stacks.MakeCluster, tmp_path: Path
) -> None:
    if stack.name == "local":
        pytest.skip("the local broker's topics are made again instead")
    cluster = make_cluster(slots=2, workers=1, settings={"keep": 3.0})
    go_on = tmp_path / "go-on"

    def wait(_: int) -> int:
        while not go_on.exists():
            time.sleep(0.05)
        return 1

    with cluster.queue() as queue:
        assert queue.map(abs, range(20), chunksize=1).results(LIMIT) == list(range(20))
        topics = queue._link().publisher()._topics
        topic = topics.ensure()
        before = topics.ends(topic)
        slow = queue.submit(wait, 0)

        def starts() -> dict[int, int]:
            # What follows moves the marks, which come with a commit.
            assert queue.map(abs, range(8), chunksize=1).results(LIMIT) == list(range(8))
            return topics._offsets(topic, range(topic.partitions), OffsetSpec.earliest())  # type: ignore[no-untyped-call]  # brings no types

        wait_until(lambda: all(start >= before[p] for p, start in starts().items()), seconds=LIMIT)
        wait_until(lambda: sum(start > before[p] for p, start in starts().items()) == 3, seconds=LIMIT)
        assert sum(start == before[p] for p, start in starts().items()) == 1, "where one waits that is not finished"
        go_on.touch()
        assert slow.result(LIMIT) == 1
        wait_until(lambda: all(start > before[p] for p, start in starts().items()), seconds=LIMIT)


def test_partitions_that_are_added_are_read(apache: LocalCluster) -> None:
    with apache.queue() as queue:
        admin = AdminClient({"bootstrap.servers": apache.config.kafka})
        for done in admin.create_partitions([NewPartitions(f"yadtq.{queue.name}.tasks", 7)]).values():  # type: ignore[no-untyped-call]  # brings no types
            done.result(LIMIT)
        wait_until(lambda: queue._link().publisher()._topics.ensure().partitions == 7)
        with apache.queue() as another:  # a client that sees them
            assert another.map(abs, range(40), chunksize=1).results(LIMIT) == list(range(40))
            assert another._link().publisher().topic.partitions == 7


def test_transactions_of_others_on_our_topics_hold_up_nobody(apache: LocalCluster) -> None:
    with apache.queue() as queue:
        producer = Producer({"bootstrap.servers": apache.config.kafka, "transactional.id": queue.name})
        producer.init_transactions(LIMIT)

        def write(*topics: str) -> None:
            producer.begin_transaction()
            for topic in topics:
                producer.produce(f"yadtq.{queue.name}.{topic}", b"junk", key=b"junk", partition=0)
            assert producer.flush(LIMIT) == 0

        write("tasks", "jobs", "dead")
        producer.commit_transaction(LIMIT)
        # Their last offsets are those of no records now.
        assert len(list(replay_jobs(apache.config, queue.name))) > 1
        assert len(list(replay_tasks(apache.config, queue.name, "normal"))) > 20
        wait_until(lambda: len(queue.dead()) == 1)
        write("tasks", "jobs")
        try:
            assert queue.map(abs, range(20), chunksize=1).results(LIMIT) == list(range(20))
        finally:
            producer.abort_transaction(LIMIT)


@pytest.mark.parametrize("which", ["jobs", "events", "dead"])
def test_topic_beside_the_tasks_that_is_deleted_is_made_again(apache: LocalCluster, which: str) -> None:
    with apache.queue() as queue:
        admin = AdminClient({"bootstrap.servers": apache.config.kafka})
        topic = f"yadtq.{queue.name}.{which}"
        for done in admin.delete_topics([topic]).values():
            done.result(LIMIT)
        wait_until(lambda: topic not in admin.list_topics(timeout=LIMIT).topics)
        job = queue.map(abs, range(20), chunksize=1)
        assert job.results(LIMIT) == list(range(20))
        wait_until(lambda: topic in admin.list_topics(timeout=LIMIT).topics)
        if which == "jobs":
            wait_until(lambda: f"seal/{job.id}" in {key for key, _ in replay_jobs(apache.config, queue.name)})


def test_broker_that_goes_away_while_topics_are_made_for_a_first_map_is_waited_for(
    stack: stacks.Servers, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Topics._create
    tried = []

    def unlucky(topics: Topics, tasks: str) -> None:
        tried.append(tasks)
        if len(tried) > 1:
            create(topics, tasks)
            return
        cut = threading.Timer(0.3, _cut_connections, [int(stack.broker.address.rpartition(":")[2])])
        with stopped(stack.broker.pid):
            cut.start()
            try:
                create(topics, tasks)
            except KafkaException:
                tried.append("and failed")
                raise
            finally:
                cut.join()

    if not stack.processes:
        pytest.skip("the broker is no process of ours")
    monkeypatch.setattr(Topics, "_create", unlucky)
    with cluster.queue() as queue:
        # A lane that nobody has used yet.
        assert queue.options(priority="low").map(abs, range(20)).results(LIMIT) == list(range(20))
    assert tried[1] == "and failed"


def _cut_connections(port: int) -> None:
    """Cut this process's connections to a port, as a server does that is killed."""
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == port:
            with socket.socket(fileno=os.dup(connection.fd)) as cut, contextlib.suppress(OSError):
                cut.shutdown(socket.SHUT_RDWR)


def test_client_that_has_heard_of_no_controller_is_replaced(stack: stacks.Servers, queue_name: str) -> None:
    class Deaf:
        def list_topics(self, timeout: float) -> None:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "waiting for controller"))

        def describe_topics(self, topics: TopicCollection, **_: float) -> dict[str, Future[None]]:
            futures: dict[str, Future[None]] = {name: Future() for name in topics.topic_names}
            for future in futures.values():
                future.set_exception(KafkaException(KafkaError(KafkaError._TIMED_OUT, "waiting for controller")))
            return futures

        def poll(self, timeout: float) -> None:
            """There is nothing to hear."""

    topics = Topics(stack.config, queue_name)
    topic = topics.ensure()
    topics._admin = Deaf()  # type: ignore[assignment]  # as librdkafka's is for five minutes
    with pytest.raises(BacklogError, match="waiting for controller"):
        topics.ensure()
    assert topics.ensure() == topic
    topics.close()
