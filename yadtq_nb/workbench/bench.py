"""What a node does at the workbench: feed, take, finish, retry, release, beat, reap. One method for each Lua verb."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from yadtq_nb import codec
from yadtq_nb.config import Config
from yadtq_nb.errors import CodecError, Crash, FormatError, WorkbenchError
from yadtq_nb.model import ChunkHead, Environment, Lane, Lease, Retry, WorkerInfo, Written
from yadtq_nb.workbench.connection import ALWAYS_FITS, Connection

#: A chunk that cannot be read is left to lapse this often, in case another node knows more; then its tasks end.
_PATIENT: Final = 2

#: Blobs up to this size are told with the news, so that a client needs no second round trip; in bytes.
_INLINE: Final = 2048

#: Messages of what a job's tasks write that are kept for those who follow it, and for how many seconds.
_TOLD: Final = 100
TOLD_FOR: Final = 60

#: Seconds for which a topic may be deleted and made again.
_DELETING: Final = 30

log = logging.getLogger(__name__)

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.decode
_NOWHERE: Final = Environment()


class Batch(msgspec.Struct, frozen=True):
    """Chunks read from one partition, one after another."""

    partition: int
    topic_id: str
    #: Where the first was expected to lie.
    expected: int
    #: Where reading goes on; given, since offsets have gaps.
    next: int
    #: (offset, head, sealed record).
    chunks: list[tuple[int, ChunkHead, bytes]]


class Cursor(msgspec.Struct, frozen=True):
    """Where the queue is in one partition of one life of the topic."""

    topic_id: str
    offset: int

    @classmethod
    def parse(cls, text: bytes | str) -> Cursor | None:
        """Read Redis's form, "topic id:offset", or nothing."""
        if not text:
            return None
        topic_id, _, offset = (text.decode() if isinstance(text, bytes) else text).rpartition(":")
        return cls(topic_id, int(offset))

    def __str__(self) -> str:
        return f"{self.topic_id}:{self.offset}"


class Fed(msgspec.Struct, frozen=True):
    """What became of a batch: "fed", "full", "moved" (the cursor is elsewhere) or "no cursor"."""

    status: str
    cursor: Cursor | None


class Share(msgspec.Struct, frozen=True):
    """A partition that this node feeds from."""

    lane: Lane
    partition: int
    cursor: Cursor | None
    #: Before it everything is finished.
    low: Cursor | None


class Heard(msgspec.Struct, frozen=True):
    """The answer to a heartbeat."""

    #: Ids of chunks that were named but belong to this node no more.
    lost: list[str]
    shares: list[Share]
    #: Chunks that wait for a free slot anywhere.
    ready: int
    #: Id of a chunk -> offsets of its tasks that were cancelled.
    dropped: dict[str, list[int]] = {}
    #: Jobs of which somebody wants to see what their tasks write.
    followed: frozenset[str] = frozenset()


class NotLiveError(Exception):
    """This node's heartbeat has lapsed: it must beat before anything is leased to it."""


