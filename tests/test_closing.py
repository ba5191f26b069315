"""Closing queues and clusters, interrupted calls, forks, and secrets: what a careless user does."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from stacks import MakeCluster
from waiting import wait_until

from yadtq_nb import JobError, JobState, LocalCluster, LocalStackError, Queue, QueueClosedError, SignatureError
from yadtq_nb.backlog.connection import let_go
from yadtq_nb.client.link import Link
from yadtq_nb.local.home import Home
from yadtq_nb.local.stack import Stack
from yadtq_nb.worker.directory import NodeDirectory, remove_left

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

LIMIT = 30


def test_cluster_closes_at_once_with_jobs_that_nobody_waits_for() -> None:
    cluster = LocalCluster(slots=1)
    queue = cluster.queue()
    job = queue.map(lambda _: time.sleep(60), range(50), chunksize=1)
    endless = queue.map(abs, itertools.count(), chunksize=1)
    future = endless[10**6]
    waiting = ThreadPoolExecutor(1).submit(job.results)
    wait_until(lambda: job.progress.running)
    closing = threading.Thread(target=cluster.close)
    closing.start()
    closing.join(12)
    assert not closing.is_alive()
    with pytest.raises(QueueClosedError, match="LocalCluster was closed"):
        waiting.result(LIMIT)
    assert isinstance(future.exception(LIMIT), JobError)


def test_wait_says_that_the_queue_was_closed_and_the_job_runs_on(cluster: LocalCluster) -> None:
    queue = cluster.queue()
    job = queue.map(lambda _: time.sleep(1), range(4), chunksize=1)
    queue.close()
    with pytest.raises(QueueClosedError, match="the job goes on"):
        job.wait(1)
    assert job.state is JobState.RUNNING
    assert cluster.queue().job(job.id).results(LIMIT) == [None] * 4


@pytest.mark.parametrize("where", ["claim", "post"])
def test_name_is_free_again_when_map_was_interrupted(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    queue = cluster.queue()
    real = getattr(Link, where)

    def interrupted(*args: object, **kwargs: object) -> object:
        if where == "claim":
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Link, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            queue.map(abs, range(3), name="again")
    assert "again" not in queue.jobs().index
    assert queue.map(abs, range(3), name="again").results(LIMIT) == [0, 1, 2]


def test_job_in_a_forked_child_is_refused_and_can_be_asked_for_there(cluster: LocalCluster, tmp_path: Path) -> None:
    queue = cluster.queue()
    job = queue.map(abs, range(3))
    assert job.results(LIMIT) == [0, 1, 2]
    said = tmp_path / "said"
    pid = os.fork()
    if not pid:
        try:
            job.results(5)
        except JobError as exc:
            said.write_text(str(exc))
        finally:
            os._exit(0)
    wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0])
    assert "before this process was forked" in said.read_text()


def test_secret_belongs_to_the_queue_also_while_no_worker_lives(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yadtq_nb.client.link._SAFE", 0.5)  # nobody feeds what is sent
    cluster = make_cluster(slots=1, workers=1)
    name = f"{cluster.queue().name}-kept"
    with Queue(name, config=cluster.config) as first:
        first.map(abs, range(3), name="kept")
    other = msgspec.structs.replace(cluster.config, secret="another secret that is long enough")
    with pytest.raises(SignatureError, match="another secret"):
        Queue(name, config=other).map(abs, range(3))


def test_quick_tasks_that_wait_behind_slow_ones_are_not_sent_one_by_one(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=2, workers=1)
    queue = cluster.queue()
    blocking = queue.map(lambda _: time.sleep(4), range(2), chunksize=1)
    wait_until(lambda: blocking.progress.running == 2)
    job = queue.map(abs, range(20_000))
    assert job.results(2 * LIMIT) == list(range(20_000))
    link = queue._link()
    assert len(link.store.fields(job.id)) < 300


def test_directory_that_cannot_be_used_is_named() -> None:
    with pytest.raises(LocalStackError, match=r"/proc/nope .*YADTQ_HOME"):
        Stack(Home(Path("/proc/nope"))).ensure_up()


def test_full_disk_does_not_end_the_keeper(tmp_path: Path) -> None:
    with LocalCluster(slots=1) as cluster:
        home = cluster._home.path
        # A directory in the place of the file: it cannot be written, for root neither.
        (home / "state.json.new").mkdir()
        os.kill(cluster.workers[0].pid, signal.SIGKILL)
        time.sleep(1.0)
        (home / "state.json.new").rmdir()
        assert cluster.queue().submit(abs, -1).result(LIMIT) == 1


def test_what_a_task_started_with_another_environment_ends_with_its_cluster(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def starts() -> None:
        import subprocess

        script = f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 300"
        subprocess.Popen(["setsid", "-f", "sh", "-c", script], env={"PATH": "/usr/bin:/bin"})
        time.sleep(60)

    for end in ("close", "kill"):
        pid_file.unlink(missing_ok=True)
        with LocalCluster(slots=1) as cluster:
            cluster.queue().submit(starts)
            wait_until(pid_file.exists)
            pid = int(pid_file.read_text())
            if end == "kill":
                os.kill(cluster.workers[0].pid, signal.SIGKILL)
                wait_until(lambda: not Path(f"/proc/{pid}").exists(), seconds=10)  # noqa: B023  # called at once
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), seconds=10)  # noqa: B023  # called at once


def test_node_whose_disk_is_full_takes_nothing_for_a_while_and_its_task_is_not_harmed(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster = make_cluster(slots=2, workers=1)
    queue = cluster.queue()
    large = bytes(100_000)
    begun = tmp_path / "begun"
    slow = queue.submit(lambda: begun.touch() or time.sleep(3) or os.getppid())
    wait_until(begun.exists)
    pid = cluster.workers[0].pid
    (node,) = queue.workers().index
    (blobs,) = Path(tempfile.gettempdir()).glob(f"yadtq-node-{node}-*/blobs")
    blobs.rename(blobs.with_name("moved"))
    blobs.write_text("in the way: nothing can be written here")
    job = queue.map(lambda x: x + len(large), range(4))
    time.sleep(1.5)
    blobs.unlink()
    assert job.results(LIMIT) == [100_000 + x for x in range(4)]
    assert slow.result(LIMIT)
    assert cluster.workers[0].pid == pid, "the node lives"
    assert job.to_frame().attempt.tolist() == [1] * 4


def test_directories_of_nodes_that_were_killed_are_removed_and_those_of_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alive = NodeDirectory("alive")
    left, young, strange = (tmp_path / f"yadtq-node-{name}" for name in ("left", "young", "strange"))
    for path in (left, young, strange):
        path.mkdir()
        if path is not strange:
            (path / "lock").touch()
        (path / "blobs").mkdir()
    for path in (alive.path, left, strange):
        os.utime(path, (0, 0))
    remove_left()
    assert set(tmp_path.iterdir()) == {alive.path, young, strange}
    alive.remove()
    assert not alive.path.exists()


def test_client_of_kafka_that_does_not_end_holds_up_nobody() -> None:
    # As librdkafka 2.16 does now and then when its broker goes away at the same time.
    released, ended = threading.Event(), threading.Event()

    def end(_: object) -> None:
        released.wait()
        ended.set()

    held = [object()]
    let_go(held, end, wait=0.05)
    assert not ended.is_set()
    assert not held, "nobody else is left with it"
    released.set()
    assert ended.wait(10)
