"""What pool, template and slots say to each other, and how it is framed.

pool ──▶ slot      Setup once, then an Order and the chunk's sealed record, one chunk at a time
slot ──▶ pool      Reports, each with a sealed segment; the last one of a chunk says so
pool ◀─▶ template  Note, one a datagram, so that file descriptors can ride along
"""

from __future__ import annotations

import socket
import struct
from typing import Final, Literal, TypeAlias, TypeVar

import msgspec

from yadtq_nb.model import Retry

Buffer: TypeAlias = "bytes | bytearray | memoryview"

#: Value of a slot's progress cell while it has not begun with a task.
NO_OFFSET: Final = 0xFFFFFFFF
#: Set in it while a slot reads an item by itself.
READING: Final = 0x80000000
#: Values of the cell beside it: nothing is wanted; the slot is to stop after the task that runs; it is to end.
GO_ON: Final[int] = 0
HOLD: Final[int] = 1
LEAVE: Final[int] = 2
#: The cell that says where in its log the chunk begins, or the task that has written there last.
LOG_START: Final = 2
#: The cell that says which: its offset, READING for the chunk, or ALONE where the chunk's only task is run.
WRITER: Final = 3
ALONE: Final = 0xFFFFFFFE
#: Bytes of the memory that a slot shares with its pool.
PROGRESS_SIZE: Final = 16
#: Longest Note, in bytes.
NOTE_SIZE: Final = 8 * 1024

_PREFIX: Final = struct.Struct("<IQ")
_JOIN_BELOW: Final = 64 * 1024
_PULL: Final = 256 * 1024
_PULLS: Final = 32

S = TypeVar("S", bound=msgspec.Struct)
encode = msgspec.msgpack.Encoder().encode


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """What a slot learns first."""

    secret: bytes
    #: Name of the node, for the outcomes.
    node: str
    #: The node's directory, shared by its slots.
    directory: str


class Order(msgspec.Struct, frozen=True, array_like=True):
    """Run one chunk, whose record follows. Nothing in it comes from the record's pickles."""

    job: str
    number: int
    first: int
    count: int
    #: Offsets that are not to be run.
    skip: tuple[int, ...]
    #: Offset -> attempt, where it is not the first.
    attempts: dict[int, int]
    #: Files with sealed blobs, or "".
    function: str
    tree: str
    arguments: str
    #: Offset -> how often it has raised and was to be tried again, and what it raised each time.
    tries: dict[int, int] = {}
    notes: dict[int, tuple[str, ...]] = {}
    #: Nothing is run: the slot says what the item at this offset looks like. -1 for none.
    describe: int = -1
    #: True when a slot has died while it read this chunk: then item by item, each told in the progress first.
    careful: bool = False
    #: Offsets of items that are not even to be read then.
    poison: tuple[int, ...] = ()
    #: File with what it needs of other jobs, or "".
    needs: str = ""


class Supply(msgspec.Struct, frozen=True, array_like=True):
    """What one job has for a chunk that needs some of its tasks. A file holds a list of these, one a job."""

    job: str
    name: str
    #: False when the queue does not know the job.
    known: bool = False
    #: Its number of tasks, or -1 while it was not sent whole.
    total: int = -1
    #: Why it was ended before its time, or "".
    cancel: str = ""
    #: Indices of tasks that were cancelled one by one.
    dropped: tuple[int, ...] = ()
    #: Sealed segments, and for each the mask of the outcomes that count, or nothing.
    segments: tuple[tuple[bytes, bytes], ...] = ()


class Report(msgspec.Struct, frozen=True, array_like=True):
    """Outcomes of some tasks; their sealed segment follows."""

    first: int
    count: int
    #: Packed uint32 offsets when they are not consecutive.
    scattered: bytes
    #: One byte a task.
    states: bytes
    last: bool
    #: Tasks that have raised and are to be tried again: they are not among the outcomes.
    retries: tuple[Retry, ...] = ()
    #: With the last report: true when a task of the order has no outcome.
    unfinished: bool = False
    #: Alone in a report: whether the slot is lent from now on, since its task waits for a job.
    lent: bool | None = None
    #: What an item looks like, when that was the order; there are no outcomes then, and no segment.
    item: str | None = None


class Note(msgspec.Struct, frozen=True, array_like=True):
    """A line between pool and template. `slot` is a serial number that is never used twice."""

    act: Literal["fork", "kill", "forked", "exited", "warm"]
    slot: int = 0
    #: Process id for "forked", wait status for "exited".
    value: int = 0
    #: Log file for "fork".
    log: str = ""
    #: For "exited": the most that the process had resident, in bytes.
    memory: int = 0


def send(sock: socket.socket, head: msgspec.Struct, body: Buffer = b"") -> None:
    """Write one frame, blocking until the other side has taken it."""
    encoded = encode(head)
    prefix = _PREFIX.pack(len(encoded), len(body))
    if len(body) < _JOIN_BELOW:
        sock.sendall(b"".join((prefix, encoded, body)))
    else:
        sock.sendall(prefix + encoded)
        sock.sendall(body)


def begin(sock: socket.socket, head: msgspec.Struct, body: Buffer = b"") -> list[memoryview]:
    """Write as much of a frame as the socket takes without waiting, and return the rest.

    Raises:
        OSError: the other side has gone.
    """
    encoded = encode(head)
    parts: list[Buffer] = [_PREFIX.pack(len(encoded), len(body)) + encoded, body]
    try:
        sent = sock.sendmsg(parts, [], socket.MSG_DONTWAIT)
    except BlockingIOError:
        sent = 0
    rest = []
    for part in parts:
        if sent < len(part):
            rest.append(memoryview(part)[sent:])
        sent = max(0, sent - len(part))
    return rest


def receive(sock: socket.socket) -> tuple[bytearray, bytearray] | None:
    """Read one frame, blocking; None when the other side has gone."""
    prefix = _read(sock, _PREFIX.size)
    if prefix is None:
        return None
    head_size, body_size = _PREFIX.unpack(prefix)
    head, body = _read(sock, head_size), _read(sock, body_size)
    return None if head is None or body is None else (head, body)


class Inbox:
    """Puts frames together from a socket without ever waiting for it."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def pull(self, sock: socket.socket) -> tuple[list[tuple[bytes, bytes]], bool]:
        """Return the frames that are complete, and whether the other side has gone."""
        frames: list[tuple[bytes, bytes]] = []
        for _ in range(_PULLS):  # a bound, so that one busy slot does not keep the pool from the others
            try:
                data = sock.recv(_PULL, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return frames, False
            except OSError:
                return frames, True
            if not data:
                return frames, True
            self._buffer += data
            self._cut(frames)
            if len(data) < _PULL:
                break
        return frames, False

    def _cut(self, frames: list[tuple[bytes, bytes]]) -> None:
        buffer = self._buffer
        while len(buffer) >= _PREFIX.size:
            head_size, body_size = _PREFIX.unpack_from(buffer)
            middle = _PREFIX.size + head_size
            end = middle + body_size
            if len(buffer) < end:
                return
            with memoryview(buffer) as view:
                frames.append((bytes(view[_PREFIX.size : middle]), bytes(view[middle:end])))
            del buffer[:end]


def _read(sock: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    with memoryview(data) as view:
        position = 0
        while position < size:
            try:
                count = sock.recv_into(view[position:], size - position, socket.MSG_WAITALL)
            except ConnectionError:
                return None
            if not count:
                return None
            position += count
    return data