class Workbench:
    """One node's hands at the workbench of one queue; what it feeds, it feeds into one lane."""

    def __init__(self, config: Config, queue: str, node: str, lane: Lane = "normal") -> None:
        self._config = config
        self._node = node
        self._lane = lane
        self._redis = Connection(config, queue)

    def check_server(self) -> None:
        """Check that this server keeps what it is given.

        Raises:
            WorkbenchError: it may throw keys away when it is full, or cannot be reached.
        """
        with self._redis.use() as client:
            memory = client.info("memory")
        if memory.get("maxmemory") and memory.get("maxmemory_policy") != "noeviction":
            raise WorkbenchError(
                f"Redis would throw away work when it is full (maxmemory-policy {memory['maxmemory_policy']}): "
                "set maxmemory-policy noeviction"
            )

    def feed(self, batches: Sequence[Batch], free: int) -> tuple[list[Fed], list[Lease]]:
        """Put batches on the workbench, each only if its cursor is where the batch began.

        Args:
            batches: at most a few hundred chunks in all.
            free: slots of this node that may be leased chunks in the same step.

        Raises:
            NotLiveError: the node must beat first.
            WorkbenchError: Redis cannot be reached or is full.
        """
        groups = [
            [b.partition, b.topic_id, b.expected, b.next, [_feed_entry(offset, head) for offset, head, _ in b.chunks]]
            for b in batches
        ]
        records = [record for b in batches for _, _, record in b.chunks]
        c = self._config
        # Of nested jobs there are only as many as tasks that run and wait for them.
        limits = (None, None) if self._lane == "nested" else (c.watermark_chunks, c.watermark_bytes)
        status, replies, granted = self._redis.call(
            "feed",
            self._node,
            c.lease,
            free,
            *(-1 if limit is None else limit for limit in limits),
            int(c.keep),
            _pack(groups),
            self._lane,
            int(c.reading == "wake"),
            *records,
        )
        _check_live(status)
        by_id = {head.id: (head, record) for b in batches for _, head, record in b.chunks}
        leases = [Lease(by_id[i][0], int(t), by_id[i][1], _done(by_id[i][0].done)) for i, t in _texts(granted)]
        return [Fed(status.decode(), Cursor.parse(cursor)) for status, cursor in replies], leases

    def take(self, count: int, *, plain: int | None = None) -> tuple[list[Lease], float | None]:
        """Lease up to count ready chunks to this node.

        Args:
            plain: how many at most if others than those of nested jobs are among them; all by default.

        Returns:
            The leases, and the seconds until the next of the chunks that wait is due, or None when none waits.

        Raises:
            NotLiveError: the node must beat first.
            WorkbenchError: Redis cannot be reached.
        """
        status, taken, due = self._redis.call(
            "take", self._node, self._config.lease, count, count if plain is None else plain
        )
        _check_live(status)
        leases = []
        for entry in taken:
            try:
                leases.append(self._lease(*entry))
            except CodecError as exc:
                log.error("chunk %s cannot be read: %s", entry[0].decode(), exc)
                # Not named, its lease lapses; another node may know more.
                id, token, record, done, packed = entry
                if _unpack(packed)[1] >= _PATIENT:
                    lease = self._unreadable(id, token, record, done, str(exc))
                    leases += [lease] if lease is not None else []
        return leases, max(0.0, float(due)) if due else None

    def _lease(self, id: bytes, token: bytes, record: bytes, done: bytes, packed: bytes) -> Lease:
        head, *_ = codec.decode_chunk(self._config.key, record)
        if head.id != id.decode():
            raise FormatError(f"chunk {id.decode()} holds the record of chunk {head.id}")
        crashes, lapses, tries, notes, waiting, deaths = _unpack(packed)
        return Lease(
            head,
            int(token),
            record,
            _done(done),
            _by_offset(crashes),
            lapses,
            _by_offset(tries),
            {offset: tuple(texts) for offset, texts in _by_offset(notes).items()},
            frozenset(waiting),
            deaths={
                offset: msgspec.convert(crashes, tuple[Crash, ...]) for offset, crashes in _by_offset(deaths).items()
            },
        )

    def _unreadable(self, id: bytes, token: bytes, record: bytes, done: bytes, trouble: str) -> Lease | None:
        """Return the lease of a chunk of which only the workbench knows how many tasks it has."""
        chunk = self._open_chunk(id.decode())
        if chunk is None:
            return None
        head = ChunkHead(
            chunk["job"], chunk["number"], chunk["first"], chunk["count"], "", "", 0, "item", False, _NOWHERE
        )
        return Lease(head, int(token), record, _done(done), trouble=trouble)

    def place(self, chunk: str) -> tuple[str, int, int] | None:
        """Return where a chunk in hand lies in Kafka: topic id, partition, offset; None when it is closed by now.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        found = self._open_chunk(chunk)
        if found is None or not found["positions"]:
            return None
        topic_id, partition, offset = found["positions"][0]
        return str(topic_id), int(partition), int(offset)

    def _open_chunk(self, chunk: str) -> dict[str, Any] | None:
        """Return what common.lua keeps of a chunk in hand."""
        with self._redis.use() as client:
            packed = client.hget(self._redis.key("open"), chunk)
        return None if packed is None else _unpack(packed)

    def finish(self, lease: Lease, offsets: range | Sequence[int], states: bytes, frame: bytes) -> str:
        """Store outcomes of some tasks of a chunk.

        Returns:
            "current" (more to come), "closed" (every task has an outcome), or "lapsed" (the lease is another's).

        Raises:
            WorkbenchError: Redis cannot be reached; it may be sent again.
        """
        consecutive = isinstance(offsets, range)
        answer, _ = self._redis.call(
            "finish",
            self._node,
            lease.head.id,
            lease.token,
            int(self._config.keep),
            _INLINE,
            b"" if consecutive else _pack(list(offsets)),
            offsets[0],
            states,
            frame,
        )
        return str(answer.decode())

    def too_large(self, size: int) -> int | None:
        """Return how many bytes of outcomes can be stored at once, when that is less than size, else None."""
        if size <= ALWAYS_FITS or size <= (most := self._redis.largest()):
            return None
        return most

    def release(self, lease: Lease, *, crashed: tuple[int, Crash] | None = None) -> bool:
        """Give a chunk back to the front of the line; crashed is the offset of the task that killed its slot, and how.

        Raises:
            WorkbenchError: Redis cannot be reached; it may be sent again.
        """
        offset, crash = ("", None) if crashed is None else crashed
        return bool(self._redis.call("release", self._node, lease.head.id, lease.token, offset, _pack(crash)))

    def retry(self, lease: Lease, tries: Sequence[Retry]) -> bool:
        """Note which tasks are to be tried again, and when. False when the lease is another's by now.

        Raises:
            WorkbenchError: Redis cannot be reached; it may be sent again.
        """
        packed = [[try_.offset, try_.times, try_.delay, try_.note] for try_ in tries]
        return bool(self._redis.call("retry", self._node, lease.head.id, lease.token, _pack(packed)))

    def mark(self, lease: Lease, offset: int) -> bool:
        """Write down which task of a suspect chunk runs next. False when the lease is another's by now."""
        return bool(self._redis.call("mark", self._node, lease.head.id, lease.token, offset))

    def beat(
        self, info: WorkerInfo, lanes: Mapping[Lane, tuple[int, bool]], leases: Sequence[tuple[Lease, int]]
    ) -> Heard:
        """Tell that this node lives, and which leases it holds; only these are renewed.

        Args:
            info: what the node says of itself.
            lanes: those that it feeds, with the partitions that their topic has, and whether their feeder really
                reads; if not, its partitions go to others.
            leases: with the offset of the task that runs now, or -1.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        named = [[lease.head.id, str(lease.token), offset] for lease, offset in leases]
        lost, marks, ready, dropped, followed = self._redis.call(
            "beat",
            self._node,
            _pack(info),
            self._config.lease,
            _pack(lanes),
            _pack(named),
        )
        shares = [
            Share(lane.decode(), int(p), Cursor.parse(cursor), Cursor.parse(low)) for lane, p, cursor, low in marks
        ]
        cancelled = {id.decode(): list(map(int, offsets)) for id, offsets in dropped}
        followed = frozenset(job.decode() for job in followed)
        return Heard([id.decode() for id in lost], shares, int(ready), cancelled, followed)

    def reap(self, dead: str = "") -> list[tuple[str, str]]:
        """Return chunks of lapsed leases to the line: (chunk, node that had it). dead: a node known to be gone.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        config = self._config
        found = self._redis.call("reap", config.lease, dead, int(config.keep), config.doubt)
        return [(id, node) for id, node in _texts(found)]

    def init(self, partition: int, seen: Cursor | None, cursor: Cursor) -> Cursor | None:
        """Set a cursor if it still is the one that was seen.

        Returns:
            The one that holds now, or None when the workbench is empty: the jobs topic must be replayed first.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        return Cursor.parse(self._redis.call("init", partition, str(seen or ""), str(cursor), self._lane))

    def begin_restore(self) -> bool:
        """Note that this node begins to replay the jobs topic. True when that was done by now."""
        return bool(self._redis.call("restore", self._node, "begin"))

    def end_restore(self) -> bool:
        """Note that this node has replayed it. False when the workbench was emptied meanwhile: begin again.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        return bool(self._redis.call("restore", self._node, "end"))

    def cursor(self, partition: int) -> Cursor | None:
        """Return where the queue is in a partition, or None while that is not set."""
        with self._redis.use() as client:
            return Cursor.parse(client.hget(self._redis.lane_key("cursor", self._lane), partition) or b"")

    def open_chunks(self) -> int:
        """Return how many chunks are in hand: ready, leased or waiting for their next try."""
        with self._redis.use() as client:
            return int(client.hlen(self._redis.key("open")))

    def begin_deletion(self) -> bool:
        """Say that this node is about to delete its lane's topic. False when somebody reads that: it is to be left.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        with self._redis.use() as client:
            # Said before it is looked: whoever begins to read says so, and then looks for this.
            client.set(self._redis.lane_key("deleting", self._lane), self._node, ex=_DELETING)
            seconds, _ = client.time()
            if not client.zcount(self._redis.lane_key("reading", self._lane), seconds, "+inf"):
                return True
        self.end_deletion()
        return False

    def end_deletion(self) -> None:
        """Say that the topic is there again. Also said by time, should this node die.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        with self._redis.use() as client:
            client.delete(self._redis.lane_key("deleting", self._lane))

    def run_id(self) -> str:
        """Name of the server's present life."""
        return self._redis.run_id()

    def wait_for_bell(self, position: str, timeout: float) -> tuple[str, frozenset[str]]:
        """Block until the bell rings after position, or timeout seconds.

        Returns:
            The new position, and why it rang: "tasks" to be fed; "ready" to be taken; "cancel" when a beat tells what
            is to be stopped; "lane" when another lane has come into use; "follow" when a beat tells which jobs are.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        with self._redis.use() as client:
            rung = client.xread({self._redis.key("bell"): position}, block=max(1, int(timeout * 1000)))
        if not rung:
            return position, frozenset()
        entries = rung[0][1]
        return str(entries[-1][0].decode()), frozenset(fields[b"k"].decode() for _, fields in entries)

    def tell(self, written: Sequence[Written]) -> None:
        """Send what tasks have written to those who follow their jobs.

        Raises:
            WorkbenchError: Redis cannot be reached or is full.
        """
        by_job: dict[str, list[Written]] = {}
        for one in written:
            by_job.setdefault(one.job, []).append(one)
        with self._redis.use() as client:
            pipe = client.pipeline(transaction=False)
            for job, found in by_job.items():
                stream = self._redis.key("job", job, "written")
                # Numbered one by one, so that whoever reads too slowly sees that something is missing.
                pipe.xadd(stream, {"b": codec.seal(self._config.key, codec.WRITTEN, _pack(found))}, "0-*", maxlen=_TOLD)
                pipe.expire(stream, TOLD_FOR)
            pipe.execute()

    def blob(self, name: str) -> bytes | None:
        """Fetch a function or source tree by its content hash, or arguments by reference."""
        with self._redis.use() as client:
            data: bytes | None = client.get(self._redis.key("blob", name))
            return data

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()


def _done(flags: bytes) -> frozenset[int]:
    return frozenset(i for i, flag in enumerate(flags) if flag == ord("1"))


def _feed_entry(offset: int, head: ChunkHead) -> list[Any]:
    weight = head.count if head.concurrent else 1
    return [
        head.job,
        head.number,
        head.first,
        head.count,
        weight,
        offset,
        head.job_name,
        head.function_name,
        head.total,
        head.created,
        head.style,
        head.policy.start_after,
        head.needs,
        head.done.decode(),
    ]


def _by_offset(table: Any) -> dict[int, Any]:
    # An empty table of Lua is packed as a list, and its keys are strings.
    return {int(offset): value for offset, value in table.items()} if table else {}


def _check_live(status: bytes) -> None:
    if status != b"ok":
        raise NotLiveError


def _texts(rows: list[list[bytes]]) -> list[list[str]]:
    return [[cell.decode() for cell in row] for row in rows]
