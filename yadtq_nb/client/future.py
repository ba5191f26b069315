"""Futures as views on a job: real ones, made when they are asked for."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

from yadtq_nb.model import State


class _Owner(Protocol):
    name: str

    def want(self) -> None: ...
    def task_state(self, index: int) -> State: ...


class TaskFuture(Future[Any]):
    """The future of one task. concurrent.futures.wait and as_completed take it, and so does asyncio.wrap_future.

    Attributes:
        job: the job it belongs to.
        index: its index in the job, from 0.
    """

    def __init__(self, job: _Owner, index: int) -> None:
        super().__init__()
        self.job = job
        self.index = index

    @property
    def key(self) -> str:
        """Name of the task, the same in every process and every attempt."""
        return f"{self.job.name}[{self.index}]"

    @property
    def state(self) -> State:
        """State of the task, as far as this process has heard."""
        return self.job.task_state(self.index)

    def cancel(self) -> bool:
        """Return False: a task that was sent cannot be taken back yet."""
        return False

    def __repr__(self) -> str:
        return f"<TaskFuture {self.key} {self.state}>"
