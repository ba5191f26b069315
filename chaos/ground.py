"""What is disturbed: a cluster of real processes, and clients in processes of their own.

Only processes that were started here are ever killed: parts and clients by the pid that was written down when they
started, slots and templates as children of these.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import redis

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the servers are started as the tests do
import stacks

from yadtq_nb import Config, LocalCluster
from yadtq_nb.local import servers

QUEUE: Final = "chaos"
_LOAD: Final = Path(__file__).with_name("load.py")
_STORE_PASSWORD: Final = "password"
#: Tasks that are killed by our faults again and again must not count as poison.
_SETTINGS: Final = {"max_crashes": 8}
#: Seconds for which a node may be starting: it needs its servers, which are killed, too.
_UP: Final = 240.0


class MissedError(Exception):
    """There was nobody to hit."""


class KafkaCluster(LocalCluster):
    """A LocalCluster on Apache Kafka, which keeps its data when it is killed."""

    def _own_servers(self) -> tuple[Config, list[dict[str, Any]]]:
        broker = servers.free_port()
        store = servers.free_port(taken=broker)
        config = Config(
            kafka=f"127.0.0.1:{broker}",
            redis=f"redis://:{_STORE_PASSWORD}@127.0.0.1:{store}/0",
            secret=stacks.SECRET,
            partitions=4,
        )
        parts = [
            stacks.kafka_plan(self._home, broker, name="broker"),
            servers.store(self._home, store, _STORE_PASSWORD, grace=0.0),
        ]
        return config, parts


class Client:
    """One client process."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, ledger: Path, log: Path) -> None:
        self.process, self.name, self.ledger, self.log = process, name, ledger, log
        #: True once a fault has killed it.
        self.killed = False

    def lines(self) -> list[dict[str, Any]]:
        """Return what it has said so far."""
        if not self.ledger.exists():
            return []
        return [json.loads(line) for line in self.ledger.read_bytes().splitlines()]


class Ground:
    """The cluster and its clients."""

    def __init__(self, stack: str, directory: Path, *, nodes: int = 3, slots: int = 2) -> None:
        self.stack = stack
        self.directory = directory
        self.audit = directory / "audit"
        self.audit.touch()
        make = KafkaCluster if stack == "kafka" else LocalCluster
        self.cluster = make(slots, nodes, QUEUE, settings=_SETTINGS, timeout=_UP)
        self.clients: list[Client] = []
        #: Set when all faults are to end.
        self.ending = threading.Event()
        self._held: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def close(self) -> None:
        """End everything."""
        for client in self.clients:
            if client.process.poll() is None:
                client.process.kill()
                client.process.wait()
        self.cluster.close()

    # Clients.

    def start_client(self, name: str, *words: str) -> Client:
        """Start a client process."""
        ledger, log = self.directory / f"{name}.ledger", self.directory / f"{name}.log"
        environment = {
            **os.environ,
            "YADTQ_CONFIG": str(self.cluster._home.config),
            "PYTHONPATH": str(stacks.ROOT),
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(_LOAD), str(ledger), str(self.audit), QUEUE, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=self.directory,
            )
        client = Client(process, name, ledger, log)
        self.clients.append(client)
        return client

    def living(self) -> list[Client]:
        """Return the clients that send and run now."""
        return [c for c in self.clients if c.name.startswith("c") and not c.killed and c.process.poll() is None]

    # Victims.

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Keep other faults away from a victim.

        Raises:
            MissedError: another one has it.
        """
        with self._guard:
            lock = self._held.setdefault(name, threading.Lock())
        if not lock.acquire(blocking=False):
            raise MissedError(name)
        try:
            yield
        finally:
            lock.release()

    def server_is_away(self) -> bool:
        """Tell whether a fault has a server, which may take longer to come back than anyone is to wait in silence."""
        return any(name in self._held and self._held[name].locked() for name in ("broker", "store"))

    def pause(self, seconds: float) -> None:
        """Let a fault last, or until all faults are to end."""
        self.ending.wait(seconds)

    def node(self, victim: int) -> str:
        """Return the name of a node."""
        return self.cluster.workers[victim % len(self.cluster.workers)].name

    def process(self, part: str) -> psutil.Process:
        """Return the process of a part: one that our keeper has started and not reaped.

        Raises:
            MissedError: it does not run.
        """
        pid = self.cluster._part(part).pid
        ours = {process.pid: process for process in self._below(psutil.Process())}
        if pid not in ours:
            raise MissedError(part)
        return ours[pid]

    def template(self, node: str) -> psutil.Process:
        """Return the process that a node's slots are forked from."""
        children = self._below(self.process(node), recursive=False)
        if not children:
            raise MissedError(node)
        return children[0]

    def ask_where(self) -> None:
        """Have nodes and clients write to their logs where each of their threads stands."""
        pids = [client.process.pid for client in self.living()]
        for worker in self.cluster.workers:
            with contextlib.suppress(MissedError):
                pids.append(self.process(worker.name).pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)

    def slots(self, node: str) -> list[psutil.Process]:
        """Return a node's slots."""
        return sorted(self._below(self.template(node), recursive=False), key=lambda process: process.pid)

    @staticmethod
    def _below(process: psutil.Process, *, recursive: bool = True) -> list[psutil.Process]:
        try:
            return list(process.children(recursive=recursive))
        except psutil.NoSuchProcess as exc:
            raise MissedError(str(process.pid)) from exc

    def freeze(self, processes: Sequence[psutil.Process], seconds: float) -> None:
        """Stop processes for a while. Each is looked up again by pid and age before it is signalled."""
        try:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
            self.pause(seconds)
        finally:
            for process in reversed(processes):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def redis(self) -> Any:
        """Return a client of the store, for the checker and for faults."""
        return redis.Redis.from_url(self.cluster.config.redis, socket_timeout=5.0)
