"""The frozen data that moves between notebook, Kafka, Redis and workers. No input or output here."""

from __future__ import annotations

import enum
import random
import secrets
import time
from array import array
from typing import Final, Literal, get_args

import msgspec

from yadtq_nb.errors import Crash


class State(enum.StrEnum):
    """State of one task."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: Its outcome, or its record, was lost with a server's data; job.retry() brings it back.
    LOST = "lost"


#: One byte for each final state, as outcomes carry it.
STATE_CODES: dict[State, int] = {
    State.SUCCEEDED: ord("S"),
    State.FAILED: ord("F"),
    State.CANCELLED: ord("C"),
    State.LOST: ord("L"),
}
STATE_OF_CODE: dict[int, State] = {code: state for state, code in STATE_CODES.items()}


class JobState(enum.StrEnum):
    """State of a whole job."""

    #: Some tasks have no outcome yet.
    RUNNING = "running"
    #: Every task has an outcome and none failed.
    SUCCEEDED = "succeeded"
    #: Every task has an outcome and at least one failed.
    FAILED = "failed"
    #: Someone has cancelled it, or its deadline has passed: tasks without an outcome never get one.
    CANCELLED = "cancelled"
    #: Tasks are missing: the client died while it was sending, or a server has lost its data.
    INCOMPLETE = "incomplete"


#: How a task's item is given to its function.
#: "item": fn(item); "star": fn(*item); "call": fn(*item[0], **item[1]); "part": fn(item.open()), of a frame.
CallStyle = Literal["item", "star", "call", "part"]


#: A way of its own from Kafka to the slots: for a job's priority, or for jobs that tasks have sent and may wait for.
Lane = Literal["nested", "high", "normal", "low"]
#: In the order in which they are served.
LANES: tuple[Lane, ...] = get_args(Lane)
#: What a user may ask for.
Priority = Literal["high", "normal", "low"]


class Environment(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Where a task runs, so that it runs as it would have run in the cell."""

    #: Working directory of the submitter.
    cwd: str = ""
    #: The submitter's sys.path.
    path: tuple[str, ...] = ()
    #: Host of the submitter: on the same host, cwd and path are used as they are.
    host: str = ""
    #: Content hash of the local source tree that travels along, or "" for none.
    tree: str = ""
    #: Directory on the submitter's machine that the tree was taken from.
    tree_root: str = ""
    #: The submitter's Python, such as "3.11".
    python: str = ""


class Policy(msgspec.Struct, frozen=True, array_like=True):
    """What is done when a task of a job fails or takes too long. Times in seconds."""

    #: How often a task that raised is tried again.
    retries: int = 0
    #: Wait before the first retry; it doubles with each, with jitter.
    backoff: float = 1.0
    #: Longest wait before a retry.
    max_delay: float = 60.0
    #: How long one attempt may take, or 0 for as long as it wants.
    timeout: float = 0.0
    #: Whether an attempt that took too long counts as one to be tried again.
    retry_timeouts: bool = False
    #: How often a task may kill its slot before it is given up, or 0 for the queue's setting.
    max_crashes: int = 0
    #: Not before then, in seconds since the epoch by the workbench's clock, or 0 for at once.
    start_after: float = 0.0

    def delay(self, tries: int) -> float:
        """Return the seconds to wait before the next attempt: doubling, and between half and all of it by chance.

        "Equal jitter" of M. Brooker, Exponential Backoff And Jitter, AWS Architecture Blog, 2015: tasks that failed
        together do not come back together.
        """
        whole = min(self.max_delay, self.backoff * 2.0 ** min(tries, 60))
        return whole * random.uniform(0.5, 1.0)  # no secret


#: Stands for all tasks of a job or chunk, where a count, an index or an offset is expected.
WHOLE: Final = -1


class Need(msgspec.Struct, frozen=True, array_like=True):
    """Tasks whose values are arguments of others, which wait for them."""

    #: Id of their job.
    job: str
    #: Index of the first.
    first: int
    #: How many, or WHOLE.
    count: int


class ChunkHead(msgspec.Struct, frozen=True, array_like=True):
    """All that a node needs to know of a chunk; the pickles behind it are opened by slots only."""

    #: Job id.
    job: str
    #: Number of the chunk in its job, from 0.
    number: int
    #: Index of its first task in the job.
    first: int
    #: Number of tasks.
    count: int
    #: Content hash of the function.
    function: str
    #: Name of the function, to be shown.
    function_name: str
    #: Length of the function's pickle that follows; 0 when it travels as a blob of its own.
    function_size: int
    style: CallStyle
    #: True when the function is a coroutine function: a slot runs many at a time.
    concurrent: bool
    environment: Environment
    #: Name of the job.
    job_name: str = ""
    #: Total of the job when this chunk is the whole of it, else -1: such a job needs no manifest.
    total: int = -1
    #: Seconds since the epoch when the job was made.
    created: float = 0.0
    #: True when the arguments lie in the workbench and not in this record.
    by_reference: bool = False
    policy: Policy = Policy()
    #: 0 for a job that was not sent by a task, else one more than that of the task's own job.
    depth: int = 0
    #: What its function and its items need of other jobs: it waits until all of that has its outcome.
    needs: tuple[Need, ...] = ()
    #: One '0' or '1' a task where some are not to be run, since they are only sent again beside others; else empty.
    done: bytes = b""

    @property
    def id(self) -> str:
        """Name of the chunk in its queue."""
        return chunk_id(self.job, self.number)


