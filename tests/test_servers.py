"""Servers fail and come back while a map of 3,000 tasks runs, on both stacks: every outcome is there, once.

Each task writes a line to a file outside of the system: how often it really ran is counted there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import stacks
from confluent_kafka.admin import AdminClient
from offsets import committed
from waiting import runs, stopped, traced, wait_until

from yadtq_nb import BacklogError, Job, JobState, LocalCluster, Queue, WorkbenchFullError
from yadtq_nb.backlog.connection import Topics
from yadtq_nb.backlog.reader import replay_jobs
from yadtq_nb.local.home import Home
from yadtq_nb.local.stack import Stack

COUNT = 3_000
#: What a task takes.
SECONDS = 0.002
#: Seconds that Kafka is away.
AWAY = 20.0
#: Seconds after which a map will not end any more.
LIMIT = 60


@pytest.fixture(scope="module", params=["local", "kafka"])
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[stacks.Servers]:
    """Servers of this module's own, for they are ended and started again."""
    if request.config.getoption("--stack") not in ("both", request.param):
        pytest.skip("not among the stacks that were asked for")
    with stacks.start(request.param, tmp_path_factory.mktemp(f"own-{request.param}")) as started:
        yield started


MakeNodes = Callable[..., LocalCluster]


@pytest.fixture
def make_nodes(servers: stacks.Servers, queue_name: str) -> Iterator[MakeNodes]:
    """Make workers, one of two slots unless said, on these servers; settings can be changed."""
    made: list[LocalCluster] = []

    def make(slots: int = 2, workers: int = 1, **changed: Any) -> LocalCluster:
        given = {name: getattr(servers.config, name) for name in servers.config.__struct_fields__}
        for name in ("kafka", "redis"):
            del given[name]
        kafka, store = servers.config.kafka, servers.config.redis
        made.append(LocalCluster(slots, workers, queue_name, kafka=kafka, redis=store, settings={**given, **changed}))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


