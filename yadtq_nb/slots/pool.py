"""The slots of a node, seen from the node's process.

    any thread                     SlotPool                          child processes
    reserve ─▶ run(lease) ───────▶ an idle slot's socket ──────────▶ slot: runs the chunk
                                   progress, shared memory ◀──────── offset of the task that runs
    main thread
    poll ◀── Outcomes, Died ◀───── selector ◀─────────────────────── segments
                                            ◀── forked, exited ───── template: forks and reaps slots

A slot runs one chunk at a time. It keeps the environment (working directory, local modules) of its first chunk: a
chunk of another one gets a fresh slot. A slot that dies is replaced at once, and its chunk comes back as Died; if the
template dies, all slots die with it, and are started again.

A task that waits for a job which it has sent lends its slot: another one is there meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from yadtq_nb.model import WHOLE, Environment, Lease, Retry, Written
from yadtq_nb.slots import processes, wire
from yadtq_nb.slots.child import Child, bound, tail
from yadtq_nb.slots.growth import MOST as GROWN
from yadtq_nb.slots.launch import Launcher, launcher
from yadtq_nb.slots.memory import MemoryWatch, over_limit
from yadtq_nb.slots.wire import GO_ON, HOLD, LEAVE, NO_OFFSET, Note, Order, Report, Setup

#: How often logs are looked at, in seconds.
_LOG_EVERY: Final = 1.0
#: Shortest time between looks at tasks that may take only so long, in seconds.
_LEAST_LOOK: Final = 0.01
#: How long a slot may take to say what an item looks like, in seconds.
_DESCRIBING: Final = 5.0
#: How long a slot may take to read a chunk whose tasks may take only so long, on top of that, in seconds: its function
#: may import much. Then the chunk is read item by item, each within its task's time.
_OPENING: Final = 60.0
#: A template that lives for less is started again with growing delay, in seconds.
_SHORT_LIFE: Final = 1.0
_LONGEST_DELAY: Final = 5.0
#: Bytes of what all slots have written that are told at a time, and of one slot's at least.
_TOLD: Final = 256 * 1024
_LEAST_TOLD: Final = 2 * 1024
#: Seconds for which a slot is kept that was there in place of a lent one.
_SPARE: Final = 5.0

_decode_report = msgspec.msgpack.Decoder(Report).decode


class Outcomes(msgspec.Struct, frozen=True):
    """Some tasks of a chunk have ended."""

    lease: Lease
    #: Offsets in the chunk.
    offsets: range | list[int]
    #: b"S" or b"F" for each.
    states: bytes
    #: The sealed segment.
    frame: bytes
    #: True when the chunk is done and its slot free.
    last: bool
    #: Tasks that have raised and are to be tried again.
    retries: tuple[Retry, ...] = ()
    #: With the last: true when a task of those that were to run has no outcome.
    unfinished: bool = False


class Died(msgspec.Struct, frozen=True):
    """A slot has ended. The chunk that it ran, if any, is not done."""

    lease: Lease | None
    #: Offset of the task that ran, or None when it had begun with none.
    offset: int | None
    #: Such as "killed by SIGKILL" or "exited with status 3".
    reason: str
    #: The last lines of what the slot wrote while it had this chunk.
    stderr: str
    #: False when no slot was there to run the chunk: then no task is to blame.
    ran: bool = True
    #: Offset of the task that took too long, so that the slot was killed.
    timed_out: int | None = None
    #: True when it was told to end, so that no task is to blame.
    told: bool = False
    #: The most that it had resident in its life, or what it used when it was killed for that; 0 when nobody can tell.
    memory: int = 0
    #: True when the item of that task was only being read.
    read: bool = False
    #: Offset of the item of which it was only to say what it looks like.
    describes: int | None = None
    #: The end of what the task has written that took too long.
    log: bytes = b""


class Described(msgspec.Struct, frozen=True):
    """A slot has said what an item looks like, and is free."""

    lease: Lease
    #: Offset in the chunk.
    offset: int
    text: str


SlotEvent: TypeAlias = Outcomes | Died | Described


class SlotPool:
    """Runs chunks in child processes. Made, started, polled and stopped by the main thread."""

    def __init__(
        self,
        *,
        slots: int,
        secret: bytes,
        node: str,
        directory: Path,
        on_ready: Callable[[], None] | None = None,
        memory_limit: int | None = None,
        max_tasks_per_slot: int | None = None,
    ) -> None:
        """Prepare a pool; nothing is started yet.

        Args:
            slots: how many chunks run at a time.
            secret: what records are verified and outcomes sealed with.
            node: the node's id, for the outcomes.
            directory: for logs and unpacked source trees; made if need be.
            on_ready: called by poll when all slots have been forked for the first time.
            memory_limit: bytes that a slot may use, with all that it has started, before it is killed.
            max_tasks_per_slot: a slot that was given as many tasks is replaced once its chunk is done.
        """
        self._count, self._directory = slots, directory
        self._setup = Setup(secret, node, str(directory))
        self._on_ready = on_ready
        self._memory_limit, self._max_tasks = memory_limit, max_tasks_per_slot
        self._watch: MemoryWatch | None = None
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._slots: dict[int, Child] = {}
        self._reserved = 0
        self._serial = 0
        self._events: list[SlotEvent] = []
        self._launcher: Launcher | None = None
        self._started_at = self._restart_at = self._logs_at = 0.0
        self._short_lives = 0
        #: Seconds until tasks that may take only so long are looked at again.
        self._look = _LOG_EVERY
        self._stopped = False
        #: Jobs whose tasks' words are asked for, and what slots wrote that have ended since.
        self._followed: frozenset[str] = frozenset()
        self._last_words: list[Written] = []
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def start(self) -> None:
        """Start the template and the slots. Orders may be given at once."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._launcher = launcher(self._directory, self._count)
            self._started_at = time.monotonic()
            self._selector.register(self._launcher.fileno(), selectors.EVENT_READ)
            self._fit()
        if self._memory_limit is not None and self._watch is None:
            self._watch = MemoryWatch(self._memory_limit, self._alive, self._stop_fat)

    def reserve(self, n: int, *, lent: bool = False) -> int:
        """Claim up to n free slots, those that are there in place of lent ones only if asked for, and return how many.

        Thread-safe.
        """
        with self._lock:
            room = self._room() - (0 if lent else self.lent())
            claimed = max(0, min(n, room, self._idle()) - self._reserved)
            self._reserved += claimed
            return claimed

    def has_free(self) -> bool:
        """Tell whether a slot is free that nobody has claimed. Thread-safe."""
        with self._lock:
            return min(self._room(), self._idle()) > self._reserved

    def _idle(self) -> int:
        return sum(map(self._is_free, self._slots.values()))

    def _room(self) -> int:
        """Return how many chunks may be run besides those that run and do not wait."""
        return self._count - sum(slot.lease is not None and not slot.lent for slot in self._slots.values())

    def lent(self) -> int:
        """Return how many slots have tasks that wait for jobs of their own. Thread-safe."""
        with self._lock:
            return sum(slot.lent for slot in self._slots.values())

    def unreserve(self, n: int) -> None:
        """Give claimed slots back. Thread-safe."""
        with self._lock:
            self._reserved -= n

    def run(
        self,
        lease: Lease,
        *,
        function_path: Path | None = None,
        tree_path: Path | None = None,
        arguments_path: Path | None = None,
        needs_path: Path | None = None,
        skip: frozenset[int] = frozenset(),
        fresh: bool = False,
        describe: int | None = None,
    ) -> None:
        """Run a chunk in one of the slots that were claimed. Thread-safe; never raises for what happens to the slot.

        Args:
            function_path: sealed blob of the function, when it does not travel in the record.
            tree_path: sealed blob of the source tree that the chunk's environment names.
            arguments_path: sealed blob of the arguments, when they do not travel in the record.
            needs_path: outcomes of other jobs that its arguments need.
            skip: offsets that are not to be run, besides those that are done.
            fresh: only in a slot in which nothing has run.
            describe: run nothing, but tell what the item at this offset looks like, within some seconds: poll then
                tells Described, or Died if that has killed the slot, or took too long.
        """
        head = lease.head
        skipped = skip | lease.done | lease.waiting
        order = Order(
            head.job,
            head.number,
            head.first,
            head.count,
            tuple(skipped),
            _attempts(lease),
            str(function_path or ""),
            str(tree_path or ""),
            str(arguments_path or ""),
            tries=lease.tries,
            notes=lease.notes,
            describe=-1 if describe is None else describe,
            careful=WHOLE in lease.crashes,
            poison=tuple(skipped.intersection(lease.crashes)),
            needs=str(needs_path or ""),
        )
        with self._lock:
            self._reserved -= 1
            slot = self._choose(head.environment, fresh=fresh)
            if slot is None:
                self._events.append(Died(lease, None, "no slot was alive to run it", "", ran=False))
                self.wake()
                return
            slot.lease, slot.environment, slot.used = lease, slot.environment or head.environment, time.monotonic()
            slot.progress[0], slot.progress[1] = NO_OFFSET, GO_ON
            slot.seen, slot.seen_at, slot.timed_out = None, slot.used, None
            slot.describes = describe
            slot.kill_at = None if describe is None else time.monotonic() + _DESCRIBING
            slot.tasks += head.count - len(order.skip)
            slot.begin_log(head, skipped)
            slot.sending.acquire()
        if head.policy.timeout or describe is not None:
            self.wake()  # poll may sleep for longer than the task may take
        slot.order(order, lease.record)

    def poll(self, timeout: float) -> list[SlotEvent]:
        """Wait up to timeout seconds for something to happen, and return what did: perhaps only a call of wake."""
        until = time.monotonic() + timeout
        while True:
            happened = self._select(0.0 if self._events else until - time.monotonic())
            self._tend()
            if happened or self._events or time.monotonic() >= until:
                break
        with self._lock:
            events, self._events = self._events, []
        return events

    def _select(self, timeout: float) -> bool:
        now = time.monotonic()
        if self._launcher is None and not self._stopped:
            timeout = min(timeout, self._restart_at - now)
        elif len(self._slots) > self._count:
            timeout = min(timeout, _LOG_EVERY, self._look)  # some are to be ended
        elif any(slot.lease or slot.kill_at is not None for slot in list(self._slots.values())):
            timeout = min(timeout, _LOG_EVERY, self._look)  # what writes a log may write a lot
        ready = self._selector.select(max(0.0, timeout))
        for key, _ in ready:
            if isinstance(key.data, Child):
                self._receive(key.data)
            elif key.fd == self._woken:
                self._drain_wake()
            else:
                self._hear()
        return bool(ready)

    def wake(self) -> None:
        """Make poll return. Thread-safe."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._waker, b"!")

    def running(self) -> dict[str, tuple[Lease, int]]:
        """Return by chunk id what runs, and the offset of its current task, -1 before its first. Thread-safe."""
        with self._lock:
            slots = [slot for slot in self._slots.values() if slot.lease]
            return {
                slot.lease.head.id: (slot.lease, -1 if (offset := slot.offset()) is None else offset)
                for slot in slots
                if slot.lease
            }

    def slowest(self, limit: int) -> list[tuple[Lease, int, float]]:
        """Return the tasks that have run for the longest: lease, offset, seconds since it was seen. Thread-safe."""
        now = time.monotonic()
        with self._lock:
            found = [
                (slot.lease, slot.seen, now - slot.seen_at)
                for slot in self._slots.values()
                if slot.lease and not slot.lease.head.concurrent and slot.look(now) and slot.seen is not None
            ]
        return sorted(found, key=lambda task: -task[2])[:limit]

    def grown(self, jobs: frozenset[str]) -> list[Written]:
        """Return what tasks of these jobs have written since the last call. Thread-safe.

        What was written before the first call, or before a pause of some seconds, is left out, but of what still runs.
        """
        with self._lock:
            left, self._last_words = self._last_words, []
            self._followed = jobs
            most = max(_LEAST_TOLD, min(GROWN, _TOLD // max(1, len(self._slots))))
            return left + [written for slot in self._slots.values() for written in slot.grown(jobs, most)]

    def kill(self, chunk_id: str) -> None:
        """SIGKILL the slot that runs a chunk, with its process group; poll then tells Died. Thread-safe."""
        with self._lock:
            for slot in self._slots.values():
                if slot.lease and slot.lease.head.id == chunk_id:
                    slot.doomed = True
                    if slot.pid:
                        processes.kill(slot.pid, group=True)

    def hold(self, chunk_id: str) -> None:
        """Have the slot of a chunk stop after the task that runs; the rest comes back unfinished. Thread-safe."""
        with self._lock:
            for slot in self._slots.values():
                if slot.lease and slot.lease.head.id == chunk_id and not slot.doomed:
                    slot.progress[1] = HOLD

    def terminate(self, chunk_id: str, grace: float) -> None:
        """Have the slot that runs a chunk end: SIGTERM raises SystemExit in its task, SIGKILL follows. Thread-safe."""
        with self._lock:
            for slot in self._slots.values():
                if slot.lease and slot.lease.head.id == chunk_id and slot.pid and not slot.doomed:
                    slot.doomed, slot.kill_at = True, time.monotonic() + grace
                    slot.progress[1] = LEAVE
                    processes.terminate(slot.pid)
        self.wake()

    def pids(self) -> list[int]:
        """Return the process ids of the slots. Thread-safe."""
        with self._lock:
            return [slot.pid for slot in self._slots.values() if slot.pid]

    def stop(self, grace: float) -> list[SlotEvent]:
        """Wait up to grace seconds for what runs, then end all processes. May be called again.

        Returns:
            What happened meanwhile. A chunk that was cut off has no last event.
        """
        events: list[SlotEvent] = []
        until = time.monotonic() + grace
        while self._launcher and self.running() and time.monotonic() < until:
            events += self.poll(until - time.monotonic())
        with self._lock:
            if self._stopped:
                return events
            self._stopped = True
            slots, self._slots = list(self._slots.values()), {}
            running, self._launcher = self._launcher, None
        if self._watch is not None:
            self._watch.close()
        if running:
            self._selector.unregister(running.fileno())
            running.end()
        for slot in slots:
            self._retire(slot)
        self._selector.close()
        os.close(self._woken)
        os.close(self._waker)
        return events + self._events

    def _fit(self) -> None:
        """Have as many slots as there should be: one more for each that is lent."""
        if self._launcher is None:
            return
        for _ in range(self._room() - self._idle()):
            taken = {slot.number for slot in self._slots.values()}
            self._add(next(number for number in range(len(taken) + 1) if number not in taken))

    def _end_spare(self, now: float) -> None:
        """End slots that were there in place of lent ones, unless they are soon wanted again."""
        with self._lock:
            spare = self._idle() - max(self._room(), self._reserved)
            for slot in [slot for slot in self._slots.values() if slot.is_idle() and now - slot.used > _SPARE]:
                if self._launcher is None or spare <= 0:
                    break
                self._discard(slot)
                spare -= 1

    def _discard(self, slot: Child) -> None:
        """End an idle slot."""
        assert self._launcher is not None  # as in _add
        self._launcher.kill(slot.serial)
        del self._slots[slot.serial]
        self._retire(slot)

    def _add(self, number: int) -> Child:
        """Ask for a fresh slot. It takes orders at once: its socket holds them until it is there."""
        assert self._launcher is not None  # callers hold the lock and have looked
        self._serial += 1
        slot = Child(self._serial, number, self._directory / f"slot-{number}.log")
        self._slots[slot.serial] = slot
        self._launcher.fork(slot.serial, slot.theirs, slot.progress_fd, str(slot.log))
        slot.handed_over()
        with contextlib.suppress(OSError):
            wire.send(slot.sock, self._setup)
        self._selector.register(slot.sock, selectors.EVENT_READ, slot)
        return slot

    def _choose(self, environment: Environment, *, fresh: bool) -> Child | None:
        idle = [slot for slot in self._slots.values() if self._is_free(slot)]
        unused = [slot for slot in idle if not slot.tasks] if fresh else idle
        for slot in unused:
            if slot.environment == environment:
                return slot
        for slot in unused:
            if slot.suits(environment):
                return slot
        if not idle or self._launcher is None:
            return None
        return self._replace(min(idle, key=lambda slot: slot.used))

    def _is_free(self, slot: Child) -> bool:
        return slot.is_idle() and not self._is_spent(slot)

    def _is_spent(self, slot: Child) -> bool:
        return self._max_tasks is not None and slot.tasks >= self._max_tasks

    def _replace(self, slot: Child) -> Child:
        """End an idle slot and ask for a fresh one, which takes orders at once."""
        self._discard(slot)
        return self._add(slot.number)

    def _retire(self, slot: Child) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(slot.sock)
        slot.close()

    def _receive(self, slot: Child) -> bool:
        """Take in what a slot has to say, and return whether it may have more."""
        frames, gone = slot.inbox.pull(slot.sock)
        with self._lock:
            for head, frame in frames:
                report = _decode_report(head)
                if report.lent is not None:
                    slot.lent = report.lent and slot.lease is not None
                    self._fit()
                elif slot.lease is not None and report.item is not None:
                    self._events.append(Described(slot.lease, report.first, report.item))
                    slot.describes, slot.kill_at = None, None
                elif slot.lease is not None:
                    offsets, states = _offsets(report), report.states
                    self._events.append(
                        Outcomes(slot.lease, offsets, states, frame, report.last, report.retries, report.unfinished)
                    )
                if report.last:
                    slot.lease, slot.lent = None, False
                    self._fit()
            if gone:  # how it ended, the launcher will tell
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(slot.sock)
        return bool(frames) and not gone

    def _hear(self) -> None:
        """Take in what the launcher has to say."""
        if self._launcher is None:
            return
        notes = self._launcher.notes()
        if notes is None:
            self._restart_later()
            return
        with self._lock:
            for note in notes:
                slot = self._slots.get(note.slot)
                if note.act == "warm":
                    self._refresh_unused()
                elif slot and note.act == "forked":
                    self._forked(slot, note)
                elif slot and note.act == "exited":
                    self._exited(slot, processes.describe(note.value), note.memory)
                    self._fit()

    def _refresh_unused(self) -> None:
        """Replace slots that were forked before the template had imported the common libraries."""
        for slot in list(self._slots.values()):
            if slot.lease is None and slot.environment is None:
                self._replace(slot)

    def _forked(self, slot: Child, note: Note) -> None:
        slot.pid = note.value
        if slot.doomed:
            processes.kill(slot.pid, group=True)
        if self._on_ready and len(self.pids()) == self._count:
            ready, self._on_ready = self._on_ready, None
            ready()

    def _exited(self, slot: Child, reason: str, memory: int = 0) -> None:
        while self._receive(slot):
            pass  # what it has sent before its end counts
        with self._lock:
            self._slots.pop(slot.serial, None)
            self._retire(slot)
            if self._followed:
                self._last_words += slot.grown(self._followed, _LEAST_TOLD)
            offset, late = (slot.offset(), slot.timed_out) if slot.lease else (None, None)
            if slot.used_memory:
                reason = over_limit(self._memory_limit or 0, slot.used_memory)
            self._events.append(
                Died(
                    slot.lease,
                    offset,
                    reason,
                    tail(slot),
                    timed_out=late,
                    told=slot.kill_at is not None and slot.describes is None,
                    memory=slot.used_memory or memory,
                    read=slot.reads(),
                    describes=slot.describes,
                    log=b"" if late is None else slot.written_by(late),
                )
            )

    def _restart_later(self) -> None:
        """The template has died, and all slots with it."""
        with self._lock:
            dead, self._launcher = self._launcher, None
        assert dead is not None  # _hear has looked, and only the main thread clears it
        self._selector.unregister(dead.fileno())
        reason = f"killed with its template, which was {dead.end()}"
        for slot in list(self._slots.values()):
            if slot.pid:
                processes.kill(slot.pid, group=True)
            self._exited(slot, reason)
        lived = time.monotonic() - self._started_at
        self._short_lives = self._short_lives + 1 if lived < _SHORT_LIFE else 0
        delay = min(0.05 * 2**self._short_lives, _LONGEST_DELAY) if self._short_lives else 0.0
        self._restart_at = time.monotonic() + delay

    def _tend(self) -> None:
        now = time.monotonic()
        self._end_late(now)
        if self._launcher is None and not self._stopped and self._started_at and now >= self._restart_at:
            self.start()
        if self._max_tasks is not None:
            self._replace_spent()
        if now >= self._logs_at:
            self._logs_at = now + _LOG_EVERY
            self._end_spare(now)
            for slot in list(self._slots.values()):
                with self._lock:  # a chunk that begins meanwhile must find the end of its log where it is then
                    bound(slot)

    def _replace_spent(self) -> None:
        with self._lock:
            for slot in list(self._slots.values()):
                if self._launcher is not None and slot.is_idle() and self._is_spent(slot):
                    self._discard(slot)
            self._fit()

    def _alive(self) -> list[Child]:
        with self._lock:
            return list(self._slots.values())

    def _stop_fat(self, slot: Child, lease: object, used: int) -> None:
        """Kill a slot that uses too much, unless another task runs there by now. Called by the watch's thread."""
        with self._lock:
            if slot.serial in self._slots and slot.lease is lease and slot.pid and not slot.doomed:
                slot.used_memory, slot.doomed = used, True
                processes.kill(slot.pid, group=True)

    def _end_late(self, now: float) -> None:
        """Kill slots that were told to end, and those whose task is late. Coroutines see to that themselves."""
        self._look = _LOG_EVERY
        with self._lock:
            for slot in self._slots.values():
                if slot.kill_at is not None and slot.pid:
                    self._look = min(self._look, _LEAST_LOOK)
                    if now >= slot.kill_at:
                        processes.kill(slot.pid, group=True)
                limit = slot.lease.head.policy.timeout if slot.lease else 0.0
                begun = slot.look(now)
                if not limit or (begun and slot.lease and slot.lease.head.concurrent and not slot.reads()):
                    continue
                self._look = min(self._look, max(_LEAST_LOOK, limit / 20))
                late = now - slot.seen_at >= (limit if begun else limit + _OPENING)
                if late and not slot.doomed and slot.pid:
                    slot.timed_out, slot.doomed = slot.seen, True
                    processes.kill(slot.pid, group=True)

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._woken, 4096):
                pass


def _attempts(lease: Lease) -> dict[int, int]:
    """Return the attempt of each task that has been tried before."""
    offsets = range(lease.head.count) if lease.lapses else {**lease.crashes, **lease.tries}
    # A crash of the node is in lapses and crashes, so these do not add up.
    return {o: 1 + max(lease.lapses, lease.crashes.get(o, 0)) + lease.tries.get(o, 0) for o in offsets}


def _offsets(report: Report) -> range | list[int]:
    if report.scattered:
        return array("I", report.scattered).tolist()
    return range(report.first, report.first + report.count)
