"""Measure what a live card sends: bytes a second of a job of 100,000 tasks that runs, by number of workers.

make bench-card
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import comm
from comm.base_comm import BaseComm

from yadtq_nb.model import JobState, Progress, RunningTask, WorkerInfo, WorkerView
from yadtq_nb.notebook import live

TASKS = 100_000
#: What Jupyter adds to each message, in bytes: two headers and offsets, as seen in JupyterLab 4.6's web socket.
ENVELOPE = 530


class Job:
    """A job whose numbers all move, as fast as anybody looks."""

    name, id, state = "sweep", "0123456789abcdef", JobState.RUNNING

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.started = time.monotonic()

    @property
    def progress(self) -> Progress:
        passed = time.monotonic() - self.started
        done, running = int(1234.5 * passed), 2 * self.workers
        return Progress(TASKS - done - running, running, done, 0, 0, TASKS, 1234.5, (TASKS - done) / 1234.5, passed)

    def worker_views(self) -> list[WorkerView]:
        return [self._view(number) for number in range(self.workers)]

    def _view(self, number: int) -> WorkerView:
        passed = time.monotonic() - self.started
        info = WorkerInfo(
            id=f"node-{number:03}-12345-ab{number:02x}",
            host=f"node-{number:03}.example.org",
            pid=12345,
            slots=16,
            busy=int(passed * 7 + number) % 17,
            done=int(1000 * passed + number),
            started=0.0,
            python="3.11",
            cpu=(passed * 331 + 97 * number) % 1600,
            memory=int(4e9 + 1e9 * passed) % (10**10),
            slowest=(RunningTask(self.id, number, passed),),
        )
        return WorkerView(info, (passed + number / 100) % 1.0, 0.0, "live")

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(timeout or 0.0)
        return False

    def cancel(self) -> int:
        return 0


class CountingComm(BaseComm):
    """A comm that counts what goes through it."""

    def __init__(self, **arguments: Any) -> None:
        self.messages = self.bytes = 0
        super().__init__(**arguments)

    def publish_msg(self, msg_type: str, data: Any = None, *_: Any, **__: Any) -> None:
        if msg_type == "comm_msg":
            self.messages += 1
            self.bytes += len(json.dumps(data)) + ENVELOPE


def measure(workers: int, seconds: float) -> tuple[float, float, float]:
    """Return messages and bytes a second, and the share of a core that the card's thread takes, in percent."""
    made: list[CountingComm] = []
    comm.create_comm = lambda **arguments: made.append(CountingComm(**arguments)) or made[-1]
    live._publish = lambda *_, **__: None
    live._in_kernel = lambda: True
    card = live.display_job(Job(workers))
    assert card is not None
    counted = made[-1]
    time.sleep(1.0)
    messages, size, used, began = counted.messages, counted.bytes, time.process_time(), time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    used = time.process_time() - used
    result = (counted.messages - messages) / took, (counted.bytes - size) / took, 100 * used / took
    card.stop()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int, nargs="*", default=[10, 200])
    given = parser.parse_args()
    print("| workers | messages a second | bytes a second | percent of a core |\n| ---: | ---: | ---: | ---: |")
    for workers in given.workers:
        messages, size, used = measure(workers, given.seconds)
        print(f"| {workers} | {messages:.1f} | {size:,.0f} | {used:.1f} |", flush=True)


if __name__ == "__main__":
    main()
