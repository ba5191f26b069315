"""The workbench as its rules say, in plain Python: what test_workbench_machine.py compares the real one with."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import msgspec

from yadtq_nb.errors import Crash
from yadtq_nb.model import LANES, ChunkHead, Lane, Lease, Retry
from yadtq_nb.workbench.bench import Batch, Cursor

LEASE = 1_000.0
WATERMARK = 3


@dataclasses.dataclass
class Job:
    fed: int = 0
    running: int = 0
    late: int = 0
    total: int = -1
    ended: bool = False
    #: Why it was ended before its time.
    cancel: str = ""
    cancelled: int = 0
    #: Indices of tasks that were cancelled one by one.
    dropped: set[int] = dataclasses.field(default_factory=set)
    #: Indices of those that have come from Kafka.
    spans: set[int] = dataclasses.field(default_factory=set)
    #: False while only its seal is known.
    named: bool = False


@dataclasses.dataclass
class Chunk:
    head: ChunkHead
    lane: Lane
    weight: int
    positions: set[tuple[str, int, int]]
    owner: str | None = None
    token: int = 0
    deadline: float = 0.0
    at: int | None = None
    lapses: int = 0
    crashes: dict[int, int] = dataclasses.field(default_factory=dict)
    #: Offset -> how it has crashed: (host, node, reason), time by time; of very many, the first five and the latest.
    deaths: dict[int, list[tuple[str, str, str]]] = dataclasses.field(default_factory=dict)
    #: Of tasks that are to be tried again: how often they have raised, and what.
    tries: dict[int, int] = dataclasses.field(default_factory=dict)
    notes: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    #: Offset -> when that task may run; also of all tasks of a job that is to start later.
    due: dict[int, float] = dataclasses.field(default_factory=dict)
    dropped: list[int] = dataclasses.field(default_factory=list)


class Model:
    """The workbench as its rules say. Owners, names and numbers; no bytes."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.reaped: float | None = None
        self.token = 0
        self.cursor: dict[int, Cursor] = {}
        self.open: dict[str, Chunk] = {}
        self.ready: dict[Lane, list[str]] = {lane: [] for lane in LANES}
        #: Chunks that wait aside, and until when.
        self.delayed: dict[str, float] = {}
        self.jobs: dict[str, Job] = {}
        #: Chunk -> offset -> run and state of its outcome; that of a dropped task is "C".
        self.outcomes: dict[str, dict[int, tuple[int, str]]] = collections.defaultdict(dict)
        self.beats: dict[str, float] = {}
        self.feeders: dict[Lane, set[str]] = {lane: set() for lane in LANES}
        self.dead: set[str] = set()
        #: Nodes that replay the jobs topic, and whether one has done so.
        self.replaying: set[str] = set()
        self.restored = False

    # Verbs.

    def feed(self, node: str, batches: list[Batch], free: int, lane: Lane = "normal") -> Any:
        if not self.is_live(node):
            return "refused"
        replies, leases = [], []
        # What waits in this lane, or in one that is served before it, comes first.
        free = 0 if any(self.ready[other] for other in LANES[: LANES.index(lane) + 1]) else free
        for batch in batches:
            cursor = self.cursor.get(batch.partition)
            status = "fed"
            if cursor is None:
                status = "no cursor"
            elif cursor != Cursor(batch.topic_id, batch.expected):
                status = "moved"
            elif lane != "nested" and len(self.ready[lane]) >= WATERMARK:
                status = "full"
            else:
                for offset, head, _ in batch.chunks:
                    position = (batch.topic_id, batch.partition, offset)
                    if self.feed_one(head, position, lane) and free > len(leases):
                        self.ready[lane].remove(head.id)
                        leases.append(self.grant(head.id, node)[:2])
                cursor = self.cursor[batch.partition] = Cursor(batch.topic_id, batch.next)
            replies.append((status, cursor))
        return replies, leases

    def feed_one(self, head: ChunkHead, position: tuple[str, int, int], lane: Lane) -> bool:
        job = self.jobs.setdefault(head.job, Job(total=head.total))
        if not job.named:
            job.named, job.total = True, job.total if job.total >= 0 else head.total
        if job.ended or self.is_finished(head):
            return False
        if head.id in self.open:
            self.open[head.id].positions.add(position)
            return False
        chunk = self.open[head.id] = Chunk(head, lane, head.count if head.concurrent else 1, {position})
        job.fed += head.count
        job.spans.update(range(head.first, head.first + head.count))
        for n in range(head.count):
            if head.first + n in job.dropped:
                self.drop_task(chunk, n)
        if self.is_finished(head):
            self.forget(head.id)
            self.end_if_complete(head.job)
            return False
        starts = head.policy.start_after
        if starts > self.now:
            chunk.due = dict.fromkeys(range(head.count), starts)
            self.delayed[head.id] = starts
            return False
        self.ready[lane].insert(0 if lane == "nested" else len(self.ready[lane]), head.id)
        return not chunk.dropped

    def take(self, node: str, count: int, plain: int) -> Any:
        if not self.is_live(node):
            return "refused"
        self.wake_delayed()
        granted: list[tuple[Any, ...]] = []
        for lane, line in self.ready.items():
            while line and len(granted) < (count if lane == "nested" else plain):
                id = line.pop(0)
                chunk = self.open[id]
                if self.jobs[chunk.head.job].ended:
                    self.forget(id)
                else:
                    granted.append(
                        (*self.grant(id, node), chunk.tries, chunk.notes, self.waiting(chunk), dict(chunk.deaths))
                    )
        return granted, steps(min(self.delayed.values()) - self.now) if self.delayed else None

    def finish(self, node: str, lease: Lease, results: dict[int, tuple[int, str]]) -> str:
        id = lease.head.id
        chunk = self.open.get(id)
        if chunk is None:
            return "closed"
        current, job, known = self.holds(node, lease), self.jobs[lease.head.job], self.outcomes[id]
        if job.ended:
            job.late += len(results)
            self.close(chunk)
            return "closed"
        # The first outcome of a task counts; without the current token only a success does.
        new = {o: result for o, result in results.items() if o not in known and (current or result[1] == "S")}
        known.update(new)
        job.late += len(results) - len(new)
        closed = len(known) == chunk.head.count
        if closed:
            self.close(chunk)
        if new:
            self.end_if_complete(lease.head.job)
        return "closed" if closed else "current" if current else "lapsed"

    def release(self, node: str, lease: Lease, crashed: tuple[int, Crash] | None) -> bool:
        if not self.holds(node, lease):
            return False
        chunk = self.open[lease.head.id]
        if crashed is not None:
            self.charge(chunk, crashed[0], crashed[1][:3])
        self.put_back(chunk)
        return True

    def retry(self, node: str, lease: Lease, tries: list[Retry]) -> bool:
        if not self.holds(node, lease):
            return False
        chunk = self.open[lease.head.id]
        for offset, times, delay, note in [msgspec.structs.astuple(one) for one in tries]:
            if chunk.tries.get(offset, 0) < times:
                chunk.tries[offset], chunk.due[offset] = times, self.now + delay
                notes = chunk.notes.setdefault(offset, [])
                notes.append(note)
                if len(notes) > 12:
                    del notes[5]
        return True

    def mark(self, node: str, lease: Lease, offset: int) -> bool:
        if not self.holds(node, lease):
            return False
        self.open[lease.head.id].at = offset
        return True

    def beat(self, node: str, leases: list[tuple[Lease, int]], polls: set[Lane]) -> Any:
        self.beats[node] = self.now
        self.dead.discard(node)
        for lane, feeders in self.feeders.items():
            (feeders.add if lane in polls else feeders.discard)(node)
        for lease, offset in leases:
            if self.holds(node, lease):
                chunk = self.open[lease.head.id]
                chunk.deadline = self.now + LEASE
                chunk.at = offset if offset >= 0 else chunk.at
                if self.jobs[lease.head.job].ended:
                    self.close(chunk)
        held = [lease.head.id for lease, _ in leases if self.holds(node, lease)]
        lost = [lease.head.id for lease, _ in leases if not self.holds(node, lease)]
        ready = sum(map(len, self.ready.values()))
        return lost, {id: self.open[id].dropped for id in held if self.open[id].dropped}, ready

    def reap(self, dead: str) -> set[tuple[str, str]]:
        away = self.reaped is not None and self.now - self.reaped > LEASE
        self.reaped = self.now
        if dead:
            for feeders in self.feeders.values():
                feeders.discard(dead)
            self.dead.add(dead)
        lapsed = set()
        for id, chunk in self.open.items():
            if chunk.owner is None:
                continue
            if dead == chunk.owner or (not dead and not away and chunk.deadline <= self.now):
                lapsed.add((id, chunk.owner))
            elif away:
                chunk.deadline = self.now + LEASE
        for id, _ in sorted(lapsed, key=lambda one: (self.open[one[0]].deadline, one[0])):
            chunk = self.open[id]
            chunk.lapses += 1
            if chunk.at is not None:
                assert chunk.owner is not None
                self.charge(chunk, chunk.at, ("host", chunk.owner, "its node died or was cut off"))
            self.put_back(chunk)
        self.wake_delayed()
        return lapsed

    def init(self, partition: int, seen: Cursor | None, cursor: Cursor) -> Cursor | None:
        if self.cursor.get(partition) == seen and (seen is not None or self.restored):
            self.cursor[partition] = cursor
        return self.cursor.get(partition)

    def begin_restore(self, node: str) -> bool:
        self.replaying.add(node)
        return self.restored

    def end_restore(self, node: str) -> bool:
        self.restored |= node in self.replaying
        self.replaying.discard(node)
        return self.restored

    def create(self, job: str) -> str:
        self.jobs.setdefault(job, Job()).named = True
        return job

    def seal(self, job: str, total: int) -> None:
        if job in self.jobs and self.jobs[job].cancel:
            return
        self.jobs.setdefault(job, Job()).total = total
        self.end_if_complete(job)

    def cancel(self, job: str, reason: str) -> int:
        it = self.jobs.setdefault(job, Job())
        if it.ended:
            return 0
        done = self.done(job)
        it.total = it.total if it.total >= 0 else max(done, it.fed)
        it.ended, it.cancel, it.cancelled = True, reason, it.cancelled + it.total - done
        for id, chunk in list(self.open.items()):
            if chunk.head.job == job and chunk.owner is None:
                self.forget(id)
        return it.total - done

    def drop(self, job: str, indices: list[int]) -> list[int]:
        """Cancel single tasks, also such as have not come from Kafka yet."""
        it = self.jobs.get(job, Job())
        if it.ended:
            return []
        waiting = {c.head.first + n: (c, n) for c in self.open.values() for n in self.left(c) if c.head.job == job}
        new = [i for i in indices if i not in it.dropped and (i not in it.spans or i in waiting)]
        for index in new:
            if index in waiting:
                self.drop_task(*waiting[index])
        for chunk in [chunk for chunk, _ in waiting.values()]:
            if self.is_finished(chunk.head) and chunk.head.id in self.open:
                self.close(chunk)
        if new:
            self.jobs[job] = it
            it.dropped.update(new)
            it.cancelled += len(new)
            self.end_if_complete(job)
        return new

    # What the verbs share.

    def is_live(self, node: str) -> bool:
        return node not in self.dead and self.now - self.beats.get(node, -math.inf) < LEASE

    def holds(self, node: str, lease: Lease) -> bool:
        chunk = self.open.get(lease.head.id)
        return chunk is not None and (chunk.owner, chunk.token) == (node, lease.token)

    def grant(self, id: str, node: str) -> tuple[Any, ...]:
        chunk = self.open[id]
        self.token += 1
        chunk.owner, chunk.token, chunk.deadline = node, self.token, self.now + LEASE
        self.jobs[chunk.head.job].running += chunk.weight
        return id, self.token, set(self.outcomes[id]), dict(chunk.crashes), chunk.lapses

    def revoke(self, chunk: Chunk) -> None:
        chunk.owner = chunk.at = None
        self.jobs[chunk.head.job].running -= chunk.weight

    def charge(self, chunk: Chunk, offset: int, death: tuple[str, str, str]) -> None:
        chunk.crashes[offset] = chunk.crashes.get(offset, 0) + 1
        known = [*chunk.deaths.get(offset, []), death]
        chunk.deaths[offset] = known if len(known) <= 12 else known[:5] + known[6:]

    def put_back(self, chunk: Chunk) -> None:
        """To the front of the line; or aside, while all tasks that are left wait for their next attempt."""
        self.revoke(chunk)
        id, waiting = chunk.head.id, self.waiting(chunk)
        left = self.left(chunk)
        if left <= waiting:
            self.delayed[id] = min(chunk.due[n] for n in left)
        else:
            self.ready[chunk.lane].insert(0, id)

    def left(self, chunk: Chunk) -> set[int]:
        return set(range(chunk.head.count)) - self.outcomes[chunk.head.id].keys()

    def waiting(self, chunk: Chunk) -> set[int]:
        return {n for n, due in chunk.due.items() if due > self.now}

    def wake_delayed(self) -> None:
        """What is due joins the line, in front."""
        woken = sorted((due, id) for id, due in self.delayed.items() if due <= self.now)
        for _, id in reversed(woken):
            del self.delayed[id]
            self.ready[self.open[id].lane].insert(0, id)

    def drop_task(self, chunk: Chunk, offset: int) -> None:
        self.outcomes[chunk.head.id][offset] = (0, "C")
        chunk.dropped.append(offset)

    def close(self, chunk: Chunk) -> None:
        if chunk.owner:
            self.revoke(chunk)
        self.forget(chunk.head.id)

    def forget(self, id: str) -> None:
        line = self.ready[self.open.pop(id).lane]
        self.delayed.pop(id, None)
        if id in line:
            line.remove(id)

    def is_finished(self, head: ChunkHead) -> bool:
        return len(self.outcomes[head.id]) == head.count

    def counts(self, job: str) -> collections.Counter[str]:
        states = [s for id, known in self.outcomes.items() if id.startswith(f"{job}:") for _, s in known.values()]
        return collections.Counter(states)

    def end_if_complete(self, job: str) -> None:
        if 0 <= self.jobs[job].total <= self.done(job):
            self.jobs[job].ended = True

    def done(self, job: str) -> int:
        counts = self.counts(job)
        return counts["S"] + counts["F"] + self.jobs[job].cancelled

    def positions(self) -> set[tuple[str, int, int]]:
        return {position for chunk in self.open.values() for position in chunk.positions}

    def low(self, partition: int) -> Cursor | None:
        cursor = self.cursor.get(partition)
        if cursor is None:
            return None
        held = [offset for topic, p, offset in self.positions() if (topic, p) == (cursor.topic_id, partition)]
        return Cursor(cursor.topic_id, min(held, default=cursor.offset))

    def view(self) -> dict[str, Any]:
        """Return what Machine.observed must find in Redis."""
        leased = {id: chunk for id, chunk in self.open.items() if chunk.owner}
        return {
            "cursor": self.cursor,
            "open": {
                id: (set(self.outcomes[id]), c.owner, c.token, c.lapses, c.crashes, c.positions, c.tries, c.notes)
                for id, c in self.open.items()
            },
            "deaths": {f"{id}:{offset}": told for id, c in self.open.items() for offset, told in c.deaths.items()},
            "due": {id: {n: steps(due - self.now) for n, due in c.due.items()} for id, c in self.open.items()},
            "positions": self.positions(),
            "ready": self.ready,
            "delayed": {id: steps(due - self.now) for id, due in self.delayed.items()},
            "leases": {id: steps(chunk.deadline - self.now) for id, chunk in leased.items()},
            "at": {id: chunk.at for id, chunk in leased.items() if chunk.at is not None},
            "beats": {node: steps(beat - self.now) for node, beat in self.beats.items()},
            "feeders": self.feeders,
            "dead": self.dead,
            "restored": self.replaying | {"done"} if self.restored else self.replaying,
            "jobs": {
                id: (
                    job.fed,
                    job.running,
                    self.counts(id)["S"],
                    self.counts(id)["F"],
                    job.late,
                    job.cancelled,
                    job.total,
                    job.cancel,
                    job.ended,
                    job.named,
                )
                for id, job in self.jobs.items()
            },
            "outcomes": {id: kept for id, known in self.outcomes.items() if (kept := without_dropped(known))},
            "dropped": {id: job.dropped for id, job in self.jobs.items() if job.dropped},
        }


def without_dropped(known: dict[int, tuple[int, str]]) -> dict[int, tuple[int, str]]:
    return {n: outcome for n, outcome in known.items() if outcome[1] != "C"}


def steps(seconds: float) -> int:
    """Round to what time moves by, since the server's clock goes on while an example runs."""
    return round(seconds / 100)
