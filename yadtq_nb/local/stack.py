"""The stack that belongs to a user and a Python environment: started when it is needed, left running."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

import msgspec

from yadtq_nb import config
from yadtq_nb.errors import LocalStackError
from yadtq_nb.local import servers
from yadtq_nb.local.home import Home, KeeperState, PartState

#: Partitions of a local queue: few, since each costs the idle broker.
PARTITIONS: Final = 4
#: How often new ports are tried when another process took them in the meantime.
_PORT_ATTEMPTS: Final = 3
_START_TIMEOUT: Final = 30.0
_STOP_TIMEOUT: Final = 20.0
#: A process of a recorded pid is the one that was recorded if it started at most this much apart, in seconds.
_SAME_START: Final = 2.0


class PartStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the stack, as it is now."""

    #: "keeper", "broker", "store", "node-1" and so on.
    name: str
    #: "up", "starting", "failing", "down" or "not answering".
    state: str
    #: 0 when it does not run.
    pid: int
    #: 0 when it has none.
    port: int = 0
    #: Seconds since it was last started, or None when it does not run.
    uptime: float | None = None
    restarts: int = 0
    #: How it last ended, such as "signal 9"; empty if it never did.
    last_exit: str = ""
    #: What a node serves.
    queue: str = ""
    slots: int = 0


class StackStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a local stack is."""

    #: "broken" when a part has died or does not answer.
    state: Literal["up", "down", "broken"]
    #: Where its state and logs are.
    directory: str
    parts: tuple[PartStatus, ...] = ()
    #: Why it is down or broken.
    reason: str = ""


class Identity(msgspec.Struct, frozen=True):
    """What a stack keeps over restarts, so that live clients find it again."""

    broker_port: int
    store_port: int
    password: str
    secret: str

    def settings(self) -> config.Config:
        """Return the settings for its clients and nodes."""
        return config.Config(
            kafka=f"127.0.0.1:{self.broker_port}",
            redis=f"redis://:{self.password}@127.0.0.1:{self.store_port}/0",
            secret=self.secret,
            reading="wake",
            partitions=PARTITIONS,
            # Topics are in memory: everything is fed at once into the store, whose append-only file holds it.
            watermark_chunks=None,
            watermark_bytes=None,
        )


class Stack:
    """A stack in a directory. Any process of the user may hold one; the keeper is the only one that acts."""

    def __init__(
        self,
        home: Home,
        *,
        slots: int | None = None,
        idle: Callable[[], float | None] = config.idle_limit,
        worker: Sequence[str] = servers.WORKER,
    ) -> None:
        """Take the stack in a directory.

        Args:
            home: its directory.
            slots: slots of each node; None for one a core.
            idle: asked at a start: stop after so many seconds without work; None for never.
            worker: the command of a node.
        """
        self.home = home
        self._slots = slots
        self._idle = idle
        self._worker = worker

    def ensure_up(self, queue: str = "default") -> config.Config:
        """Start what is not up, and return how to reach it. Cheap when all is up.

        Broker and store answer when it returns; a node that has just been started may not be ready yet.

        Raises:
            LocalStackError: it cannot be started; the message names the log.
        """
        with _explained(self.home):
            return self._serving(queue) or self._start_or_mend(queue)

    def status(self) -> StackStatus:
        """Look at every part, and ask the servers."""
        try:
            state = self.home.state()
        except NotADirectoryError:
            state = None
        if state is None:
            return StackStatus(state="down", directory=str(self.home.path))
        if self.home.alive():
            return self._status_alive(state)
        return self._status_gone(state)

    def down(self) -> bool:
        """End every process of the stack, and return whether there was one. What is stored stays."""
        if not self.home.path.is_dir():
            return False
        with self.home.starting():
            if self.home.alive():
                self._end_keeper()
                return True
            state = self.home.state()
            if state is None or state.stopped:
                return False
            kill_leftovers(state)
            self.home.write(self.home.path / "state.json", msgspec.json.encode(_as_stopped(state)))
            return True

    def _serving(self, queue: str) -> config.Config | None:
        if not self.home.alive():
            return None
        state = self.home.state()
        if state is None or not state.servers_up or not state.serves(queue):
            return None
        self.home.touch()
        return self.home.settings()

    def _start_or_mend(self, queue: str) -> config.Config:
        self.home.make()
        with self.home.starting():  # of two kernels, the second finds it up
            deadline = time.monotonic() + _START_TIMEOUT
            while (settings := self._serving(queue)) is None:
                if time.monotonic() >= deadline:
                    raise LocalStackError(f"the local stack is not up after {_START_TIMEOUT:g} s: {self._trouble()}")
                self._mend(queue)
            return settings

    def _mend(self, queue: str) -> None:
        """Take one step towards a stack that serves the queue."""
        if not self.home.alive():
            self._start(queue)
            return
        state = self.home.state()
        if state is not None and state.servers_up and not state.serves(queue):
            self._ask_to_serve(queue)
        time.sleep(0.002)  # it starts, stops or restarts a server

    def _ask_to_serve(self, queue: str) -> None:
        spec = self._node(queue, name="")
        with contextlib.suppress(LocalStackError):  # it may be stopping: then it is started anew
            self.home.ask(do="serve", spec=spec)

    def _start(self, queue: str) -> None:
        last = self.home.state()
        crashed = last is not None and not last.stopped
        if last is not None and crashed:
            kill_leftovers(last)
        for _ in range(_PORT_ATTEMPTS):
            identity = self._identity()
            self.home.write_settings(identity.settings())
            parts = [
                servers.broker(self.home, identity.broker_port),
                servers.store(self.home, identity.store_port, identity.password),
                *self._nodes(queue, last if crashed else None),
            ]
            servers.write_plan(self.home, parts, idle=self._idle(), after_crash=crashed)
            # What it says is of the last keeper: it must not be taken for the new one's word.
            (self.home.path / "state.json").unlink(missing_ok=True)
            try:
                servers.start_keeper(self.home)
            except servers.ServerDiedError as exc:
                died = exc
                continue
            return
        raise LocalStackError(f"{died}:\n{self.home.tail(died.part)}\nThe whole log: {self.home.log(died.part)}")

    def _nodes(self, queue: str, crashed: KeeperState | None) -> list[dict[str, Any]]:
        """Return the nodes to start: one for the queue, and those that were lost in a crash, as their successors."""
        lost = {part.queue: part.node_id for part in (crashed.parts if crashed else ()) if part.queue}
        queues = list(dict.fromkeys([queue, *lost]))
        return [
            self._node(name, name=f"node-{number}", predecessor=lost.get(name, ""))
            for number, name in enumerate(queues, start=1)
        ]

    def _node(self, queue: str, *, name: str, predecessor: str = "") -> dict[str, Any]:
        return servers.node(
            self.home,
            queue=queue,
            slots=self._slots or cores(),
            name=name,
            predecessor=predecessor,
            command=self._worker,
        )

    def _identity(self) -> Identity:
        """Return ports and secrets: those of last time as far as the ports are free."""
        path = self.home.path / "identity.json"
        try:
            last = msgspec.json.decode(path.read_bytes(), type=Identity)
        except (FileNotFoundError, msgspec.MsgspecError):
            last = Identity(0, 0, secrets.token_hex(32), secrets.token_hex(32))
        broker_port = servers.free_port(wanted=last.broker_port)
        identity = Identity(
            broker_port,
            servers.free_port(wanted=last.store_port, taken=broker_port),
            last.password,
            last.secret,
        )
        self.home.write(path, msgspec.json.encode(identity))
        return identity

    def _end_keeper(self) -> None:
        with contextlib.suppress(LocalStackError):
            self.home.ask(do="down")
        deadline = time.monotonic() + _STOP_TIMEOUT
        while self.home.alive():
            if time.monotonic() >= deadline:  # it hangs: its parts die with it
                state = self.home.state()
                if state is not None:
                    kill_recorded(state.pid, state.started)
                deadline += _STOP_TIMEOUT
            time.sleep(0.005)

    def _trouble(self) -> str:
        state = self.home.state()
        bad = next((part for part in state.parts if part.state != "up"), None) if state else None
        name = bad.name if bad else "keeper"
        return f"{name}: {self.home.tail(name, lines=1)}\nThe whole log: {self.home.log(name)}"

    def _status_alive(self, state: KeeperState) -> StackStatus:
        try:
            self.home.ask(do="ping")
            keeper = "up"
        except LocalStackError:
            keeper = "not answering"
        now = time.time()
        parts = [PartStatus(name="keeper", state=keeper, pid=state.pid, uptime=now - state.started)]
        for part in state.parts:
            seen = part.state
            if seen == "up" and part.port and not servers.answers(self.home, part.name):
                seen = "not answering"
            parts.append(_part_status(part, seen, now))
        bad = next((part for part in parts if part.state not in ("up", "starting")), None)
        reason = f"{bad.name} is {bad.state}: see {self.home.log(bad.name)}" if bad else state.reason
        return StackStatus(
            state="broken" if bad else "up", directory=str(self.home.path), parts=tuple(parts), reason=reason
        )

    def _status_gone(self, state: KeeperState) -> StackStatus:
        if state.stopped:
            return StackStatus(state="down", directory=str(self.home.path), reason=state.reason)
        keeper = PartStatus(name="keeper", state="down", pid=0, last_exit="killed")
        parts = [_part_status(part, "down", time.time()) for part in state.parts]
        return StackStatus(
            state="broken",
            directory=str(self.home.path),
            parts=(keeper, *parts),
            reason="its keeper was killed; the next Queue() or `yadtq up` heals it",
        )


def ensure_up(queue: str = "default") -> config.Config:
    """Start this user's stack for this Python environment if it is not up, and return how to reach it.

    It runs on when this process ends, and stops by itself after some time without work. Cheap when it is up.

    Raises:
        LocalStackError: it cannot be started; the message names the log.
    """
    servers.check_platform()
    return Stack(Home.of_this_environment()).ensure_up(queue)


def status() -> StackStatus:
    """Look at every part of this user's stack for this Python environment."""
    servers.check_platform()
    stack = Stack(Home.of_this_environment())
    with _explained(stack.home):
        return stack.status()


