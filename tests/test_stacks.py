"""The servers that the other tests run on are what they are said to be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import stacks
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from redis import Redis
from stacks import MakeCluster

FAKE = Path(__file__).with_name("fake_worker.py")


def test_record_goes_through_the_broker_and_back(stack: stacks.Servers, queue_name: str) -> None:
    servers = {"bootstrap.servers": stack.config.kafka}
    admin = AdminClient(servers)  # kept in a name: its futures fail once it is gone
    admin.create_topics([NewTopic(queue_name, num_partitions=1, replication_factor=1)])[queue_name].result(20)
    producer = Producer({**servers, "enable.idempotence": True})
    producer.produce(queue_name, b"sent", partition=0)
    assert producer.flush(20) == 0
    consumer = Consumer({**servers, "group.id": queue_name})
    try:
        consumer.assign([TopicPartition(queue_name, 0, 0)])
        message = consumer.poll(20)
    finally:
        consumer.close()
    assert message is not None
    assert message.value() == b"sent"


def test_store_keeps_an_append_only_file_and_evicts_nothing(stack: stacks.Servers) -> None:
    with Redis.from_url(stack.config.redis) as store:
        assert store.config_get("appendonly", "maxmemory-policy") == {
            "appendonly": "yes",
            "maxmemory-policy": "noeviction",
        }


def test_each_stack_is_read_as_suits_its_broker(stack: stacks.Servers) -> None:
    assert stack.config.reading == ("wake" if stack.name == "local" else "poll")


def test_cluster_serves_a_queue_of_its_own_on_the_shared_servers(
    make_cluster: MakeCluster, stack: stacks.Servers, queue_name: str
) -> None:
    cluster = make_cluster(1, 2, worker_command=[sys.executable, str(FAKE)])
    assert cluster.config == stack.config
    assert len({worker.pid for worker in cluster.workers}) == 2
    assert queue_name in cluster.log("node-1")


def test_missing_service_skips_on_a_laptop_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception):
        stacks.missing("no java")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception):
        stacks.missing("no java")
