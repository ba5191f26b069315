"""A node that stands still for longer than its lease: others do its work, and when it comes back it harms nothing."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
from stacks import MakeCluster
from waiting import runs, runs_in_slots, traced, wait_until

from yadtq_nb import LocalCluster

LEASE = {"lease": 1.2, "heartbeat": 0.4}
LIMIT = 60


def statuses(cluster: LocalCluster) -> list[str]:
    return sorted(cluster.queue().workers().status)


def node_of(cluster: LocalCluster, slot: int) -> int:
    """Return the process of the node that a slot belongs to."""
    nodes = {worker.pid for worker in cluster.workers}
    return next(process.pid for process in psutil.Process(slot).parents() if process.pid in nodes)


def send(number: signal.Signals, pid: int, *, slots: bool) -> None:
    family = psutil.Process(pid).children(recursive=True) if slots else []
    for process in (psutil.Process(pid), *family):
        process.send_signal(number)


def test_node_that_stands_still_for_longer_than_its_lease_comes_back_and_doubles_nothing(
    make_cluster: MakeCluster, audit: Path
) -> None:
    cluster = make_cluster(slots=1, workers=2, settings=LEASE)
    queue = cluster.queue()
    job = queue.map(traced, range(600), kwargs={"audit": str(audit)}, chunksize=5)
    wait_until(lambda: len(runs(audit)) > 60, "tasks run")
    frozen = node_of(cluster, runs_in_slots(audit)[-1][1])
    send(signal.SIGSTOP, frozen, slots=True)
    try:
        wait_until(lambda: statuses(cluster) == ["live", "lost"], "it is missed")
        seen = job.progress.succeeded
        wait_until(lambda: job.progress.succeeded > seen, "the other goes on")
    finally:
        send(signal.SIGCONT, frozen, slots=True)
    wait_until(lambda: statuses(cluster) == ["live", "live"], "it is back")
    assert job.results(timeout=LIMIT) == [x * x for x in range(600)]
    assert (job.progress.succeeded, job.progress.failed) == (600, 0)
    ran = Counter(runs(audit))
    assert ran.keys() == set(range(600))
    assert sum(ran.values()) - 600 <= 10, "only what it held runs again"
    assert sum(worker.restarts for worker in cluster.workers) == 0
    pids = set(queue.map(lambda _: time.sleep(0.05) or os.getpid(), range(20), chunksize=1).results(LIMIT))
    assert frozen in {node_of(cluster, pid) for pid in pids}, "it works again"


def test_failure_that_a_node_reports_after_its_lease_has_gone_to_another_is_not_believed(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster = make_cluster(slots=1, workers=2, settings=LEASE)
    fail, succeed = tmp_path / "fail", tmp_path / "succeed"

    def task(_: int) -> str:
        try:
            (tmp_path / "first").open("x").write(str(os.getpid()))
        except FileExistsError:
            (tmp_path / "second").touch()
            while not succeed.exists():
                time.sleep(0.02)
            return "done by the other"
        while not fail.exists():
            time.sleep(0.02)
        (tmp_path / "failed").touch()
        raise RuntimeError("of the node that stood still")

    queue = cluster.queue()
    future = queue.submit(task, 0)
    wait_until(lambda: (tmp_path / "first").exists() and (tmp_path / "first").read_text(), "it runs")
    frozen = node_of(cluster, int((tmp_path / "first").read_text()))
    send(signal.SIGSTOP, frozen, slots=False)
    try:
        wait_until((tmp_path / "second").exists, "the other has it")
        fail.touch()
        wait_until((tmp_path / "failed").exists, "the failure waits for its node")
        time.sleep(0.2)
    finally:
        send(signal.SIGCONT, frozen, slots=False)
    wait_until(lambda: statuses(cluster) == ["live", "live"], "it is back")
    # Enough for what it has to say: it beats, finishes and takes again.
    assert queue.submit(abs, -1).result(LIMIT) == 1
    assert not future.done()
    succeed.touch()
    assert future.result(LIMIT) == "done by the other"