class BrokenItem(msgspec.Struct, frozen=True):
    """Stands in a chunk's arguments for an item that cannot be sent or read: its task fails, its mates run."""

    #: Index of the task in its job.
    index: int
    #: Why it could not be sent.
    message: str
    #: Name of the error that its task ends with.
    error: str = "ItemPickleError"
    #: That error itself, where a slot could not read the item.
    info: ErrorInfo | None = None


class Manifest(msgspec.Struct, frozen=True):
    """What the queue knows of a job before its first chunk."""

    id: str
    name: str
    function_name: str
    created: float
    #: Number of tasks, or -1 while an iterator is still being drawn.
    total: int
    style: CallStyle = "item"
    #: Host and process that submitted it, to be shown.
    client: str = ""
    #: Names of the function's parameters, for the columns of a DataFrame.
    parameters: tuple[str, ...] = ()
    #: When the job is ended, whatever of it is done, in seconds since the epoch by the workbench's clock; 0 for never.
    deadline: float = 0.0
    lane: Lane = "normal"
    #: What it is compared by with a job that wants its name, packed; empty when nobody chose its name.
    sameness: bytes = b""


class Seal(msgspec.Struct, frozen=True):
    """The end of a job's sending: how many tasks there are, and where its last chunks lie."""

    id: str
    total: int
    #: "topic id/partition" to the offset after the job's last record there.
    ends: dict[str, int] = {}
    #: The job's life that ends with it; see Reopen.
    life: int = 0


#: Chunks of a job's next life are numbered from here on, of the one after from twice as much: a retry, an extension.
LIFE: Final = 1 << 22


class Reopen(msgspec.Struct, frozen=True):
    """A job that was sent whole is sent in part again, or gets more tasks: it begins another life."""

    id: str
    #: Its number, from 1; those of its chunks begin at LIFE times that.
    life: int
    #: Chunks of lives before this one are passed by: the job had ended.
    floor: int
    #: How many tasks it has now.
    total: int
    #: Packed uint32 indices of the tasks that are sent again while chunks of earlier lives may still run.
    replaced: bytes = b""
    #: True when the job had ended: its deadline went with that.
    ended: bool = False


class Cancel(msgspec.Struct, frozen=True):
    """The end of a job before its time."""

    id: str
    #: "cancelled" or "deleted" by someone, or past its "deadline".
    reason: str = "cancelled"


