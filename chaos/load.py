"""The load: what clients send, and what must come of it. Run as a script it is one client, in a process of its own.

load.py LEDGER AUDIT QUEUE send CLIENT SEED ROUNDS      sends jobs, two at a time, and waits for them
load.py LEDGER AUDIT QUEUE attach JOB...                finds jobs by name after their client was killed

Everything that a client does goes to its ledger, a line of JSON each; every start of a task, to the audit file. Nothing
local is imported here: the functions travel by themselves.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from yadtq_nb import (
    BacklogError,
    JobCancelledError,
    JobError,
    JobIncompleteError,
    JobNotFoundError,
    JobTimeoutError,
    Queue,
    WorkbenchError,
)

#: (index, seconds that it takes, what it does beside, bytes that it is given and gives back)
Item = tuple[int, float, str, bytes]
#: Seconds for which an attaching client waits for a job to be known, and for it to move.
_UNKNOWN: Final = 20.0
_STILL: Final = 40.0
#: Seconds for which it asks again while a server is away.
_AWAY: Final = 60.0
#: Seconds within which a job is repaired.
_MENDED: Final = 120.0


def patiently(call: Callable[[], Any]) -> Any:
    """Ask again while a server is away for longer than a call waits: whoever only asks can do that."""
    deadline = time.monotonic() + _AWAY
    while True:
        try:
            return call()
        except (WorkbenchError, BacklogError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


# What tasks do.


def note(audit: str, job: str, index: int) -> None:
    """Write down that a task starts: one write, so that lines of many processes never mix."""
    line = f"{job} {index} {os.getpid()} {time.time():.3f}\n".encode()
    file = os.open(audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)


def act(audit: str, job: str, item: Item) -> Any:
    """Do what an item says, and answer for it."""
    index, _, deed, payload = item
    if deed in ("raise", "mend"):
        raise ValueError(f"{job} {index} fails on purpose")
    if deed == "exit":
        os._exit(3)
    if deed in ("crash", "flake"):
        try:
            os.close(os.open(f"{audit}.{job}.{index}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass  # it has failed once
        else:
            if deed == "flake":
                raise ConnectionError(f"{job} {index} fails once")
            os.kill(os.getpid(), signal.SIGKILL)
    value = zlib.crc32(f"{job} {index}".encode())
    return (value, payload[::-1]) if payload else value


def work(item: Item, *, audit: str, job: str) -> Any:
    """A task."""
    note(audit, job, item[0])
    time.sleep(item[1])
    return act(audit, job, item)


def work_mended(item: Item, *, audit: str, job: str) -> Any:
    """What is called instead, once a job is repaired."""
    index, seconds, deed, payload = item
    return work((index, seconds, "" if deed == "mend" else deed, payload), audit=audit, job=job)


def work_below(item: Item, *, audit: str, job: str, queue: Queue) -> Any:
    """A task that sends a job and waits for it."""
    note(audit, job, item[0])
    assert queue.map(abs, range(-3, 0)).results() == [3, 2, 1]
    return act(audit, job, item)


async def work_together(item: Item, *, audit: str, job: str) -> Any:
    """A task that is a coroutine."""
    note(audit, job, item[0])
    await asyncio.sleep(item[1])
    return act(audit, job, item)


# What must come of it.


def expected(job: str, item: Item, *, repaired: bool = True) -> str:
    """Return the only outcome that is right in the end, as digest() writes it.

    Args:
        repaired: whether the repair of the job has begun, if it is to be.
    """
    index, _, deed, payload = item
    if deed == "mend" and not repaired:
        return "ValueError"
    if deed in ("raise", "exit", "late"):
        return {"raise": "ValueError", "exit": "TaskCrashedError", "late": "TaskTimeoutError"}[deed]
    value = zlib.crc32(f"{job} {index}".encode())
    return digest((value, payload[::-1]) if payload else value)


def digest(outcome: Any) -> str:
    """Write an outcome in few characters."""
    if isinstance(outcome, BaseException):
        return type(outcome).__name__
    return f"{outcome[0]}/{zlib.crc32(outcome[1]):x}" if isinstance(outcome, tuple) else str(outcome)


# Shapes of jobs. Another one is a function here that returns its items.

SHAPES: Final[dict[str, tuple[Callable[[random.Random], list[Item]], str, dict[str, Any]]]] = {}


def shape(how: str = "list", **options: Any) -> Callable[[Callable[[random.Random], list[Item]]], None]:
    """Register a shape, with its options of map.

    Args:
        how: "list", "drawn" (an iterator), "together" (coroutines), "below" (tasks that wait for jobs of their own),
            "cancelled" (by its client, after a while), "revived" (retried after that), "mended" (retried with another
            function) or "single" (submit).
    """

    def register(items: Callable[[random.Random], list[Item]]) -> None:
        SHAPES[items.__name__] = (items, how, options)

    return register


def shape_of(job: str) -> str:
    """Return the name of a job's shape, which its own name says."""
    return job.split("-")[-1]


