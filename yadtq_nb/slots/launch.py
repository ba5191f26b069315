"""How slots come into being: forked by the template on Linux, spawned one by one elsewhere.

Both speak Notes over a socket that the pool selects on, so that the pool need not know which it has.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final, Protocol

import msgspec

from yadtq_nb.slots import processes
from yadtq_nb.slots.wire import NOTE_SIZE, PROGRESS_SIZE, Note, encode

#: Libraries that start threads look at these; as many slots as cores with as many threads each would crowd the machine.
_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_END: Final = 3.0

_decode = msgspec.msgpack.Decoder(Note).decode


class Launcher(Protocol):
    """Starts slots and tells when they end."""

    def fileno(self) -> int:
        """Return what to select on."""

    def fork(self, serial: int, sock: socket.socket, progress_fd: int, log: str) -> None:
        """Ask for a slot that serves sock. Thread-safe."""

    def kill(self, serial: int) -> None:
        """Ask for a slot's end. Thread-safe."""

    def notes(self) -> list[Note] | None:
        """Return what has happened, without waiting; None when there will be no more."""

    def end(self) -> str:
        """End everything that was started, and return in words how the launcher ended."""


def launcher(directory: Path, slots: int) -> Launcher:
    """Start what suits this machine. Only from the main thread: the template dies with the thread that started it."""
    environ = dict(os.environ)
    for name in _THREADS:
        environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // slots)))
    return Template(directory, environ) if processes.LINUX else Spawner(environ)


def shared_memory() -> int:
    """Return a file descriptor of memory to be mapped by pool and slot."""
    if sys.platform.startswith("linux"):
        fd = os.memfd_create("yadtq-progress", os.MFD_CLOEXEC)
    else:
        fd, name = tempfile.mkstemp(prefix="yadtq-")
        os.unlink(name)
    os.truncate(fd, PROGRESS_SIZE)
    return fd


class Template:
    """The template process, from this side."""

    def __init__(self, directory: Path, environ: dict[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Whatever a slot's task has started carries this mark, unless it was started with another environment.
        self._mark = f"YADTQ_SLOTS={os.getpid()}-{os.urandom(8).hex()}"
        name, _, value = self._mark.partition("=")
        with theirs, (directory / "template.log").open("ab") as log:
            self._process = subprocess.Popen(
                _command("yadtq_nb.slots.template", str(theirs.fileno()), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environ, name: value},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C at the node's terminal is the node's to handle
            )
        self._control = ours

    @property
    def pid(self) -> int:
        """Process id of the template."""
        return self._process.pid

    def fileno(self) -> int:
        """See Launcher."""
        return self._control.fileno()

    def fork(self, serial: int, sock: socket.socket, progress_fd: int, log: str) -> None:
        """See Launcher."""
        note = encode(Note("fork", serial, log=log))
        with contextlib.suppress(OSError):  # the template is dead, as notes() will tell
            socket.send_fds(self._control, [note], [sock.fileno(), progress_fd])

    def kill(self, serial: int) -> None:
        """See Launcher."""
        with contextlib.suppress(OSError):
            self._control.send(encode(Note("kill", serial)))

    def notes(self) -> list[Note] | None:
        """See Launcher."""
        notes: list[Note] = []
        while True:
            try:
                data = self._control.recv(NOTE_SIZE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return notes
            except OSError:
                data = b""
            if not data:
                return notes or None
            notes.append(_decode(data))

    def end(self) -> str:
        """See Launcher."""
        self._control.close()
        try:
            status = self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        # Only needed when the template could not see to it, but it is better to be sure.
        until = time.monotonic() + _END  # a process stuck in the kernel is left
        while (left := processes.marked(self._mark)) and time.monotonic() < until:
            for pid in left:
                processes.kill(pid)
        return processes.describe(-status if status < 0 else status << 8)


class Spawner:
    """Starts a fresh interpreter for each slot. A slot ends itself when its leash, a pipe, is let go."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._environ = environ
        self._control, self._report = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._lock = threading.Lock()
        self._processes: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
        self._watchers: list[threading.Thread] = []

    def fileno(self) -> int:
        """See Launcher."""
        return self._control.fileno()

    def fork(self, serial: int, sock: socket.socket, progress_fd: int, log: str) -> None:
        """See Launcher."""
        held, leash = os.pipe()
        fds = [sock.fileno(), progress_fd, held]
        process = subprocess.Popen(
            _command("yadtq_nb.slots.slot", *map(str, fds), log),
            stdin=subprocess.DEVNULL,
            env=self._environ,
            pass_fds=fds,
        )
        os.close(held)
        watcher = threading.Thread(target=self._watch, args=(serial, process), name=f"yadtq-slot-{serial}", daemon=True)
        with self._lock:
            self._processes[serial] = process, leash
            self._watchers = [thread for thread in self._watchers if thread.is_alive()]
            watcher.start()
            self._watchers.append(watcher)

    def kill(self, serial: int) -> None:
        """See Launcher."""
        with self._lock:
            process = self._processes.get(serial)
        if process:
            processes.kill(process[0].pid, group=True)

    def notes(self) -> list[Note] | None:
        """See Launcher."""
        notes: list[Note] = []
        with contextlib.suppress(OSError):
            while True:
                notes.append(_decode(self._control.recv(NOTE_SIZE, socket.MSG_DONTWAIT)))
        return notes

    def end(self) -> str:
        """See Launcher."""
        with self._lock:
            running, watchers = list(self._processes.values()), self._watchers
        for process, _ in running:
            processes.kill(process.pid, group=True)
        for watcher in watchers:
            watcher.join()
        self._control.close()
        self._report.close()
        return "ended"

    def _watch(self, serial: int, process: subprocess.Popen[bytes]) -> None:
        self._tell(Note("forked", serial, process.pid))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it must not wait for it, too
        processes.kill(process.pid, group=True)
        with self._lock:
            os.close(self._processes.pop(serial)[1])
        self._tell(Note("exited", serial, status, memory=processes.peak(usage)))

    def _tell(self, note: Note) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            self._report.send(encode(note))


def _command(module: str, *arguments: str) -> list[str]:
    # Not -m: it would put the working directory before the standard library on sys.path.
    package = str(Path(__file__).parent.parent.parent)
    code = f"import sys; {package!r} in sys.path or sys.path.append({package!r}); from {module} import main; main()"
    return [sys.executable, "-P", "-c", code, *arguments]
