"""Repair: tasks of a job that was sent are sent again, from the records that are kept of it, and more are added.

outcomes ─▶ which tasks ─▶ which records hold them ─▶ another life of the job ─▶ these records, for these tasks ─▶ seal
"""

from __future__ import annotations

import contextlib
import functools
from array import array
from collections.abc import Generator, Iterable, Iterator
from typing import Final, Protocol, TypeAlias

import msgspec

from yadtq_nb import codec
from yadtq_nb.backlog.publish import Publisher, Receipts
from yadtq_nb.backlog.reader import replay_tasks
from yadtq_nb.client.board import Outcomes
from yadtq_nb.client.inbox import PATIENCE, Inbox, is_incomplete
from yadtq_nb.client.sender import Mailer, Packet
from yadtq_nb.config import Config
from yadtq_nb.errors import CodecError, JobError, JobNotFoundError, WorkbenchError
from yadtq_nb.model import LIFE, ChunkHead, Lane, Reopen, Seal, new_id
from yadtq_nb.workbench.connection import patiently
from yadtq_nb.workbench.jobs import JobRecord, JobStore

#: Seconds for which Redis is waited for once a job is open again: given up then, the job would be incomplete.
ONCE_OPEN: Final = 60.0
#: Times to look again when the job has changed while it was looked at.
_LOOKS: Final = 5


class Link(Protocol):
    """What is needed of a queue's client."""

    queue: str
    key: bytes
    config: Config
    inbox: Inbox
    mailer: Mailer

    @property
    def store(self) -> JobStore: ...
    def publisher(self, lane: Lane = "normal") -> Publisher: ...


class Again(msgspec.Struct):
    """What is to be sent again of a job."""

    #: Indices of the tasks.
    wanted: list[int]
    #: Outcomes that count no more then: their field, its mask from then on, and how many these are.
    void: list[tuple[str, bytes, int]]


def known(link: Link, job: str, name: str) -> JobRecord:
    """Return a job that was sent whole.

    Raises:
        JobNotFoundError: it has expired, or was deleted.
        JobError: it was not sent whole.
    """
    found = patiently(lambda: link.store.record(job), PATIENCE)
    if found is None:
        raise JobNotFoundError(f"queue {link.queue!r} keeps nothing of job {name!r} any more: map anew", job=name)
    if found.ended is None and not found.sealed:
        if is_incomplete(found):
            raise JobError(f"job {name!r} is incomplete: job.cancel() ends it, then it can be repaired", job=name)
        raise JobError(f"job {name!r} is still being sent: try again when it is", job=name)
    return found


def retry(link: Link, job: str, name: str, fixed: Packet | None) -> int:
    """Send again what has failed; of a job that has ended also what was cancelled or lost. Returns how many tasks.

    Args:
        fixed: holds another function for them; its job and items are of no account.

    Raises:
        JobNotFoundError, JobError: see known.
        BacklogError, WorkbenchError: a server cannot be reached.
    """
    for _ in range(_LOOKS):
        seen = known(link, job, name)
        with _log_kept(link, seen.lane) if seen.cancel else contextlib.nullcontext():
            sent = _try_again(link, seen, fixed)
        if sent is not None:
            return sent
    raise JobError(f"job {name!r} changes while it is looked at: try again", job=name)


def _try_again(link: Link, seen: JobRecord, fixed: Packet | None) -> int | None:
    """Open a job again, and send; None when it is no more as it was seen."""
    again = _unsuccessful(link, seen)
    if not again.wanted:
        return 0
    ended = seen.ended is not None
    places = _places(link, seen, again.wanted)
    life = 0
    link.inbox.sending(seen.id)
    link.inbox.take_back(seen.id)
    reopen = functools.partial(
        link.store.reopen,
        seen,
        total=seen.total,
        function=fixed.function_name if fixed is not None else "",
        void=again.void,
        replaced=() if ended else again.wanted,
        whole=ended,
        token=new_id(),
    )
    try:
        life = patiently(reopen, PATIENCE)
        if not life:
            return None
        replaced = b"" if ended else array("I", again.wanted).tobytes()
        # Before its chunks: a workbench that is emptied must not run what they replace.
        link.mailer.send_safely(Reopen(seen.id, life, life if ended else 0, seen.total, replaced, ended))
        return _send(link, seen, life, places, fixed)
    finally:
        link.inbox.sent(seen.id)
        if life:  # else another client may be sending
            with contextlib.suppress(WorkbenchError):  # the queue will see by itself
                link.store.stop_sending(seen.id)


def _unsuccessful(link: Link, seen: JobRecord) -> Again:
    """Look through all outcomes. Their values are not unpickled."""
    good, failed = bytearray(max(0, seen.total)), list[int]()
    void = []
    for stored in link.store.outcomes(seen.id, link.store.fields(seen.id)):
        try:
            outcomes = Outcomes(link.key, seen.id, stored)
        except CodecError:
            continue  # as if it were not there: these tasks are lost
        counted = set(outcomes.indices())
        mask = outcomes.keep_successes()
        for index in outcomes.indices():
            good[index] = 1
        if mask:
            bad = counted.difference(outcomes.indices())
            failed += bad
            void.append((stored.field, mask, len(bad)))
    if seen.ended is None:
        return Again(sorted(failed), void)
    return Again([index for index, done in enumerate(good) if not done], void)


#: Number, first index and count of a chunk.
_Span: TypeAlias = tuple[int, int, int]


class _Places(msgspec.Struct):
    """Which chunk's record holds which of the tasks that are sent again: number -> its tasks, as in ChunkHead.done."""

    kept: dict[int, bytes]
    #: Of those that Redis has not got: they lie in Kafka's log only.
    logged: dict[int, bytes]