@shape()
def quick(_: random.Random) -> list[Item]:
    return [(i, 0.001, "", b"") for i in range(600)]


@shape()
def mixed(rng: random.Random) -> list[Item]:
    return [(i, min(0.5, rng.expovariate(1 / 0.02)), "", b"") for i in range(150)]


@shape()
def failing(rng: random.Random) -> list[Item]:
    return [(i, rng.uniform(0.005, 0.02), "" if i % 9 else "raise", b"") for i in range(100)]


@shape(chunksize=20)
def crashing(rng: random.Random) -> list[Item]:
    doomed = rng.sample(range(60), 2)
    return [(i, 0.01, "crash" if i in doomed else "", b"") for i in range(60)]


@shape(chunksize=6)
def poisoned(rng: random.Random) -> list[Item]:
    doomed = rng.randrange(12)
    return [(i, 0.01, "exit" if i == doomed else "", b"") for i in range(12)]


@shape(chunksize=1)
def long(rng: random.Random) -> list[Item]:
    return [(i, rng.uniform(2.0, 4.0), "", b"") for i in range(5)]


@shape("together")
def together(rng: random.Random) -> list[Item]:
    return [(i, rng.uniform(0.05, 0.3), "" if i % 50 else "raise", b"") for i in range(200)]


@shape(chunksize=1)
def many(_: random.Random) -> list[Item]:
    return [(i, 0.0, "", b"") for i in range(1500)]


@shape(chunksize=5)
def large(rng: random.Random) -> list[Item]:
    huge = rng.randrange(30)
    return [(i, 0.01, "", rng.randbytes(1_200_000 if i == huge else 30_000)) for i in range(30)]


@shape(chunksize=4, retries=3, backoff=0.2, retry_on=ConnectionError)
def flaky(rng: random.Random) -> list[Item]:
    return [(i, 0.01, rng.choice(["", "flake", "flake", "raise"]), b"") for i in range(40)]


# Longer than anybody is frozen: only what is late on purpose is to be late.
@shape(chunksize=5, timeout=12.0, max_crashes=50)
def late(rng: random.Random) -> list[Item]:
    doomed = rng.randrange(10)
    return [(i, 120.0 if i == doomed else 0.01, "late" if i == doomed else "", b"") for i in range(10)]


@shape(priority="high")
def urgent(rng: random.Random) -> list[Item]:
    return [(i, rng.uniform(0.0, 0.02), "", b"") for i in range(60)]


# A server may be away for longer than what a task calls waits. These run for minutes: our faults hit them many times.
@shape(
    "below",
    chunksize=1,
    retries=50,
    backoff=0.2,
    max_delay=2.0,
    retry_on=(WorkbenchError, BacklogError),
    max_crashes=50,
)
def below(_: random.Random) -> list[Item]:
    return [(i, 0.0, "", b"") for i in range(4)]


@shape("cancelled", priority="low")
def cancelled(rng: random.Random) -> list[Item]:
    return [(i, rng.uniform(0.01, 0.2), "", b"") for i in range(300)]


@shape("revived", chunksize=1)
def revived(rng: random.Random) -> list[Item]:
    return [(i, rng.uniform(0.0, 0.05), "", b"") for i in range(300)]


@shape("mended", chunksize=7)
def mended(rng: random.Random) -> list[Item]:
    return [(i, rng.uniform(0.0, 0.05), "mend" if i % 6 == 5 else "", b"") for i in range(90)]


@shape("drawn")
def drawn(rng: random.Random) -> list[Item]:
    return [(i, rng.uniform(0.0, 0.01), "", b"") for i in range(400)]


@shape("single")
def single(rng: random.Random) -> list[Item]:
    return [(0, rng.uniform(0.0, 0.2), rng.choice(["", "", "", "raise", "crash"]), b"")]


def items_of(job: str) -> list[Item]:
    """Return the items of a job, which its name says."""
    return SHAPES[shape_of(job)][0](random.Random(job))


# A client.


