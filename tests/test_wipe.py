"""Redis comes back empty in the middle of a job, on both stacks."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import redis
from offsets import committed
from stacks import MakeCluster
from waiting import runs, traced, wait_for_file, wait_until

from yadtq_nb import JobIncompleteError, JobState, LocalCluster
from yadtq_nb.backlog.connection import Topics

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

LIMIT = 60


def wipe(cluster: LocalCluster, queue: str) -> None:
    """Take every key of a queue away at once, as a Redis that has lost its data does."""
    client = redis.Redis.from_url(cluster.config.redis)
    script = "local k = redis.call('KEYS', ARGV[1]) for i = 1, #k do redis.call('DEL', k[i]) end return #k"
    assert client.eval(script, 0, f"{{yadtq:{queue}}}:*") > 5
    client.close()


def test_job_that_lost_outcomes_says_so_and_brings_just_these_back(
    make_cluster: MakeCluster, audit: Path, tmp_path: Path
) -> None:
    cluster = make_cluster(slots=2, workers=1, settings={"doubt": 2.0})
    gate = tmp_path / "gate"

    def gated(x: int) -> int:
        squared = traced(x, audit=str(audit), seconds=0)
        if x >= 300:
            wait_for_file(str(gate))
        return squared

    queue, other = cluster.queue(), cluster.queue()
    job = queue.map(gated, range(400), chunksize=4, name="sweep")
    job.want()
    topic = Topics(cluster.config, queue.name).ensure()
    wait_until(lambda: any(offset for offset in committed(cluster, queue, topic).values()))
    wipe(cluster, queue.name)
    gate.touch()
    # Who has heard them in time has them all.
    assert job.results(LIMIT) == [x * x for x in range(400)]
    assert set(runs(audit)) == set(range(400)), "what was not finished for good has run again"
    seen = other.job("sweep")
    wait_until(lambda: seen.state is not JobState.RUNNING)
    assert seen.state is JobState.INCOMPLETE
    lost = seen.lost
    assert 0 < len(lost) < 400
    assert seen.progress.lost == len(lost)
    with pytest.raises(JobIncompleteError, match=r"job.retry\(\)"):
        seen.results()
    assert seen.results(errors="skip") == [x * x for x in range(400) if x not in set(lost)]
    frame = seen.to_frame()
    assert frame.index[frame.state == "lost"].tolist() == lost
    before = Counter(runs(audit))
    assert seen.retry() == len(lost)
    assert seen.results(LIMIT) == [x * x for x in range(400)]
    assert sorted((Counter(runs(audit)) - before).elements()) == lost, "no other has run again"
    assert seen.state is JobState.SUCCEEDED
    assert seen.retry() == 0


def test_job_that_had_just_begun_is_run_whole(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=2, workers=1)
    queue = cluster.queue()
    job = queue.map(lambda x: (time.sleep(0.02), x)[1], range(100), chunksize=2)
    wait_until(lambda: job.progress.succeeded > 10)
    wipe(cluster, queue.name)
    assert job.results(LIMIT) == list(range(100))
    assert job.state is JobState.SUCCEEDED
    assert job.progress.succeeded == 100
