"""Outcomes that a node makes itself, since no slot lived to make them. Nothing is pickled here."""

from __future__ import annotations

import socket
import time
from array import array
from collections.abc import Sequence
from typing import Final

import msgspec

from yadtq_nb import codec
from yadtq_nb.errors import Crash, TaskError
from yadtq_nb.model import WHOLE, Crashed, ErrorInfo, Lease, Segment
from yadtq_nb.slots import memory

_SIGKILL: Final = "killed by SIGKILL"


def outcome(secret: bytes, node: str, lease: Lease, offsets: list[int], item: str | None) -> tuple[bytes, bytes]:
    """Return states and frame of tasks that have killed their slot or node as often as is allowed.

    Args:
        offsets: one, or several when none in particular is to blame.
        item: what it looks like, or None when that could not be found out.
    """
    blamed = {offset: offset if offset in lease.crashes else WHOLE for offset in offsets}
    errors = {lease.head.first + o: _crashed(lease, lease.head.first + o, of, item) for o, of in blamed.items()}
    attempts = {lease.head.first + o: lease.crashes[of] for o, of in blamed.items()}
    # Of a death that is the whole chunk's nobody knows whose output it was: the last lines are in the error.
    logs = {lease.head.first + o: log for o, of in blamed.items() if of != WHOLE and (log := _last_lines(lease, of))}
    return _failed(secret, node, lease, offsets, errors, attempts, logs=logs)


def _last_lines(lease: Lease, blamed: int) -> bytes:
    stderr = next((death.stderr for death in reversed(lease.deaths.get(blamed, ())) if death.stderr), "")
    return stderr.encode("utf-8", "replace")


def _crashed(lease: Lease, index: int, blamed: int, item: str | None) -> ErrorInfo:
    times, deaths = lease.crashes[blamed], lease.deaths.get(blamed, ())
    stderr = next((death.stderr for death in reversed(deaths) if death.stderr), "")
    lines = [
        f"task {index} of job {lease.head.job_name!r} has killed its slot {times} times and is not tried again: "
        f"{deaths[-1].reason if deaths else 'nobody knows how'}",
        f"its item: {item or 'cannot be shown: reading it kills its slot or node, or takes too long'}",
        *(f"{number}. {_told(death)}" for number, death in enumerate(deaths, times - len(deaths) + 1)),
    ]
    if any(death.reason == _SIGKILL for death in deaths):
        lines.append("Linux sends SIGKILL when the machine, or the container, has no more memory: see its log (dmesg)")
    if any(death.reason.startswith(memory.OVER) for death in deaths):
        lines.append(
            "have it hold less at a time, or give slots more: yadtq worker --memory-limit, and fewer --slots where "
            "the machine has no more"
        )
    if stderr:
        lines.append(f"last lines of its output:\n{stderr}")
    crashed = Crashed(item or "", deaths, stderr)
    return ErrorInfo("yadtq_nb.TaskCrashedError", "\n".join(lines), "", ours="TaskCrashedError", crashed=crashed)


def _told(death: Crash) -> str:
    most = f", with {memory.megabytes(death.memory)} at most" if death.memory else ""
    return f"{death.reason} on {death.host or 'a host that is not known any more'} (node {death.node}){most}"


def late(secret: bytes, node: str, lease: Lease, offset: int, log: bytes) -> tuple[bytes, bytes]:
    """Return states and frame of a task that took longer than its job allows, the last time that it was tried.

    Args:
        log: what it had written by then.
    """
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
    return _failed(
        secret, node, lease, [offset], {index: error}, {index: tried + 1} if tried else {}, [limit], {index: log}
    )


def refusal(secret: bytes, node: str, lease: Lease, offsets: Sequence[int], error: TaskError) -> tuple[bytes, bytes]:
    """Return states and frame of tasks that could not be started, or whose results cannot be stored."""
    name = type(error).__name__
    info = ErrorInfo(f"yadtq_nb.{name}", str(error), "", ours=name)
    return _failed(secret, node, lease, offsets, {lease.head.first + offset: info for offset in offsets}, {})


def without_logs(secret: bytes, frame: bytes) -> bytes:
    """Return the sealed segment of outcomes without what their tasks have written."""
    segment, values = codec.decode_segment(secret, frame)
    return codec.encode_segment(secret, msgspec.structs.replace(segment, logs={}), [values])


def _failed(
    secret: bytes,
    node: str,
    lease: Lease,
    offsets: Sequence[int],
    errors: dict[int, ErrorInfo],
    attempts: dict[int, int],
    seconds: Sequence[float] = (),
    logs: dict[int, bytes] = {},  # noqa: B006  # it is only read
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
        logs={index: log for index, log in logs.items() if log},
    )
    return states, codec.encode_segment(secret, segment, codec.dumps([]))
