"""What a client does at the workbench: make jobs, read their progress and outcomes, hear the news."""

from __future__ import annotations

import bisect
import contextlib
import functools
import struct
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal

import msgspec

from yadtq_nb import codec
from yadtq_nb.config import Config
from yadtq_nb.errors import JobNotFoundError, SignatureError, TooLargeError, WorkbenchError
from yadtq_nb.model import CallStyle, Cancel, Lane, Manifest, Reopen, Seal, WorkerInfo, WorkerView, Written, new_id
from yadtq_nb.workbench.bench import TOLD_FOR, Cursor
from yadtq_nb.workbench.connection import ALWAYS_FITS, Connection, patiently

#: Number, first index and count of a chunk, as feed notes them.
_SPAN: Final = struct.Struct("<III")
#: Fields or keys fetched in one round trip.
_PAGE: Final = 100
#: Bytes at the start of a sealed blob that hold its signature.
_SIGNED: Final = 64
#: Outcomes that are larger are not fetched for the sake of the errors in them, and how much is at once, in bytes.
_LARGE: Final = 1024 * 1024
_AT_ONCE: Final = 4 * 1024 * 1024
#: Seconds after which a sender that has said nothing counts as gone.
SENDER_LEASE: Final = 10.0
#: Seconds after which somebody who follows a job, and has not said so again, does no more.
_FOLLOWED: Final = 10.0
#: Seconds between looks whether a topic is there again.
_PAUSE: Final = 0.05
_SAY_SENDING: Final = "#!lua flags=allow-oom\nreturn redis.call('SET', KEYS[1], 1, 'PX', ARGV[1])"

_pack = msgspec.msgpack.Encoder().encode
_decode_info = msgspec.msgpack.Decoder(WorkerInfo).decode
_decode_written = msgspec.msgpack.Decoder(list[Written]).decode


class JobRecord(msgspec.Struct, frozen=True):
    """A job as the workbench knows it. Counts are of tasks, times in seconds since the epoch."""

    id: str
    name: str
    function_name: str
    created: float
    #: -1 while it is not known.
    total: int
    style: CallStyle
    #: True once every item was sent.
    sealed: bool
    #: True while the client that sends it says so.
    sending: bool
    #: Tasks that have reached the workbench, or were cancelled before that; those sent again count from then on.
    fed: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    #: Outcomes that came after another of the same task, and were dropped.
    late: int
    #: Bytes of inputs, results and large arguments kept.
    bytes: int
    #: When the last outcome came, or None.
    ended: float | None
    #: The workbench's clock when this was read.
    now: float
    #: Seconds until it is forgotten.
    expires: float
    #: Names of the function's parameters.
    parameters: tuple[str, ...] = ()
    #: Why it was ended before its time ("cancelled", "deadline", "lost", "deleted"), or "".
    cancel: str = ""
    #: Tasks whose outcome, or whose record, was lost with a server's data.
    lost: int = 0
    lane: Lane = "normal"
    #: How often it was opened again.
    life: int = 0
    #: Its end as the workbench writes it, or "".
    ended_text: str = ""

    @property
    def done(self) -> int:
        """Tasks with an outcome."""
        return self.succeeded + self.failed + self.cancelled


class JobFacts(msgspec.Struct, frozen=True):
    """What those that need a job's values must know of it."""

    name: str
    #: -1 while it was not sent whole.
    total: int
    #: Why it was ended before its time, or "".
    cancel: str
    #: Tasks that were cancelled.
    cancelled: int
    #: Tasks that have failed.
    failed: int = 0
    #: Whether it was opened again: then a task may be in several chunks.
    reopened: bool = False


class News(msgspec.Struct, frozen=True):
    """One entry of the results stream."""

    job: str
    #: Name of the outcomes that came, or "" when only the end is told.
    field: str
    #: How many tasks got their outcome.
    count: int
    #: The outcomes themselves when they are small, else None: fetch them.
    frame: bytes | None
    #: True when the job ended with it.
    ended: bool
    #: Why it was ended before its time, or "".
    cancel: str = ""
    #: Indices of tasks that were cancelled one by one.
    dropped: tuple[int, ...] = ()
    #: Number of the job's life when it was opened again: what has failed may count no more, or there are more tasks.
    reopened: int = 0


