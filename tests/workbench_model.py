"""The workbench as its rules say, in plain Python: what test_workbench_machine.py compares the real one with."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import msgspec

from yadtq_nb.model import ChunkHead, Lease, Retry
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
    #: False while only its seal is known.
    named: bool = False


@dataclasses.dataclass
class Chunk:
    head: ChunkHead
    weight: int
    positions: set[tuple[str, int, int]]
    owner: str | None = None
    token: int = 0
    deadline: float = 0.0
    at: int | None = None
    lapses: int = 0
    crashes: dict[int, int] = dataclasses.field(default_factory=dict)
    #: Of tasks that are to be tried again: how often they have raised, and what.
    tries: dict[int, int] = dataclasses.field(default_factory=dict)
    notes: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    #: Offset -> when that task may run; also of all tasks of a job that is to start later.
    due: dict[int, float] = dataclasses.field(default_factory=dict)


class Model:
    """The workbench as its rules say. Owners, names and numbers; no bytes."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.reaped: float | None = None
        self.token = 0
        self.cursor: dict[int, Cursor] = {}
        self.open: dict[str, Chunk] = {}
        self.ready: list[str] = []
        #: Chunks that wait aside, and until when.
        self.delayed: dict[str, float] = {}
        self.jobs: dict[str, Job] = {}
        #: Chunk -> offset -> run and state of its outcome.
        self.outcomes: dict[str, dict[int, tuple[int, str]]] = collections.defaultdict(dict)
        self.beats: dict[str, float] = {}
        self.feeders: set[str] = set()
        self.dead: set[str] = set()
        #: Nodes that replay the jobs topic, and whether one has done so.
        self.replaying: set[str] = set()
        self.restored = False

    # Verbs.

    def feed(self, node: str, batches: list[Batch], free: int) -> Any:
        if not self.is_live(node):
            return "refused"
        replies, leases = [], []
        free = 0 if self.ready else free
        for batch in batches:
            cursor = self.cursor.get(batch.partition)
            status = "fed"
            if cursor is None:
                status = "no cursor"
            elif cursor != Cursor(batch.topic_id, batch.expected):
                status = "moved"
            elif len(self.ready) >= WATERMARK:
                status = "full"
            else:
                for offset, head, _ in batch.chunks:
                    position = (batch.topic_id, batch.partition, offset)
                    if self.feed_one(head, position) and free > len(leases):
                        self.ready.remove(head.id)
                        leases.append(self.grant(head.id, node)[:2])
                cursor = self.cursor[batch.partition] = Cursor(batch.topic_id, batch.next)
            replies.append((status, cursor))
        return replies, leases

    def feed_one(self, head: ChunkHead, position: tuple[str, int, int]) -> bool:
        job = self.jobs.setdefault(head.job, Job(total=head.total))
        job.named = True
        if self.is_finished(head):
            return False
        if head.id in self.open:
            self.open[head.id].positions.add(position)
            return False
        chunk = self.open[head.id] = Chunk(head, head.count if head.concurrent else 1, {position})
        job.fed += head.count
        starts = head.policy.start_after
        if starts > self.now:
            chunk.due = dict.fromkeys(range(head.count), starts)
            self.delayed[head.id] = starts
            return False
        self.ready.append(head.id)
        return True

    def take(self, node: str, count: int) -> Any:
        if not self.is_live(node):
            return "refused"
        self.wake_delayed()
        taken, self.ready = self.ready[:count], self.ready[count:]
        granted = [
            (*self.grant(id, node), self.open[id].tries, self.open[id].notes, self.waiting(self.open[id]))
            for id in taken
        ]
        return granted, steps(min(self.delayed.values()) - self.now) if self.delayed else None

    def finish(self, node: str, lease: Lease, results: dict[int, tuple[int, str]]) -> str:
        id = lease.head.id
        chunk = self.open.get(id)
        if chunk is None:
            return "closed"
        current, job, known = self.holds(node, lease), self.jobs[lease.head.job], self.outcomes[id]
        # The first outcome of a task counts; without the current token only a success does.
        new = {o: result for o, result in results.items() if o not in known and (current or result[1] == "S")}
        known.update(new)
        job.late += len(results) - len(new)
        closed = len(known) == chunk.head.count
        if closed:
            if chunk.owner:
                self.revoke(chunk)
            self.forget(id)
        if new:
            self.end_if_complete(lease.head.job)
        return "closed" if closed else "current" if current else "lapsed"

    def release(self, node: str, lease: Lease, crashed: int | None) -> bool:
        if not self.holds(node, lease):
            return False
        chunk = self.open[lease.head.id]
        if crashed is not None:
            chunk.crashes[crashed] = chunk.crashes.get(crashed, 0) + 1
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
                del notes[5 : len(notes) - 7]
        return True

    def mark(self, node: str, lease: Lease, offset: int) -> bool:
        if not self.holds(node, lease):
            return False
        self.open[lease.head.id].at = offset
        return True

    def beat(self, node: str, leases: list[tuple[Lease, int]], polls: bool) -> list[str]:
        self.beats[node] = self.now
        self.dead.discard(node)
        (self.feeders.add if polls else self.feeders.discard)(node)
        kept = [(self.open[lease.head.id], offset) for lease, offset in leases if self.holds(node, lease)]
        for chunk, offset in kept:
            chunk.deadline = self.now + LEASE
            chunk.at = offset if offset >= 0 else chunk.at
        return [lease.head.id for lease, _ in leases if not self.holds(node, lease)]

    def reap(self, dead: str) -> set[tuple[str, str]]:
        away = self.reaped is not None and self.now - self.reaped > LEASE
        self.reaped = self.now
        if dead:
            self.feeders.discard(dead)
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
                chunk.crashes[chunk.at] = chunk.crashes.get(chunk.at, 0) + 1
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
        self.jobs.setdefault(job, Job()).total = total
        self.end_if_complete(job)

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

    def put_back(self, chunk: Chunk) -> None:
        """To the front of the line; or aside, while all tasks that are left wait for their next attempt."""
        self.revoke(chunk)
        id, waiting = chunk.head.id, self.waiting(chunk)
        left = set(range(chunk.head.count)) - self.outcomes[id].keys()
        if left <= waiting:
            self.delayed[id] = min(chunk.due[n] for n in left)
        else:
            self.ready.insert(0, id)

    def waiting(self, chunk: Chunk) -> set[int]:
        return {n for n, due in chunk.due.items() if due > self.now}

    def wake_delayed(self) -> None:
        """What is due joins the line, in front."""
        woken = sorted((due, id) for id, due in self.delayed.items() if due <= self.now)
        for _, id in woken:
            del self.delayed[id]
        self.ready[:0] = [id for _, id in woken]

    def forget(self, id: str) -> None:
        del self.open[id]
        self.delayed.pop(id, None)
        self.ready = [other for other in self.ready if other != id]

    def is_finished(self, head: ChunkHead) -> bool:
        return len(self.outcomes[head.id]) == head.count

    def counts(self, job: str) -> collections.Counter[str]:
        states = [s for id, known in self.outcomes.items() if id.startswith(f"{job}:") for _, s in known.values()]
        return collections.Counter(states)

    def end_if_complete(self, job: str) -> None:
        if 0 <= self.jobs[job].total <= self.counts(job).total():
            self.jobs[job].ended = True

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
                    job.total,
                    job.ended,
                    job.named,
                )
                for id, job in self.jobs.items()
            },
            "outcomes": {id: known for id, known in self.outcomes.items() if known},
        }


def steps(seconds: float) -> int:
    """Round to what time moves by, since the server's clock goes on while an example runs."""
    return round(seconds / 100)
