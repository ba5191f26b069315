"""The clients that one process has of one queue: a producer, connections to Redis, and the inbox's thread."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final

import msgspec

from yadtq_nb import codec, lending, pending
from yadtq_nb.backlog.publish import Publisher
from yadtq_nb.backlog.reader import replay_tasks
from yadtq_nb.client.board import Board
from yadtq_nb.client.inbox import PATIENCE, Inbox
from yadtq_nb.client.job import Job
from yadtq_nb.client.options import JobOptions
from yadtq_nb.client.sender import FLUSH, Mailer, Packet, Sender
from yadtq_nb.config import Config
from yadtq_nb.errors import BacklogError, CodecError, JobError, JobExistsError, TooLargeError, YadtqError
from yadtq_nb.model import CallStyle, Cancel, Environment, Lane, Seal, new_id
from yadtq_nb.workbench.connection import patiently
from yadtq_nb.workbench.jobs import JobStore

#: Seconds that exit waits for what is sent to be safe; with no worker to feed it, it may never be.
_SAFE: Final = 10.0


class Link:
    """Opened on first use; closed with the queue."""

    def __init__(self, config: Config, queue: str) -> None:
        """Connect.

        Raises:
            WorkbenchError: Redis cannot be reached. Kafka is looked for when something is sent.
            SignatureError: the queue's workers have another secret.
        """
        self.queue = queue
        self.key = config.key
        self._config = config
        self.store = JobStore(config, queue)
        patiently(self.store.check_secret, PATIENCE)
        self.inbox = Inbox(config, queue)
        self._publishers: dict[Lane, Publisher] = {}
        self._lock = threading.Lock()
        self.mailer = Mailer(config, self.store, self.publisher)
        self._senders: list[Sender] = []
        self._pid = os.getpid()
        pending.add(self)

    def publisher(self, lane: Lane = "normal") -> Publisher:
        """Return who writes to a lane; it comes into use with the first call, and nodes are told so."""
        with self._lock:
            if lane not in self._publishers:
                self._publishers[lane] = Publisher(
                    self._config, self.queue, lane, fed=functools.partial(self.store.cursors, lane)
                )
                if lane != "normal":
                    patiently(lambda: self.store.ring("lane"), PATIENCE)
            return self._publishers[lane]

    def packet(
        self,
        fn: Callable[..., Any],
        kwargs: dict[str, Any],
        style: CallStyle,
        where: Environment,
        options: JobOptions,
    ) -> Packet:
        """Pickle a function, and give its job an id and a name.

        Raises:
            TypeError: the function cannot be pickled.
        """
        try:
            types = (options.retry_types,) if options.retries else ()
            function = b"".join(codec.dumps((fn, kwargs, *types)))
        except Exception as exc:  # whatever the user's closure does when it is pickled
            raise TypeError(f"{function_name(fn)} cannot be sent to workers: {type(exc).__name__}: {exc}") from exc
        job, name = new_id(), options.name
        packet = Packet(
            job=job,
            name=name or f"{function_name(fn).rpartition('.')[2].strip('<>')}-{job[-5:]}",
            named=name is not None,
            function=function,
            function_id=codec.content_hash(function),
            function_name=function_name(fn),
            style=style,
            concurrent=_is_coroutine_function(fn),
            environment=where,
            created=time.time(),
            parameters=_parameters(fn) if style in ("star", "call") else (),
            deadline=options.ends_at(self.store.now),
            policy=options.policy(self.store.now),
            lane=options.lane,
            depth=lending.depth + 1 if lending.in_slot() else 0,
        )
        self.publisher(packet.lane)
        if packet.by_blob:
            self.mailer.keep_blob(codec.FUNCTION, packet.function_id, function)
        return packet

    def claim(self, packet: Packet, total: int | None) -> Packet:
        """Make the job known to the queue, under its name; a name that was made up is changed when it is taken.

        Raises:
            JobExistsError: the name is taken.
            WorkbenchError: Redis cannot be reached.
        """
        client = f"{socket.gethostname()}:{os.getpid()}"
        holder = patiently(lambda: self.store.create(packet.manifest(total, client)), PATIENCE)
        if holder != packet.job and packet.named:
            raise JobExistsError(
                f"queue {self.queue!r} has a job {packet.name!r} already (id {holder}): get it with "
                f"queue.job({packet.name!r}), or choose another name",
                job=packet.name,
            )
        if holder != packet.job:
            packet = msgspec.structs.replace(packet, name=f"{packet.name}-{packet.job}")
            patiently(lambda: self.store.create(packet.manifest(total, client)), PATIENCE)
        self.mailer.send_entry(packet.manifest(total, client))
        return packet

    def withdraw(self, packet: Packet) -> None:
        """Give a job's name back when nothing of it was sent."""
        if all(sender.job != packet.job for sender in self._senders):
            with contextlib.suppress(YadtqError):
                if self.store.withdraw(packet.job):
                    self.mailer.send_entry(Cancel(packet.job))  # nor may it come back from the journal

    def post(
        self,
        packet: Packet,
        items: list[Any] | Iterator[Any],
        total: int | None,
        chunksize: int | None,
        slots: Callable[[], int],
    ) -> Job:
        """Start sending a job, and return it; one without items has ended by then."""
        board, job = self._new_job(packet, total)
        if total == 0:
            seal = Seal(packet.job, 0)
            self.mailer.send_entry(seal)
            self.mailer.flush()
            patiently(lambda: self.store.seal(seal), PATIENCE)
            board.end()
            return job
        sender = Sender(
            packet,
            items,
            total=total,
            chunksize=chunksize,
            mailer=self.mailer,
            inbox=self.inbox,
            store=self.store,
            board=board,
            slots=slots,
        )
        self._senders = [other for other in self._senders if not other.finished.is_set()]
        self._senders.append(sender)
        sender.start()
        return job

    def post_one(self, packet: Packet, item: Any) -> Job:
        """Send a job of one task from this thread: its chunk says all there is to say of it."""
        board, job = self._new_job(packet, 1)
        board.wanted = True

        def acknowledged(error: BacklogError | None, _partition: int, _offset: int) -> None:
            if error is not None:
                failure = JobError(f"job {packet.name!r} was not sent: {error}", job=packet.name)
                failure.__cause__ = error
                board.end(failure)

        future: Future[Any] = job[0]
        try:
            self.mailer.send(packet, 0, 0, [item], acknowledged, total=1)
        except TooLargeError:
            self.inbox.forget(board)
            raise
        self.mailer.ring()
        assert future is job[0]
        return job

    def _new_job(self, packet: Packet, total: int | None) -> tuple[Board, Job]:
        board = Board(packet.job, self.key)
        job = Job(
            self,
            board,
            id=packet.job,
            name=packet.name,
            total=total,
            style=packet.style,
            created=packet.created,
            parameters=packet.parameters,
        )
        self.inbox.watch(board, known=False)
        return board, job

    def cancel(self, job: str) -> int:
        """Cancel a job; see Job.cancel."""
        cancel = Cancel(job)
        # To Kafka first: a workbench that is filled again must not bring the job back to life.
        self.mailer.send_entry(cancel)
        self.mailer.flush()
        cancelled = patiently(lambda: self.store.cancel(cancel), PATIENCE)
        for sender in self._senders:
            if sender.job == job:
                sender.stop()
        return cancelled

    def bring_back(self, job: str) -> int:
        """Send the lost tasks of a job again, from Kafka's log; see Job.retry."""
        known = self.store.record(job)
        if known is None or not self.store.reopen(job):
            return 0
        publisher = self.publisher(known.lane)
        kept = {field.partition(".")[0] for field in self.store.fields(job)}
        ends: dict[int, int] = {}
        refused: list[BacklogError] = []

        def acknowledged(error: BacklogError | None, partition: int, offset: int) -> None:
            if error is not None:
                refused.append(error)
            else:
                ends[partition] = max(ends.get(partition, 0), offset + 1)

        count = 0
        for record in replay_tasks(self._config, self.queue, known.lane):
            try:
                head, *_ = codec.decode_chunk(self.key, record)
            except CodecError:
                continue
            if head.job == job and str(head.number) not in kept:
                kept.add(str(head.number))
                count += head.count
                publisher.send_chunk(record, acknowledged)
                self.mailer.ring()
        publisher.flush(FLUSH)
        if refused:
            raise refused[0]
        places = {f"{publisher.topic.id}/{partition}": end for partition, end in ends.items()}
        seal = Seal(job, known.total, places)
        self.mailer.send_entry(seal)
        self.mailer.flush()
        patiently(lambda: self.store.seal(seal), PATIENCE)
        return count

    def finish_sending(self, timeout: float, *, ending: bool) -> None:
        """Wait for what has an end to be sent, and for Kafka to have it all; when ending, give up the rest."""
        if os.getpid() != self._pid:
            return
        deadline = time.monotonic() + timeout
        for sender in self._senders:
            if sender.bounded:
                sender.hurry()
                sender.finished.wait(max(0.0, deadline - time.monotonic()))
            elif ending:
                sender.abandon()
        for publisher in list(self._publishers.values()):
            publisher.settle(min(_SAFE, max(0.1, deadline - time.monotonic())))

    def close(self) -> None:
        """Send what is being sent, and close."""
        pending.remove(self)
        self.finish_sending(60.0, ending=True)
        for publisher in self._publishers.values():
            publisher.close()
        self.inbox.close("the queue was closed (open one and use queue.job(...): the job goes on)")
        self.store.close()

    def leave(self) -> None:
        """Close without sending anything more: the servers are about to end, and the jobs with them."""
        pending.remove(self)
        for sender in self._senders:
            sender.stop()
        for publisher in self._publishers.values():
            publisher.close(0.0)
        self.inbox.close("the LocalCluster was closed, and the job with it,")
        self.store.close()


def function_name(fn: Callable[..., Any]) -> str:
    """Return a name to show for anything that can be called."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return name.rpartition("<locals>.")[2]


def _is_coroutine_function(fn: Callable[..., Any]) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004  # an object whose __call__ is a coroutine function


def _parameters(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's positional parameters, as far as they can be told."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