class Stored(msgspec.Struct, frozen=True):
    """Outcomes of some tasks of one chunk, as they lie in the workbench."""

    field: str
    frame: bytes
    #: One '0' or '1' a task when only some of them counted, else empty.
    mask: bytes


class JobStore:
    """A client's hands at the workbench of one queue."""

    def __init__(self, config: Config, queue: str) -> None:
        self._config = config
        self._redis = Connection(config, queue)
        self._seq = 0

    def check_secret(self) -> None:
        """Compare our secret with the queue's, which its first client or worker has set.

        With another one we would pass by whatever others have sent, and they whatever we send.

        Raises:
            SignatureError: they differ.
            WorkbenchError: Redis cannot be reached.
        """
        ours, name = codec.fingerprint(self._config.key), self._redis.key("secret")
        live = {view.info.secret for view in self.workers() if view.status == "live"} - {""}
        if live and ours not in live:
            raise SignatureError(
                "this queue's workers use another secret: set the same YADTQ_SECRET (or secret=) here and there"
            )
        with self._redis.use() as client:
            # A full Redis takes nothing that might be new, and what it holds must be there to be read, and deleted.
            if not client.exists(name):
                client.set(name, ours, nx=True)
            # As long as it is used: what lies in the queue is signed with it.
            held, _ = client.pipeline(transaction=False).get(name).expire(name, int(self._config.keep * 4)).execute()
        if held is not None and held.decode() != ours:
            raise SignatureError(
                "what lies in this queue was signed with another secret: set the same YADTQ_SECRET (or secret=) as its "
                f"other clients and workers, or use another queue; to give the old secret up, delete {name} in Redis"
            )

    def create(self, manifest: Manifest) -> str:
        """Claim the job's name; returns the id of the job that holds it.

        Raises:
            WorkbenchError: Redis cannot be reached or is full.
        """
        m = manifest
        return str(
            self._redis.call(
                "create",
                m.id,
                m.name,
                m.function_name,
                m.created,
                m.total,
                m.style,
                m.client,
                int(self._config.keep),
                ",".join(m.parameters),
                m.deadline,
                m.lane,
                m.sameness,
            ).decode()
        )

    def withdraw(self, job: str) -> bool:
        """Forget a job of which nothing was sent, and give its name back."""
        return bool(self._redis.call("withdraw", job))

    def seal(self, seal: Seal) -> None:
        """Say how many tasks there are, once all are sent."""
        self._redis.call("seal", seal.id, seal.total, _pack(seal.ends), int(self._config.keep), seal.life)

    def cancel(self, cancel: Cancel) -> int:
        """End a job now; returns how many of its tasks had no outcome. May be sent twice.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        return self.cancel_life(cancel)[0]

    def cancel_life(self, cancel: Cancel, life: int | None = None) -> tuple[int, int]:
        """End a job now, unless it was opened again after that life. May be sent twice.

        Returns:
            How many of its tasks had no outcome, and its present life.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        meant = "" if life is None else life
        count, present = self._redis.call("cancel", cancel.id, cancel.reason, int(self._config.keep), meant)
        return int(count), int(present)

    def end_late(self) -> None:
        """End jobs whose deadline has passed. May be sent twice.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        self._redis.call("late", int(self._config.keep))

    def delete(self, job: str) -> bool:
        """Forget a job and all that is kept of it. May be sent twice; False when it was deleted before.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        return bool(self._redis.call("delete", job, int(self._config.keep)))

    def keep(self, job: str, seconds: float) -> bool:
        """Have a job expire so many seconds after its end, or from now if it has ended. False when it is gone.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        return bool(self._redis.call("keep", job, max(1, round(seconds))))

    def sameness(self, job: str) -> bytes:
        """Return what a job is compared by, packed; empty when it has nothing of that kind."""
        with self._redis.use() as client:
            return client.get(self._key(job, "sameness")) or b""

    def reopen(
        self,
        seen: JobRecord,
        *,
        total: int,
        function: str = "",
        void: Sequence[tuple[str, bytes, int]] = (),
        replaced: Sequence[int] = (),
        whole: bool = False,
        token: str = "",
    ) -> int:
        """Have a job that was sent whole begin another life, if it is as it was seen.

        Args:
            seen: the job as it was when the rest was found out.
            token: of this call alone: sent again with the same, since the answer was lost, it gives the same answer.
            total: how many tasks it has from now on.
            function: name of the function of those that are sent now; "" for the old one.
            void: outcomes that count no more: their field, its mask from now on, and how many these are.
            replaced: indices of the tasks that are sent again, where the job has not ended.
            whole: everything without success is sent again, of a job that has ended.

        Returns:
            The number of the life, or 0: it is not as it was seen.
        """
        masks = _pack([[field, mask.decode(), count] for field, mask, count in void])  # Lua knows no bytes
        keep = int(self._config.keep)
        told = (seen.life, seen.ended_text, total, function, masks, _pack(list(replaced)), int(whole), token)
        return int(self._redis.call("reopen", seen.id, keep, *told))

    def restore_reopened(self, entry: Reopen) -> None:
        """Have a workbench that was emptied know of a job's last life."""
        replaced = _pack(list(array("I", entry.replaced)))
        self._redis.call("reopened", entry.id, int(self._config.keep), entry.life, entry.floor, entry.total, replaced)

    def ends(self, job: str) -> dict[str, int]:
        """Return where the last chunks of a job lie in Kafka, as its seal has said."""
        with self._redis.use() as client:
            packed = client.hget(self._key(job), "ends")
        return dict(msgspec.msgpack.decode(packed)) if packed else {}

    def copy_arguments(self, job: str, number: int, other: int) -> bool:
        """Keep the large arguments of a chunk for another, too. False when they are gone."""
        source, target = (self._redis.key("blob", f"{job}-{n}") for n in (number, other))
        blobs = self._key(job, "blobs")
        with self._redis.use() as client:
            size = client.strlen(source)
            client.hset(blobs, str(other), size)
            return bool(size and client.copy(source, target, replace=True))

    def run_id(self) -> str:
        """Name of the server's present life."""
        return self._redis.run_id()

    def drop(self, job: str, indices: Sequence[int]) -> list[int]:
        """Cancel single tasks; returns the indices of those that had no outcome and have this one now.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        while True:
            fed = self._fed(job)
            places = self._places(job, indices)
            tasks = [[*places.get(index, (-1, 0)), index] for index in indices]
            status, dropped = self._redis.call("drop", job, int(self._config.keep), fed, _pack(tasks))
            if status == b"ok":
                return list(map(int, dropped))

    def _fed(self, job: str) -> bytes:
        with self._redis.use() as client:
            return client.hget(self._key(job), "fed") or b"0"

    def _places(self, job: str, indices: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Return the chunk's number and the offset in it of tasks that have reached the workbench."""
        with self._redis.use() as client:
            packed = client.get(self._key(job, "spans")) or b""
        if not packed:
            return {}
        wanted, places = sorted(set(indices)), {}
        for number, first, count in _SPAN.iter_unpack(packed):
            for at in range(bisect.bisect_left(wanted, first), bisect.bisect_left(wanted, first + count)):
                places[wanted[at]] = (number, wanted[at] - first)
        return places

    def dropped(self, job: str) -> list[int]:
        """Return the indices of tasks that were cancelled one by one."""
        with self._redis.use() as client:
            return sorted(map(int, client.smembers(self._key(job, "dropped"))))

    def say_sending(self, *jobs: str) -> None:
        """Tell that this client still sends items of these jobs, or would again; holds for SENDER_LEASE seconds."""
        with self._redis.use() as client, client.pipeline(transaction=False) as pipe:
            for job in jobs:
                # Also when Redis is full: a client that sends must not be taken for one that has died.
                pipe.eval(_SAY_SENDING, 1, self._key(job, "sending"), int(SENDER_LEASE * 1000))
            pipe.execute()

    def stop_sending(self, job: str) -> None:
        """Tell that this client sends no more of the job."""
        with self._redis.use() as client:
            client.delete(self._key(job, "sending"))

    def put_arguments(self, job: str, number: int, data: bytes) -> None:
        """Keep arguments that are too large for their chunk, for as long as their job is kept.

        Raises:
            TooLargeError, WorkbenchError: see put_blob.
        """
        keep = int(self._config.keep * 4)
        with self._redis.use() as client:
            # Noted first: whatever is noted goes with its job.
            blobs = self._key(job, "blobs")
            client.pipeline(transaction=False).hset(blobs, str(number), len(data)).expire(blobs, keep).execute()
        self.put_blob(f"{job}-{number}", data)

    def put_blob(self, name: str, data: bytes) -> bool:
        """Keep a function or a source tree under a name. True when it was not there yet.

        Raises:
            TooLargeError: Redis does not take so much.
            WorkbenchError: Redis cannot be reached or is full.
        """
        if len(data) > ALWAYS_FITS and len(data) > (most := self._redis.largest()):
            raise TooLargeError(
                f"an argument, function or source tree of {len(data):,} bytes is more than the {most:,} bytes that "
                "Redis takes at once (proto-max-bulk-len): split it, or put the data where workers can reach it and "
                "pass its name"
            )
        key = self._redis.key("blob", name)
        with self._redis.use() as client:
            keep = int(self._config.keep * 4)
            start, _ = client.pipeline(transaction=False).getrange(key, 0, _SIGNED - 1).expire(key, keep).execute()
            # What another secret has signed, perhaps the one of last year, is no use under the same name.
            if start == data[:_SIGNED]:
                return False
            client.set(key, data, ex=keep)
            return True

    def blob(self, name: str) -> bytes | None:
        """Fetch what put_blob kept."""
        with self._redis.use() as client:
            data: bytes | None = client.get(self._redis.key("blob", name))
            return data

    def fed(self, lane: Lane = "normal") -> tuple[str, dict[int, Cursor]]:
        """Return the name of the server's present life, and how far each partition of a lane has been fed in it."""
        with self._redis.use() as client:
            # In one: a restart in between would tell what one life knows as another's.
            pipe = client.pipeline().info("server").hgetall(self._redis.lane_key("cursor", lane))
            server, found = pipe.execute()
        parsed = {int(partition): Cursor.parse(cursor) for partition, cursor in found.items()}
        return str(server["run_id"]), {p: cursor for p, cursor in parsed.items() if cursor is not None}

    @contextlib.contextmanager
    def reading_log(self, lane: Lane, seconds: int = 300) -> Iterator[None]:
        """Keep nodes from deleting a lane's topic while the block reads it, for so many seconds at most.

        On a broker in memory they do that when all was read. librdkafka 2.16 crashes in who reads it just then.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        readers, me, until = self._redis.lane_key("reading", lane), new_id(), self.now() + seconds
        with self._redis.use() as client:
            client.zadd(readers, {me: until})
            client.expire(readers, seconds)
        try:
            while self._is_being_deleted(lane):
                time.sleep(_PAUSE)
            yield
        finally:
            with contextlib.suppress(WorkbenchError), self._redis.use() as client:  # else it is over by time
                client.zrem(readers, me)

    def _is_being_deleted(self, lane: Lane) -> bool:
        with self._redis.use() as client:
            return bool(client.exists(self._redis.lane_key("deleting", lane)))

    def now(self) -> float:
        """Return the workbench's clock, in seconds since the epoch."""
        with self._redis.use() as client:
            seconds, micros = client.time()
        return float(seconds + micros / 1e6)

    def ring(self, why: Literal["tasks", "lane", "follow"] = "tasks") -> None:
        """Wake feeders that do not wait at Kafka, or have nodes look for what else there is that is new."""
        with self._redis.use() as client:
            client.xadd(self._redis.key("bell"), {"k": why}, maxlen=64, approximate=True)

    def find(self, name_or_id: str) -> str | None:
        """Return the id of a job, by its name or its id, or None."""
        with self._redis.use() as client:
            named, exists = (
                client.pipeline(transaction=False)
                .get(self._redis.key("name", name_or_id))
                .exists(self._key(name_or_id))
                .execute()
            )
            if named is not None and client.exists(self._key(named.decode())):
                return str(named.decode())
        return name_or_id if exists else None

    def record(self, job: str) -> JobRecord | None:
        """Return one job, or None when the queue does not know it (yet, or any more).

        Raises:
            JobNotFoundError: it was deleted.
        """
        found = next(iter(self.records([job])), None)
        if found is not None and found.cancel == "deleted":
            raise deleted(job)
        return found

    def recent(self, seconds: float, limit: int) -> tuple[list[JobRecord], int]:
        """Return the newest of the jobs that were made within so many seconds, and how many there are of these."""
        with self._redis.use() as client:
            now, _ = client.time()
            pipe = client.pipeline(transaction=False)
            pipe.zrevrangebyscore(self._redis.key("jobs"), "+inf", now - seconds, start=0, num=limit)
            pipe.zcount(self._redis.key("jobs"), now - seconds, "+inf")
            ids, count = pipe.execute()
        return self.records(_decoded(ids)), int(count)

    def records(self, jobs: Iterable[str] | None = None) -> list[JobRecord]:
        """Return jobs, by default all, newest first."""
        with self._redis.use() as client:
            ids = list(jobs) if jobs is not None else _decoded(client.zrevrange(self._redis.key("jobs"), 0, -1))
            pipe = client.pipeline(transaction=False)
            pipe.time()
            for job in ids:
                pipe.hgetall(self._key(job)).exists(self._key(job, "sending")).ttl(self._key(job))
                pipe.hvals(self._key(job, "blobs"))
            (seconds, micros), *cells = pipe.execute()
            now = seconds + micros / 1e6
            found = []
            for n, job in enumerate(ids):
                fields, sending, ttl, blobs = cells[4 * n : 4 * n + 4]
                if fields:
                    found.append(_record(fields, bool(sending), now, ttl, sum(map(int, blobs))))
                elif jobs is None:
                    client.zrem(self._redis.key("jobs"), job)
            return found

    def outcomes(self, job: str, fields: Iterable[str]) -> Iterator[Stored]:
        """Yield outcomes by the names that the news gave; what has expired is left out."""
        wanted = list(fields)
        for start in range(0, len(wanted), _PAGE):
            page = wanted[start : start + _PAGE]
            with self._redis.use() as client:
                cells = client.hmget(self._key(job, "out"), [*page, *(f"{field}m" for field in page)])
            for field, frame, mask in zip(page, cells, cells[len(page) :], strict=False):
                if frame is not None:
                    yield Stored(field, frame, mask or b"")

    def first_failures(self, job: str, place: int, count: int) -> tuple[int, list[Stored]]:
        """Return some of the outcomes in which the first failures are: so many from that place on.

        Returns:
            How many were looked at, and those of them that are there. Of large ones, which hold large results beside
            their errors, fewer are looked at, or they are left out.
        """
        with self._redis.use() as client:
            fields = _decoded(client.lrange(self._key(job, "failed"), place, place + count - 1))
            pipe = client.pipeline(transaction=False)
            for field in fields:
                pipe.hstrlen(self._key(job, "out"), field)
            sizes = pipe.execute()
        looked, total, small = 0, 0, []
        for field, size in zip(fields, sizes, strict=True):
            total += size if size <= _LARGE else 0
            if total > _AT_ONCE:
                break
            looked += 1
            if size <= _LARGE:
                small.append(field)
        return looked, list(self.outcomes(job, small))

    def fields(self, job: str) -> list[str]:
        """Return the names of all outcomes that are there."""
        with self._redis.use() as client:
            return [name for name in _decoded(client.hkeys(self._key(job, "out"))) if not name.endswith("m")]

    def spans(self, job: str) -> list[tuple[int, int, int]]:
        """Return number, first index and count of the chunks that have reached the workbench."""
        with self._redis.use() as client:
            packed = client.get(self._key(job, "spans")) or b""
        return list(_SPAN.iter_unpack(packed))

    def outcomes_of(self, job: str, numbers: Sequence[int]) -> tuple[JobFacts | None, list[Stored]]:
        """Return what is known of a job, or None, and the outcomes of some of its chunks, at one moment."""
        # Two parts of each: most chunks have one, and so it is known at once that there is no more.
        fields = [f"{number}.{part}" for number in numbers for part in range(2)]
        masks = [f"{field}m" for field in fields]
        with self._redis.use() as client:
            pipe = client.pipeline(transaction=False)
            pipe.hmget(
                self._key(job), "name", "total", "sealed", "ended", "cancel", "cancelled", "id", "failed", "life"
            )
            if fields:
                pipe.hmget(self._key(job, "out"), [*fields, *masks])
            facts, *cells = pipe.execute()
        frames = cells[0] if cells else []
        found = [
            Stored(field, frame, mask or b"")
            for field, frame, mask in zip(fields, frames, frames[len(fields) :], strict=False)
            if frame is not None
        ]
        left, part = [s.field.removesuffix(".1") for s in found if s.field.endswith(".1")], 2
        while left:
            more = list(self.outcomes(job, [f"{number}.{part}" for number in left]))
            found += more
            left, part = [stored.field.partition(".")[0] for stored in more], part + 1
        return _facts(facts), found

    def inputs(self, job: str, numbers: Iterable[int] | None = None, *, patience: float = 0.0) -> Iterator[bytes]:
        """Yield the sealed records of a job's chunks, or of some of them, in order.

        Args:
            patience: seconds for which Redis is waited for, each time that it is away.
        """
        if numbers is None:
            with self._redis.use() as client:
                numbers = map(int, client.hkeys(self._key(job, "in")))
        numbers = sorted(numbers)
        for start in range(0, len(numbers), _PAGE):
            page = numbers[start : start + _PAGE]
            records = patiently(functools.partial(self._inputs, job, page), patience)
            yield from (record for record in records if record is not None)

    def _inputs(self, job: str, numbers: Sequence[int]) -> list[bytes | None]:
        with self._redis.use() as client:
            return list(client.hmget(self._key(job, "in"), numbers))

    def input(self, job: str, number: int) -> bytes | None:
        """Return the sealed record of one of a job's chunks, or None when it is not kept."""
        with self._redis.use() as client:
            record: bytes | None = client.hget(self._key(job, "in"), str(number))
            return record

    def workers(self) -> list[WorkerView]:
        """Return the nodes that beat within the last day, live ones first."""
        with self._redis.use() as client:
            (seconds, micros), beats, infos, dead = (
                client.pipeline(transaction=False)
                .time()
                .zrevrange(self._redis.key("beats"), 0, -1, withscores=True)
                .hgetall(self._redis.key("nodes"))
                .smembers(self._redis.key("dead"))
                .execute()
            )
        now = seconds + micros / 1e6
        views = [self._view(infos[node], beat, now, node in dead) for node, beat in beats if node in infos]
        return sorted(views, key=lambda view: (view.status not in ("live", "stopping"), view.heartbeat_age))

    def _view(self, packed: bytes, beat: float, now: float, dead: bool) -> WorkerView:
        info = _decode_info(packed)
        age = max(0.0, now - beat)
        lost = (dead or age > self._config.lease) and info.status != "stopped"
        return WorkerView(info, age, beat, "lost" if lost else info.status)

    def news_position(self) -> str:
        """Return the place of the newest entry of the results stream."""
        with self._redis.use() as client:
            last = client.xrevrange(self._redis.key("news"), count=1)
            if last:
                self._seq = int(last[0][1][b"q"])
            return str(last[0][0].decode()) if last else "0-0"

    def wait_for_news(self, position: str, timeout: float) -> tuple[str, list[News], bool]:
        """Block until there is news after position, or timeout seconds.

        Returns:
            The new position, the news, and whether some were missed: then compare with the outcomes.
        """
        block = max(1, int(timeout * 1000))
        news = self._redis.key("news")
        reply = self._redis.send("XREAD", "COUNT", 1000, "BLOCK", block, "STREAMS", news, position)
        if not reply:
            return position, [], False
        entries = [(at, dict(zip(fields[::2], fields[1::2], strict=True))) for at, fields in reply[0][1]]
        expected, self._seq = self._seq + 1, int(entries[-1][1][b"q"])
        missed = int(entries[0][1][b"q"]) != expected or self._seq != expected + len(entries) - 1
        return entries[-1][0].decode(), [_news(fields) for _, fields in entries], missed

    def follow(self, job: str) -> str:
        """Ask nodes to send what the job's tasks write, for the next seconds, and return where that is now."""
        followed, written = self._redis.key("followed"), self._key(job, "written")
        until = self.now() + _FOLLOWED
        with self._redis.use() as client:
            pipe = client.pipeline(transaction=False).zadd(followed, {job: until})
            pipe.expire(followed, TOLD_FOR).expire(written, TOLD_FOR).xrevrange(written, count=1)
            *_, last = pipe.execute()
        return str(last[0][0].decode()) if last else "0-0"

    def written(self, job: str, position: str, timeout: float) -> tuple[str, list[Written], bool]:
        """Block until tasks of a job have written something after position, or timeout seconds.

        Returns:
            The new position, what was written, and whether something before it was missed.
        """
        block, stream = max(1, int(timeout * 1000)), self._key(job, "written")
        reply = self._redis.send("XREAD", "BLOCK", block, "STREAMS", stream, position)
        if not reply:
            return position, [], False
        entries = reply[0][1]
        found: list[Written] = []
        for _, (_, frame) in entries:
            found += _decode_written(codec.unseal(self._config.key, codec.WRITTEN, frame))
        missed = place_written(entries[0][0].decode()) != place_written(position) + 1
        return entries[-1][0].decode(), found, missed

    def _key(self, job: str, part: str = "") -> str:
        return self._redis.key("job", job, part) if part else self._redis.key("job", job)

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()


