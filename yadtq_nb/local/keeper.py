"""The keeper: one detached process that starts the parts of a stack, restarts those that die, and ends them all.

    starter ──▶ keeper ──▶ broker, store      up once a probe is answered on the port
                       ──▶ node-1, node-2...  up once they print "ready"; a fresh id each time they start

It runs as a script, `python -I -S keeper.py DIRECTORY`, and imports the standard library only, so that it is there
within milliseconds. What it starts stands in plan.json; what it has, in state.json, which it replaces at each change.
It holds a lock on keeper.lock for life, and the kernel drops that with the process: who can lock it knows it is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: A part that lived at least this long is restarted at once.
LONG_LIFE = 5.0
#: A part that dies young is restarted after this long, doubled each time up to SLOWEST_RESTART.
FIRST_DELAY = 0.1
SLOWEST_RESTART = 5.0
#: Young deaths in a row after which a part is called failing.
FAILING_FROM = 4
#: Longest wait between two looks at idleness, owner and directory, in seconds.
TICK = 2.0
#: A log that is longer than this is put aside as LOG.old, in bytes.
LOG_LIMIT = 8 * 1024 * 1024

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Part:
    """One process that the keeper keeps: what it is, and how it is doing."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        #: Nodes get a fresh id each time they start.
        self.is_node: bool = "queue" in spec
        self.pid = 0
        #: "starting", "up" or "down".
        self.state = "down"
        self.started = 0.0
        self.born = 0.0
        self.restarts = 0
        self.young_deaths = 0
        self.last_exit = ""
        #: When to start it again, by the monotonic clock; None when it is not to be started.
        self.due: float | None = None
        #: True when it was stopped on purpose and stays so.
        self.held = False
        self.node_id = ""
        #: The dead node whose leases may be given back at once.
        self.predecessor: str = spec.get("predecessor", "")

    def view(self) -> dict[str, Any]:
        """Return what state.json says of it."""
        failing = self.young_deaths >= FAILING_FROM and self.state != "up"
        return {
            "name": self.name,
            "state": "failing" if failing else self.state,
            "pid": self.pid,
            "port": self.spec.get("port", 0),
            "started": self.started,
            "restarts": self.restarts,
            "last_exit": self.last_exit,
            "queue": self.spec.get("queue", ""),
            "slots": self.spec.get("slots", 0),
            "node_id": self.node_id,
        }


