"""A worker node: one process that serves one queue with some slots.

    threads of a node                                              what they touch
    ─────────────────                                              ───────────────
    main     outcomes from slots ─▶ finish ─▶ take ─▶ slots        slot sockets, Redis
    feeder   Kafka ─▶ feed ─▶ slots                                Kafka, Redis
    heart    beat, renew, reap                                     Redis, events
    bell     blocks until there may be work ─▶ wakes the others    Redis
    teller   what tasks write ─▶ those who follow their jobs       logs, Redis

Each thread has its own connection to Redis. A node never unpickles anything: only slots do.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil

from yadtq_nb import codec
from yadtq_nb.backlog.dead import Dead
from yadtq_nb.backlog.publish import Publisher
from yadtq_nb.backlog.reader import Record, replay_jobs
from yadtq_nb.config import Config
from yadtq_nb.errors import BacklogError, CodecError, TaskError, TooLargeError, WorkbenchError
from yadtq_nb.model import Lane, Lease, RunningTask, WorkerInfo
from yadtq_nb.slots.hints import wrong_python
from yadtq_nb.slots.pool import Described, Died, Outcomes, SlotPool
from yadtq_nb.workbench.bench import Heard, NotLiveError, Workbench
from yadtq_nb.workbench.connection import patiently
from yadtq_nb.workbench.jobs import JobStore
from yadtq_nb.worker import crash
from yadtq_nb.worker.blobs import BlobFiles
from yadtq_nb.worker.deaths import Deaths, Part
from yadtq_nb.worker.directory import NodeDirectory, remove_left
from yadtq_nb.worker.feeder import Feeder
from yadtq_nb.worker.heart import Heart, Marks
from yadtq_nb.worker.needs import NeedFiles
from yadtq_nb.worker.restore import find_blob, restore_jobs
from yadtq_nb.worker.teller import Teller

log = logging.getLogger(__name__)

#: Seconds between tries while a server is away.
_PAUSE: Final = 0.2
#: Seconds after which a thread of a node makes way for another; measured: a task is there and back 10 % sooner.
_SWITCH: Final = 0.0005
#: Seconds that a node waits for Redis at its start: it may still be reading its file.
_START: Final = 15.0
#: Seconds for which a node whose disk is full takes nothing.
_REST: Final = 2.0
#: Seconds that a task gets to clean up once it is cancelled.
_LEAVE: Final = 0.5
#: Of how many running tasks a heartbeat tells, and how long they must have run by then, in seconds.
_SLOWEST: Final = 5
_SLOW: Final = 0.5
#: Seconds that running tasks get when the node is asked to stop.
GRACE: Final = 5.0


class Node:
    """One node: build it, then run it in the main thread."""

    def __init__(
        self,
        config: Config,
        queue: str,
        slots: int,
        *,
        id: str = "",
        predecessor: str = "",
        active: Path | None = None,
        grace: float = GRACE,
        memory_limit: int | None = None,
        max_tasks_per_slot: int | None = None,
    ) -> None:
        """Say what the node serves.

        Args:
            predecessor: id of a node that is known to be dead: what it held is returned at once.
            active: a file whose time is set whenever there is work.
            grace: seconds that running tasks get when the node is asked to stop.
            memory_limit, max_tasks_per_slot: see SlotPool.
        """
        self.id = id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.queue = queue
        self.slots = slots
        self._config = config
        self._predecessor = predecessor
        self._active = active
        self._grace = grace
        self._started = time.time()
        self._done = 0
        self._leases: dict[str, Lease] = {}
        self._leases_lock = threading.Lock()
        self._outbox: collections.deque[Callable[[], object]] = collections.deque()
        #: What is still to be run, part by part, of chunks here over which slots or nodes have died.
        self._parts: dict[str, collections.deque[Part]] = {}
        #: Chunks here with tasks that are to be run later: given back when those that run now are done.
        self._unfinished: set[str] = set()
        #: Something may lie in the line of ready chunks: the bell has rung, or the last look found all it could take.
        self._may_take = True
        #: When the next of the chunks that wait is due, on the monotonic clock, as far as was heard.
        self._due_at = float("inf")
        #: Until then nothing is taken: this machine's disk is full, or the like. On the monotonic clock.
        self._rest_until = 0.0
        self._stopping = threading.Event()
        self._stop_at = float("inf")
        #: True when a thread of this node has ended by an error of ours.
        self.failed = False
        self._home = NodeDirectory(self.id)
        self._directory = self._home.path
        self._blobs = BlobFiles(
            self._directory / "blobs",
            config.key,
            lambda name: find_blob(config, replay_jobs(config, queue), name),
        )
        self.pool = SlotPool(
            slots=slots,
            secret=config.key,
            node=self.id,
            directory=self._directory,
            memory_limit=memory_limit,
            max_tasks_per_slot=max_tasks_per_slot,
        )
        self._processes: dict[int, psutil.Process] = {}

    # Life.

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until asked to stop. ready is called once the node can be given work.

        Raises:
            BacklogError, WorkbenchError: a server cannot be reached at the start.
        """
        # First of all: the template starts while this process imports and connects.
        self.pool.start()
        try:
            self._connect()
            ready()
            threading.Thread(target=remove_left, name="yadtq-cleaner", daemon=True).start()
            self._serve()
        finally:
            self._close()

    def stop(self) -> None:
        """Ask the node to finish or give back what it holds; a second time: at once. Safe in a signal handler."""
        self._stop_at = 0.0 if self._stopping.is_set() else time.monotonic() + self._grace
        self._stopping.set()
        self.pool.wake()

    def fail(self, args: threading.ExceptHookArgs) -> None:
        """End the node, since one of its threads has ended: half a node would hold partitions and feed nothing."""
        log.critical("thread %s has ended", args.thread and args.thread.name, exc_info=args.exc_value)
        self.failed = True
        self.stop()

    def _connect(self) -> None:
        config, queue = self._config, self.queue
        self._bench = Workbench(config, queue, self.id)
        patiently(self._bench.check_server, _START)
        with contextlib.closing(JobStore(config, queue)) as store:
            store.check_secret()
        self._deaths = Deaths(config, self.id, self._bench, post=self._post, later=self._outbox.append)
        self._needs = NeedFiles(self._directory / "needs", JobStore(config, queue))
        self._publisher = Publisher(config, queue)
        self._teller = Teller(lambda: Workbench(config, queue, self.id), self.pool.grown)
        self._heart = Heart(
            config,
            Workbench(config, queue, self.id),
            info=self._info,
            leases=self._held,
            lanes=lambda: {lane: (f.partitions, f.is_polling()) for lane, f in self._feeders.items()},
            heard=self._hear,
            reaped=self._tell_reaped,
        )
        self._feeders: dict[Lane, Feeder] = {"normal": self._make_feeder("normal")}
        self._heart.beat()
        if self._predecessor:
            self._heart.reap(self._predecessor)
        self._heart.start()
        self._feeders["normal"].start()
        self._bell = threading.Thread(target=self._listen, name="yadtq-bell", daemon=True)
        self._bell.start()
        self._publisher.send_event("node started", node=self.id, host=socket.gethostname(), slots=self.slots)

    def _open_lanes(self, lanes: frozenset[Lane]) -> None:
        """Feed these lanes too. Called by the feeder of the normal one, the first that looks."""
        for lane in lanes - self._feeders.keys():
            feeder = self._make_feeder(lane)
            self._feeders = {**self._feeders, lane: feeder}
            feeder.start()
            self._heart.hurry()  # it shares out the partitions

    def _make_feeder(self, lane: Lane) -> Feeder:
        return Feeder(
            self._config,
            self.queue,
            lane,
            Workbench(self._config, self.queue, self.id, lane),
            restore=lambda: restore_jobs(self._config, self.queue, replay_jobs(self._config, self.queue)),
            reserve=lambda count: self._reserve(count, nested=lane == "nested"),
            unreserve=self._unreserve,
            start=self._start,
            refuse=self._refuse,
            settle=self._publisher.flush,
            found=self._open_lanes,
            slots=self.slots,
        )

    def _serve(self) -> None:
        while not (self._stopping.is_set() and (self._is_idle() or time.monotonic() >= self._stop_at)):
            if (self._may_take or time.monotonic() >= self._due_at) and not self._stopping.is_set():
                self._take()
            if self._stopping.is_set():
                # What runs may end; what has not begun is given back, for others to run.
                for chunk in self.pool.running():
                    self.pool.hold(chunk)
            wait = _PAUSE if self._outbox or self._stopping.is_set() else min(60.0, self._due_in())
            for event in self.pool.poll(wait):
                if isinstance(event, Outcomes):
                    self._finish(event)
                elif isinstance(event, Described):
                    self._deaths.end(event.lease, [event.offset], event.text)
                    self._go_on(event.lease)
                else:
                    self._bury(event)
            self._send_outbox()

    def _due_in(self) -> float:
        """Return the seconds until a chunk that waits may be taken; without a free slot, an outcome wakes us first."""
        if not self.pool.has_free():
            return 60.0
        return max(0.001, self._due_at - time.monotonic())

    def _is_idle(self) -> bool:
        return not self._leases and not self._outbox

    def _close(self) -> None:
        if not hasattr(self, "_bell"):
            self.pool.stop(0.0)
            self._home.remove()
            return
        self._stopping.set()
        self._feeders["normal"].close()  # first: it opens the others
        for lane, feeder in self._feeders.items():
            if lane != "normal":
                feeder.close()
        self._heart.close()
        self._bell.join()
        self.pool.stop(0.0)
        self._teller.close()
        with contextlib.suppress(WorkbenchError):
            for lease in list(self._leases.values()):
                self._bench.release(lease)
            self._bench.beat(self._info("stopped"), {}, [])
        self._publisher.send_event("node stopped", node=self.id)
        self._publisher.close(1.0)
        self._bench.close()
        self._needs.close()
        self._home.remove()

    # Taking and running.

    def _take(self) -> None:
        """Fill free slots from the line of ready chunks, whoever fed them."""
        lent = self.pool.lent()
        free = self._reserve(self.slots + lent, nested=True)
        if not free:
            return
        leases: list[Lease] = []
        # Before looking: a bell that rings meanwhile must not be forgotten.
        self._may_take = False
        try:
            leases, due = self._bench.take(free, plain=max(0, free - lent))
            self._due_at = float("inf") if due is None else time.monotonic() + due
            # What was not for a lent slot still lies there.
            if len(leases) == free or lent:
                self._may_take = True
        except NotLiveError:
            log.warning("nothing is taken: this node's heartbeat is late")
        except CodecError:
            log.warning("nothing could be taken", exc_info=True)
        except WorkbenchError as exc:
            log.warning("taking waits: %s", exc)
        self.pool.unreserve(free - len(leases))
        for lease in leases:
            self._start(lease, self._bench)

    def _reserve(self, count: int, *, nested: bool) -> int:
        """Claim free slots, unless this node takes nothing now. Called by the main thread and by the feeders.

        Args:
            nested: the lent ones, too. These are kept for nested jobs: with others, each of which might lend its slot
                again, a node would start more and more of what it cannot finish.
        """
        if self._stopping.is_set() or time.monotonic() < self._rest_until:
            return 0
        return self.pool.reserve(count, lent=nested)

    def _unreserve(self, count: int) -> None:
        """Give back what the feeder had claimed; the main thread may have found no slot meanwhile."""
        self.pool.unreserve(count)
        if count and self._may_take:
            self.pool.wake()

    def _start(self, lease: Lease, workbench: Workbench) -> None:
        """Run a leased chunk in a reserved slot. Called by the main thread and by the feeder."""
        with self._leases_lock:
            self._leases[lease.head.id] = lease
        out = lease.done | lease.waiting
        left = [o for o in range(lease.head.count) if o not in out]
        parts = self._deaths.parts(lease, left) if lease.lapses or lease.crashes else None
        try:
            if lease.waiting:
                self._unfinished.add(lease.head.id)
            if not left or (parts is not None and not parts):
                self._drop(lease)
                self.pool.unreserve(1)
            elif parts is not None:
                self._parts[lease.head.id] = parts
                self._run_next_part(lease, workbench)
            else:
                self._run(lease, workbench, lease.done)
        except (TaskError, WorkbenchError, OSError) as exc:
            self.pool.unreserve(1)
            self._fail(lease, left, exc)

    def _run(self, lease: Lease, workbench: Workbench, skip: frozenset[int], part: Part | None = None) -> None:
        head, path = lease.head, self._blobs.path
        if trouble := lease.trouble or wrong_python(head.environment):
            raise TaskError(trouble)
        function = None if head.function_size else path(head.function, workbench, codec.FUNCTION)
        tree = path(head.environment.tree, workbench, codec.TREE) if head.environment.tree else None
        arguments = path(_arguments(lease), workbench, codec.ARGUMENTS) if head.by_reference else None
        needs = self._needs.path(lease) if head.needs else None
        self.pool.run(
            lease,
            function_path=function,
            tree_path=tree,
            arguments_path=arguments,
            needs_path=needs,
            skip=skip,
            fresh=part is not None and part.fresh,
            describe=part.offsets[0] if part is not None and part.describe else None,
        )

    def _run_next_part(self, lease: Lease, workbench: Workbench) -> None:
        part = self._parts[lease.head.id][0]
        if len(part.offsets) == 1:
            workbench.mark(lease, part.offsets[0])
        self._run(lease, workbench, frozenset(range(lease.head.count)).difference(part.offsets), part)
        self._parts[lease.head.id].popleft()

    # What slots tell.

    def _finish(self, event: Outcomes) -> None:
        lease = event.lease
        self._done += len(event.states)
        if event.states:
            states, frame = self._that_fit(event)
            self._outbox.append(lambda: self._bench.finish(lease, event.offsets, states, frame))
        if event.retries:
            retries = event.retries
            self._outbox.append(lambda: self._bench.retry(lease, retries))
        if event.last:
            self._go_on(lease, unfinished=event.unfinished)

    def _go_on(self, lease: Lease, *, unfinished: bool = False) -> None:
        """A slot is done with a chunk, or with a part of it: see to the rest."""
        id = lease.head.id
        if unfinished and self._leases.get(id) is lease:
            self._unfinished.add(id)
        if not self._parts.get(id) or self._leases.get(id) is not lease:
            self._drop(lease)
            return
        self._send_outbox()
        # Where the feeder was quicker, the rest waits in the line.
        if unfinished or self._stopping.is_set() or not self.pool.reserve(1):
            self._outbox.append(lambda: self._bench.release(lease))
            self._drop(lease)
            return
        left = [offset for part in self._parts[id] for offset in part.offsets]
        try:
            self._run_next_part(lease, self._bench)
        except (TaskError, WorkbenchError, OSError) as exc:
            self.pool.unreserve(1)
            self._fail(lease, left, exc)

    def _that_fit(self, event: Outcomes) -> tuple[bytes, bytes]:
        """Return states and frame of outcomes; what Redis does not take would hold up all that comes after it."""
        most = self._bench.too_large(len(event.frame))
        if most is None:
            return event.states, event.frame
        bare = crash.without_logs(self._config.key, event.frame)
        if len(bare) <= most:
            return event.states, bare
        first, offsets = event.lease.head.first, list(event.offsets)
        error = TooLargeError(
            f"the results of tasks {first + offsets[0]} to {first + offsets[-1]} have {len(event.frame):,} bytes, more "
            f"than the {most:,} bytes that Redis takes at once (proto-max-bulk-len): return less, or write the data "
            "where the notebook can reach it and return its name"
        )
        return crash.refusal(self._config.key, self.id, event.lease, offsets, error)

    def _bury(self, event: Died) -> None:
        """A slot has died: charge the task that ran in it, and let its chunk-mates go on elsewhere."""
        lease = event.lease
        self._publisher.send_event("slot died", node=self.id, reason=event.reason, chunk=lease and lease.head.id)
        if lease is not None:
            self._deaths.settle(lease, event)
            self._drop(lease)

    def _fail(self, lease: Lease, offsets: list[int], error: Exception) -> None:
        """End tasks that cannot even be started."""
        if isinstance(error, TaskError):
            # First: once its outcomes are in, the workbench knows no more where it lies in Kafka.
            self._outbox.append(lambda: self._put_aside(lease, error))
            self._post(lease, offsets, *crash.refusal(self._config.key, self.id, lease, offsets, error))
        else:
            if isinstance(error, OSError):
                log.error("no chunk is taken for a while: %s: %s", self._directory, error)
                self._rest_until = time.monotonic() + _REST
                self._due_at = min(self._due_at, self._rest_until)
            self._outbox.append(lambda: self._bench.release(lease))
        self._drop(lease)
        self.pool.wake()

    def _post(self, lease: Lease, offsets: range | list[int], states: bytes, frame: bytes) -> None:
        """Put outcomes in the outbox: what a slot has done is not lost while Redis is away."""
        self._outbox.append(lambda: self._bench.finish(lease, offsets, states, frame))
        self.pool.wake()

    def _send_outbox(self) -> None:
        while self._outbox:
            try:
                self._outbox[0]()
            except WorkbenchError as exc:
                log.warning("outcomes wait: %s", exc)
                return
            self._outbox.popleft()

    def _drop(self, lease: Lease) -> None:
        if lease.head.needs:
            self._needs.drop(lease)
        with self._leases_lock:
            # The same chunk may have come here again meanwhile, under a lease of its own.
            if self._leases.get(lease.head.id) is not lease:
                return
            del self._leases[lease.head.id]
        self._parts.pop(lease.head.id, None)
        if lease.head.id in self._unfinished:
            self._unfinished.discard(lease.head.id)
            self._outbox.append(lambda: self._bench.release(lease))
            self.pool.wake()
        if lease.head.by_reference:
            self._blobs.drop(_arguments(lease))

    # What the heart asks and hears.

    def _held(self) -> list[tuple[Lease, int]]:
        """Leases with the offset that runs now, or -1."""
        running = self.pool.running()
        with self._leases_lock:
            return [(lease, running[id][1] if id in running else -1) for id, lease in self._leases.items()]

    def _hear(self, heard: Heard, marks: Marks) -> None:
        for lane, feeder in self._feeders.items():
            shares = [share for share in heard.shares if share.lane == lane]
            feeder.share(shares, {p: mark for (of, p), mark in marks.items() if of == lane})
        self._stop_lost(heard.lost)
        self._stop_dropped(heard.dropped)
        self._teller.follow(heard.followed)
        if heard.ready and not self._may_take:
            self._may_take = True
            self.pool.wake()
        if self._active is not None and (self._leases or heard.ready):
            self._active.touch()
        self._publisher.send_event("heartbeat", node=self.id, leases=len(self._leases), ready=heard.ready)

    def _stop_lost(self, chunks: list[str]) -> None:
        """Stop what is another's by now, or done: its outcome would only be dropped."""
        running = self.pool.running()
        for chunk in chunks:
            if chunk in running and running[chunk][0] is self._leases.get(chunk):
                self.pool.terminate(chunk, _LEAVE)

    def _stop_dropped(self, dropped: dict[str, list[int]]) -> None:
        """Stop single tasks that were cancelled; those that have not begun are seen to by whoever takes the rest."""
        running = self.pool.running() if dropped else {}
        for chunk, offsets in dropped.items():
            lease, offset = running.get(chunk, (None, -1))
            if lease is None or lease is not self._leases.get(chunk) or lease.done.issuperset(offsets):
                continue
            if offset in offsets and not lease.head.concurrent:
                self.pool.terminate(chunk, _LEAVE)
            elif max(offsets) > offset or lease.head.concurrent:
                self.pool.hold(chunk)

    def _tell_reaped(self, lapsed: list[tuple[str, str]]) -> None:
        for chunk, node in lapsed:
            self._publisher.send_event("lease lapsed", chunk=chunk, node=node, by=self.id)
        self._may_take = True
        self.pool.wake()

    def _refuse(self, record: Record, topic_id: str, error: CodecError) -> None:
        """Put a record aside that cannot be fed."""
        value = record.value or b""
        job = codec.claimed_job(value)
        self._send_dead(value, (topic_id, record.partition, record.offset), error, job=job)

    def _put_aside(self, lease: Lease, error: Exception) -> None:
        """Put a record aside whose tasks have ended with an error, since they cannot even be started."""
        head = lease.head
        place = self._bench.place(head.id) or ("", -1, -1)
        try:
            self._send_dead(lease.record, place, error, job=head.job, job_name=head.job_name, chunk=head.number)
        except BacklogError:
            log.exception("chunk %s is not on the dead topic", head.id)

    def _send_dead(self, value: bytes, place: tuple[str, int, int], error: Exception, **job: Any) -> None:
        topic_id, partition, offset = place
        reason = str(error)
        log.error("partition %d, offset %d is refused: %s", partition, offset, reason)
        self._publisher.send_event("record refused", node=self.id, partition=partition, offset=offset, reason=reason)
        note = Dead(
            reason=reason,
            error=type(error).__name__,
            topic_id=topic_id,
            partition=partition,
            offset=offset,
            size=len(value),
            time=time.time(),
            node=self.id,
            **job,
        )
        self._publisher.send_dead(note, value)

    def _listen(self) -> None:
        """Wake the others whenever the bell rings."""
        bench, position = Workbench(self._config, self.queue, self.id), "0-0"
        while not self._stopping.is_set():
            try:
                rung, why = bench.wait_for_bell(position, 1.0)
            except WorkbenchError:
                self._stopping.wait(_PAUSE)
                continue
            if why & {"cancel", "follow"}:
                self._heart.hurry()
            if "lane" in why:
                self._feeders["normal"].look()
            if rung != position:
                position = rung
                for feeder in self._feeders.values():
                    feeder.ring()
                self._may_take = True
                self.pool.wake()
        bench.close()

    def _info(self, status: str = "") -> WorkerInfo:
        running = self.pool.running()
        jobs = collections.Counter(lease.head.job for lease, _ in running.values())
        cpu, memory = self._usage()
        return WorkerInfo(
            id=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            slots=self.slots,
            busy=max(0, len(running) - self.pool.lent()),
            done=self._done,
            started=self._started,
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            cpu=cpu,
            memory=memory,
            running=dict(jobs),
            status=status or ("stopping" if self._stopping.is_set() else "live"),
            secret=codec.fingerprint(self._config.key),
            slowest=self._slowest(),
        )

    def _slowest(self) -> tuple[RunningTask, ...]:
        found = self.pool.slowest(_SLOWEST)
        return tuple(
            RunningTask(lease.head.job, lease.head.first + offset, round(seconds, 1))
            for lease, offset, seconds in found
            if seconds >= _SLOW
        )

    def _usage(self) -> tuple[float, int]:
        cpu, memory = 0.0, 0
        seen: dict[int, psutil.Process] = {}
        for pid in (os.getpid(), *self.pool.pids()):
            with contextlib.suppress(psutil.Error):  # it may end at any moment
                process = seen[pid] = self._processes.get(pid) or psutil.Process(pid)
                cpu += process.cpu_percent()
                memory += process.memory_info().rss
        self._processes = seen
        return round(cpu, 1), memory


def _arguments(lease: Lease) -> str:
    """Name of the blob that holds a chunk's arguments."""
    return f"{lease.head.job}-{lease.head.number}"


def serve(
    config: Config,
    *,
    queue: str,
    slots: int,
    id: str = "",
    predecessor: str = "",
    active: Path | None = None,
    memory_limit: int | None = None,
    max_tasks_per_slot: int | None = None,
    ready: Callable[[Node], None] = lambda _: None,
) -> None:
    """Run a node in this process until SIGTERM or Ctrl-C.

    Raises:
        BacklogError, WorkbenchError: a server cannot be reached at the start, or will not do.
        SignatureError: the queue's other workers have another secret.
    """
    node = Node(
        config,
        queue,
        slots,
        id=id,
        predecessor=predecessor,
        active=active,
        memory_limit=memory_limit,
        max_tasks_per_slot=max_tasks_per_slot,
    )
    threading.excepthook = node.fail
    # The threads hand a task on to each other: with Python's 5 ms one may wait for another's bookkeeping.
    sys.setswitchinterval(_SWITCH)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.stop())
    node.run(lambda: ready(node))
    if node.failed:
        raise SystemExit(1)
