"""The directory of one stack: its files, its locks, and how its keeper is spoken to.

    plan.json      what the keeper is to start, with the store's password; ports and secrets are kept over restarts
    state.json     what the keeper has: parts, pids, states; replaced at each change
    config.json    the settings that clients and nodes use
    keeper.lock    held by the keeper for life
    start.lock     held by whoever starts or stops the stack
    active         touched while there is work
    control.sock   the keeper listens here
    store/ logs/   the store's append-only file; one log for each part

All are readable by the owner only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from yadtq_nb import config
from yadtq_nb.errors import LocalStackError

#: Longest path that a Unix socket can be connected to, in bytes, on all systems.
_SOCKET_PATH_LIMIT = 100


class PartState(msgspec.Struct, frozen=True):
    """One part of a stack, as its keeper wrote it."""

    #: "broker", "store", "node-1" and so on.
    name: str
    #: "starting", "up", "failing" or "down".
    state: str
    #: 0 when it does not run.
    pid: int
    #: 0 for a node.
    port: int
    #: Seconds since the epoch.
    started: float
    restarts: int
    #: How it last ended, such as "signal 9"; empty if it never did.
    last_exit: str
    #: What a node serves; empty for a server.
    queue: str
    slots: int
    node_id: str


class KeeperState(msgspec.Struct, frozen=True):
    """What state.json says."""

    pid: int
    started: float
    #: True when it ended in order: a keeper that is gone without it was killed.
    stopped: bool
    #: Why it stops or stopped; empty while it goes on.
    reason: str
    parts: list[PartState]

    def part(self, name: str) -> PartState | None:
        """Return the part of that name."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def servers_up(self) -> bool:
        """Whether broker and store answered when they were last started."""
        return not self.reason and all(part.state == "up" for part in self.parts if not part.queue)

    def serves(self, queue: str) -> bool:
        """Whether a node for the queue is kept."""
        return any(part.queue == queue for part in self.parts)


class Home:
    """A stack's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.json"
        self.config = path / "config.json"
        self.active = path / "active"
        self.logs = path / "logs"
        self.store = path / "store"

    @classmethod
    def of_this_environment(cls) -> Home:
        """Return the directory of this user's stack for this Python environment."""
        name = hashlib.sha256(os.fsencode(sys.prefix)).hexdigest()[:12]
        return cls(config.state_directory() / name)

    def make(self) -> None:
        """Make the directories.

        Raises:
            LocalStackError: another user owns them.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for directory in (self.path, self.logs, self.store):
            directory.mkdir(mode=0o700, exist_ok=True)
        if self.path.stat().st_uid != os.getuid():
            # Its files would be read as ours, and another user's plan would be run.
            raise LocalStackError(f"{self.path} belongs to another user: set YADTQ_HOME to a directory of your own")
        self.path.chmod(0o700)

    def write(self, path: Path, data: bytes) -> None:
        """Replace a file by one that only the owner can read."""
        new = path.with_name(f"{path.name}.new")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
        new.replace(path)

    def write_settings(self, settings: config.Config) -> None:
        """Store how to reach the stack."""
        self.write(self.config, msgspec.json.encode(settings))

    def settings(self) -> config.Config:
        """Return how to reach the stack."""
        return config.read(self.config)

    def touch(self) -> None:
        """Put off the idle stop."""
        os.utime(self.active)

    def state(self) -> KeeperState | None:
        """Return what the keeper last wrote, or None if there never was one."""
        try:
            data = (self.path / "state.json").read_bytes()
        except FileNotFoundError:
            return None
        return msgspec.json.decode(data, type=KeeperState)

    def alive(self) -> bool:
        """Whether a keeper lives: the kernel tells, by the lock that it holds."""
        import fcntl  # here, since Windows has none and must still be able to import this package

        try:
            lock = os.open(self.path / "keeper.lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Let one process at a time start or stop the stack."""
        import fcntl

        lock = os.open(self.path / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send the keeper a request and return its answer.

        Raises:
            LocalStackError: it cannot be reached, or refused.
        """
        try:
            with self._connect() as connection, connection.makefile("rb") as lines:
                connection.sendall(json.dumps(request).encode() + b"\n")
                answer: dict[str, Any] = json.loads(lines.readline() or b"{}")
        except (OSError, ValueError) as exc:
            raise LocalStackError(f"the local stack's keeper does not answer: see {self.log('keeper')}") from exc
        if not answer.get("ok"):
            raise LocalStackError(
                f"the local stack's keeper refused {request['do']}: {answer.get('error', 'no answer')}"
            )
        return answer

    def wait(self, what: Callable[[KeeperState], bool], *, timeout: float, until: str) -> KeeperState:
        """Wait until the keeper's state is as wanted, and return it.

        Raises:
            LocalStackError: it was not in time.
        """
        deadline = time.monotonic() + timeout
        while True:
            state = self.state()
            if state is not None and what(state):
                return state
            if time.monotonic() >= deadline:
                raise LocalStackError(f"waited {timeout:g} s until {until}: see the logs in {self.logs}")
            time.sleep(0.002)

    def log(self, part: str) -> Path:
        """Return the log of a part."""
        return self.logs / f"{part}.log"

    def tail(self, part: str, *, lines: int = 5) -> str:
        """Return the last lines of a part's log, or nothing."""
        try:
            text = self.log(part).read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(5.0)
        path = str(self.path / "control.sock")
        directory = -1
        try:
            if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT and sys.platform == "linux":
                directory = os.open(self.path, os.O_PATH)
                path = f"/proc/self/fd/{directory}/control.sock"
            connection.connect(path)
        except BaseException:
            connection.close()
            raise
        finally:
            if directory >= 0:
                os.close(directory)
        return connection
