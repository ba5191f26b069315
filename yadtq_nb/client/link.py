"""The clients that one process has of one queue: a producer, connections to Redis, and the inbox's thread."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import os
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import msgspec

from yadtq_nb import codec, lending, needs, pending
from yadtq_nb.backlog.publish import Publisher
from yadtq_nb.client import repair, sameness
from yadtq_nb.client.board import Board
from yadtq_nb.client.inbox import PATIENCE, Inbox
from yadtq_nb.client.job import Job, attach
from yadtq_nb.client.names import made_up
from yadtq_nb.client.options import IfExists, JobOptions
from yadtq_nb.client.sender import FLUSH, Mailer, Packet, Sender
from yadtq_nb.config import Config
from yadtq_nb.errors import (
    BacklogError,
    JobError,
    JobExistsError,
    JobNotFoundError,
    TooLargeError,
    WorkbenchError,
    YadtqError,
)
from yadtq_nb.model import CallStyle, Cancel, Environment, Lane, Need, Reopen, Seal, new_id
from yadtq_nb.workbench.connection import patiently
from yadtq_nb.workbench.jobs import JobRecord, JobStore

_T = TypeVar("_T")

log = logging.getLogger(__name__)

#: Seconds that exit waits for what is sent to be safe; with no worker to feed it, it may never be.
_SAFE: Final = 10.0
#: Seconds that a closing queue waits for a sender to say that its job was not sent whole.
_TOLD: Final = 2.0
#: Seconds that closing waits for what has an end to be sent.
_CLOSE: Final = 60.0
#: Seconds that Kafka has to take the word that a job is ended, before the workbench hears it.
_TELL: Final = 1.0
#: Pairs of words that are tried for a name before the job's id is.
_WORDS_TRIED: Final = 5
#: Seconds for which the local stack is taken to be up.
_WOKEN: Final = 1.0
#: Seconds for which the number of slots is taken to be known.
_SLOTS_KNOWN: Final = 2.0


class Link:
    """Opened on first use; closed with the queue."""

    def __init__(self, config: Config, queue: str, *, wake: Callable[[], object] | None = None) -> None:
        """Connect.

        Args:
            wake: starts the servers, if they may have ended by themselves.

        Raises:
            WorkbenchError: Redis cannot be reached. Kafka is looked for when something is sent.
            SignatureError: the queue's workers have another secret.
        """
        self.queue = queue
        self.key = config.key
        self.config = config
        self._wake, self._woken_at = wake, time.monotonic()
        self._store = JobStore(config, queue)
        patiently(self.store.check_secret, PATIENCE)
        self._publishers: dict[Lane, Publisher] = {}
        self.inbox = Inbox(config, queue, held=self._held)
        self._lock = threading.Lock()
        self.mailer = Mailer(config, self.store, self.publisher, self.inbox, is_ours=self.is_ours)
        self._senders: list[Sender] = []
        self._pid = os.getpid()
        #: When the slots were last counted, and how many there were.
        self._slots_seen = (float("-inf"), 0)
        pending.add(self)

    @property
    def store(self) -> JobStore:
        """What is asked of the workbench; see wake."""
        self.wake()
        return self._store

    def wake(self) -> None:
        """Have the local stack started if it has stopped, being idle.

        Not from other threads than the user's, such as a card's: it could never be stopped.
        """
        if self._wake is None or time.monotonic() - self._woken_at < _WOKEN:
            return
        if threading.current_thread() is threading.main_thread():
            self._woken_at = time.monotonic()
            self._wake()

    def publisher(self, lane: Lane = "normal") -> Publisher:
        """Return who writes to a lane; it comes into use with the first call, and nodes are told so."""
        with self._lock:
            if lane not in self._publishers:
                fed = functools.partial(self.store.fed, lane)
                # Rung for when it was sent, a feeder may sleep again by the time that a slow broker has it.
                arrived = self.mailer.ring
                self._publishers[lane] = Publisher(self.config, self.queue, lane, fed=fed, arrived=arrived)
                if lane != "normal":
                    patiently(lambda: self.store.ring("lane"), PATIENCE)
            return self._publishers[lane]

    def _held(self) -> set[str]:
        return set().union(*(publisher.holds() for publisher in list(self._publishers.values())))

    def slots(self) -> int:
        """Return how many slots serve this queue, at least 1."""
        seen, slots = self._slots_seen
        if time.monotonic() - seen > _SLOTS_KNOWN:
            try:
                views = self.store.workers()
            except WorkbenchError:  # it is a guess for the size of chunks: no reason not to send
                return max(1, slots)
            slots = sum(view.info.slots for view in views if view.status == "live")
            self._slots_seen = (time.monotonic(), slots)
        return max(1, slots)

    def environment(self, fn: Callable[..., Any], items: list[Any] | Iterator[Any] | None = None) -> Environment:
        """Return what a function needs beside itself; modules that workers may lack are put where they find them."""
        from yadtq_nb import source

        cwd = os.getcwd()
        tree = source.collect(fn, items)
        if tree is not None:
            self.mailer.keep_blob(codec.TREE, tree.hash, tree.archive)
        return Environment(
            cwd=cwd,
            path=tuple(entry or cwd for entry in sys.path),
            host=socket.gethostname(),
            tree=tree.hash if tree else "",
            tree_root=str(tree.root) if tree else "",
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
        )

    def packet(
        self,
        fn: Callable[..., Any],
        kwargs: dict[str, Any],
        style: CallStyle,
        where: Environment,
        options: JobOptions,
        key: bytes = b"",
    ) -> Packet:
        """Pickle a function, and give its job an id and a name.

        Args:
            key: what a job that has a name is compared by, packed.

        Raises:
            TypeError: the function cannot be pickled.
            ValueError: it holds too many futures.
            JobError: it holds a future or job of another queue.
        """
        function, needed = self._pickle_call(fn, kwargs, *((options.retry_types,) if options.retries else ()))
        job, name = new_id(), options.name
        packet = Packet(
            job=job,
            name=name or made_up(function_name(fn).rpartition(".")[2].strip("<>"), job),
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
            needs=needed,
            sameness=key,
        )
        self.publisher(packet.lane)
        if packet.by_blob:
            self.mailer.keep_blob(codec.FUNCTION, packet.function_id, function)
        return packet

    def is_ours(self, other: object) -> bool:
        """Tell whether the client of some job belongs to this queue, on these servers."""
        if other is self:
            return True
        if not isinstance(other, Link) or (other.queue, other.key) != (self.queue, self.key):
            return False
        # One server may have several addresses.
        return other.config.redis == self.config.redis or other.store.run_id() == self.store.run_id()

    def _pickle_call(
        self, fn: Callable[..., Any], kwargs: dict[str, Any], *types: tuple[type[BaseException], ...]
    ) -> tuple[bytes, tuple[Need, ...]]:
        try:
            with needs.collecting(self.is_ours) as met:
                function = b"".join(codec.dumps((fn, kwargs, *types)))
        except JobError:
            raise
        except Exception as exc:  # whatever the user's closure does when it is pickled
            raise TypeError(f"{function_name(fn)} cannot be sent to workers: {type(exc).__name__}: {exc}") from exc
        needed = met.needs()
        if len(needed) > needs.MOST:
            raise ValueError(f"{function_name(fn)} cannot be sent to workers: {needs.too_many(len(needed))}")
        return function, needed

    def check(self, *arguments: object) -> None:
        """Find a future or job of another queue among arguments before anything of them is sent.

        Raises:
            JobError: there is one.
        """
        try:
            with needs.collecting(self.is_ours):
                codec.dumps(arguments)
        except JobError:
            raise
        except Exception:  # as the task will say
            return

    def claim(self, packet: Packet, total: int | None, if_exists: IfExists | None = None) -> Packet | Job:
        """Make the job known to the queue, under its name; a name that was made up is changed when it is taken.

        Returns:
            What is to be sent; or the job that has the name, where that is the same or if_exists is "attach".

        Raises:
            JobExistsError: the name is taken by another job.
            WorkbenchError, BacklogError: a server cannot be reached.
        """
        client, wanted = f"{socket.gethostname()}:{os.getpid()}", packet.name
        for times in itertools.count(1):
            manifest = packet.manifest(total, client)
            holder = patiently(functools.partial(self.store.create, manifest), PATIENCE)
            if holder == packet.job:
                self.inbox.told(packet.job, functools.partial(JobStore.create, manifest=manifest))
                self.mailer.send_entry(manifest)
                return packet
            if not packet.named:
                packet = msgspec.structs.replace(packet, name=_another_name(packet, times))
            elif if_exists == "new":
                packet = msgspec.structs.replace(packet, name=f"{wanted}-{times + 1}")
            elif if_exists == "replace":
                self.delete(holder)
            elif (found := self._same(holder, packet, if_exists)) is not None:
                return found
        raise AssertionError("never ends")

    def _same(self, holder: str, packet: Packet, if_exists: IfExists | None) -> Job | None:
        """Return the job that has the name; None when it has gone meanwhile.

        Raises:
            JobExistsError: it is another one.
        """
        try:
            record = patiently(lambda: self.store.record(holder), PATIENCE)
        except JobNotFoundError:
            return None
        if record is None:
            return None
        if if_exists is None:
            theirs = sameness.unpack(patiently(lambda: self.store.sameness(holder), PATIENCE))
            ours = sameness.unpack(packet.sameness)
            if not ours.is_same(theirs):
                raise self._taken(packet.name, holder, theirs, ours)
        return attach(self, record)

    def _taken(self, name: str, holder: str, theirs: sameness.Sameness, ours: sameness.Sameness) -> JobExistsError:
        differing = sameness.differences(theirs, ours)
        if differing:
            what = f"it differs in {', '.join(differing)}"
        else:
            what = f"whether this is the same cannot be told: {ours.trouble or theirs.trouble or 'another version'}"
        return JobExistsError(
            f"queue {self.queue!r} has a job {name!r} already (id {holder}), and {what}. Ways out: if_exists='attach' "
            f"takes the job that is there, if_exists='replace' cancels and deletes it and runs this one, "
            f"if_exists='new' runs this one as '{name}-2' or the like; or choose another name",
            job=name,
            differing=differing,
        )

    def withdraw(self, packet: Packet) -> None:
        """Give a job's name back when nothing of it was sent."""
        if all(sender.job != packet.job for sender in self._senders):
            self.inbox.take_back(packet.job)
            with contextlib.suppress(YadtqError):
                if self.store.withdraw(packet.job):
                    self.mailer.send_entry(Cancel(packet.job))  # nor may it come back from the journal

    def post(
        self,
        packet: Packet,
        items: list[Any] | Iterator[Any],
        total: int | None,
        chunksize: int | None,
    ) -> Job:
        """Start sending a job, and return it; one without items has ended by then."""
        board, job = self._new_job(packet, total)
        if total == 0:
            self.mailer.seal(Seal(packet.job, 0), PATIENCE)
            board.end()
            return job
        self._start_sending(packet, items, board, total=total, chunksize=chunksize)
        return job

    def post_one(self, packet: Packet, item: Any) -> Job:
        """Send a job of one task from this thread: its chunk says all there is to say of it."""
        board, job = self._new_job(packet, 1)
        board.wanted = True

        def acknowledged(error: BacklogError | None, _where: str, _offset: int) -> None:
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
        board = Board(packet.job, self.key, packet.name, total)
        job = Job(
            self,
            board,
            id=packet.job,
            name=packet.name,
            style=packet.style,
            created=packet.created,
            parameters=packet.parameters,
        )
        self.inbox.watch(board, known=False)
        return board, job

    def cancel(self, job: str) -> int:
        """Cancel a job; see Job.cancel."""
        cancel = Cancel(job)
        # Told again, it must not end what somebody has had run again since.
        count, _ = self._end(
            cancel,
            lambda store: store.cancel_life(cancel),
            lambda ended: lambda store: store.cancel_life(cancel, ended[1]),
        )
        return count

    def delete(self, job: str) -> bool:
        """Delete a job; see Job.delete."""
        return self._end(
            Cancel(job, "deleted"), lambda store: store.delete(job), lambda _: lambda store: store.delete(job)
        )

    def _end(
        self,
        cancel: Cancel,
        end: Callable[[JobStore], _T],
        again: Callable[[_T], Callable[[JobStore], object]],
    ) -> _T:
        # To Kafka first: a workbench that is filled again must not bring the job back to life. But where Kafka is away
        # its tasks do not run on until it is back.
        away: BacklogError | None = None
        told = False
        try:
            self.mailer.send_entry(cancel)
            told = self.mailer.flush(timeout=_TELL)
        except BacklogError as exc:
            away = exc
        ended = patiently(lambda: end(self.store), PATIENCE)
        self.inbox.told(cancel.id, again(ended))
        for sender in self._senders:
            if sender.job == cancel.id:
                sender.stop(over=True)
        if away is not None:
            raise away
        if not told:
            self.mailer.flush()
        return ended

    def fixed(
        self, seen: JobRecord, fn: Callable[..., Any], kwargs: dict[str, Any] | None, where: Environment
    ) -> Packet:
        """Return what chunks of a job have in common when another function is called.

        Args:
            kwargs: its fixed keyword arguments; None for those of the job.

        Raises:
            TypeError: the function cannot be pickled.
            JobError: the arguments of the job cannot be read here; nothing of it is kept.
        """
        old = repair.recorded(self, seen)
        try:
            with needs.supplying(lambda job, index: needs.Later(self, job, index, job)):
                _, kept, *types = codec.loads_home(old.function)
        except Exception as exc:  # whatever the user's objects do when they are unpickled here
            if kwargs is None:
                raise JobError(
                    f"the fixed arguments of job {seen.name!r} cannot be read here, pass kwargs=: {exc}", job=seen.name
                ) from exc
            kept, types = {}, []
        function, needed = self._pickle_call(fn, kept if kwargs is None else kwargs, *types)
        return msgspec.structs.replace(
            old,
            function=function,
            function_id=codec.content_hash(function),
            function_name=function_name(fn),
            concurrent=_is_coroutine_function(fn),
            environment=where,
            needs=needed,
        )

    def extend(self, job: str, name: str, board: Board, items: list[Any]) -> None:
        """Start sending more items of a job.

        Raises:
            JobNotFoundError, JobError: it was cancelled, or not sent whole, or is not kept.
            BacklogError, WorkbenchError: a server cannot be reached.
        """
        for sender in self._senders:
            if sender.job == job and sender.bounded:
                sender.finished.wait(FLUSH)
        seen = repair.known(self, job, name)
        packet = repair.recorded(self, seen)
        self.inbox.sending(job)  # said before it is opened, lest it be taken for one whose client has died
        self.inbox.take_back(job)
        try:
            life = self._reopen_for(len(items), seen)
            while not life:  # it has ended meanwhile, or someone else was first
                seen = repair.known(self, job, name)
                life = self._reopen_for(len(items), seen)
            total = seen.total + len(items)
            self.mailer.send_safely(Reopen(job, life, 0, total, ended=seen.ended is not None))
            ends = patiently(lambda: self.store.ends(job), repair.ONCE_OPEN)
            self._start_sending(packet, items, board, total=total, first=seen.total, life=life, ends=ends)
        finally:
            self.inbox.sent(job)

    def _reopen_for(self, more: int, seen: JobRecord) -> int:
        if seen.cancel:
            raise JobError(f"job {seen.name!r} was ended before its time: map the items anew", job=seen.name)
        token = new_id()
        return patiently(lambda: self.store.reopen(seen, total=seen.total + more, token=token), PATIENCE)

    def _start_sending(
        self,
        packet: Packet,
        items: list[Any] | Iterator[Any],
        board: Board,
        *,
        total: int | None,
        chunksize: int | None = None,
        first: int = 0,
        life: int = 0,
        ends: dict[str, int] | None = None,
    ) -> None:
        sender = Sender(
            packet,
            items,
            total=total,
            chunksize=chunksize,
            mailer=self.mailer,
            inbox=self.inbox,
            store=self.store,
            board=board,
            slots=self.slots,
            first=first,
            life=life,
            ends=ends,
        )
        self._senders = [other for other in self._senders if not other.finished.is_set()]
        self._senders.append(sender)
        sender.start()

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
        unsent = sum(publisher.unsent() for publisher in list(self._publishers.values())) if ending else 0
        if unsent:
            log.warning(
                "queue %r is left, but Kafka at %s has not said that it has the last %d records: send again what lacks",
                *(self.queue, self.config.kafka, unsent),
            )

    def is_sending(self) -> bool:
        """Tell whether something that has an end is not sent yet, or not safe."""
        if os.getpid() != self._pid:
            return False
        sending = any(sender.bounded and not sender.finished.is_set() for sender in self._senders)
        return sending or not all(publisher.is_settled() for publisher in list(self._publishers.values()))

    def close(self) -> None:
        """Send what is being sent, and close."""
        pending.remove(self)
        self.finish_sending(_CLOSE, ending=True)
        taken = [publisher.close() for publisher in self._publishers.values()]
        for sender in self._senders if not all(taken) else ():
            sender.finished.wait(_TOLD)  # its job is not one that goes on
        self.inbox.close("the queue was closed (open one and use queue.job(...): the job goes on)")
        self.store.close()

    def leave(self) -> None:
        """Close without sending anything more: the servers are about to end, and the jobs with them."""
        pending.remove(self)
        for sender in self._senders:
            sender.stop(over=True)  # what is told of its job is told below
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


def _another_name(packet: Packet, times: int) -> str:
    """Return a name instead of one that was made up and is taken; after some words, one that nobody else has."""
    short = packet.function_name.rpartition(".")[2].strip("<>")
    return made_up(short, packet.job, times) if times < _WORDS_TRIED else f"{short}-{packet.job}"


def _is_coroutine_function(fn: Callable[..., Any]) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004  # an object whose __call__ is a coroutine function


def _parameters(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's positional parameters, as far as they can be told."""
    if type(fn) is types.FunctionType and not vars(fn):
        # Nothing says otherwise, and signature() takes its time.
        return fn.__code__.co_varnames[: fn.__code__.co_argcount]
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