def _places(link: Link, seen: JobRecord, wanted: list[int]) -> _Places:
    """Find the newest record of each task. What has none stays lost."""
    places, whole = _placed(seen, wanted, link.store.spans(seen.id), [])
    if whole or not seen.cancel:
        return places
    # Not all that was sent has been fed. What is fed while the log is read lies in Redis then.
    logged = [(head.number, head.first, head.count) for head, _ in _logged(link, seen)]
    return _placed(seen, wanted, link.store.spans(seen.id), logged)[0]


def _placed(seen: JobRecord, wanted: list[int], fed: Iterable[_Span], logged: Iterable[_Span]) -> tuple[_Places, bool]:
    """Return which records hold the tasks, and whether there is one of each."""
    spans = {number: (first, count, False) for number, first, count in logged}
    spans.update((number, (first, count, True)) for number, first, count in fed)
    missing = bytearray(seen.total)
    for index in wanted:
        missing[index] = 1
    places = _Places({}, {})
    for number in sorted(spans, reverse=True):
        first, count, kept = spans[number]
        part = missing[first : first + count]
        if any(part) and len(part) == count:
            missing[first : first + count] = bytes(count)
            (places.kept if kept else places.logged)[number] = bytes(ord("0") if want else ord("1") for want in part)
    return places, not any(missing)


def _log_kept(link: Link, lane: Lane) -> contextlib.AbstractContextManager[None]:
    return link.store.reading_log(lane) if link.config.reading == "wake" else contextlib.nullcontext()


def _logged(link: Link, seen: JobRecord) -> Generator[tuple[ChunkHead, bytes], None, None]:
    for record in replay_tasks(link.config, link.queue, seen.lane):
        head = _head(link, seen, record)
        if head is not None:
            yield head, record


def _head(link: Link, seen: JobRecord, record: bytes) -> ChunkHead | None:
    try:
        head, *_ = codec.decode_chunk(link.key, record)
    except CodecError:
        return None
    return head if head.job == seen.id else None


def _send(link: Link, seen: JobRecord, life: int, places: _Places, fixed: Packet | None) -> int:
    publisher = link.publisher(seen.lane)
    receipts = Receipts()
    if fixed is not None and fixed.by_blob:
        link.mailer.keep_blob(codec.FUNCTION, fixed.function_id, fixed.function)
    number, sent = life * LIFE, 0
    for record, done in _records(link, seen, places):
        head, function, arguments = codec.decode_chunk(link.key, record)
        if head.by_reference:
            copy = functools.partial(link.store.copy_arguments, seen.id, head.number, number)
            if not patiently(copy, ONCE_OPEN):
                continue  # they stay lost
        head = msgspec.structs.replace(head, number=number, total=-1, done=done if b"1" in done else b"")
        if fixed is not None:
            head, function = _with(head, fixed), memoryview(b"" if fixed.by_blob else fixed.function)
        publisher.send_chunk(codec.encode_chunk(link.key, head, function, [arguments]), receipts, job=seen.id)
        link.mailer.ring()
        number, sent = number + 1, sent + done.count(b"0")
    link.mailer.settle(seen.lane, receipts)
    ends = patiently(lambda: link.store.ends(seen.id), ONCE_OPEN)
    link.mailer.seal(Seal(seen.id, seen.total, ends | receipts.ends, life), ONCE_OPEN)
    return sent


def _records(link: Link, seen: JobRecord, places: _Places) -> Iterator[tuple[bytes, bytes]]:
    for record in link.store.inputs(seen.id, places.kept, patience=ONCE_OPEN):
        head = _head(link, seen, record)
        if head is not None:
            yield record, places.kept[head.number]
    if places.logged:
        for head, record in _logged(link, seen):
            done = places.logged.pop(head.number, None)
            if done is not None:
                yield record, done


def _with(head: ChunkHead, fixed: Packet) -> ChunkHead:
    """Return the head of a chunk that is run with another function. What its items need is not told apart: it stays."""
    return msgspec.structs.replace(
        head,
        function=fixed.function_id,
        function_name=fixed.function_name,
        function_size=0 if fixed.by_blob else len(fixed.function),
        concurrent=fixed.concurrent,
        environment=fixed.environment,
        needs=tuple(dict.fromkeys(head.needs + fixed.needs)),
    )


def _newest(link: Link, seen: JobRecord) -> bytes | None:
    spans = link.store.spans(seen.id)
    return next(link.store.inputs(seen.id, [max(spans)[0]]), None) if spans else None


def recorded(link: Link, seen: JobRecord) -> Packet:
    """Return what the chunks of a job have in common, from the newest record of it.

    Raises:
        JobError: no record of it is kept.
    """
    record = _newest(link, seen)
    if record is None and seen.total > 0:  # nothing has been fed yet
        with _log_kept(link, seen.lane), contextlib.closing(_logged(link, seen)) as logged:
            record = next((record for _, record in logged), None) or _newest(link, seen)
    if record is None:
        raise JobError(f"no input of job {seen.name!r} is kept, and so no function: map anew", job=seen.name)
    head, function, _ = codec.decode_chunk(link.key, record)
    data = bytes(function)
    if not head.function_size:
        sealed = link.store.blob(head.function)
        if sealed is None:
            raise JobError(f"the function of job {seen.name!r} is kept no more: map anew", job=seen.name)
        data = bytes(codec.unseal(link.key, codec.FUNCTION, sealed))
    return Packet(
        job=seen.id,
        name=seen.name,
        named=True,
        function=data,
        function_id=head.function,
        function_name=head.function_name,
        style=head.style,
        concurrent=head.concurrent,
        environment=head.environment,
        created=seen.created,
        parameters=seen.parameters,
        policy=msgspec.structs.replace(head.policy, start_after=0.0),
        lane=seen.lane,
        depth=head.depth,
    )
