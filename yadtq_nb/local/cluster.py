"""LocalCluster: a private stack for tests and scripts, which ends with the `with` block or with its process."""

from __future__ import annotations

import operator
import os
import secrets
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from yadtq_nb import config
from yadtq_nb.errors import LocalStackError
from yadtq_nb.local import servers
from yadtq_nb.local.home import Home, PartState
from yadtq_nb.local.stack import Identity, cores

if TYPE_CHECKING:
    from yadtq_nb import Queue

_PORT_ATTEMPTS: Final = 3
#: Seconds that nodes have to end in order: a test's tasks are worth no longer wait.
_NODE_GRACE: Final = 1.0


class LocalWorker:
    """One worker node of a LocalCluster: a place that is filled again when its process dies."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self.name = name
        self._cluster = cluster

    @property
    def pid(self) -> int:
        """Its process now, or 0."""
        return self._cluster._part(self.name).pid

    @property
    def node_id(self) -> str:
        """The id under which the queue knows it now; a restarted node has a new one."""
        return self._cluster._part(self.name).node_id

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return self._cluster._part(self.name).restarts

    def kill(self) -> None:
        """Send SIGKILL to the node's process only, and wait for its end."""
        self._cluster._end(self.name, do="kill", hold=False)

    def stop(self) -> None:
        """Ask the node to end in order, and wait for it; it stays down."""
        self._cluster._end(self.name, do="stop")

    def start(self) -> None:
        """Start a node here that was stopped, and wait until it is ready."""
        self._cluster._start(self.name)