class Client:
    """One client process: what it does goes to its ledger."""

    def __init__(self, ledger: Path, audit: Path, queue: Queue) -> None:
        self._ledger, self._audit, self._queue = ledger, str(audit), queue

    def say(self, what: str, job: str, **more: Any) -> None:
        """Add a line to the ledger."""
        line = json.dumps({"what": what, "job": job, "time": time.time(), **more}).encode() + b"\n"
        file = os.open(self._ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, line)
        os.close(file)

    def send(self, client: str, seed: str, rounds: int) -> None:
        """Send jobs of random shapes, two at a time."""
        rng = random.Random(f"{seed} {client}")
        for number in range(rounds):
            names = [f"{seed}-{client}-{number}-{shape}" for shape in rng.sample(sorted(SHAPES), 2)]
            sent = [(name, job) for name in names if (job := self._send_one(name)) is not None]
            for name, job in sent:
                how = SHAPES[shape_of(name)][1]
                if how == "cancelled":
                    job.wait(rng.uniform(0.0, 2.0))
                    patiently(job.cancel)
                if how == "revived":
                    self._cancel_sent(job, rng.uniform(0.0, 1.0))
                if how in ("mended", "revived"):
                    self._mend(name, job)
                self.say("done", name, outcomes=self._outcomes(job))

    def _send_one(self, name: str) -> Any:
        _, how, options = SHAPES[shape_of(name)]
        items = items_of(name)
        given = self._given(name)
        self.say("sends", name)
        asked = time.monotonic()
        try:
            if how == "single":
                job = self._queue.options(name=name).submit(work, items[0], **given).job
            else:
                fn = {"together": work_together, "below": work_below}.get(how, work)
                given |= {"queue": self._queue} if how == "below" else {}
                source: Iterable[Item] = iter(items) if how == "drawn" else items
                job = self._queue.map(fn, source, name=name, kwargs=given, **options)
        except (WorkbenchError, BacklogError) as exc:
            # A server was away for longer than a call waits: said, and for the checker to judge.
            self.say("refused", name, after=time.monotonic() - asked, error=str(exc))
            return None
        self.say("waits", name, id=job.id)
        return job

    def _given(self, name: str) -> dict[str, Any]:
        return {"audit": self._audit, "job": name}

    def _mark(self, name: str) -> Path:
        """The file that says that a job was whole, and its repair has begun."""
        return Path(f"{self._audit}.{name}.mends")

    def _mend(self, name: str, job: Any) -> None:
        """Retry with another function until nothing is left to be retried."""
        deadline = time.monotonic() + _MENDED
        while time.monotonic() < deadline:
            job = patiently(lambda: self._queue.job(name))
            try:
                self._outcomes(job, 5.0)
            except JobTimeoutError:
                continue
            except JobIncompleteError:
                pass  # a server has lost of it, or somebody was killed while he sent it again
            self._mark(name).touch()
            self.say("mends", name)
            try:
                if not self._retry(job, name):
                    return
            except JobError as exc:
                if "job.cancel() ends it" in str(exc):
                    patiently(job.cancel)
                time.sleep(0.5)
        self.say("stuck", name)

    @staticmethod
    def _cancel_sent(job: Any, every: float) -> None:
        """Cancel a job once it was sent whole: what was not sent by then would be gone."""
        while not job.wait(every) and not patiently(lambda: job.link.store.record(job.id)).sealed:
            pass
        patiently(job.cancel)

    def _retry(self, job: Any, name: str) -> int:
        return int(patiently(lambda: job.retry(work_mended, kwargs=self._given(name))))

    @staticmethod
    def _outcomes(job: Any, timeout: float | None = None) -> list[str]:
        return [digest(value) for value in patiently(lambda: job.results(timeout, errors="return"))]

    def attach(self, name: str) -> None:
        """Find a job whose client was killed, and wait for what there is of it."""
        deadline = time.monotonic() + _UNKNOWN
        while True:
            try:
                job = patiently(lambda: self._queue.job(name))
                break
            except JobNotFoundError:
                if time.monotonic() > deadline:
                    self.say("unknown", name)
                    return
                time.sleep(0.2)
        # What is sent by nobody any more ends all the same, or is known to be incomplete.
        before, deadline = -1, time.monotonic() + _STILL
        while True:
            try:
                if self._mark(name).exists():
                    self._mend(name, job)
                self.say("done", name, outcomes=self._outcomes(job, 5.0))
                return
            except JobCancelledError:
                return
            except JobIncompleteError:
                self.say("incomplete", name, outcomes=[digest(value) for value in job.results(0.0, errors="skip")])
                return
            except JobTimeoutError:
                progress = patiently(lambda: job.progress)
                if progress.done > before or progress.running:
                    before, deadline = progress.done, time.monotonic() + _STILL
                elif time.monotonic() > deadline:
                    self.say("stuck", name)
                    return


def main() -> None:
    """Be one client."""
    faulthandler.register(signal.SIGUSR1)
    ledger, audit, queue, what, *more = sys.argv[1:]
    with Queue(queue) as opened:
        client = Client(Path(ledger), Path(audit), opened)
        if what == "send":
            client.send(more[0], more[1], int(more[2]))
        else:
            for name in more:
                client.attach(name)


if __name__ == "__main__":
    main()
