"""Priorities, on both stacks: what is high goes first, what is low last, and neither holds up the other."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import redis
from offsets import committed
from stacks import MakeCluster
from waiting import wait_until

from yadtq_nb import JobState, LocalCluster
from yadtq_nb.backlog.connection import Topics

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

LIMIT = 60


def write(name: str, audit: str, gate: str, seconds: float) -> str:
    """Write down who runs, then wait at the gate, or for a while."""
    with open(audit, "a") as file:
        file.write(f"{name}\n")
    time.sleep(seconds)
    while gate and not Path(gate).exists():
        time.sleep(0.01)
    return name


def test_lines_are_served_in_order_of_priority(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=1, workers=1)
    queue, audit, gate = cluster.queue(), tmp_path / "audit", tmp_path / "gate"
    first = queue.submit(write, "first", str(audit), str(gate), 0)
    wait_until(audit.exists)
    jobs = [
        queue.map(write, [priority] * 6, [str(audit)] * 6, [""] * 6, [0] * 6, chunksize=2, priority=priority)
        for priority in ("low", "normal", "high")
    ]
    wait_until(lambda: all((record := queue._link().store.record(job.id)) and record.fed == 6 for job in jobs))
    gate.touch()
    assert first.result(LIMIT) == "first"
    for job in jobs:
        job.results(LIMIT)
    assert audit.read_text().split() == ["first"] + ["high"] * 6 + ["normal"] * 6 + ["low"] * 6
    frame = queue.jobs()
    assert [frame.priority[job.name] for job in jobs] == ["low", "normal", "high"]


def test_what_is_high_overtakes_a_long_backlog_and_whatever_fills_the_workbench(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=2, workers=1, settings={"watermark_chunks": 20})
    queue = cluster.queue()
    # Long, and sent whole: on Kafka most of it waits there.
    backlog = queue.map(time.sleep, [0.02] * 3_000, chunksize=1, priority="low")
    wait_until(lambda: backlog.progress.succeeded > 20)
    for priority in ("normal", "high"):
        before = backlog.progress.succeeded
        assert queue.options(priority=priority).submit(abs, -7).result(LIMIT) == 7
        assert queue.map(abs, range(-9, 0), priority=priority).results(LIMIT) == list(range(9, 0, -1))
        assert backlog.progress.succeeded < before + 1_000, "not behind the backlog"
    backlog.cancel()


def test_lanes_outlive_a_restart_of_the_node_and_a_wipe_of_redis(cluster: LocalCluster) -> None:
    queue = cluster.queue()
    assert queue.map(abs, [-1], priority="high").results(LIMIT) == [1]
    cluster.workers[0].stop()
    job = queue.map(abs, range(-20, 0), priority="high", chunksize=2, name="kept")
    wait_until(lambda: job._link.store.record(job.id).sealed)
    client = redis.Redis.from_url(cluster.config.redis)
    client.delete(*client.keys(f"{{yadtq:{queue.name}}}:*"))
    cluster.workers[0].start()
    assert job.results(LIMIT) == list(range(20, 0, -1))
    assert job.state is JobState.SUCCEEDED
    client.close()


def test_lost_tasks_of_a_high_job_are_brought_back_from_its_own_topic(cluster: LocalCluster) -> None:
    queue, gate = cluster.queue(), cluster._home.path / "gate"

    def wait(x: int) -> int:
        while x >= 20 and not gate.exists():
            time.sleep(0.02)
        return x

    queue.map(wait, range(40), priority="high", chunksize=1, name="lost")
    other = cluster.queue().job("lost")
    topic = Topics(cluster.config, queue.name, "high").ensure()
    wait_until(lambda: any(committed(cluster, queue, topic).values()))
    client = redis.Redis.from_url(cluster.config.redis)
    client.delete(*client.keys(f"{{yadtq:{queue.name}}}:*"))
    client.close()
    gate.touch()
    wait_until(lambda: other.state is not JobState.RUNNING)
    lost = other.lost
    assert set(lost) <= set(range(20))
    assert other.retry() == len(lost) > 0
    assert other.results(LIMIT) == list(range(40))


def test_priority_that_there_is_not_is_refused(cluster: LocalCluster) -> None:
    with pytest.raises(ValueError, match="priority must be 'high', 'normal' or 'low', not 'urgent'"):
        cluster.queue().map(abs, [1], priority="urgent")
    with pytest.raises(ValueError, match="priority must be"):
        cluster.queue().options(priority="nested")
