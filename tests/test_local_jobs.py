"""Jobs on the local stack, with its real node: they outlive what the stack goes through."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Producer
from waiting import wait_until

from yadtq_nb import Job, LocalCluster, Queue
from yadtq_nb.backlog import publish
from yadtq_nb.backlog.connection import Topic, Topics
from yadtq_nb.backlog.reader import Reader
from yadtq_nb.client import inbox
from yadtq_nb.errors import BacklogError
from yadtq_nb.local.home import Home
from yadtq_nb.local.stack import Stack
from yadtq_nb.model import Seal
from yadtq_nb.workbench.bench import Workbench
from yadtq_nb.workbench.jobs import JobStore


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "stack")
    yield home
    Stack(home).down()


def slow(x: int, seconds: float) -> int:
    time.sleep(seconds)
    return x


def test_stack_does_not_stop_while_a_task_runs_and_stops_after_it(home: Home) -> None:
    stack = Stack(home, slots=1, idle=lambda: 4.0)
    with Queue(config=stack.ensure_up()) as queue:
        assert queue.submit(time.sleep, 6.0).result(timeout=30) is None
    wait_until(lambda: not home.alive(), "the stack runs on")
    assert stack.status().reason == "idle for 4 s"


def test_jobs_of_an_open_notebook_start_the_stack_that_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YADTQ_HOME", str(tmp_path / "stack"))
    stack = Stack(Home.of_this_environment())
    asks: list[Callable[[Job], object]] = [
        lambda job: job.results(30),
        lambda job: job.to_frame().shape,
        lambda job: job.progress.succeeded,
        lambda job: job.state,
        lambda job: job.errors().shape,
    ]
    try:
        with Queue() as queue:
            jobs = [queue.map(abs, range(3)) for _ in asks]
            wait_until(lambda: all(job.wait(0) for job in jobs))
            for ask, job in zip(asks, jobs, strict=True):
                assert stack.down()
                time.sleep(1.0)  # for so long it is taken to be up
                assert stack.status().state == "down"
                elsewhere = threading.Thread(target=repr, args=(job,))
                elsewhere.start()
                elsewhere.join()
                assert stack.status().state == "down", "a card in a thread must not start what somebody has ended"
                ask(job)
            jobs[0].extend([-3])
            assert jobs[0].results(30) == [0, 1, 2, 3]
    finally:
        stack.down()


def test_job_goes_on_after_the_whole_stack_was_killed(home: Home) -> None:
    stack = Stack(home, slots=2, idle=lambda: None)
    with Queue(config=stack.ensure_up()) as queue:
        job = queue.map(slow, range(40), kwargs={"seconds": 0.1}, name="sweep", chunksize=2)
        next(iter(job.as_completed()))
        state = home.state()
        assert state is not None
        os.kill(state.pid, signal.SIGKILL)
        wait_until(lambda: not home.alive(), "the stack runs on")
        with Queue(config=stack.ensure_up()) as again:
            assert again.job("sweep").results(timeout=30) == list(range(40))


def lives(queue: Queue) -> set[str]:
    """Return the ids of the tasks topics that its partitions are read from."""
    return {cursor.topic_id for cursor in queue._link().store.fed()[1].values()}


def await_another_life(queue: Queue, before: set[str]) -> None:
    """Wait until the tasks topic was made again, and send something now and then: it is when it has been read."""
    deadline, number = time.monotonic() + 60, 0
    while lives(queue) == before:
        assert time.monotonic() < deadline, "the topic was not made again"
        number += 1
        assert queue.submit(abs, -number).result(30) == number


def test_broker_in_memory_is_relieved_of_what_is_done_and_nothing_is_lost_on_the_way() -> None:
    with LocalCluster(slots=2) as cluster, cluster.queue() as queue:
        first = queue.submit(abs, -1)
        assert first.result(30) == 1
        before = lives(queue)
        assert queue.map(abs, range(2_400), chunksize=1).results(60) == list(range(2_400))
        await_another_life(queue, before)
        assert queue.map(abs, range(100)).results(30) == list(range(100))


def test_broker_in_memory_keeps_what_is_not_finished(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def wait() -> int:
        while not gate.exists():
            time.sleep(0.02)
        return 7

    with LocalCluster(slots=2) as cluster, cluster.queue() as queue:
        held = queue.submit(wait)
        assert queue.map(abs, range(2_400), chunksize=1).results(60) == list(range(2_400))
        before = lives(queue)
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            assert queue.submit(abs, -1).result(30) == 1
            assert lives(queue) == before, "a Redis that is emptied now must find the record of it in Kafka"
        gate.touch()
        assert held.result(30) == 7
        await_another_life(queue, before)


def test_job_that_was_cancelled_before_all_was_fed_is_retried_though_the_broker_was_relieved_of_it() -> None:
    def wait(x: int) -> int:
        time.sleep(0.02)
        return x

    with LocalCluster(slots=2, settings={"watermark_chunks": 50}) as cluster, cluster.queue() as queue:
        store = queue._link().store
        job = queue.map(wait, range(2_500), chunksize=1)
        wait_until(lambda: store.record(job.id).sealed)
        job.cancel()
        await_another_life(queue, lives(queue))
        done = job.progress.succeeded
        assert 0 < done < 2_000
        assert job.retry(abs) == 2_500 - done
        assert job.results(60) == list(range(2_500))


def test_job_that_was_cancelled_is_retried_from_the_log_while_nobody_reads_it() -> None:
    with LocalCluster(slots=1, settings={"watermark_chunks": 10}) as cluster, cluster.queue() as queue:
        assert queue.submit(abs, -1).result(30) == 1
        node = psutil.Process(cluster.workers[0].pid)
        node.suspend()
        job = queue.map(abs, range(-2_400, 0), chunksize=1)  # more than a short fetch finds in a partition of Tansu's
        wait_until(lambda: queue._link().store.record(job.id).sealed)
        job.cancel()
        assert job.retry() == 2_400
        node.resume()
        assert job.results(60) == list(range(2_400, 0, -1))


def test_topic_is_not_deleted_while_somebody_reads_its_log() -> None:
    with LocalCluster(slots=2) as cluster, cluster.queue() as queue:
        assert queue.map(abs, range(2_400), chunksize=1).results(60) == list(range(2_400))
        before = lives(queue)
        with queue._link().store.reading_log("normal"):
            deadline = time.monotonic() + 8
            while time.monotonic() < deadline:
                assert queue.submit(abs, -1).result(30) == 1
                assert lives(queue) == before
        await_another_life(queue, before)
        # Nor is it read while it is being deleted.
        bench = Workbench(cluster.config, queue.name, "node")
        assert bench.begin_deletion()
        threading.Timer(0.5, bench.end_deletion).start()
        with queue._link().store.reading_log("normal"):
            assert not queue._link().store._is_being_deleted("normal")
            assert not bench.begin_deletion()


def test_what_the_broker_in_memory_forgets_before_it_is_fed_is_sent_again() -> None:
    with LocalCluster(slots=1, workers=1) as cluster, cluster.queue() as queue:
        assert queue.submit(abs, -1).result(30) == 1
        cluster.workers[0].stop()
        job = queue.map(abs, range(50), chunksize=5)
        link = queue._link()
        wait_until(lambda: (record := link.store.record(job.id)) and record.sealed, "the broker has everything")
        assert not link.publisher().settle(0), "and nobody has fed it"
        cluster.kill_broker()
        cluster.restart_broker()
        cluster.workers[0].start()
        assert job.results(60) == list(range(50))


def test_job_is_not_lost_while_its_client_cannot_reach_the_broker_that_forgot_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbox, "_SENDING", 0.2)
    with LocalCluster(slots=1, workers=1, settings={"doubt": 1.0}) as cluster, cluster.queue() as queue:
        assert queue.submit(abs, -1).result(30) == 1
        cluster.workers[0].stop()
        job = queue.map(abs, range(50), chunksize=5)
        link = queue._link()
        wait_until(lambda: (record := link.store.record(job.id)) and record.sealed, "the broker has everything")
        cluster.kill_broker()
        topics = link.publisher()._topics
        reached, away = topics.ensure, threading.Event()

        def ensure() -> Topic:
            if not away.is_set():
                raise BacklogError("no way to the broker")
            return reached()

        monkeypatch.setattr(topics, "ensure", ensure)
        cluster.restart_broker()
        cluster.workers[0].start()
        time.sleep(6.0)  # the node has looked at the topic, and found it empty
        away.set()
        assert job.results(60) == list(range(50))


def test_what_was_fed_just_before_redis_lost_its_last_second_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The store is frozen while it writes its file, so to say, and the broker is gone before its chunks are read again.
    monkeypatch.setattr(publish, "ROLLBACK", 60.0)
    with LocalCluster(slots=1, workers=1) as cluster, cluster.queue() as queue:
        assert queue.submit(abs, -1).result(30) == 1
        cluster.workers[0].stop()
        job = queue.map(slow, range(12), kwargs={"seconds": 1.0}, chunksize=6)
        link = queue._link()
        wait_until(lambda: (record := link.store.record(job.id)) and record.sealed, "the broker has everything")
        time.sleep(0.5)
        before, store = tmp_path / "before", cluster._home.store
        shutil.copytree(store, before)
        cluster.workers[0].start()
        assert link.publisher().settle(30), "all is fed"
        cluster.workers[0].kill()
        cluster.workers[0].stop()
        cluster.kill_store()
        shutil.rmtree(store)
        shutil.copytree(before, store)
        cluster.kill_broker()
        cluster.restart_store()
        cluster.restart_broker()
        cluster.workers[0].start()
        assert job.results(60) == list(range(12))


def test_what_redis_lost_of_jobs_with_its_last_second_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "ROLLBACK", 60.0)  # the last second of a machine that is slow, so to say
    monkeypatch.setattr(inbox, "_SENDING", 0.0)
    seal, seen = JobStore.seal, list[bool]()

    def looked_at(store: JobStore, entry: Seal) -> None:
        record = store.record(entry.id)
        seen.append(record is not None and inbox.is_incomplete(record))
        seal(store, entry)

    gate = threading.Event()

    def items() -> Iterator[int]:
        yield from range(4)
        gate.wait()

    with LocalCluster(slots=1, workers=1) as cluster, cluster.queue() as queue:
        drawn = queue.map(slow, items(), kwargs={"seconds": 0.0}, chunksize=2)
        wait_until(lambda: drawn.progress.succeeded == 4)
        stopped = queue.map(slow, range(100), kwargs={"seconds": 0.5}, chunksize=1)
        wait_until(lambda: stopped.progress.succeeded > 0)
        time.sleep(0.5)
        before, store = tmp_path / "before", cluster._home.store
        shutil.copytree(store, before)
        gate.set()
        wait_until(lambda: (record := queue._link().store.record(drawn.id)) and record.ended)
        stopped.cancel()
        new = queue.starmap(slow, [(n, 0.0) for n in range(4)], name="new")
        assert new.results(30) == list(range(4))
        monkeypatch.setattr(JobStore, "seal", looked_at)
        cluster.kill_store()
        shutil.rmtree(store)
        shutil.copytree(before, store)
        cluster.restart_store()
        with cluster.queue() as other:
            assert other.job(drawn.id).results(30) == list(range(4))
            wait_until(lambda: other.job(stopped.id).state == "cancelled")
            wait_until(lambda: "new" in set(other.jobs().index), "it is told a moment after the others")
            assert other.job("new").results(30) == list(range(4))
            record = other._link().store.record(new.id)
            assert record is not None
            assert record.parameters == ("x", "seconds")
        assert seen
        assert not any(seen), "nobody takes a job that is told again for one whose client has died"


def test_what_is_sent_to_a_deleted_topic_does_not_get_in_the_way_of_the_next_one() -> None:
    """Tansu takes records for a topic that is not there, and gives them to the next one of that name."""
    with LocalCluster(slots=1, workers=0) as cluster:
        topics = Topics(cluster.config, "another")
        first = topics.ensure()
        producer = Producer({"bootstrap.servers": cluster.config.kafka, "linger.ms": 50})
        producer.produce(first.name, b"first", partition=0)
        assert producer.flush(30) == 0
        topics.delete()
        for number in range(20):  # in one batch
            producer.produce(first.name, b"late %d" % number, partition=0)
        assert producer.flush(30) == 0
        second = topics.ensure()
        sent = [b"second %d" % number for number in range(20)]
        for record in sent:
            producer.produce(second.name, record, partition=0)
            assert producer.flush(30) == 0
        reader, read = Reader(cluster.config, "another", second), list[tuple[int, bytes | None]]()
        reader.assign({0: 0})
        wait_until(lambda: read.extend((r.offset, r.value) for r in reader.poll(0.5, 100)) or len(read) >= len(sent))
        reader.close()
        topics.close()
        assert read == list(enumerate(sent))


def test_of_topics_that_were_made_at_once_all_use_the_same() -> None:
    with LocalCluster(slots=1, workers=0) as cluster:
        topics = Topics(cluster.config, "another")
        first = topics.ensure()
        topics._create(topics._new_name())  # as another would who has not found one just before
        other = Topics(cluster.config, "another")
        assert other.ensure() == topics.ensure() == first
        topics.delete()
        assert other._describe() == (None, False), "and none comes back when it is deleted"
        topics.close()
        other.close()


def test_what_lies_in_the_next_life_of_the_topic_is_not_taken_for_what_was_fed_in_the_last() -> None:
    with LocalCluster(slots=1, workers=1) as cluster, cluster.queue() as queue:
        assert [queue.submit(abs, -n).result(30) for n in range(12)] == list(range(12))
        cluster.workers[0].stop()
        topics = Topics(cluster.config, queue.name)
        topics.delete()
        topics.ensure()
        futures = [queue.submit(abs, -n) for n in range(12)]
        publisher = queue._link().publisher()
        assert publisher.flush(30), "the broker has them, at offsets that were fed long ago in the life before"
        assert not publisher.settle(0.5), "and nobody has fed them"
        topics.delete()
        cluster.workers[0].start()
        assert [future.result(30) for future in futures] == list(range(12))
