"""job[17].debug(): a recorded call, run again in this process, and under pdb where it raises."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import MakeCluster, RunScript
from waiting import wait_for_file

from yadtq_nb import DependencyError, ItemPickleError, JobError, JobNotFoundError, LocalCluster, Queue, TaskError
from yadtq_nb import codec as codecs
from yadtq_nb.client import debug as debugging
from yadtq_nb.model import ChunkHead

pytestmark = pytest.mark.one_stack

#: Seconds after which something hangs.
LIMIT = 30

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

Commands = Callable[[str], None]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Write what pdb is told, a line a command; at its end it is left."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def divide(x: int, by: int = 0) -> float:
    here = f"item {x}"
    return helper(x, by) if here else 0


def helper(x: int, by: int) -> float:
    return x / by


# Where it raises


def test_task_that_failed_is_opened_where_it_raised_with_its_own_item(
    queue: Queue, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    job = queue.map(divide, range(20), chunksize=5)
    job.wait(LIMIT)
    commands("p 'x is', x\nup\np here\nup\nq\n")
    assert job[17].debug() is None
    out, err = capsys.readouterr()
    assert "('x is', 17)" in out
    assert "'item 17'" in out
    assert "Oldest frame" in out, "the frames of this package are none of the user's"
    assert "yadtq_nb" not in out
    assert "ZeroDivisionError: division by zero" in err
    assert "in helper" in err
    assert "yadtq_nb" not in err


def test_call_that_does_not_fit_its_function_is_opened_too(
    queue: Queue, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    job = queue.submit(divide, 1, 2, 3).job  # type: ignore[attr-defined]  # a TaskFuture
    job.wait(LIMIT)
    commands("p item\nq\n")
    assert job[0].debug() is None
    out, err = capsys.readouterr()
    assert "((1, 2, 3), {})" in out
    assert "TypeError: divide() takes" in err


def test_task_that_exits_is_opened_and_ctrl_c_is_not(queue: Queue, commands: Commands) -> None:
    def leave(kind: str) -> None:
        raise {"exit": SystemExit, "ctrl-c": KeyboardInterrupt}[kind]

    job = queue.map(leave, ["exit", "ctrl-c"])
    job.wait(LIMIT)
    commands("q\n")
    assert job[0].debug() is None
    with pytest.raises(KeyboardInterrupt):
        job[1].debug()


def test_breakpoint_of_the_function_asks_here_and_q_ends_it(
    queue: Queue, commands: Commands, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pdb

    monkeypatch.setattr(sys, "breakpointhook", lambda: pdb.Pdb(nosigint=True).set_trace(sys._getframe(1)))

    def stop(x: int) -> int:
        if os.environ.get("DEBUG_HERE"):
            breakpoint()
        return x + 1

    future = queue.submit(stop, 41)
    assert future.result(LIMIT) == 42
    monkeypatch.setenv("DEBUG_HERE", "1")
    commands("p 'x is', x\nq\n")
    assert future.debug() is None  # type: ignore[attr-defined]  # a TaskFuture
    assert "('x is', 41)" in capsys.readouterr().out


def test_pdb_reads_a_scripts_standard_input(run_script: RunScript, tmp_path: Path) -> None:
    lines = run_script(
        """
        import io, os

        def fail(x):
            inner = x * 2
            raise ValueError(inner)

        job = queue.map(fail, [20, 21])
        job.wait(30)
        read, write = os.pipe()
        os.write(write, b"p 'inner is', inner\\nq\\n")
        os.close(write)
        os.dup2(read, 0)
        directory, path = os.getcwd(), list(sys.path)
        print("gave", job[1].debug())
        assert (os.getcwd(), sys.path) == (directory, path)
        """
    )
    assert any("('inner is', 42)" in line for line in lines)
    assert lines[-1].endswith("gave None")


# Where it does not


@pytest.mark.parametrize("style", ["item", "star", "call", "part"])
def test_value_of_each_kind_of_call_is_returned(queue: Queue, style: str) -> None:
    import pandas as pd

    def add(x: int, y: int = 1) -> tuple[int, int]:
        return x + y, os.getpid()

    def total(frame: pd.DataFrame) -> tuple[int, int]:
        return int(frame["x"].sum()), os.getpid()

    job: Any = {
        "item": lambda: queue.map(add, [41]),
        "star": lambda: queue.map(add, [40], [2]),
        "call": lambda: queue.submit(add, 40, y=2).job,  # type: ignore[attr-defined]  # a TaskFuture
        "part": lambda: queue.map_frame(total, pd.DataFrame({"x": [20, 22]}), chunks=1),
    }[style]()
    assert job[0].debug() == (42, os.getpid())


def test_options_of_map_and_keyword_arguments_are_given(queue: Queue) -> None:
    job = queue.map(divide, [1, 2], kwargs={"by": 4}, retries=2, retry_on=(ValueError,))
    assert [future.debug() for future in job] == [0.25, 0.5]  # type: ignore[attr-defined]  # TaskFutures


def test_item_is_fresh_each_time(queue: Queue) -> None:
    def grow(items: list[int]) -> list[int]:
        items.append(1)
        return items

    future: Any = queue.submit(grow, [])
    assert future.result(LIMIT) == future.debug() == future.debug() == [1]


def test_task_is_debugged_in_another_client_and_before_it_has_run(make_cluster: MakeCluster, tmp_path: Path) -> None:
    with make_cluster(1) as cluster, cluster.queue() as queue, cluster.queue() as other:
        gate = str(tmp_path / "gate")
        queue.submit(wait_for_file, gate)
        job = queue.map(lambda x: (x, os.getpid()), [1, 2], name="waits", chunksize=1)
        later: Any = other.job("waits")[1]
        assert later.debug() == (2, os.getpid())
        assert job[1].state == "queued"
        Path(gate).touch()


def test_large_functions_and_arguments_are_fetched(queue: Queue) -> None:
    table = os.urandom(3_000_000)
    big: Any = queue.submit(lambda data: (len(table), len(data)), os.urandom(6_000_000))
    assert big.debug() == (3_000_000, 6_000_000)


def test_coroutine_is_awaited_with_and_without_a_running_loop(
    queue: Queue, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    async def nap(x: int) -> int:
        await asyncio.sleep(0.001)
        return 10 // x

    job: Any = queue.map(nap, [0, 5])
    job.wait(LIMIT)

    async def in_a_notebook() -> Any:
        return job[1].debug()

    assert job[1].debug() == asyncio.run(in_a_notebook()) == 2
    commands("p 'x is', x\nup\nq\n")
    assert job[0].debug() is None
    out = capsys.readouterr().out
    assert "('x is', 0)" in out
    assert "Oldest frame" in out


def test_futures_and_jobs_as_arguments_are_values(queue: Queue) -> None:
    raw = queue.map(lambda x: x * x, range(6), chunksize=2)
    limit = queue.submit(abs, -100)
    both: Any = queue.submit(lambda one, rest, limit: (one, rest, limit), raw[3], rest=raw, limit=limit)
    mapped: Any = queue.map(lambda x, plus: x + plus, raw, kwargs={"plus": limit})
    expected = (9, [0, 1, 4, 9, 16, 25], 100)
    assert both.result(LIMIT) == both.debug() == expected
    assert mapped[5].result(LIMIT) == mapped[5].debug() == 125


# Where it cannot be


def test_task_whose_needs_have_failed_says_so_with_the_chain(queue: Queue) -> None:
    broken = queue.submit(divide, 1)
    needs: Any = queue.submit(abs, broken)
    needs.exception(LIMIT)
    with pytest.raises(DependencyError, match=r"abs.*\[0\] was not run: it needs divide.*ZeroDivisionError") as caught:
        needs.debug()
    assert caught.value.needs
    assert caught.value.index == 0


def test_inputs_that_have_expired_are_named(queue: Queue, cluster: LocalCluster) -> None:
    with cluster.queue() as queue, redis.Redis.from_url(cluster.config.redis) as client:
        job: Any = queue.map(abs, [1, 2])
        job.wait(LIMIT)
        (key,) = client.keys(f"*yadtq:{queue.name}*{job.id}:in")
        client.delete(key)
        with pytest.raises(JobNotFoundError, match="was given is not kept any more"):
            job[1].debug()
        client.delete(key.removesuffix(b":in"))
        client.delete(key.removesuffix(b"in") + b"spans")
        with pytest.raises(JobNotFoundError, match="was given is not kept any more"):
            job[1].debug()
        job.delete()
        with pytest.raises(JobNotFoundError, match="deleted"):
            job[1].debug()


class Local:
    """Unpickles on workers only."""

    def __init__(self, here: int) -> None:
        self.here = here

    def __reduce__(self) -> tuple[Any, ...]:
        return _unless, (self.here,)


def _unless(pid: int) -> int:
    import os

    if os.getpid() == pid:
        raise RuntimeError("no such driver")
    return pid


def test_item_that_cannot_be_unpickled_here_is_named_and_its_mates_are_debugged(queue: Queue) -> None:
    job: Any = queue.map(lambda x: 7, [Local(os.getpid()), 1], chunksize=2)
    assert job.results(LIMIT) == [7, 7]
    with pytest.raises(TaskError, match=r"the item of .*\[0\] cannot be unpickled here: RuntimeError: no such driver"):
        job[0].debug()
    assert job[1].debug() == 7


def test_function_that_cannot_be_unpickled_here_is_named(queue: Queue) -> None:
    local = Local(os.getpid())
    job: Any = queue.map(lambda x: local, [1])
    assert job.results(LIMIT) == [os.getpid()]
    with pytest.raises(TaskError, match=r"the function of .*\[0\] cannot be unpickled here: RuntimeError") as caught:
        job[0].debug()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_task_that_no_worker_feeds_says_so(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debugging, "PATIENCE", 0.2)
    with Queue(f"{queue.name}-unserved", config=queue._settings()) as other:
        future: Any = other.submit(abs, 1)
        with pytest.raises(JobError, match="has not reached the workbench"):
            future.debug()


def test_item_that_could_not_be_sent_says_so(queue: Queue) -> None:
    job: Any = queue.map(lambda x: 1, [(i for i in ()), 2])
    job.wait(LIMIT)
    with pytest.raises(ItemPickleError, match="the item of task 0 cannot be sent"):
        job[0].debug()
    assert job[1].debug() == 1


def test_function_of_another_python_is_not_unpickled(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = queue.map(lambda x: 1, [1])
    job.wait(LIMIT)
    monkeypatch.setattr(debugging, "PYTHON", "3.99")
    with pytest.raises(TaskError, match=r"was sent by Python 3\.\d+, and this is 3\.99"):
        job[0].debug()


def test_record_that_is_not_signed_is_never_unpickled(cluster: LocalCluster) -> None:
    with cluster.queue() as queue, redis.Redis.from_url(cluster.config.redis) as client:
        job: Any = queue.map(abs, [1])
        job.wait(LIMIT)
        (key,) = client.keys(f"*yadtq:{queue.name}*{job.id}:in")
        head, function, arguments = codecs.decode_chunk(cluster.config.key, client.hget(key, "0"))
        assert isinstance(head, ChunkHead)
        client.hset(key, "0", codecs.encode_chunk(b"another secret", head, function, [arguments]))
        with pytest.raises(codecs.SignatureError):
            job[0].debug()


def test_package_stays_light(run_script: RunScript) -> None:
    lines = run_script(textwrap.dedent("print('pdb' in sys.modules, 'yadtq_nb.client.debug' in sys.modules)"))
    assert lines == ["False False"]
