"""Redis cuts off all its clients again and again, on both stacks: calls wait, jobs go on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import redis

from yadtq_nb import LocalCluster, WorkbenchError
from yadtq_nb.model import Lane


@pytest.fixture
def cut(cluster: LocalCluster) -> Iterator[None]:
    """All connections to Redis are cut ten times a second while the test runs."""
    over = threading.Event()
    client = redis.Redis.from_url(cluster.config.redis)

    def run() -> None:
        while not over.wait(0.1):
            with contextlib.suppress(redis.RedisError):
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    thread = threading.Thread(target=run)
    thread.start()
    yield
    over.set()
    thread.join()
    client.close()


@pytest.mark.usefixtures("cut")
def test_maps_that_are_made_while_connections_are_cut_give_all_results(cluster: LocalCluster) -> None:
    for number in range(5):
        with cluster.queue() as queue:
            job = queue.map(abs, range(-40, 0), name=f"cut-{number}")
            assert job.results(timeout=30) == list(range(40, 0, -1))
            assert queue.job(f"cut-{number}").results(timeout=30) == list(range(40, 0, -1))


@pytest.mark.usefixtures("cut")
def test_job_is_not_incomplete_to_the_client_that_sends_it_though_the_queue_was_not_told_for_long(
    cluster: LocalCluster,
) -> None:
    def draw() -> Iterator[int]:
        for x in range(40):
            time.sleep(0.12)
            yield x

    job = cluster.queue().map(abs, draw(), chunksize=1)
    store = redis.Redis.from_url(cluster.config.redis)
    while not job.wait(0.02):
        with contextlib.suppress(redis.RedisError):  # as when it has lapsed
            store.delete(f"{{yadtq:{cluster.queue().name}}}:job:{job.id}:sending")
    store.close()
    assert job.results(timeout=10) == list(range(40))


@pytest.mark.parametrize("lane", ["normal", "low"])
def test_what_is_sent_first_waits_for_a_store_that_is_away_for_a_moment(lane: Lane) -> None:
    with LocalCluster(slots=1, workers=1) as cluster, cluster.queue() as queue:
        link = queue._link()
        cluster.kill_store()
        back = threading.Timer(1.5, cluster.restart_store)
        back.start()
        assert link.publisher(lane).topic.partitions > 0
        back.join()


def test_results_of_a_job_that_has_ended_are_there_once_the_store_is_back() -> None:
    with LocalCluster(slots=1) as cluster, cluster.queue() as queue:
        job = queue.map(abs, range(10))
        assert job.wait(30)  # counted, and not fetched yet
        cluster.kill_store()
        with pytest.raises(WorkbenchError):
            job.results(30)
        cluster.restart_store()
        assert job.results(30) == list(range(10))