def place_written(position: str) -> int:
    """Return which message of what a job's tasks write lies at a position, from 1: they are numbered one by one."""
    return int(position.partition("-")[2])


def _news(fields: dict[bytes, bytes]) -> News:
    return News(
        fields[b"j"].decode(),
        fields[b"f"].decode(),
        int(fields[b"n"]),
        fields.get(b"b"),
        fields[b"e"] == b"1",
        fields.get(b"c", b"").decode(),
        tuple(map(int, msgspec.msgpack.decode(fields[b"s"]))) if b"s" in fields else (),
        int(fields.get(b"r", 0)),
    )


def deleted(job: str) -> JobNotFoundError:
    """Say that a job is gone."""
    return JobNotFoundError(f"job {job!r} was deleted by job.delete(): nothing of it is kept", job=job)


def _record(fields: dict[bytes, bytes], sending: bool, now: float, ttl: int, blobs: int) -> JobRecord:
    def count(name: bytes) -> int:
        return int(fields.get(name, b"0"))

    ended = fields.get(b"ended")
    return JobRecord(
        id=fields[b"id"].decode(),
        name=fields.get(b"name", b"").decode(),
        function_name=fields.get(b"function", b"").decode(),
        created=float(fields.get(b"created", b"0")),
        total=int(fields.get(b"total", b"-1")),
        style=msgspec.convert(fields.get(b"style", b"item").decode(), CallStyle),
        sealed=fields.get(b"sealed") == b"1",
        sending=sending,
        fed=count(b"fed") + count(b"unfed"),
        running=max(0, count(b"running")),
        succeeded=count(b"succeeded"),
        failed=count(b"failed"),
        cancelled=count(b"cancelled"),
        late=count(b"late"),
        bytes=count(b"bytes") + blobs,
        ended=float(ended) if ended else None,
        now=now,
        expires=float(ttl),
        parameters=tuple(filter(None, fields.get(b"parameters", b"").decode().split(","))),
        cancel=fields.get(b"cancel", b"").decode(),
        lost=count(b"lost"),
        lane=msgspec.convert(fields.get(b"lane", b"normal").decode(), Lane),
        life=count(b"life"),
        ended_text=ended.decode() if ended else "",
    )


def _facts(cells: list[bytes | None]) -> JobFacts | None:
    texts = (cell.decode() if cell is not None else "" for cell in cells)
    name, total, sealed, ended, cancel, cancelled, id, failed, life = texts
    if not id:
        return None
    known = int(total or -1) if sealed == "1" or ended else -1
    return JobFacts(name or id, known, cancel, int(cancelled or 0), int(failed or 0), bool(life))


def _decoded(names: Iterable[Any]) -> list[str]:
    return [name.decode() for name in names]