class Keeper:
    """Starts, watches and ends the parts of one stack."""

    def __init__(self, directory: Path, plan: dict[str, Any], *, owner: int, ready_fd: int) -> None:
        self.directory = directory
        self.plan = plan
        self.owner = owner
        self.ready_fd = ready_fd
        #: True while state.json is not what it should be.
        self._unwritten = False
        self.parts = [Part(spec) for spec in plan["parts"]]
        self.started = time.time()
        #: Why it stops; empty while it goes on.
        self.reason = ""
        self.last_active = time.monotonic()
        self.active_mtime = 0
        self.next_tick = 0.0
        self.selector = selectors.DefaultSelector()
        self.user_umask = os.umask(0o077)

    def run(self) -> None:
        """Keep the parts until told to stop, idle, or without owner."""
        self._listen()
        for part in self.parts:
            self._spawn(part)
        self._write_state()
        while not self.reason:
            self._pump(self._timeout())
            self._reap()
            self._probe()
            self._restart_due()
            self._tell_starter()
            if time.monotonic() >= self.next_tick:
                self._tick()
        self._stop_all()

    # What happens, one method each.

    def _listen(self) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._stop("asked by a signal"))
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        self.selector.register(reading, selectors.EVENT_READ, lambda: os.read(reading, 4096))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        Path("control.sock").unlink(missing_ok=True)
        listener.bind("control.sock")  # relative to the directory: a path of more than 107 bytes cannot be bound
        listener.listen(16)
        self.selector.register(listener, selectors.EVENT_READ, lambda: self._answer(listener))
        if self.owner and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # gone already: the first tick sees it
                self.selector.register(os.pidfd_open(self.owner), selectors.EVENT_READ, self._check_owner)

    def _pump(self, timeout: float) -> None:
        for key, _ in self.selector.select(timeout):
            key.data()

    def _timeout(self) -> float:
        now = time.monotonic()
        if any(part.state == "starting" and "port" in part.spec for part in self.parts):
            return 0.002  # probes: nothing tells when a server begins to answer
        dues = [part.due for part in self.parts if part.due is not None]
        return max(0.0, min([self.next_tick, *dues]) - now)

    def _spawn(self, part: Part) -> None:
        part.due = None
        part.state, part.held = "starting", False
        part.started, part.born = time.time(), time.monotonic()
        argv = list(part.spec["argv"])
        # Nodes run in the environment of whoever started the stack, servers in a bare one.
        environment = {**(os.environ if part.is_node else {}), **part.spec["env"], "YADTQ_STACK": str(self.directory)}
        if part.is_node:
            part.node_id = f"{socket.gethostname().split('.')[0]}-{secrets.token_hex(3)}"
            argv += ["--node-id", part.node_id]
            argv += ["--predecessor", part.predecessor] if part.predecessor else []
            environment["YADTQ_NODE"] = part.node_id
        output, child_output = os.pipe()
        # Until the child has its own handlers, the keeper's would swallow a SIGTERM that is meant for the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        part.pid = os.fork()
        if not part.pid:
            self._become(argv, environment, part, child_output)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.close(child_output)
        os.set_blocking(output, False)
        self.selector.register(output, selectors.EVENT_READ, lambda: self._copy_output(part, output))

    def _become(self, argv: list[str], environment: dict[str, str], part: Part, output: int) -> None:
        """Turn the forked child into the part. Never returns."""
        try:
            signal.set_wakeup_fd(-1)
            for name in ("SIGCHLD", "SIGTERM", "SIGINT", "SIGHUP", "SIGPIPE", "SIGXFSZ"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)  # what is ignored stays so over exec
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.plan["pid"]:  # the keeper died before the line above
                os._exit(1)
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if part.is_node:
                os.umask(self.user_umask)  # files that tasks make look as if made in a cell
            os.chdir(part.spec["cwd"])
            os.execve(argv[0], argv, environment)
        except BaseException as exc:
            os.write(2, f"cannot start {argv[0]}: {exc}\n".encode())
        finally:
            os._exit(127)

    def _copy_output(self, part: Part, output: int) -> None:
        data = read_some(output)
        if data is None:
            return
        if not data:
            self.selector.unregister(output)
            os.close(output)
            return
        append_log(self.directory / "logs" / f"{part.name}.log", data)
        if (
            part.is_node
            and part.state == "starting"
            and any(line.split(b" ")[0] == b"ready" for line in data.splitlines())
        ):
            self._is_up(part)

    def _is_up(self, part: Part) -> None:
        part.state = "up"
        if part.is_node:
            part.predecessor = part.node_id
        self._write_state()

    def _probe(self) -> None:
        for part in self.parts:
            if part.state == "starting" and "port" in part.spec and answers(part.spec):
                self._is_up(part)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            part = next((part for part in self.parts if part.pid == pid), None)
            if part is not None:  # else an orphan of a task, which came to us as its subreaper
                self._died(part, os.waitstatus_to_exitcode(status))

    def _died(self, part: Part, code: int) -> None:
        part.pid = 0
        part.last_exit = f"signal {-code}" if code < 0 else f"exit code {code}"
        lived = time.monotonic() - part.born
        part.young_deaths = 0 if lived >= LONG_LIFE and part.state == "up" else part.young_deaths + 1
        if part.is_node:
            clear_node(part.node_id)
            self._kill_strays()
        part.state = "down"
        if not (self.reason or part.held):
            log(f"{part.name} ended after {lived:.1f} s: {part.last_exit}")
            self._plan_restart(part)
        self._write_state()

    def _kill_strays(self) -> None:
        """Kill what has no other parent left: processes of tasks that have hidden the mark of their node."""
        deadline = time.monotonic() + 2.0
        while (strays := children() - {part.pid for part in self.parts}) and time.monotonic() < deadline:
            for pid in strays:
                with contextlib.suppress(ProcessLookupError, ChildProcessError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

    def _plan_restart(self, part: Part) -> None:
        if part.is_node and not self.plan["restart_nodes"]:
            return
        delay = FIRST_DELAY * 2 ** (part.young_deaths - 1) if part.young_deaths else 0.0
        part.due = time.monotonic() + min(delay, SLOWEST_RESTART)

    def _restart_due(self) -> None:
        if self._unwritten:
            self._write_state()
        for part in self.parts:
            if part.due is not None and part.due <= time.monotonic():
                part.restarts += 1
                self._spawn(part)
                self._write_state()

    def _tell_starter(self) -> None:
        """Tell the process that started the keeper, once, whether the servers answer."""
        if self.ready_fd < 0:
            return
        servers = [part for part in self.parts if not part.is_node]
        if all(part.state == "up" for part in servers):
            message = b"ready\n"
        elif dead := next((part for part in servers if part.last_exit), None):
            message = f"failed {dead.name}\n".encode()
            self._stop(f"{dead.name} did not start: {dead.last_exit}")
        else:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self.ready_fd, message)
        os.close(self.ready_fd)
        self.ready_fd = -1

    def _tick(self) -> None:
        self._check_owner()
        idle: float | None = self.plan["idle"]
        now = time.monotonic()
        self.next_tick = now + min(TICK, (idle or TICK) / 4)
        try:
            mtime = Path("active").stat().st_mtime_ns
            Path("keeper.lock").stat()
        except FileNotFoundError:
            self._stop("its directory is gone")
            return
        if mtime != self.active_mtime:
            # The monotonic clock, which stands still while a laptop sleeps: a night with the lid shut is not idleness.
            self.active_mtime, self.last_active = mtime, now
        if idle is not None and now - self.last_active >= idle:
            self._stop(f"idle for {idle:g} s")

    def _check_owner(self) -> None:
        if self.owner and os.getppid() != self.owner:
            self._stop("its owner is gone")

    # What it is asked.

    def _answer(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError, ValueError, KeyError):
            connection.settimeout(1.0)
            with connection.makefile("rb") as lines:
                request = json.loads(lines.readline(65536))
            answer = self._obey(request)
            connection.sendall(json.dumps(answer).encode() + b"\n")

    def _obey(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "ping":
                return {"ok": True}
            case "down":
                self._stop("asked")
                return {"ok": True}
            case "serve":
                return self._serve(request["spec"])
        part = next((part for part in self.parts if part.name == request["part"]), None)
        if part is None:
            return {"ok": False, "error": f"there is no {request['part']}"}
        match request["do"]:
            case "kill":
                part.held = bool(request["hold"])
                self._signal(part, signal.SIGKILL)
            case "stop":
                part.held = True
                self._signal(part, signal.SIGTERM)
            case "start":
                part.held = False
                part.due = None if part.pid else time.monotonic()
        return {"ok": True}

    def _serve(self, spec: dict[str, Any]) -> dict[str, Any]:
        for part in self.parts:
            if part.is_node and part.spec["queue"] == spec["queue"]:
                return {"ok": True}
        part = Part({**spec, "name": f"node-{1 + sum(part.is_node for part in self.parts)}"})
        self.parts.append(part)
        self._spawn(part)
        self._write_state()
        return {"ok": True}

    def _signal(self, part: Part, number: signal.Signals) -> None:
        part.due = None
        if part.pid:  # not reaped yet, so the pid cannot be another process's
            os.kill(part.pid, number)

    # The end.

    def _stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _stop_all(self) -> None:
        log(f"stops: {self.reason}")
        self._write_state()
        self._end([part for part in self.parts if part.is_node])
        self._end([part for part in self.parts if not part.is_node])
        sweep("YADTQ_STACK", str(self.directory))
        self._kill_strays()
        self._reap()
        self._write_state(stopped=True)
        if self.plan["ephemeral"]:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, parts: list[Part]) -> None:
        """Ask parts to end, and kill each that has not when its grace is over."""
        asked = time.monotonic()
        for part in parts:
            self._signal(part, signal.SIGTERM)
        while any(part.pid for part in parts):
            for part in parts:
                if time.monotonic() >= asked + part.spec["grace"]:
                    self._signal(part, signal.SIGKILL)
            self._pump(0.01)
            self._reap()

    def _write_state(self, *, stopped: bool = False) -> None:
        state = {
            "pid": os.getpid(),
            "started": self.started,
            "stopped": stopped,
            "reason": self.reason,
            "parts": [part.view() for part in self.parts],
        }
        try:
            Path("state.json.new").write_text(json.dumps(state))
            Path("state.json.new").replace("state.json")
            self._unwritten = False
        except FileNotFoundError:
            pass  # the directory was removed: the next tick stops
        except OSError:
            self._unwritten = True  # a full disk must not stop the stack: the next tick tries again


