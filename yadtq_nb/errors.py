"""Every error that yadtq-nb raises, in one tree.

YadtqError
├── ConfigError (ValueError)            a setting is missing or wrong
├── LocalStackError                     the stack on this machine cannot start
├── BacklogError (ConnectionError)      Kafka cannot be reached or refuses
├── WorkbenchError (ConnectionError)    Redis cannot be reached or refuses
│   ├── WorkbenchFullError              it is full
│   └── WorkbenchRefusedError           it refuses the password, or its certificate is not trusted
├── CodecError (ValueError)             bytes that cannot be read
│   ├── SignatureError                  signed with another secret, or not at all
│   └── FormatError                     malformed, truncated, or of another version
├── JobError                            about a whole job
│   ├── JobExistsError                  the name is taken
│   ├── JobNotFoundError (LookupError)  no such job on this queue
│   ├── JobIncompleteError              its client died, or its iterator raised, while it was being sent
│   ├── QueueClosedError                this process hears no more of it
│   ├── JobCancelledError               someone has cancelled it
│   └── JobTimeoutError (TimeoutError)  not finished in the time that was given
└── TaskError                           one task failed, and its own exception cannot be shown
    ├── DependencyError                 what it needs of another task is not there: that one failed, or was cancelled
    ├── TaskCrashedError                it killed its slot too often
    ├── TaskTimeoutError (TimeoutError) it took longer than timeout=
    ├── ItemPickleError                 its item cannot be pickled
    ├── TooLargeError (ValueError)      its argument or result is larger than Redis takes
    └── ResultPickleError               its result cannot be pickled

A task's own exception is raised as itself, with a RemoteTraceback as its cause. Ctrl-C while a job is waited for raises
JobInterrupt, which is a KeyboardInterrupt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class YadtqError(Exception):
    """Base of every error of this package."""


class ConfigError(YadtqError, ValueError):
    """A setting is missing or wrong; the message names it and the remedy."""


class LocalStackError(YadtqError):
    """The local stack cannot be started or has died; the message names the log to read."""


class BacklogError(YadtqError, ConnectionError):
    """Kafka cannot be reached, or refused what was asked."""


class WorkbenchError(YadtqError, ConnectionError):
    """Redis cannot be reached, or refused what was asked."""


class WorkbenchFullError(WorkbenchError):
    """Redis is full: nothing more can be sent until old jobs have gone."""


class WorkbenchRefusedError(WorkbenchError):
    """Redis refuses the user or password, or shows a certificate that is not trusted: trying again does not help."""


class CodecError(YadtqError, ValueError):
    """Bytes that cannot be read."""


class SignatureError(CodecError):
    """A record was signed with another secret, or not at all: it is never unpickled."""


class FormatError(CodecError):
    """A record is malformed, truncated, or of a format version that is not known here."""


class JobError(YadtqError):
    """Something is wrong with a whole job.

    Attributes:
        job: the job's name or id.
    """

    def __init__(self, message: str, *, job: str = "") -> None:
        super().__init__(message)
        self.job = job

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class JobExistsError(JobError):
    """The name is taken by another job of this queue, or by one of which it cannot be told whether it is another.

    Attributes:
        differing: what differs, in words; empty where it cannot be told.
    """

    def __init__(self, message: str, *, job: str = "", differing: Sequence[str] = ()) -> None:
        super().__init__(message, job=job)
        self.differing = tuple(differing)


class JobNotFoundError(JobError, LookupError):
    """The queue knows no job of that name or id."""


class QueueClosedError(JobError):
    """This process has closed its queue, and hears no more of the job, which goes on."""


class JobIncompleteError(JobError):
    """The client died while it was still sending items, or its iterator raised, so later items are missing."""


class JobInterrupt(KeyboardInterrupt):
    """Ctrl-C, or an interrupted kernel, while a job was waited for: the job goes on."""


class JobCancelledError(JobError):
    """The job was cancelled, so some of its tasks have no outcome."""


class JobTimeoutError(JobError, TimeoutError):
    """The job, or one of its tasks, was not finished within the time that was given."""


class TaskError(YadtqError):
    """One task failed, and its own exception could not be brought back as itself.

    Attributes:
        index: index of the task in its job, or None.
        type_name: qualified name of the exception's type on the worker.
        remote_traceback: the traceback as text, as the worker saw it.
    """

    def __init__(
        self,
        message: str,
        *,
        index: int | None = None,
        type_name: str = "",
        remote_traceback: str = "",
    ) -> None:
        super().__init__(message)
        self.index = index
        self.type_name = type_name
        self.remote_traceback = remote_traceback

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class DependencyError(TaskError):
    """The task was not run: one of its arguments is a future or job that has no value.

    The text of the traceback shows what was raised there, and there again, down to the first.

    Attributes:
        needs: what it needed that failed, and what that one needed, and so on, such as ("clean[3]", "load[3]").
        reason: why the last of them has no value.
    """

    def __init__(self, message: str, *, needs: tuple[str, ...] = (), reason: str = "", **facts: Any) -> None:
        super().__init__(message, **facts)
        self.needs = needs
        self.reason = reason


class Crash(NamedTuple):
    """How a task has killed its slot or its node, once."""

    #: Host of the node.
    host: str
    #: Id of the node.
    node: str
    #: Such as "killed by SIGSEGV", "exited with status 3", or "its node died or was cut off".
    reason: str
    #: Bytes: the most that the slot's process had resident in its life; what the slot used, with all that it had
    #: started, when it was stopped for the memory limit; 0 when nobody could tell, as of a node that has died.
    memory: int = 0
    #: When it was told, in seconds since the epoch by the workbench's clock.
    time: float = 0.0
    #: The last lines that the slot wrote while it had the task; kept of the latest crash that left some.
    stderr: str = ""


class TaskCrashedError(TaskError):
    """The task killed its slot (segfault, out of memory, os._exit) or its node as often as is allowed.

    Attributes:
        item: the task's item as text, shortened; "" when it could not be shown, and the message says why.
        crashes: each time, in order: host, node, reason, memory. Of very many, the first few and the latest.
        stderr: the last 20 lines that its slot had written.
    """

    def __init__(
        self, message: str, *, item: str = "", crashes: tuple[Crash, ...] = (), stderr: str = "", **facts: Any
    ) -> None:
        super().__init__(message, **facts)
        self.item = item
        self.crashes = crashes
        self.stderr = stderr


class TaskTimeoutError(TaskError, TimeoutError):
    """The task took longer than the time that was given by timeout=, and its slot was killed."""


class ItemPickleError(TaskError):
    """The item cannot be pickled, so the task could not be sent."""


class TooLargeError(TaskError, ValueError):
    """An argument, function or result is larger than Redis takes at once; the message names both sizes."""


class ResultPickleError(TaskError):
    """The task returned something that cannot be pickled."""


class RemoteTraceback(Exception):  # noqa: N818  # it is no error of its own, but the cause of one
    """Cause of an exception that was raised on a worker: prints the worker's traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    """Unpickle an error whose constructor takes keyword-only facts."""
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error
