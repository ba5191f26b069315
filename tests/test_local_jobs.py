"""Jobs on the local stack, with its real node: they outlive what the stack goes through."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from yadtq_nb import Queue
from yadtq_nb.local.home import Home
from yadtq_nb.local.stack import Stack


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "stack")
    yield home
    Stack(home).down()


def wait_for_end(home: Home, *, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while home.alive():
        assert time.monotonic() < deadline, "the stack runs on"
        time.sleep(0.02)


def slow(x: int, seconds: float) -> int:
    time.sleep(seconds)
    return x


def test_stack_does_not_stop_while_a_task_runs_and_stops_after_it(home: Home) -> None:
    stack = Stack(home, slots=1, idle=lambda: 2.0)
    with Queue(config=stack.ensure_up()) as queue:
        assert queue.submit(slow, 7, 4.0).result(timeout=30) == 7
    wait_for_end(home)
    assert stack.status().reason == "idle for 2 s"


def test_job_goes_on_after_the_whole_stack_was_killed(home: Home) -> None:
    stack = Stack(home, slots=2, idle=lambda: None)
    with Queue(config=stack.ensure_up()) as queue:
        job = queue.map(slow, range(40), kwargs={"seconds": 0.1}, name="sweep", chunksize=2)
        next(iter(job.as_completed()))
        state = home.state()
        assert state is not None
        os.kill(state.pid, signal.SIGKILL)
        wait_for_end(home)
        with Queue(config=stack.ensure_up()) as again:
            assert again.job("sweep").results(timeout=30) == list(range(40))
