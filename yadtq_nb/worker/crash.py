"""Outcomes that a node makes itself, since no slot lived to make them. Nothing is pickled here."""

from __future__ import annotations

import socket
import time
from array import array
from collections.abc import Mapping, Sequence

from yadtq_nb import codec
from yadtq_nb.errors import TaskError
from yadtq_nb.model import ErrorInfo, Lease, Segment


def outcome(
    secret: bytes, node: str, lease: Lease, crashes: Mapping[int, int], reason: str, stderr: str = ""
) -> tuple[bytes, bytes]:
    """Return states and frame of tasks that have killed their slot or node as often as is allowed.

    Args:
        crashes: offset in the chunk -> how often.
        reason: how it ended the last time.
        stderr: the last lines that it wrote.
    """
    errors = {}
    for offset, times in crashes.items():
        index = lease.head.first + offset
        message = (
            f"task {index} of job {lease.head.job_name!r} has killed its slot {times} times and is not tried again: "
            f"{reason} on {socket.gethostname()} (node {node})"
        )
        if stderr:
            message += f"\nlast lines of its output:\n{stderr}"
        errors[index] = ErrorInfo("yadtq_nb.TaskCrashedError", message, "", ours="TaskCrashedError")
    return _failed(secret, node, lease, list(crashes), errors, {lease.head.first + o: n for o, n in crashes.items()})


def late(secret: bytes, node: str, lease: Lease, offset: int) -> tuple[bytes, bytes]:
    """Return states and frame of a task that took longer than its job allows, the last time that it was tried."""
    index, limit = lease.head.first + offset, lease.head.policy.timeout
    message = "\n".join(
        (
            f"task {index} of job {lease.head.job_name!r} took longer than its timeout of {limit:g} s, and its slot "
            f"was killed on {socket.gethostname()} (node {node})",
            *lease.notes.get(offset, ()),
        )
    )
    error = ErrorInfo("yadtq_nb.TaskTimeoutError", message, "", ours="TaskTimeoutError")
    tried = lease.tries.get(offset, 0)
    return _failed(secret, node, lease, [offset], {index: error}, {index: tried + 1} if tried else {}, [limit])


def refusal(secret: bytes, node: str, lease: Lease, offsets: Sequence[int], error: TaskError) -> tuple[bytes, bytes]:
    """Return states and frame of tasks that could not be started, or whose results cannot be stored."""
    name = type(error).__name__
    info = ErrorInfo(f"yadtq_nb.{name}", str(error), "", ours=name)
    return _failed(secret, node, lease, offsets, {lease.head.first + offset: info for offset in offsets}, {})


def _failed(
    secret: bytes,
    node: str,
    lease: Lease,
    offsets: Sequence[int],
    errors: dict[int, ErrorInfo],
    attempts: dict[int, int],
    seconds: Sequence[float] = (),
) -> tuple[bytes, bytes]:
    count = len(offsets)
    states = b"F" * count
    now = time.time()
    segment = Segment(
        job=lease.head.job,
        number=lease.head.number,
        first=lease.head.first + offsets[0],
        count=count,
        scattered=array("I", [lease.head.first + offset for offset in offsets]).tobytes(),
        states=states,
        errors=errors,
        started=array("d", [now] * count).tobytes(),
        seconds=array("d", seconds or [0.0] * count).tobytes(),
        worker=node,
        attempts=attempts,
    )
    return states, codec.encode_segment(secret, segment, codec.dumps([]))