def prctl(option: int, value: int) -> None:
    """Set a property of this process; only Linux has it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def answers(spec: dict[str, Any]) -> bool:
    """Whether a server answers the probe of its spec as it should."""
    try:
        with socket.create_connection((spec.get("host", "127.0.0.1"), spec["port"]), timeout=0.2) as connection:
            connection.settimeout(0.2)
            connection.sendall(bytes.fromhex(spec["ask"]))
            return bytes.fromhex(spec["expect"]) in connection.recv(4096)
    except OSError:
        return False


def clear_node(node_id: str) -> None:
    """End and remove what a dead node left: processes of its tasks, its scratch directory."""
    sweep("YADTQ_NODE", node_id)
    for scratch in Path(tempfile.gettempdir()).glob(f"yadtq-node-{node_id}-*"):
        shutil.rmtree(scratch, ignore_errors=True)


def sweep(variable: str, value: str) -> None:
    """Kill every process whose environment at its start had this value: what a node or its tasks left behind.

    Linux only. It looks again until it finds nothing, since a process may fork while it is looked for.
    """
    marker = f"{variable}={value}".encode()
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        found = [pid for pid in _processes() if pid != os.getpid() and marker in _environment(pid)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def children() -> set[int]:
    """Return the processes whose parent is this one; Linux only."""
    with contextlib.suppress(OSError):
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    return set()


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")  # empty for a zombie
    except OSError:
        return []


def read_some(fd: int) -> bytes | None:
    """Read what is there: None when there is nothing, empty at the end."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return None


