"""Redis comes back empty in the middle of a job, on both stacks."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from offsets import committed
from stacks import MakeCluster

from yadtq_nb import JobIncompleteError, JobState, LocalCluster
from yadtq_nb.backlog.connection import Topics

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

LIMIT = 60


def when(condition: Callable[[], object], seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wipe(cluster: LocalCluster, queue: str) -> None:
    """Take every key of a queue away at once, as a Redis that has lost its data does."""
    client = redis.Redis.from_url(cluster.config.redis)
    script = "local k = redis.call('KEYS', ARGV[1]) for i = 1, #k do redis.call('DEL', k[i]) end return #k"
    assert client.eval(script, 0, f"{{yadtq:{queue}}}:*") > 5
    client.close()


def test_job_that_lost_outcomes_says_so_and_brings_just_these_back(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=2, workers=1)
    audit, gate = tmp_path / "audit", tmp_path / "gate"

    def traced(x: int) -> int:
        with audit.open("a") as file:
            file.write(f"{x}\n")
        while x >= 300 and not gate.exists():
            time.sleep(0.02)
        return x * x

    def ran() -> Counter[int]:
        return Counter(map(int, audit.read_text().split())) if audit.exists() else Counter()

    queue, other = cluster.queue(), cluster.queue()
    job = queue.map(traced, range(400), chunksize=4, name="sweep")
    job.want()
    topic = Topics(cluster.config, queue.name).ensure()
    when(lambda: any(offset for offset in committed(cluster, queue, topic).values()))
    wipe(cluster, queue.name)
    gate.touch()
    # Who has heard them in time has them all.
    assert job.results(LIMIT) == [x * x for x in range(400)]
    assert set(ran()) == set(range(400)), "what was not finished for good has run again"
    seen = other.job("sweep")
    when(lambda: seen.state is not JobState.RUNNING)
    assert seen.state is JobState.INCOMPLETE
    lost = seen.lost
    assert 0 < len(lost) < 400
    assert seen.progress.lost == len(lost)
    with pytest.raises(JobIncompleteError, match=r"job.retry\(\)"):
        seen.results()
    assert seen.results(errors="skip") == [x * x for x in range(400) if x not in set(lost)]
    frame = seen.to_frame()
    assert frame.index[frame.state == "lost"].tolist() == lost
    before = ran()
    assert seen.retry() == len(lost)
    assert seen.results(LIMIT) == [x * x for x in range(400)]
    assert sorted((ran() - before).elements()) == lost, "no other has run again"
    assert seen.state is JobState.SUCCEEDED
    assert seen.retry() == 0


def test_job_that_had_just_begun_is_run_whole(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=2, workers=1)
    queue = cluster.queue()
    job = queue.map(lambda x: (time.sleep(0.02), x)[1], range(100), chunksize=2)
    when(lambda: job.progress.succeeded > 10)
    wipe(cluster, queue.name)
    assert job.results(LIMIT) == list(range(100))
    assert job.state is JobState.SUCCEEDED
    assert job.progress.succeeded == 100