class Crashed(msgspec.Struct, frozen=True, array_like=True):
    """What is known of a task that has killed its slot or its node as often as is allowed."""

    #: Its item as text, or "" when it could not be shown.
    item: str
    crashes: tuple[Crash, ...]
    #: The last lines that a slot had written.
    stderr: str


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """An exception as it travels."""

    #: Module and qualified name of its type.
    type_name: str
    message: str
    #: Formatted traceback of the worker.
    traceback: str
    #: The exception itself, pickled; empty when it cannot be pickled and unpickled.
    pickled: bytes = b""
    #: The name of our own error to raise when it cannot be brought back as itself.
    ours: str = "TaskError"
    #: Of a TaskCrashedError.
    crashed: Crashed | None = None

    def line(self, type_name: str) -> str:
        """Return how a traceback ends, with the type named so."""
        return f"{type_name}: {self.message}" if self.message else type_name


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Outcomes of some tasks of one chunk, packed together."""

    job: str
    #: Number of the chunk.
    number: int
    #: Indices of the tasks in the job: (first, count) when consecutive, else given one by one.
    first: int
    count: int
    #: Packed uint32 indices when they are not consecutive, else empty.
    scattered: bytes
    #: One byte a task: see STATE_CODES.
    states: bytes
    #: Index in the job -> error, for those that failed.
    errors: dict[int, ErrorInfo]
    #: Seconds since the epoch at which each task started, packed float64.
    started: bytes
    #: Run time of each task in seconds, packed float64.
    seconds: bytes
    #: Node that ran them.
    worker: str
    #: Index in the job -> attempt, for those that were not run for the first time.
    attempts: dict[int, int] = {}
    #: Index in the job -> the end of what it has written, for those that have written anything.
    logs: dict[int, bytes] = {}

    def indices(self) -> range | array[int]:
        """Indices of the tasks in the job, in the order of the packed fields."""
        if not self.scattered:
            return range(self.first, self.first + self.count)
        return array("I", self.scattered)


class RunningTask(msgspec.Struct, frozen=True, array_like=True):
    """A task that runs in a slot now."""

    #: Job id.
    job: str
    #: Index in the job.
    index: int
    #: Seconds for which it has been seen to run, at the heartbeat that tells of it.
    seconds: float


class WorkerInfo(msgspec.Struct, frozen=True):
    """What a node says of itself with each heartbeat."""

    id: str
    host: str
    pid: int
    slots: int
    busy: int
    #: Tasks finished since it started.
    done: int
    #: Seconds since the epoch.
    started: float
    python: str
    #: Percent of one core, of the node and its slots together.
    cpu: float = 0.0
    #: Resident bytes of the node and its slots together.
    memory: int = 0
    #: Job id -> tasks of it that run here now.
    running: dict[str, int] = {}
    #: "live", "stopping" or "stopped".
    status: str = "live"
    #: Fingerprint of the secret that it verifies with.
    secret: str = ""
    #: The few tasks that have run here for the longest; coroutines, which run side by side, are not told apart.
    slowest: tuple[RunningTask, ...] = ()


class WorkerView(msgspec.Struct, frozen=True):
    """A node as the queue sees it."""

    info: WorkerInfo
    #: Seconds since its last heartbeat, by the workbench's clock.
    heartbeat_age: float
    #: When that was, in seconds since the epoch.
    last_heartbeat: float
    #: "live", "stopping", "stopped", or "lost" when its heartbeat has lapsed.
    status: str


class ErrorGroup(msgspec.Struct, frozen=True):
    """Failures of one type that were raised at the same line."""

    #: Module and qualified name of the type.
    type_name: str
    #: Where it was raised, such as "fit.py, line 12, in load", or "" where there was no line.
    place: str
    #: What the first of them says.
    message: str
    #: Traceback of the first of them, as the worker has formatted it.
    traceback: str
    #: Index of the first task, as far as was seen.
    first: int
    #: How many were seen.
    count: int


class JobView(msgspec.Struct, frozen=True):
    """A job as a list of jobs shows it."""

    id: str
    name: str
    state: JobState
    progress: Progress
    #: Seconds since it was made.
    age: float


class Progress(msgspec.Struct, frozen=True):
    """Where a job stands. Counts are of tasks."""

    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    #: None while an iterator is still being drawn.
    total: int | None
    #: Tasks finished a second, over the job's life so far.
    rate: float
    #: Estimated seconds to the end, or None when it cannot be told.
    eta: float | None
    #: Seconds since the job was made, until its end once it has ended.
    elapsed: float
    #: Tasks whose outcome, or whose record, was lost with a server's data.
    lost: int = 0

    @property
    def done(self) -> int:
        """Tasks with an outcome."""
        return self.succeeded + self.failed + self.cancelled


class Written(msgspec.Struct, frozen=True, array_like=True):
    """What tasks have written while somebody follows their job."""

    job: str
    #: Indices of the first and the last of those that ran meanwhile: the same where it can be told.
    first: int
    last: int
    #: Whole lines, as a rule.
    text: bytes


class Retry(msgspec.Struct, frozen=True, array_like=True):
    """One task that has raised and is to be tried again."""

    #: Offset in the chunk.
    offset: int
    #: How often it has raised so far, this time included.
    times: int
    #: Seconds until it may run again.
    delay: float
    #: What it raised, in a line.
    note: str


class Lease(msgspec.Struct, frozen=True):
    """A node's right to run one chunk, until it lapses."""

    head: ChunkHead
    #: Fencing token: an outcome counts fully only with the current one.
    token: int
    #: The sealed record, as it came from Kafka.
    record: bytes
    #: Offsets in the chunk that have an outcome already.
    done: frozenset[int] = frozenset()
    #: Offset in the chunk -> how often that task has killed its slot or node. WHOLE is none's in particular.
    crashes: dict[int, int] = {}
    #: How often a lease of this chunk has lapsed after it had started.
    lapses: int = 0
    #: Offset in the chunk -> how often that task has raised and was to be tried again.
    tries: dict[int, int] = {}
    #: Offset in the chunk -> what it raised, attempt by attempt.
    notes: dict[int, tuple[str, ...]] = {}
    #: Offsets that are not to be run now: they wait for their next attempt.
    waiting: frozenset[int] = frozenset()
    #: Why its record cannot be read, where that is so: its tasks end with this.
    trouble: str = ""
    #: Offset in the chunk -> how that task has killed its slot or node, time by time.
    deaths: dict[int, tuple[Crash, ...]] = {}


def chunk_id(job: str, number: int) -> str:
    """Name of a chunk in its queue."""
    return f"{job}:{number}"


def new_id() -> str:
    """Return a fresh id of 24 hex digits, whose order is the order of time to the millisecond."""
    return f"{time.time_ns() // 1_000_000:011x}"[-11:] + secrets.token_hex(7)[:13]