class LocalCluster:
    """Broker, store and workers of its own, in a temporary directory.

    Nothing is left when it is closed, nor when the process that made it is killed.

    Args:
        slots: slots of each worker; None for one a core.
        workers: how many worker nodes.
        queue: the queue they serve.
        restart: start workers again that died.
        kafka: address of a broker to use instead of its own; give redis, too.
        redis: URL of a store to use instead of its own.
        settings: other fields of Config, such as lease or partitions.
        worker_command: the command of a node, if not this package's.
        memory_limit: what a slot may use, with all that its task has started, in bytes or such as "2G"; over it, it is
            stopped, and its task is charged with a crash. None for no limit.
        max_tasks_per_slot: a slot that has run so many tasks is replaced by a fresh one. None for no limit.

    Raises:
        LocalStackError: it cannot be started.
        ConfigError: the memory limit is no size, or too small.
    """

    def __init__(
        self,
        slots: int | None = None,
        workers: int = 1,
        queue: str = "default",
        *,
        restart: bool = True,
        kafka: str | None = None,
        redis: str | None = None,
        settings: dict[str, Any] | None = None,
        worker_command: Sequence[str] = servers.WORKER,
        timeout: float = 30.0,
        memory_limit: str | int | None = None,
        max_tasks_per_slot: int | None = None,
    ) -> None:
        servers.check_platform()
        if slots is not None and operator.index(slots) < 1:
            raise ValueError(f"slots must be at least 1, or None for one a core, not {slots!r}")
        if operator.index(workers) < 0:
            raise ValueError(f"workers must not be negative, not {workers!r}")
        if max_tasks_per_slot is not None and operator.index(max_tasks_per_slot) < 1:
            raise ValueError(f"max_tasks_per_slot must be at least 1, or None, not {max_tasks_per_slot!r}")
        self._memory_limit = config.parse_memory_limit(memory_limit)
        self._max_tasks_per_slot = max_tasks_per_slot
        if (kafka is None) != (redis is None):
            raise LocalStackError("LocalCluster takes kafka and redis both, or neither")
        self._timeout = timeout
        self._queue = queue
        self._owner = os.getpid()
        self._queues: weakref.WeakSet[Queue] = weakref.WeakSet()
        self._keeper: subprocess.Popen[bytes] | None = None
        self._home = Home(Path(tempfile.mkdtemp(prefix="yadtq-")))
        self.workers = [LocalWorker(self, f"node-{number}") for number in range(1, workers + 1)]
        try:
            self._home.make()
            given = None
            if kafka is not None and redis is not None:
                given = config.Config(kafka=kafka, redis=redis, secret=secrets.token_hex(32))
            self.config = self._start_keeper(given, settings or {}, slots or cores(), worker_command, restart=restart)
            self.wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def queue(self, name: str | None = None) -> Queue:
        """Return a queue on these servers: the one that its workers serve, unless named."""
        from yadtq_nb import Queue

        queue = Queue(name or self._queue, config=self.config)
        self._queues.add(queue)
        return queue

    def wait(self) -> None:
        """Wait until every part is up.

        Raises:
            LocalStackError: one was not in time; the message has the end of its log.
        """
        try:
            self._home.wait(
                lambda state: all(part.state == "up" for part in state.parts),
                timeout=self._timeout,
                until="every part is up",
            )
        except LocalStackError as exc:
            state = self._home.state()
            bad = [part.name for part in state.parts if part.state != "up"] if state else ["keeper"]
            tails = "\n".join(f"{name}: {self._home.tail(name, lines=20)}" for name in bad)
            raise LocalStackError(f"{exc}\n{tails}") from None

    def close(self) -> None:
        """End every process and remove the directory. May be called again."""
        if os.getpid() != self._owner:  # a forked child has a copy of this object, but not the cluster
            return
        for queue in list(self._queues):
            queue._leave()  # the cluster and its queues are one to whoever closes it
        if self._keeper is not None and self._keeper.poll() is None:
            self._keeper.terminate()
            try:
                self._keeper.wait(self._timeout)
            except subprocess.TimeoutExpired:
                self._keeper.kill()  # its parts die with it
                self._keeper.wait()
        shutil.rmtree(self._home.path, ignore_errors=True)

    def kill_broker(self) -> None:
        """Send SIGKILL to the broker, which loses its topics, and leave it down."""
        self._end("broker", do="kill", hold=True)

    def restart_broker(self) -> None:
        """Start the broker again on its port, empty, and wait until it answers."""
        self._restart("broker")

    def kill_store(self) -> None:
        """Send SIGKILL to the store and leave it down."""
        self._end("store", do="kill", hold=True)

    def restart_store(self, *, wipe: bool = False) -> None:
        """Start the store again on its port, with its data unless wiped, and wait until it answers."""
        if self._part("store").pid:
            self.kill_store()
        if wipe:
            shutil.rmtree(self._home.store)
            self._home.make()
        self._start("store")

    def log(self, part: str) -> str:
        """Return the log of "keeper", "broker", "store" or a worker's name."""
        return self._home.tail(part, lines=10_000)

    def _start_keeper(
        self,
        given: config.Config | None,
        settings: dict[str, Any],
        slots: int,
        worker_command: Sequence[str],
        *,
        restart: bool,
    ) -> config.Config:
        for _ in range(_PORT_ATTEMPTS):
            chosen, parts = (given, []) if given is not None else self._own_servers()
            chosen = msgspec.structs.replace(chosen, **settings)
            for worker in self.workers:
                parts.append(
                    servers.node(
                        self._home,
                        queue=self._queue,
                        slots=slots,
                        name=worker.name,
                        grace=_NODE_GRACE,
                        command=worker_command,
                        memory_limit=self._memory_limit,
                        max_tasks_per_slot=self._max_tasks_per_slot,
                    )
                )
            self._home.write_settings(chosen)
            servers.write_plan(self._home, parts, idle=None, restart_nodes=restart, ephemeral=True)
            try:
                self._keeper = servers.start_keeper(self._home, owner=self._owner)
            except servers.ServerDiedError as exc:  # perhaps its port was taken: try others
                died = exc
                self._home.make()
                continue
            return chosen
        raise died

    def _own_servers(self) -> tuple[config.Config, list[dict[str, Any]]]:
        broker_port = servers.free_port()
        store_port = servers.free_port(taken=broker_port)
        identity = Identity(broker_port, store_port, secrets.token_hex(32), secrets.token_hex(32))
        parts = [
            servers.broker(self._home, broker_port),
            servers.store(self._home, store_port, identity.password, grace=0.0),
        ]
        return identity.settings(), parts

    def _part(self, name: str) -> PartState:
        state = self._home.state()
        part = state.part(name) if state is not None else None
        if part is None:
            raise LocalStackError(f"this cluster has no {name}, or is closed")
        return part

    def _end(self, name: str, **request: Any) -> None:
        pid = self._part(name).pid
        if not pid:
            return
        self._home.ask(part=name, **request)
        self._home.wait(
            lambda state: (part := state.part(name)) is not None and part.pid != pid,
            timeout=self._timeout,
            until=f"{name} has ended",
        )

    def _start(self, name: str) -> None:
        self._home.ask(do="start", part=name)
        self._home.wait(
            lambda state: (part := state.part(name)) is not None and part.state == "up",
            timeout=self._timeout,
            until=f"{name} is up",
        )

    def _restart(self, name: str) -> None:
        if self._part(name).pid:
            self._end(name, do="kill", hold=True)
        self._start(name)