def down() -> bool:
    """End this user's stack for this Python environment, and return whether there was one. What is stored stays."""
    servers.check_platform()
    stack = Stack(Home.of_this_environment())
    with _explained(stack.home):
        return stack.down()


@contextlib.contextmanager
def _explained(home: Home) -> Iterator[None]:
    """Raise what is wrong with the directory as an error that names it."""
    try:
        yield
    except OSError as exc:
        raise LocalStackError(
            f"the local stack's directory {home.path} cannot be used: {exc}; YADTQ_HOME names another one"
        ) from exc


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def kill_leftovers(state: KeeperState) -> None:
    """End what a killed keeper left running: on Linux nothing, as its parts die with it, but perhaps not yet."""
    for part in state.parts:
        if part.pid:
            kill_recorded(part.pid, part.started)


def kill_recorded(pid: int, started: float) -> None:
    """Kill a process and wait for its end, unless its pid is by now another's."""
    import psutil  # here, since a healthy start has no need of it

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) >= _SAME_START:
            return
        process.kill()
        while process.status() != psutil.STATUS_ZOMBIE:  # nobody may reap it, but its ports are free
            time.sleep(0.002)


def _part_status(part: PartState, seen: str, now: float) -> PartStatus:
    runs = part.pid and seen != "down"
    return PartStatus(
        name=part.name,
        state=seen,
        pid=part.pid if runs else 0,
        port=part.port,
        uptime=now - part.started if runs else None,
        restarts=part.restarts,
        last_exit=part.last_exit,
        queue=part.queue,
        slots=part.slots,
    )


def _as_stopped(state: KeeperState) -> KeeperState:
    return KeeperState(state.pid, state.started, True, "killed", [])
