"""Slots, nodes and clients die, on both stacks: every result arrives, each once, and nothing is left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from stacks import MakeCluster
from waiting import is_running, runs, runs_in_slots, traced, wait_until

from yadtq_nb import JobState, LocalCluster, TaskCrashedError

SRC = Path(__file__).parents[1]


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def check_outcomes(job_results: list[int], count: int, succeeded: int) -> None:
    assert job_results == [x * x for x in range(count)]
    assert succeeded == count


def test_slot_killed_in_the_middle_of_a_map_costs_no_result_and_doubles_none(
    cluster: LocalCluster, audit: Path
) -> None:
    job = cluster.queue().map(traced, range(200), kwargs={"audit": str(audit)}, chunksize=10)
    wait_until(lambda: len(runs(audit)) > 50, "tasks run")
    os.kill(runs_in_slots(audit)[-1][1], signal.SIGKILL)
    results = job.results(timeout=30)
    check_outcomes(results, 200, job.progress.succeeded)
    again = [x for x, times in Counter(runs(audit)).items() if times > 1]
    assert len(again) <= 10, "only tasks of the chunk that was cut off run again"


def test_chunk_mates_of_a_task_that_kills_its_slot_are_not_touched(cluster: LocalCluster) -> None:
    def segfault(x: int) -> int:
        if x == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        return x

    job = cluster.queue().map(segfault, range(8), chunksize=8)
    results = job.results(timeout=30, errors="return")
    assert [x for x in results if isinstance(x, int)] == [0, 1, 2, 4, 5, 6, 7]
    error = results[3]
    assert isinstance(error, TaskCrashedError)
    assert error.index == 3
    assert "SIGSEGV" in str(error)
    assert job.to_frame().attempt.tolist() == [1, 1, 1, 2, 1, 1, 1, 1]


def test_task_that_kills_its_slot_once_is_tried_again_and_succeeds(cluster: LocalCluster, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def die_once(_: int) -> str:
        if not mark.exists():
            mark.touch()
            os._exit(3)
        return "done"

    assert cluster.queue().submit(die_once, 1).result(30) == "done"


def test_node_killed_with_its_slots_in_the_middle_of_a_map_costs_no_result(
    make_cluster: MakeCluster, audit: Path
) -> None:
    cluster = make_cluster(slots=1, workers=2, restart=False)
    job = cluster.queue().map(traced, range(200), kwargs={"audit": str(audit)}, chunksize=5)
    wait_until(lambda: len(runs(audit)) > 40, "tasks run")
    victim = cluster.workers[0]
    doomed = [psutil.Process(victim.pid), *descendants(victim.pid)]
    for process in doomed:
        process.kill()
    results = job.results(timeout=60)
    check_outcomes(results, 200, job.progress.succeeded)
    # It may have held nothing at that moment.
    wait_until(lambda: sorted(cluster.queue().workers().status) == ["live", "lost"], "the dead one is seen")
    workers = cluster.queue().workers()
    lost = workers[workers.status == "lost"].iloc[0]
    assert lost.heartbeat_age > 0
    assert lost.last_heartbeat.timestamp() > time.time() - 60


def test_node_that_is_killed_is_started_again_and_its_chunks_are_returned_at_once(
    make_cluster: MakeCluster, audit: Path
) -> None:
    # The lease outlasts the test: only the successor's word can free the chunk.
    cluster = make_cluster(slots=2, workers=1, settings={"lease": 90.0})
    job = cluster.queue().map(traced, range(200), kwargs={"audit": str(audit)}, chunksize=5)
    wait_until(lambda: len(runs(audit)) > 40, "tasks run")
    cluster.workers[0].kill()
    results = job.results(timeout=30)
    check_outcomes(results, 200, job.progress.succeeded)


def test_task_that_kills_its_node_every_time_ends_as_crashed_and_the_others_are_done(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(slots=1, workers=2)

    def kill_node(x: int) -> int:
        if x == 2:
            for process in psutil.Process().parents():
                if "yadtq_nb.worker" in process.cmdline() and "--slots" in process.cmdline():
                    process.kill()
            time.sleep(30)
        return x

    job = cluster.queue().map(kill_node, range(5), chunksize=5)
    results = job.results(timeout=60, errors="return")
    assert [x for x in results if isinstance(x, int)] == [0, 1, 3, 4]
    assert isinstance(results[2], TaskCrashedError)


def test_more_workers_than_partitions_all_get_work(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(slots=1, workers=3, settings={"partitions": 1})

    def where(_: int) -> int:
        time.sleep(0.1)
        return os.getppid()

    assert len(set(cluster.queue().map(where, range(30)).results(timeout=60))) == 3


def test_what_a_task_has_started_is_gone_when_its_node_is_killed(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(slots=1, workers=1, restart=False)
    note = tmp_path / "pids"

    def start_and_hang(_: int) -> None:
        plain = subprocess.Popen(["sleep", "300"])
        away = subprocess.Popen(["sleep", "300"], start_new_session=True)
        note.with_suffix(".new").write_text(f"{os.getpid()} {plain.pid} {away.pid}")
        note.with_suffix(".new").rename(note)
        time.sleep(300)

    cluster.queue().map(start_and_hang, [0])
    wait_until(note.exists, "the task runs")
    pids = [int(pid) for pid in note.read_text().split()]
    assert all(map(psutil.pid_exists, pids))
    cluster.workers[0].kill()
    wait_until(lambda: not any(map(is_running, pids)), "what the task has started is still running")


def test_client_that_is_killed_right_after_map_loses_nothing_that_it_had_sent(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    _write_config(config, cluster)
    script = f"""
        import os, time
        from yadtq_nb import Queue
        def slow(x):
            time.sleep(0.01)
            return x
        job = Queue({cluster.queue().name!r}).map(slow, range(100), name="orphan")
        while not job._link.store.record(job.id).sealed:
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    """
    done = _run(script, config)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert cluster.queue().job("orphan").results(timeout=30) == list(range(100))


@pytest.mark.parametrize("act", ["extend(range(100, 50_000))", "retry(abs)"])
def test_client_that_is_killed_while_it_sends_more_of_a_job_leaves_one_that_can_be_cancelled_and_repaired(
    cluster: LocalCluster, tmp_path: Path, act: str
) -> None:
    config = tmp_path / "config.json"
    _write_config(config, cluster)
    script = f"""
        import os
        from yadtq_nb import Queue
        from yadtq_nb.backlog.publish import Publisher
        def odd(x):
            if x % 2:
                raise ValueError(x)
            return x
        job = Queue({cluster.queue().name!r}).map(odd, range(100), name="orphan", chunksize=1)
        job.results(30, errors="skip")
        sent = []
        def send_some(self, *record, send=Publisher.send_chunk, **more):
            send(self, *record, **more)
            sent.append(record)
            if len(sent) == 5:
                self.flush(10)
                os.kill(os.getpid(), 9)
        Publisher.send_chunk = send_some
        job.{act}
        job.results(30)
    """
    done = _run(script, config)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with cluster.queue() as queue:
        job = queue.job("orphan")
        wait_until(lambda: queue.job("orphan").state is JobState.INCOMPLETE, "nobody sends it any more")
        job = queue.job("orphan")
        job.cancel()
        assert job.retry(abs) > 0
        assert job.results(30, errors="skip")[:100] == list(range(100))


@pytest.mark.parametrize("count", [1, 2])
def test_node_asked_to_stop_finishes_what_it_runs_and_gives_back_the_rest(
    make_cluster: MakeCluster, audit: Path, count: int
) -> None:
    cluster = make_cluster(slots=1, workers=count + 1)
    job = cluster.queue().map(traced, range(150), kwargs={"audit": str(audit)}, chunksize=3)
    wait_until(lambda: len(runs(audit)) > 20, "tasks run")
    for worker in cluster.workers[:count]:
        worker.stop()
    results = job.results(timeout=60)
    check_outcomes(results, 150, job.progress.succeeded)
    assert len(runs(audit)) == 150, "a node that stops in peace runs nothing twice"


def _write_config(path: Path, cluster: LocalCluster) -> None:
    import msgspec

    path.write_bytes(msgspec.json.encode(cluster.config))


def _run(script: str, config: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "YADTQ_CONFIG": str(config), "PYTHONPATH": str(SRC)}
    file = config.with_name("script.py")
    file.write_text(textwrap.dedent(script))
    return subprocess.run(
        [sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_node_that_is_asked_twice_to_stop_ends_at_once(make_cluster: MakeCluster, tmp_path: Path) -> None:
    began = tmp_path / "began"

    def forever(_: int) -> None:
        began.touch()
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)

    cluster = make_cluster(slots=1, workers=1)
    queue = cluster.queue()
    job = queue.map(forever, [0])
    wait_until(began.exists)
    node = psutil.Process(cluster.workers[0].pid)
    os.kill(node.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert node.is_running(), "its task has some seconds to end"
    asked = time.monotonic()
    os.kill(node.pid, signal.SIGTERM)
    wait_until(lambda: not node.is_running() or node.status() == psutil.STATUS_ZOMBIE)
    assert time.monotonic() - asked < 4, "less than its grace"
    job.cancel()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own")
def test_slots_are_ended_before_nodes_where_memory_runs_out(cluster: LocalCluster) -> None:
    def score(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    assert cluster.queue().submit(score, "self").result(30) > score(cluster.workers[0].pid)


def test_node_that_is_asked_to_stop_ends_its_task_and_hands_back_the_rest(
    make_cluster: MakeCluster, audit: Path
) -> None:
    cluster = make_cluster(slots=1, workers=2, restart=False)

    def slow(x: int) -> int:
        with audit.open("a") as file:
            file.write(f"{x} {os.getppid()}\n")
        time.sleep(0.4)
        return x * x

    job = cluster.queue().map(slow, range(12), chunksize=12)
    wait_until(lambda: len(runs(audit)) == 2, "a second task runs")
    template = runs_in_slots(audit)[0][1]
    node = next(worker for worker in cluster.workers if template in [p.pid for p in descendants(worker.pid)])
    os.kill(node.pid, signal.SIGTERM)
    wait_until(lambda: not is_running(node.pid), "the node has ended")
    check_outcomes(job.results(timeout=30), 12, job.progress.succeeded)
    assert Counter(runs(audit)) == Counter(range(12)), "each has run once"
    assert len({template for _, template in runs_in_slots(audit)}) == 2, "in its grace it would have run them all"
    assert job.to_frame().attempt.tolist() == [1] * 12
