"""The process that slots are forked from, and the one that sees to it that nothing outlives them.

    node process                 template (one thread, no Kafka, no Redis)         slot
    SlotPool ── Note fork ─────▶ fork ─────────────────────────────────────────▶ setsid, dies with the template
             ◀─ Note forked ───  imports a library whenever nobody asks             serves its socket
             ◀─ Note exited ───  reaps it, kills its group and its orphans ◀──────  ends, however it ends
             ◀─ Note warm ─────  has imported all

A slot adopts the orphans of what its tasks start; when it ends, the template inherits them, so every child of the
template that is no slot belonged to a slot that has ended, and is killed. When the control socket closes, or the node
dies (PR_SET_PDEATHSIG), the template kills all that is below it and exits.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from typing import Final, NoReturn

import msgspec

from yadtq_nb.slots import processes, slot
from yadtq_nb.slots.wire import NOTE_SIZE, Note, encode

#: Libraries that most tasks want, cheapest first.
PRELOAD: Final = ("numpy", "pandas")
#: A library is imported once nobody has asked for anything for so long, in seconds.
_QUIET: Final = 0.05
#: How long the template goes on killing what a dead slot has left, in seconds.
_KILLING: Final = 2.0

_decode = msgspec.msgpack.Decoder(Note).decode


class Template:
    """Forks slots on request, from its only thread."""

    def __init__(self, control: socket.socket, owner: int) -> None:
        self._control, self._owner = control, owner
        self._pid = os.getpid()
        self._slots: dict[int, int] = {}
        self._preload = [name for name in PRELOAD if importlib.util.find_spec(name)]
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        for sock in (self._woken, self._waker):
            sock.setblocking(False)
        self._selector.register(control, selectors.EVENT_READ, self._obey)
        self._selector.register(self._woken, selectors.EVENT_READ, self._reap)

    def serve(self) -> None:
        """Serve until the control socket closes or SIGTERM comes; does not return then."""
        signal.set_wakeup_fd(self._waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._end_with_owner())
        while True:
            ready = self._selector.select(_QUIET if self._preload else None)
            for key, _ in ready:
                key.data()
            if not ready and self._preload:
                self._import(self._preload.pop(0))

    def _end_with_owner(self) -> None:
        # A service manager may signal the whole group: then the node decides, and closes the control socket.
        if os.getppid() != self._owner:
            self.end()

    def end(self) -> NoReturn:
        """Kill everything below and exit."""
        if os.getpid() == self._pid:  # a child between fork and its own signal handlers must not kill its siblings
            for pid in self._slots:
                processes.kill(pid, group=True)
            self._slots.clear()
            self._kill_strays()
        os._exit(0)

    def _obey(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, NOTE_SIZE, 2)
        except ConnectionError:
            data, fds = b"", []
        if not data:
            self.end()
        note = _decode(data)
        if note.act == "fork":
            self._fork(note, *fds)
        elif note.act == "kill":
            for pid, serial in self._slots.items():
                if serial == note.slot:
                    processes.kill(pid, group=True)

    def _fork(self, note: Note, sock_fd: int, progress_fd: int) -> None:
        # Between fork and the child's own handlers, a signal would run the template's handlers in the child.
        held = {signal.SIGTERM, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        pid = os.fork()
        if not pid:
            self._become_slot(note, sock_fd, progress_fd, held)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        self._slots[pid] = note.slot
        os.close(sock_fd)
        os.close(progress_fd)
        self._tell(Note("forked", note.slot, pid))

    def _become_slot(self, note: Note, sock_fd: int, progress_fd: int, held: set[signal.Signals]) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for signum in held:
                signal.signal(signum, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
            for open_here in (self._selector, self._woken, self._waker, self._control):
                open_here.close()
            slot.serve_forked(socket.socket(fileno=sock_fd), progress_fd, note.log, self._pid)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        ended = self._wait()
        if ended:
            self._kill_strays()  # first, so that whoever hears of the slot's end knows that nothing of it is left
        for note in ended:
            self._tell(note)

    def _wait(self) -> list[Note]:
        ended: list[Note] = []
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    break
                if pid in self._slots:
                    processes.kill(pid, group=True)
                    ended.append(Note("exited", self._slots.pop(pid), status, memory=processes.peak(usage)))
        return ended

    def _kill_strays(self) -> None:
        # Killing one makes its children ours: go on until there are none. A process stuck in the kernel is left.
        until = time.monotonic() + _KILLING
        while strays := [pid for pid in processes.children() if pid not in self._slots]:
            for pid in strays:
                processes.kill(pid)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > until:
                break
            time.sleep(0.0005)

    def _import(self, name: str) -> None:
        try:
            importlib.import_module(name)
        except Exception:
            traceback.print_exc()  # broken here, so it is broken in the slot too, where its user will see it
        gc.collect()
        gc.freeze()  # shared pages stay shared
        if not self._preload:
            self._tell(Note("warm"))

    def _tell(self, note: Note) -> None:
        try:
            self._control.send(encode(note))
        except OSError:
            self.end()


def main() -> None:
    """Entry point: `control socket's fd` `pid of the node` are the arguments."""
    control_fd, owner = map(int, sys.argv[1:3])
    signal.signal(signal.SIGINT, lambda *_: None)  # as with SIGTERM, see _end_with_owner
    alive = processes.die_with_parent(owner, signal.SIGTERM)
    processes.adopt_orphans()
    if not alive:
        return
    import cloudpickle  # noqa: F401  # even the first task needs it

    gc.freeze()
    Template(socket.socket(fileno=control_fd), owner).serve()


if __name__ == "__main__":
    main()
