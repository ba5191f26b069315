"""Following what tasks write while they run: whose it is, that nothing is missing, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from conftest import MakeCluster, StartScript
from waiting import wait_for_file, wait_until

from yadtq_nb import (
    JobCancelledError,
    JobNotFoundError,
    LocalCluster,
    Queue,
    SignatureError,
    WorkbenchError,
    codec,
)
from yadtq_nb.model import ChunkHead, Environment, Written
from yadtq_nb.slots.capture import CUT
from yadtq_nb.slots.growth import MOST, Growth
from yadtq_nb.workbench import bench
from yadtq_nb.workbench.jobs import JobStore
from yadtq_nb.worker import teller

pytestmark = pytest.mark.one_stack

#: Seconds after which something hangs.
LIMIT = 30

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])


def count_slowly(x: int) -> int:
    for n in range(3):
        print(f"task {x} step {n}")
        time.sleep(0.4)
    return x


# From the notebook


def test_lines_are_printed_while_tasks_run_with_their_index(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    job = queue.map(count_slowly, range(4), chunksize=1)
    job.tail(LIMIT)
    assert job.wait(0)
    lines = capsys.readouterr().out.splitlines()
    for x in range(4):
        assert [line for line in lines if line.startswith(f"[{x}] ")] == [f"[{x}] task {x} step {n}" for n in range(3)]
    assert len(lines) == 12


def test_short_tasks_of_one_chunk_lose_no_line(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    def speak(x: int) -> None:
        print(f"task {x}")
        time.sleep(0.01)

    job = queue.map(speak, range(300), chunksize=50)
    job.tail(LIMIT)
    assert job.wait(0)
    found: dict[str, tuple[int, int]] = {}
    for line in capsys.readouterr().out.splitlines():
        whose, _, text = line.partition("] ")
        first, _, last = whose[1:].partition("-")
        found[text] = int(first), int(last or first)
    assert len(found) == 300
    for x in range(300):
        first, last = found[f"task {x}"]
        assert first <= x <= last <= first + 50


def test_what_a_running_task_has_written_before_is_printed_first(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "gate"

    def speak(_: int) -> None:
        print("before")
        (tmp_path / "begun").touch()
        wait_for_file(gate)
        print("after")

    job = queue.map(speak, [0])
    wait_until((tmp_path / "begun").exists)
    time.sleep(0.5)
    job.tail(2.0)
    assert not job.wait(0)
    assert capsys.readouterr().out == "[0] before\n"
    gate.touch()
    assert job.wait(LIMIT)


def test_output_of_subprocesses_and_an_unfinished_line_are_printed(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak(_: int) -> None:
        import subprocess

        subprocess.run(["sh", "-c", "echo from a child; printf 'no end'"], check=True)
        time.sleep(2.0)

    (job := queue.map(speak, [0])).tail(LIMIT)
    assert job.wait(0)
    assert capsys.readouterr().out == "[0] from a child\n[0] no end\n"


def test_of_a_progress_bar_only_the_last_state_is_printed(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    def bar(_: int) -> None:
        for percent in range(101):
            print(f"\r{percent}%", end="", flush=True)
        print()
        time.sleep(0.5)

    (job := queue.map(bar, [0])).tail(LIMIT)
    assert job.wait(0)
    assert capsys.readouterr().out.splitlines()[-1] == "[0] 100%"


def test_lines_of_coroutines_name_the_chunk(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    async def speak(x: int) -> None:
        print(f"task {x}")
        await asyncio.sleep(0.5)

    (job := queue.map(speak, range(6), chunksize=6)).tail(LIMIT)
    assert job.wait(0)
    assert sorted(capsys.readouterr().out.splitlines()) == [f"[0-5] task {x}" for x in range(6)]


def test_last_words_of_a_task_that_kills_its_slot_are_printed(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    def die(_: int) -> None:
        import os

        time.sleep(1.0)
        print("farewell", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    (job := queue.map(die, [0], max_crashes=1)).tail(LIMIT)
    assert job.wait(0)
    assert "[0] farewell" in capsys.readouterr().out.splitlines()


def test_other_jobs_are_not_printed_and_other_workers_are(
    make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = make_cluster(slots=1, workers=2).queue()

    def speak(text: str) -> None:
        import os

        for _ in range(4):
            print(text, os.getppid())
            time.sleep(0.3)

    job = queue.map(speak, ["ours", "ours"], chunksize=1)
    other = queue.map(speak, ["theirs"])
    job.tail(LIMIT)
    assert job.wait(0)
    assert other.wait(LIMIT)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert len(set(lines)) == 2, "two tasks on two workers"


def test_job_that_has_ended_says_where_its_output_is(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    job = queue.map(count_slowly, [], name="an empty one")
    assert job.wait(LIMIT)
    job.tail()
    assert capsys.readouterr().out == ("job 'an empty one' has ended: what its tasks have written is in job[i].log\n")


def test_interrupted_tail_leaves_the_job_running(start_script: StartScript) -> None:
    program = start_script(
        """
        import time
        def speak(_):
            for n in range(80):
                print("line", n)
                time.sleep(0.1)
            return "whole"
        job = queue.map(speak, [0], name="followed")
        try:
            job.tail()
        except JobInterrupt as exc:
            print(exc, flush=True)
        print(job.results(30))
        """
    )
    assert program.stdout.readline().startswith("[0] line")  # type: ignore[union-attr]
    program.send_signal(signal.SIGINT)
    output, errors = program.communicate(timeout=LIMIT)
    assert "job 'followed' goes on" in output, errors
    assert output.endswith("['whole']\n")


def test_who_follows_or_waits_is_told_by_its_name_that_a_job_was_deleted_or_cancelled(
    queue: Queue, shared_cluster: LocalCluster
) -> None:
    with shared_cluster.queue() as elsewhere:
        job = queue.map(time.sleep, [LIMIT] * 3, name="gone soon")
        theirs = elsewhere.job(job.id)
        threading.Timer(0.5, job.delete).start()
        with pytest.raises(JobNotFoundError, match="'gone soon' was deleted"):
            theirs.tail(LIMIT)
        for seen in (job, theirs):
            with pytest.raises(JobNotFoundError, match="'gone soon' was deleted"):
                seen.wait(LIMIT)
        job = queue.map(time.sleep, [LIMIT] * 3, name="ended soon")
        theirs = elsewhere.job(job.id)
        threading.Timer(0.5, job.cancel).start()
        with pytest.raises(JobCancelledError, match="'ended soon' was cancelled"):
            theirs.results(LIMIT)


def test_two_processes_follow_one_job(start_script: StartScript, queue: Queue) -> None:
    source = """
        import time
        def speak(_):
            for n in range(12):
                print("line", n)
                time.sleep(0.25)
        job = queue.job("twice") if sys.argv[1] == "look" else queue.map(speak, [0], name="twice")
        print("here", flush=True)
        job.tail(30)
        """
    sender = start_script(source, "send")
    assert sender.stdout.readline() == "here\n"  # type: ignore[union-attr]
    other = start_script(source, "look")
    for program in (sender, other):
        output, errors = program.communicate(timeout=LIMIT)
        assert output.splitlines()[-1] == "[0] line 11", errors


def test_forged_words_are_not_printed(queue: Queue, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = queue.map(wait_for_file, [gate])
    forged = codec.seal(b"another secret", codec.WRITTEN, msgspec.msgpack.encode([Written(job.id, 0, 0, b"forged\n")]))

    def forge() -> None:
        time.sleep(1.0)
        with job.link.store._redis.use() as client:
            client.xadd(job.link.store._redis.key("job", job.id, "written"), {"b": forged}, "0-*")

    import threading

    thread = threading.Thread(target=forge)
    thread.start()
    with pytest.raises(SignatureError):
        job.tail(LIMIT)
    thread.join()
    gate.touch()
    assert job.wait(LIMIT)


def test_reader_that_is_too_slow_is_told_so(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    store, node = JobStore(cluster.config, "words"), bench.Workbench(cluster.config, "words", "a")
    position = store.follow("j")
    node.tell([Written("j", 0, 0, b"first")])
    position, found, missed = store.written("j", position, 1.0)
    assert ([one.text for one in found], missed) == ([b"first"], False)
    for n in range(3 * bench._TOLD):
        node.tell([Written("j", n, n, b"x" * 5_000)])
    _, found, missed = store.written("j", position, 1.0)
    assert missed
    assert len(found) < 2 * bench._TOLD
    store.close()
    node.close()


def test_nodes_stop_telling_when_nobody_follows(make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yadtq_nb.workbench.jobs._FOLLOWED", 1.0)
    queue = make_cluster(slots=1).queue()

    def speak(_: int) -> None:
        for n in range(60):
            print("line", n)
            time.sleep(0.1)

    job = queue.map(speak, [0])
    job.tail(1.0)
    store = job.link.store

    def told() -> Any:
        with store._redis.use() as client:
            return client.xlen(store._redis.key("job", job.id, "written"))

    wait_until(lambda: told() > 0)
    time.sleep(3.0)
    seen = told()
    time.sleep(1.5)
    assert told() == seen
    assert not job.wait(0)
    job.cancel()


def test_following_goes_on_after_redis_was_emptied(
    make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = make_cluster(slots=1).queue()

    def speak(_: int) -> None:
        for n in range(100):
            print("line", n)
            time.sleep(0.1)

    job = queue.map(speak, [0])
    store = job.link.store

    def empty() -> None:
        with store._redis.use() as client:
            client.delete(store._redis.key("job", job.id, "written"), store._redis.key("followed"))

    threading.Timer(2.0, empty).start()
    job.tail(8.0)
    job.cancel()
    numbers = [int(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "line" in line]
    assert numbers[0] < 15
    assert numbers[-1] > 60


def test_what_is_written_while_redis_is_away_is_told_when_it_is_back_and_a_gap_is_said() -> None:
    told, away, looks = list[Written](), True, 0

    class Bench:
        def tell(self, written: list[Written]) -> None:
            if away:
                raise WorkbenchError("Redis is away")
            told.extend(written)

        def close(self) -> None: ...

    def grown(_: frozenset[str]) -> list[Written]:
        nonlocal looks
        looks += 1
        long = b"x" * (teller._WAITING // 2)
        return [Written("j", looks, looks, b"%d " % looks + long)] if looks <= 4 else []

    thread = teller.Teller(lambda: cast(bench.Workbench, Bench()), grown)
    thread.follow(frozenset({"j"}))
    wait_until(lambda: looks > 4)
    away = False
    wait_until(lambda: told)
    thread.close()
    assert [one.first for one in told] == [4]
    assert told[0].text.startswith(CUT + b"4 x")


# A slot's log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "slot.log"
    path.touch()
    return path


def head(job: str, number: int, count: int, *, concurrent: bool = False) -> ChunkHead:
    return ChunkHead(job, number, 100 * number, count, "f", "f", 1, "item", concurrent, Environment())


def add(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def test_chunks_that_begin_between_two_looks_are_told_apart(log: Path) -> None:
    growth = Growth(log)
    for number, job in enumerate(["ours", "theirs", "ours"]):
        growth.begin(log.stat().st_size, head(job, number, 10), frozenset())
        add(log, f"chunk {number}\n")
    found = growth.take(frozenset({"ours"}), lambda: 3, done=False)
    assert found == [Written("ours", 0, 9, b"chunk 0\n"), Written("ours", 200, 203, b"chunk 2\n")]
    assert growth.take(frozenset({"ours"}), lambda: 3, done=False) == []


def test_words_are_of_the_tasks_that_ran_since_the_last_look(log: Path) -> None:
    growth, ours = Growth(log), frozenset({"ours"})
    growth.begin(0, head("ours", 0, 10), frozenset({0, 9}))
    add(log, "a\n")
    assert growth.take(ours, lambda: 2, done=False) == [Written("ours", 1, 2, b"a\n")]
    add(log, "b\n")
    assert growth.take(ours, lambda: 2, done=False) == [Written("ours", 2, 2, b"b\n")]
    add(log, "c\n")
    assert growth.take(ours, lambda: None, done=True) == [Written("ours", 2, 8, b"c\n")]


def test_half_a_line_waits_for_its_rest_but_not_for_ever(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growth, ours = Growth(log), frozenset({"ours"})
    growth.begin(0, head("ours", 0, 1), frozenset())
    add(log, "whole\nhalf")
    assert [one.text for one in growth.take(ours, lambda: 0, done=False)] == [b"whole\n"]
    assert growth.take(ours, lambda: 0, done=False) == []
    add(log, " and half\nmore")
    assert [one.text for one in growth.take(ours, lambda: 0, done=False)] == [b"half and half\n"]
    monkeypatch.setattr("yadtq_nb.slots.growth._WHOLE", 0.0)
    assert [one.text for one in growth.take(ours, lambda: 0, done=False)] == [b"more"]


def test_of_much_the_end_is_told_and_a_log_may_be_cut(log: Path) -> None:
    growth, ours = Growth(log), frozenset({"ours"})
    growth.begin(0, head("ours", 0, 1), frozenset())
    add(log, "x" * 99 + "\n")
    growth.take(ours, lambda: 0, done=False)
    add(log, ("y" * 99 + "\n") * 1_000)
    (found,) = growth.take(ours, lambda: 0, done=False)
    assert found.text.startswith(CUT)
    assert len(found.text) == MOST + len(CUT)
    log.write_text(log.read_text()[50_000:])
    growth.cut(50_000)
    add(log, "z\n")
    assert [one.text for one in growth.take(ours, lambda: 0, done=False)] == [b"z\n"]


def test_who_comes_while_others_follow_gets_what_its_own_job_has_written(log: Path) -> None:
    growth = Growth(log)
    growth.begin(0, head("theirs", 0, 1), frozenset())
    growth.take(frozenset({"theirs"}), lambda: 0, done=False)
    growth.begin(0, head("ours", 1, 5), frozenset())
    add(log, "before\n")
    assert growth.take(frozenset({"theirs"}), lambda: 2, done=False) == []
    assert growth.take(frozenset({"ours", "theirs"}), lambda: 2, done=False) == [Written("ours", 100, 102, b"before\n")]


def test_line_without_end_is_told_piece_by_piece(log: Path) -> None:
    growth, ours = Growth(log), frozenset({"ours"})
    growth.begin(0, head("ours", 0, 1), frozenset())
    add(log, "x" * (MOST + 10))
    (found,) = growth.take(ours, lambda: 0, done=False)
    assert len(found.text) == MOST + len(CUT)


def test_who_comes_late_gets_what_runs_and_not_what_was_long_ago(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yadtq_nb.slots.growth._STALE", 0.0)
    growth, ours = Growth(log), frozenset({"ours"})
    growth.begin(0, head("ours", 0, 1), frozenset())
    add(log, "long ago\n")
    growth.begin(log.stat().st_size, head("ours", 1, 1), frozenset())
    add(log, "now\n")
    assert [one.text for one in growth.take(ours, lambda: 0, done=False)] == [b"now\n"]
