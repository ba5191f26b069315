"""Map a function over many inputs on many machines, from a notebook.

from yadtq_nb import Queue

queue = Queue()
job = queue.map(simulate, params, name="sweep")
job.to_frame()
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from yadtq_nb.errors import (
    BacklogError,
    CodecError,
    ConfigError,
    Crash,
    DependencyError,
    FormatError,
    ItemPickleError,
    JobCancelledError,
    JobError,
    JobExistsError,
    JobIncompleteError,
    JobInterrupt,
    JobNotFoundError,
    JobTimeoutError,
    LocalStackError,
    QueueClosedError,
    RemoteTraceback,
    ResultPickleError,
    SignatureError,
    TaskCrashedError,
    TaskError,
    TaskTimeoutError,
    TooLargeError,
    WorkbenchError,
    WorkbenchFullError,
    WorkbenchRefusedError,
    YadtqError,
)

if TYPE_CHECKING:
    from yadtq_nb.client.future import TaskFuture
    from yadtq_nb.client.job import Job
    from yadtq_nb.client.queue import Queue
    from yadtq_nb.config import Config
    from yadtq_nb.local import LocalCluster
    from yadtq_nb.model import JobState, Progress, State

__version__ = "0.1.0"

__all__ = [
    "BacklogError",
    "CodecError",
    "Config",
    "ConfigError",
    "Crash",
    "DependencyError",
    "FormatError",
    "ItemPickleError",
    "Job",
    "JobCancelledError",
    "JobError",
    "JobExistsError",
    "JobIncompleteError",
    "JobInterrupt",
    "JobNotFoundError",
    "JobState",
    "JobTimeoutError",
    "LocalCluster",
    "LocalStackError",
    "Progress",
    "Queue",
    "QueueClosedError",
    "RemoteTraceback",
    "ResultPickleError",
    "SignatureError",
    "State",
    "TaskCrashedError",
    "TaskError",
    "TaskFuture",
    "TaskTimeoutError",
    "TooLargeError",
    "WorkbenchError",
    "WorkbenchFullError",
    "WorkbenchRefusedError",
    "YadtqError",
    "__version__",
]

#: Where the names live that would import more than the standard library: they are imported on first use.
_LAZY = {
    "Config": "yadtq_nb.config",
    "Job": "yadtq_nb.client.job",
    "JobState": "yadtq_nb.model",
    "LocalCluster": "yadtq_nb.local",
    "Progress": "yadtq_nb.model",
    "Queue": "yadtq_nb.client.queue",
    "State": "yadtq_nb.model",
    "TaskFuture": "yadtq_nb.client.future",
}


# Nothing is printed into a notebook's cell from a thread: who wants the log configures logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    import importlib

    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return __all__