def start_map(queue: Queue, audit: Path, *, chunksize: int = 5, count: int = COUNT, seconds: float = SECONDS) -> Job:
    """Map, and return when a tenth has run."""
    job = queue.map(traced, range(count), kwargs={"audit": str(audit), "seconds": seconds}, chunksize=chunksize)
    wait_until(lambda: len(runs(audit)) > count // 10, "tasks run")
    assert not job.wait(0), "what comes now comes in the middle of it"
    return job


def check(job: Job, audit: Path, *, again: int, count: int = COUNT) -> None:
    """Check that each outcome is there, once, and that at most so many tasks ran again."""
    assert job.results(timeout=LIMIT) == [x * x for x in range(count)]
    assert (job.progress.succeeded, job.progress.failed, job.progress.total) == (count, 0, count)
    assert job.to_frame().index.is_unique
    ran = Counter(runs(audit))
    assert ran.keys() == set(range(count)), "each task that has an outcome has run"
    assert sum(ran.values()) - count <= again


def test_broker_that_is_stopped_for_a_while_and_started_again(
    servers: stacks.Servers, make_nodes: MakeNodes, audit: Path, tmp_path: Path
) -> None:
    """Kafka has its data again. The local stack's broker has lost it: what was not fed is sent again."""
    # Little is let in at a time: the rest lies in Kafka when it goes.
    watermark = {"watermark_chunks": 50} if servers.name == "kafka" else {}
    with make_nodes(**watermark).queue() as queue:
        job = start_map(queue, audit)
        servers.broker.end(signal.SIGTERM if servers.name == "kafka" else signal.SIGKILL)
        ended = time.monotonic()
        late = tmp_path / "late"
        late.touch()
        sent_meanwhile = queue.map(traced, range(100), kwargs={"audit": str(late), "seconds": SECONDS})
        time.sleep(max(0.0, ended + AWAY - time.monotonic()))
        assert not sent_meanwhile.wait(0)
        servers.broker.start()
        check(job, audit, again=0)
        check(sent_meanwhile, late, again=0, count=100)


def test_cancel_stops_what_runs_while_the_broker_does_not_answer(
    servers: stacks.Servers, make_nodes: MakeNodes, audit: Path
) -> None:
    nodes = make_nodes()
    with nodes.queue() as queue, nodes.queue() as another:
        job = start_map(queue, audit, count=200, seconds=0.05)
        seen = another.job(job.name)
        cancelling = threading.Thread(target=job.cancel)
        with stopped(servers.broker.pid):
            cancelling.start()
            wait_until(lambda: seen.state is JobState.CANCELLED, seconds=15)
        cancelling.join(LIMIT)
        assert not cancelling.is_alive(), "it waits until Kafka has it, too"
        cancels = {key for key, _ in replay_jobs(servers.config, queue.name)}
        assert f"cancel/{job.id}" in cancels


def test_who_has_sent_nothing_cancels_a_job_while_the_broker_does_not_answer_and_is_told_so(
    servers: stacks.Servers, make_nodes: MakeNodes, audit: Path
) -> None:
    nodes = make_nodes()
    with nodes.queue() as queue, nodes.queue() as another:
        job = start_map(queue, audit, count=2000, seconds=0.1)
        seen = another.job(job.name)
        with stopped(servers.broker.pid):
            with pytest.raises(BacklogError):
                seen.cancel()
            assert seen.state is JobState.CANCELLED


def test_store_that_is_killed_and_started_again_with_its_append_only_file_after_longer_than_a_lease(
    servers: stacks.Servers, make_nodes: MakeNodes, audit: Path
) -> None:
    with make_nodes(lease=1.2, heartbeat=0.4).queue() as queue:
        job = start_map(queue, audit)
        servers.store.end(signal.SIGKILL)
        time.sleep(2.0)
        servers.store.start()
        check(job, audit, again=0)


def test_store_that_is_killed_and_comes_back_empty_in_the_middle_of_a_job(
    servers: stacks.Servers, make_nodes: MakeNodes, audit: Path
) -> None:
    """What was finished for good is lost with it, and brought back; who has heard it in time has it all the same."""
    cluster = make_nodes(doubt=2.0)
    with cluster.queue() as queue, cluster.queue() as other:
        job = start_map(queue, audit, seconds=0.008)
        job.want()
        topic = Topics(cluster.config, queue.name).ensure()
        wait_until(lambda: any(committed(cluster, queue, topic).values()), "a part is finished for good")
        assert not job.wait(0)
        servers.store.wipe()
        assert job.results(LIMIT) == [x * x for x in range(COUNT)]
        seen = other.job(job.id)
        wait_until(lambda: seen.state is not JobState.RUNNING, "the queue knows where it stands", LIMIT)
        lost = seen.lost
        assert seen.state is JobState.INCOMPLETE
        assert 0 < len(lost) == seen.progress.lost < COUNT
        before = Counter(runs(audit))
        assert before.keys() == set(range(COUNT))
        assert seen.retry() == len(lost)
        assert seen.results(LIMIT) == [x * x for x in range(COUNT)]
        assert (seen.state, seen.progress.succeeded) == (JobState.SUCCEEDED, COUNT)
        assert sorted((Counter(runs(audit)) - before).elements()) == lost, "no other has run again"


def test_lease_outlives_an_outage_of_the_store_also_when_another_node_is_back_first(
    servers: stacks.Servers, make_nodes: MakeNodes, audit: Path
) -> None:
    if servers.name == "kafka":
        pytest.skip("nothing of it touches the broker")
    cluster = make_nodes(slots=1, workers=2, lease=2.0, heartbeat=0.4)
    with cluster.queue() as queue:
        job = queue.map(traced, range(1), kwargs={"audit": str(audit), "seconds": 6.0})
        wait_until(lambda: runs(audit), "it runs")
        wait_until(lambda: sorted(queue.workers().busy) == [0, 1], "its node has said so")
        views = queue.workers()
        busy = int(views[views.busy == 1].pid.iloc[0])
        idle = views[views.busy == 0].index[0]
        servers.store.end(signal.SIGKILL)
        os.kill(busy, signal.SIGSTOP)
        try:
            time.sleep(2.5)
            servers.store.start()
            wait_until(lambda: queue.workers().heartbeat_age[idle] < 0.4, "the other is back")
            time.sleep(0.5)
        finally:
            os.kill(busy, signal.SIGCONT)
        check(job, audit, again=0, count=1)


def test_full_store_refuses_what_is_new_and_finishes_what_it_has(
    servers: stacks.Servers, make_nodes: MakeNodes, audit: Path
) -> None:
    def traced_with(x: int, _: str, *, audit: str) -> int:
        return traced(x, audit=audit, seconds=0.001)

    nodes = make_nodes()
    with nodes.queue() as queue, redis.Redis.from_url(servers.config.redis) as client:
        old = queue.map(abs, range(-5, 0), name="old")
        assert old.results(30) == [5, 4, 3, 2, 1]
        inbox = queue._link().inbox
        try:
            client.config_set("maxmemory", client.info("memory")["used_memory"] + 1_000_000)
            words = [os.urandom(1_000).hex() for _ in range(COUNT)]
            job = queue.map(traced_with, range(COUNT), words, kwargs={"audit": str(audit)}, chunksize=10)
            seen = -1
            while seen != (seen := len(runs(audit))) or not seen:
                time.sleep(1.0)
            assert 0 < seen < COUNT, "what is in is finished, the rest waits outside"
            wait_until(lambda: job.progress.succeeded == seen, "outcomes get in")
            # So far it is as full as lets single small things in.
            client.config_set("maxmemory", 1_000_000)
            with pytest.raises(WorkbenchFullError, match="maxmemory"):
                queue.map(abs, [1], name="new")
            assert queue.workers().status.tolist() == ["live"], "heartbeats get in"
            with nodes.queue() as another:  # as after a kernel was restarted
                assert another.job("old").results(30) == [5, 4, 3, 2, 1]
                another.job("old").delete()
            # As to a store that has been started again: what does not get in is told later, and news is heard.
            inbox.told(job.id, lambda store: store.put_blob("told again", b"x"))
            inbox._tell_again()
            assert inbox._untold
        finally:
            client.config_set("maxmemory", 0)
        check(job, audit, again=0)
        wait_until(lambda: not inbox._untold, "it is told once there is room")
        assert queue._link().store.blob("told again") == b"x"


def test_full_producer_queue_waits_for_the_broker(servers: stacks.Servers, make_nodes: MakeNodes, audit: Path) -> None:
    cluster = make_nodes(kafka_options={"queue.buffering.max.messages": 20})
    with cluster.queue() as queue:
        assert queue.submit(abs, -1).result(30) == 1
        with stopped(servers.broker.pid):
            job = queue.map(traced, range(COUNT), kwargs={"audit": str(audit), "seconds": SECONDS}, chunksize=2)
            time.sleep(2.0)
            assert len(queue._link().publisher()._producer) >= 20
        check(job, audit, again=0)


@pytest.mark.parametrize("node", ["reads", "is-away"])
def test_tasks_topic_that_is_deleted_is_made_again_and_filled_again(
    servers: stacks.Servers, make_nodes: MakeNodes, audit: Path, node: str
) -> None:
    if node == "is-away" and servers.name == "local":
        pytest.skip("the same as a broker in memory that is killed")
    watermark = {"watermark_chunks": 50} if servers.name == "kafka" else {}
    cluster = make_nodes(**watermark)
    with cluster.queue() as queue:
        job = start_map(queue, audit)
        if node == "is-away":
            cluster.workers[0].stop()
        admin = AdminClient({"bootstrap.servers": servers.config.kafka})
        topic = queue._link().publisher().topic.name
        admin.delete_topics([topic])[topic].result(20)
        if node == "is-away":
            cluster.workers[0].start()
        # A node that reads may die of it, with what it runs: librdkafka crashes in a consumer whose topic is deleted.
        check(job, audit, again=20)


def test_broker_store_and_node_that_are_killed_at_once(
    servers: stacks.Servers, make_nodes: MakeNodes, audit: Path
) -> None:
    cluster = make_nodes()
    with cluster.queue() as queue:
        job = start_map(queue, audit)
        servers.broker.end(signal.SIGKILL)
        servers.store.end(signal.SIGKILL)
        cluster.workers[0].kill()
        servers.store.start()
        servers.broker.start()
        check(job, audit, again=20)


def test_local_stack_that_is_killed_whole_and_started_again_by_the_next_queue(tmp_path: Path, audit: Path) -> None:
    home = Home(tmp_path / "stack")
    stack = Stack(home, slots=2, idle=lambda: None)
    try:
        with Queue(config=stack.ensure_up()) as queue:
            job = start_map(queue, audit)
            state = home.state()
            assert state is not None
            os.kill(state.pid, signal.SIGKILL)
            wait_until(lambda: not home.alive(), "all parts die with the keeper")
            stack.ensure_up()
            check(job, audit, again=20)
    finally:
        stack.down()
