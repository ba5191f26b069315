"""Maps under load on real processes, while slots, nodes, clients and servers are killed, stopped and cut off.

make chaos ARGS="--minutes 3 --stack local"            a fresh seed, printed first
make chaos ARGS="--minutes 3 --stack kafka --seed 7"   the same plan of faults again

    faults.py   the plan, from a seed, and what each fault does
    load.py     what clients send, and what must come of it
    ground.py   the cluster, the clients, and where the victims are
    check.py    compares ledgers, audit file and store

The load runs undisturbed first, then disturbed, then to its end. Exit code 1: lost, doubled, wrong, odd or hung.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Final

import check
import faults
import load
import redis
from ground import QUEUE, Ground, MissedError

from yadtq_nb.backlog.connection import Topics
from yadtq_nb.errors import YadtqError
from yadtq_nb.model import LANES, Lane
from yadtq_nb.workbench.connection import patiently
from yadtq_nb.workbench.jobs import JobStore

#: Clients that send at a time, and rounds of two jobs that each sends.
_CLIENTS: Final = 3
_ROUNDS: Final = 4
#: Seconds without a task that starts or a client that says something, while all servers are there, that count as hung.
_HUNG: Final = 60.0
#: Seconds that the checker waits for a store which a fault has killed just before.
_PATIENCE: Final = 30.0
#: Part of the time that is not disturbed, and the most seconds of it.
_CALM: Final = (0.15, 30.0)
#: Seconds undisturbed from which a comparison says something: jobs differ.
_TELLING: Final = 20.0


class HungError(Exception):
    """Nothing moves any more."""


def main() -> int:
    """Run, print the table, and tell whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--stack", choices=["local", "kafka"], default="local")
    parser.add_argument("--every", type=float, default=2.0, help="mean seconds between two faults")
    parser.add_argument("--only", default="", help="kinds of faults whose name contains this")
    parser.add_argument("--keep", type=Path, default=None, help="directory to copy ledgers, audit and logs to")
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed
    again = f"--seed {seed} --minutes {given.minutes:g} --every {given.every:g} --stack {given.stack}"
    again += f" --only {given.only!r}" if given.only else ""
    print(f"chaos: {again}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        run = Run(given.stack, seed, 60 * given.minutes, Path(directory), every=given.every, only=given.only)
        try:
            good = run.run()
        finally:
            if given.keep is not None:
                _keep(given.keep, Path(directory), run.ground.cluster._home.path)
            run.ground.close()
    print("good" if good else f"NOT GOOD: {again}", flush=True)
    return 0 if good else 1


class Run:
    """One run: calm, disturbed, to the end, checked."""

    def __init__(self, stack: str, seed: int, seconds: float, directory: Path, *, every: float, only: str) -> None:
        self._seed = seed
        self._calm = min(_CALM[0] * seconds, _CALM[1])
        self._seconds = seconds - self._calm
        self.plan = [fault for fault in faults.draw_plan(seed, self._seconds, every=every) if only in fault.kind]
        self.ground = Ground(stack, directory)
        self._store = JobStore(self.ground.cluster.config, QUEUE)
        self._topics: dict[Lane, Topics] = {}
        self._done: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()
        self._broken: list[str] = []
        self._started = 0
        self._attached: set[str] = set()
        self._moved = (time.monotonic(), 0)
        self._log = (directory / "faults.log").open("w", buffering=1)
        self._begin = time.time()

    def run(self) -> bool:
        """Run all of it; True when every promise was kept."""
        hung = ""
        windows = []
        try:
            for seconds, plan in ((self._calm, []), (self._seconds, self.plan)):
                start = time.time()
                self._load_for(seconds, plan)
                windows.append((start, time.time()))
            self._finish()
        except HungError as exc:
            hung = str(exc)
        self.ground.ending.set()
        tally = self._check(hung)
        print(self._table(tally, windows), flush=True)
        if tally.findings():
            print(tally.findings(), flush=True)
        if hung:
            print(self._dump(), flush=True)
        return tally.good

    # The load, with a plan of faults or without.

    def _load_for(self, seconds: float, plan: list[faults.Fault]) -> None:
        start = time.monotonic()
        todo, threads = list(plan), []
        while time.monotonic() < start + seconds:
            while todo and todo[0].at <= time.monotonic() - start:
                threads.append(threading.Thread(target=self._hit, args=[todo.pop(0)], daemon=True))
                threads[-1].start()
            for _ in range(_CLIENTS - len(self.ground.living())):
                self._started += 1
                self.ground.start_client(
                    f"c{self._started}", "send", f"c{self._started}", str(self._seed), str(_ROUNDS)
                )
            self._look_after()
            time.sleep(0.02)
        if plan:
            self.ground.ending.set()
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                raise HungError("a fault could not be undone")

    def _hit(self, fault: faults.Fault) -> None:
        try:
            self._log.write(f"{time.time():.3f} {fault.at:.2f} {fault.kind} {fault.victim} {fault.seconds:.2f}\n")
            faults.KINDS[fault.kind].do(self.ground, fault.victim, fault.seconds)
            self._done[fault.kind] += 1
            self._log.write(f"{time.time():.3f} {fault.at:.2f} over\n")
        except MissedError:
            self._missed[fault.kind] += 1
            self._log.write(f"{time.time():.3f} {fault.at:.2f} missed\n")
        except Exception as exc:  # a fault that breaks must not end the run unseen
            self._broken.append(f"{fault.kind} at {fault.at:.1f}: {type(exc).__name__}: {exc}")
            self.ground.ask_where()

    def _look_after(self) -> None:
        """Start who attaches to the jobs of killed clients, and see whether anything moves."""
        for client in list(self.ground.clients):
            if client.killed and client.name not in self._attached and client.process.poll() is not None:
                self._attached.add(client.name)
                lines = client.lines()
                done = {line["job"] for line in lines if line["what"] == "done"}
                open_jobs = [line["job"] for line in lines if line["what"] == "sends" and line["job"] not in done]
                if open_jobs:
                    self.ground.start_client(f"a-{client.name}", "attach", *open_jobs)
        now = time.monotonic()
        size = self.ground.audit.stat().st_size
        size += sum(c.ledger.stat().st_size for c in self.ground.clients if c.ledger.exists())
        if size != self._moved[1] or self.ground.server_is_away():
            self._moved = (now, size)
        elif now - self._moved[0] > _HUNG:
            raise HungError(f"nothing has moved for {_HUNG:g} s")

    def _finish(self) -> None:
        """Wait until all clients have ended, and nothing is left to be done."""
        while any(client.process.poll() is None for client in self.ground.clients) or self._has_more():
            self._look_after()
            time.sleep(0.05)
        while left := self._left():
            if time.monotonic() - self._moved[0] > _HUNG:
                raise HungError(f"left over: {left}")
            self._look_after()
            time.sleep(0.2)

    def _has_more(self) -> bool:
        return any(client.killed and client.name not in self._attached for client in self.ground.clients)

    def _left(self) -> str:
        """Return what is still at the workbench, or in Kafka and not fed; empty when all is done."""
        found = self._counts()
        return ", ".join(f"{name} {count}" for name, count in found.items() if count)

    def _counts(self) -> dict[str, int]:
        client, prefix = self.ground.redis(), f"{{yadtq:{QUEUE}}}"
        found = {
            "open": client.hlen(f"{prefix}:open"),
            "leases": client.zcard(f"{prefix}:leases"),
            "ready bytes": sum(int(client.get(key) or 0) for key in client.scan_iter(f"{prefix}:ready_bytes*")),
            "at": client.hlen(f"{prefix}:at"),
            "positions": sum(client.zcard(key) for key in client.scan_iter(f"{prefix}:position:*")),
        }
        found["not fed"] = sum(map(self._not_fed, LANES))
        return found

    def _not_fed(self, lane: Lane) -> int:
        if lane not in self._topics:
            self._topics[lane] = Topics(self.ground.cluster.config, QUEUE, lane)
        topics = self._topics[lane]
        topic = topics.ensure()
        fed = {p: c.offset for p, c in self._store.fed(lane)[1].items() if c.topic_id == topic.id}
        # Of batches of several records Tansu says a smaller end than it has.
        return sum(max(0, end - fed.get(p, 0)) for p, end in topics.ends(topic).items())

    # Afterwards.

    def _check(self, hung: str) -> check.Tally:
        ground, tally = self.ground, check.Tally()
        audit = check.read_audit(ground.audit.read_text().splitlines())
        jobs = check.read_ledgers([(client.killed, client.lines()) for client in ground.clients])
        forgetful = ground.stack == "local" and any("broker" in kind for kind in self._done)
        for name, sent in jobs.items():
            id = patiently(functools.partial(self._store.find, name), _PATIENCE)
            record = patiently(functools.partial(self._store.record, id), _PATIENCE) if id else None
            found = None
            if record is not None:
                running = int(ground.redis().hget(f"{{yadtq:{QUEUE}}}:job:{record.id}", "running") or 0)
                found = check.find(ground.cluster.config, self._store, record, running)
                tally.late += record.late
            check.check_job(tally, sent, found, audit, forgetful=forgetful)
        check.count_runs(tally, audit)
        tally.odd += self._broken
        if hung:
            tally.odd.append(f"hung: {hung}")
        with contextlib.suppress(YadtqError, redis.RedisError):
            tally.odd += [f"left over: {left}"] if (left := self._left()) else []
        for client in ground.clients:
            code = client.process.poll()
            if code and not client.killed:
                tally.odd.append(f"client {client.name} ended with {code}:\n{client.log.read_text()[-1500:]}")
        return tally

    def _table(self, tally: check.Tally, windows: list[tuple[float, float]]) -> str:
        kinds = [kind for kind in faults.KINDS if self._done[kind] or self._missed[kind]]
        rows = [f"| {kind} | {self._done[kind]} | {self._missed[kind]} |" for kind in kinds]
        return "\n".join(
            [
                "| fault | done | nobody there |",
                "| --- | ---: | ---: |",
                *rows,
                f"| all | {sum(self._done.values())} | {sum(self._missed.values())} |",
                "",
                f"jobs {tally.jobs} · tasks {tally.tasks} · lost {len(tally.lost)} · doubled {len(tally.doubled)} · "
                f"wrong {len(tally.wrong)} · odd {len(tally.odd)}",
                f"starts {tally.starts} · tasks run more than once {tally.rerun} · late outcomes dropped {tally.late}",
                f"clients killed {sum(c.killed for c in self.ground.clients)} · jobs they had not made known "
                f"{tally.unborn} · refused while a server was away {tally.refused}",
                f"jobs incomplete {tally.incomplete}, with {tally.unsent} tasks never sent · "
                f"tasks forgotten with the in-memory broker and their client {tally.forgotten}",
                self._time_over(windows),
            ]
        )

    def _time_over(self, windows: list[tuple[float, float]]) -> str:
        """Compare the work that was done in a second, disturbed and not; work is the time that tasks sleep."""
        if len(windows) < 2:
            return ""
        known: dict[str, list[load.Item]] = {}
        seen: set[tuple[str, str]] = set()
        work = [0.0, 0.0]
        lines = [line.split() for line in self.ground.audit.read_text().splitlines()]
        # Clients take seconds to start: that is no part of undisturbed work.
        windows = [(max(windows[0][0], float(lines[0][3]) if lines else 0.0), windows[0][1]), windows[1]]
        for job, index, _, at in lines:
            if (job, index) in seen:
                continue
            seen.add((job, index))
            if job not in known:
                known[job] = load.items_of(job)
            for n, (start, end) in enumerate(windows):
                if start <= float(at) < end:
                    work[n] += known[job][int(index)][1]
        lengths = [max(0.001, end - start) for start, end in windows]
        calm, rough = (done / length for done, length in zip(work, lengths, strict=True))
        told = f"seconds of task a second: {calm:.2f} undisturbed, {rough:.2f} disturbed"
        if lengths[0] < _TELLING or not calm:
            return f"{told} (too short to compare)"
        return f"{told}: {lengths[1] - work[1] / calm:.0f} s over undisturbed in {lengths[1]:.0f} s"

    def _dump(self) -> str:
        """Tell where all jobs stand."""
        self.ground.ask_where()
        lines = ["", "where jobs stand:"]
        with contextlib.suppress(YadtqError, redis.RedisError):
            lines += [
                f"  {r.name}: total {r.total} sealed {r.sealed} sending {r.sending} fed {r.fed} running {r.running} "
                f"succeeded {r.succeeded} failed {r.failed}"
                for r in self._store.records()
                if r.ended is None
            ]
            lines.append(f"  {self._counts()}")
            client, prefix = self.ground.redis(), f"{{yadtq:{QUEUE}}}"
            lines.append(f"  leases {client.zrange(f'{prefix}:leases', 0, 9, withscores=True)}")
            lines += [f"  open {id.decode()}" for id in list(client.hkeys(f"{prefix}:open"))[:10]]
            lines.append(f"  ready {client.lrange(f'{prefix}:ready', 0, 9)}")
            lines += [
                f"  {v.info.id} {v.status} {v.heartbeat_age:.1f} s {v.info.running}" for v in self._store.workers()
            ]
            lines.append(f"  cursors {self._store.fed()[1]}")
        for client in self.ground.clients:
            if client.process.poll() is None:
                lines.append(f"  client {client.name}: {[(x['what'], x['job']) for x in client.lines()[-2:]]}")
                lines.append(client.log.read_text()[-3000:])
        for part in ("keeper", *(worker.name for worker in self.ground.cluster.workers)):
            lines += [f"--- {part}", "\n".join(self.ground.cluster.log(part).splitlines()[-8:])]
        return "\n".join(lines)


def _keep(target: Path, directory: Path, cluster: Path) -> None:
    """Copy what the run has left: ledgers, audit file, logs."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    shutil.copytree(cluster / "logs", target / "logs", dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
