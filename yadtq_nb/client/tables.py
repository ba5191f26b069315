"""Jobs and workers as DataFrames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from yadtq_nb.backlog.dead import Dead
from yadtq_nb.client.board import Outcomes
from yadtq_nb.client.inbox import job_state
from yadtq_nb.client.shown import place
from yadtq_nb.model import WorkerView
from yadtq_nb.workbench.jobs import JobRecord


def jobs(records: Sequence[JobRecord]) -> pd.DataFrame:
    """Return one row a job, indexed by name: counts of tasks, bytes kept, times in UTC, to the second."""
    return pd.DataFrame(
        {
            "state": [str(job_state(r)) for r in records],
            "total": pd.array([r.total if r.total >= 0 else None for r in records], dtype="Int64"),
            "queued": [max(0, max(r.total, r.fed) - r.done - r.running) for r in records],
            "running": [r.running for r in records],
            "succeeded": [r.succeeded for r in records],
            "failed": [r.failed for r in records],
            "cancelled": [r.cancelled for r in records],
            "priority": [r.lane for r in records],
            "created": _times([r.created for r in records]),
            "ended": _times([r.ended for r in records]),
            "function": [r.function_name for r in records],
            "id": [r.id for r in records],
            "bytes": [r.bytes for r in records],
            "expires": _times([r.now + r.expires if r.expires >= 0 else None for r in records]),
        },
        index=pd.Index([r.name for r in records], name="job", dtype=object),
    )


class Workers(pd.DataFrame):
    """A DataFrame that a notebook shows as the live card of its queue. What is made from it is a plain DataFrame."""

    #: What stands for it where it is displayed. A pickle leaves it behind.
    _shown_as: Any = None

    def _ipython_display_(self) -> None:
        if self._shown_as is None:
            raise NotImplementedError  # IPython goes on with the table
        self._shown_as._ipython_display_()


def workers(views: Sequence[WorkerView], shown_as: object) -> pd.DataFrame:
    """Return one row a node, indexed by id: status, slots, load; times in UTC, to the second; ages in seconds.

    Args:
        views: the nodes.
        shown_as: what stands for the DataFrame where it is displayed.
    """
    infos = [view.info for view in views]
    frame = Workers(
        {
            "status": [view.status for view in views],
            "slots": [i.slots for i in infos],
            "busy": [i.busy for i in infos],
            "done": [i.done for i in infos],
            "heartbeat_age": [round(view.heartbeat_age, 3) for view in views],
            "last_heartbeat": _times([view.last_heartbeat for view in views]),
            "started": _times([i.started for i in infos]),
            "cpu": [i.cpu for i in infos],
            "memory": [i.memory for i in infos],
            "host": [i.host for i in infos],
            "pid": [i.pid for i in infos],
            "python": [i.python for i in infos],
        },
        index=pd.Index([i.id for i in infos], name="worker", dtype=object),
    )
    frame._shown_as = shown_as
    return frame


def errors(segments: Iterable[Outcomes], *, grouped: bool) -> pd.DataFrame:
    """Return one row for each task that has failed, or for each type of error and line that raised it."""
    rows = []
    for outcomes in segments:
        segment, counted = outcomes.segment, set(outcomes.indices()) if outcomes.segment.errors else ()
        for position, index in enumerate(segment.indices() if counted else ()):
            info = segment.errors.get(index)
            if info is not None and index in counted:
                rows.append((index, segment, position, info))
    rows.sort(key=lambda row: row[0])
    frame = pd.DataFrame(
        {
            "type": [info.type_name for *_, info in rows],
            "message": [info.message for *_, info in rows],
            "where": [place(info.traceback) for *_, info in rows],
            "traceback": [info.traceback for *_, info in rows],
            "worker": [segment.worker for _, segment, *_ in rows],
            "started": _times([memoryview(segment.started).cast("d")[at] for _, segment, at, _ in rows]),
            "seconds": [memoryview(segment.seconds).cast("d")[at] for _, segment, at, _ in rows],
            "attempt": [segment.attempts.get(index, 1) for index, segment, *_ in rows],
        },
        index=pd.Index([index for index, *_ in rows], name="index", dtype="int64"),
    )
    if not grouped:
        return frame
    groups = frame.reset_index().groupby(["type", "where"], sort=False)
    found = groups.agg(count=("index", "size"), first=("index", "min"), message=("message", "first"))
    return found.sort_values(["count", "first"], ascending=[False, True])


def dead(notes: Sequence[Dead]) -> pd.DataFrame:
    """Return one row a refused record, newest first; time in UTC, to the second; size in bytes of the original."""
    newest = list(reversed(notes))
    return pd.DataFrame(
        {
            "time": _times([n.time for n in newest]),
            "partition": [n.partition for n in newest],
            "offset": [n.offset for n in newest],
            "size": [n.size for n in newest],
            "error": [n.error for n in newest],
            "reason": [n.reason for n in newest],
            "job": [n.job_name or n.job for n in newest],
            "chunk": pd.array([n.chunk if n.chunk >= 0 else None for n in newest], dtype="Int64"),
            "node": [n.node for n in newest],
            "topic_id": [n.topic_id for n in newest],
        }
    )


def _times(seconds: Sequence[float | None]) -> pd.DatetimeIndex:
    return pd.to_datetime(np.array(seconds, dtype=np.float64).round(), unit="s", utc=True)