def append_log(path: Path, data: bytes) -> None:
    """Append to a log, putting it aside when it has grown too long."""
    with contextlib.suppress(OSError):  # a full disk must not stop the stack
        with path.open("ab") as file:
            file.write(data)
            length = file.tell()
        if length > LOG_LIMIT:
            path.replace(f"{path}.old")


def log(line: str) -> None:
    """Write a line with the time to the keeper's own log."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    append_log(Path("logs/keeper.log"), f"{stamp} {line}\n".encode())


def main() -> None:
    """Run the keeper of one directory until it ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--owner", type=int, default=0)
    options = parser.parse_args()
    if not options.owner and os.fork():
        os._exit(0)  # no child of the starter, which need not reap it
    os.set_inheritable(options.ready_fd, False)
    os.chdir(options.directory)
    lock = os.open("keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # an old keeper that is still stopping is waited for
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    plan = json.loads(Path("plan.json").read_text())
    if plan["after_crash"]:
        sweep("YADTQ_STACK", str(options.directory))
        for spec in plan["parts"]:
            if spec.get("predecessor"):
                clear_node(spec["predecessor"])
    plan["pid"] = os.getpid()
    Keeper(options.directory, plan, owner=options.owner, ready_fd=options.ready_fd).run()


if __name__ == "__main__":
    main()
