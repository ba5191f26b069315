"""The queue: the one object that a notebook makes."""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, Final, Unpack

from yadtq_nb import config as configuration
from yadtq_nb.client import options
from yadtq_nb.client.future import TaskFuture
from yadtq_nb.client.inbox import PATIENCE
from yadtq_nb.client.job import Job
from yadtq_nb.client.options import ChunkSize, ErrorTypes, Given, IfExists, JobOptions, Seconds
from yadtq_nb.config import Config
from yadtq_nb.errors import ConfigError, JobNotFoundError, YadtqError
from yadtq_nb.model import CallStyle, Priority
from yadtq_nb.needs import Later
from yadtq_nb.workbench.connection import patiently

if TYPE_CHECKING:
    import pandas as pd

    from yadtq_nb.client.link import Link
    from yadtq_nb.client.sender import Packet
    from yadtq_nb.notebook.live import QueueCard


class Queue:
    """A named line of work, served by workers anywhere.

    With nothing given and nothing configured, a local stack on this machine serves it, and is started when needed.

        queue = Queue()
        job = queue.map(simulate, params, name="sweep")
        job.to_frame()

    A Queue can be pickled and used inside a task; in a forked process it opens clients of its own.
    """

    def __init__(
        self,
        name: str = "default",
        *,
        kafka: str | None = None,
        redis: str | None = None,
        secret: str | None = None,
        kafka_options: Mapping[str, str | int | bool] | None = None,
        redis_options: Mapping[str, Any] | None = None,
        config: Config | None = None,
    ) -> None:
        """Name the queue and, if need be, its servers.

        Args:
            name: letters, digits, dots, dashes and underscores.
            kafka: bootstrap servers, host:port with commas between; else YADTQ_KAFKA, else yadtq.toml.
            redis: URL; else YADTQ_REDIS, else yadtq.toml.
            secret: what chunks and results are signed with; else YADTQ_SECRET, else yadtq.toml.
            kafka_options: settings for librdkafka, such as users and certificates; each else from
                YADTQ_KAFKA_OPTIONS, else yadtq.toml.
            redis_options: settings for redis-py, likewise.
            config: all settings at once.

        Raises:
            ConfigError: a setting is missing or wrong.
            LocalStackError: the local stack cannot be started.
        """
        if not name or len(name) > 100 or not set(name) <= _NAME_CHARACTERS:
            raise ConfigError(f"queue name {name!r}: use 1 to 100 letters, digits, dots, dashes and underscores")
        self.name = name
        self._given = config or configuration.load(
            kafka=kafka, redis=redis, secret=secret, kafka_options=kafka_options, redis_options=redis_options
        )
        self._lock = threading.Lock()
        self._opened: tuple[int, Config, Link] | None = None
        self._live: QueueCard | None = None
        if self._given is None:
            self._settings()

    # Sending.

    def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any],
        name: str | None = None,
        if_exists: IfExists | None = None,
        kwargs: dict[str, Any] | None = None,
        chunksize: ChunkSize = "auto",
        retries: int = 0,
        backoff: Seconds = 1.0,
        max_delay: Seconds = 60.0,
        retry_on: ErrorTypes = Exception,
        timeout: Seconds | None = None,
        max_crashes: int | None = None,
        start_after: Seconds | datetime.datetime | None = None,
        deadline: Seconds | datetime.datetime | None = None,
        priority: Priority = "normal",
    ) -> Job:
        """Call fn on each item, on the workers. Returns at once.

        Args:
            fn: a function, a coroutine function, or anything that can be called.
            iterables: as for the builtin map: the shortest one ends it. Sized ones are sent whole; an iterator is
                drawn as fast as its tasks are done. A future or job of this queue, anywhere in an item, is awaited
                on the queue, without a slot held meanwhile, and passed by value: of a job the list of its results. A
                job as an iterable gives its values one by one, so that the new tasks begin before it ends. Where it
                failed or was cancelled, the task fails with DependencyError.
            name: of the job; made from fn's name and two words when not given. When a job has it already, running or
                done, and its function, items and options are the same, that job is returned: a cell can be run again.
                The same means: the same code, whatever its comments and docstrings, of fn and of all functions, classes
                and local modules that it uses; the same defaults, closures, globals and kwargs; items that are equal.
                Not chunksize, priority, start_after and deadline.
            if_exists: what to do when the name is taken, whatever differs: "attach" returns the job that has it,
                "replace" cancels and deletes that one and runs this one, "new" adds -2, -3, ... to the name.
            kwargs: keyword arguments that are the same for every call; futures and jobs as above.
            chunksize: tasks that travel together, at most 2,000; measured by default.
            retries: how often a task that raises is tried again, it alone; no slot waits meanwhile. The last error
                is the task's, with the earlier ones as its notes.
            backoff: seconds (or a timedelta) before the first retry. It doubles with each, and a part of it is
                left to chance.
            max_delay: the longest wait before a retry, in seconds.
            retry_on: exception classes after which a task is tried again; any Exception by default.
            timeout: seconds that one attempt of a task may take. Then its slot is killed, and the task fails with
                TaskTimeoutError, which is a builtin TimeoutError too, or is tried again. A coroutine is cancelled.
            max_crashes: how often a task may kill its slot before it fails with TaskCrashedError; 2 by default.
            start_after: seconds from now, or a datetime, before which no task starts.
            deadline: seconds from now, or a datetime, at which the whole job is ended as by job.cancel(); then
                results() raises JobTimeoutError, with errors="skip" or "return" it gives what there is.
            priority: "high", "normal" or "low": what is high overtakes all that waits and is not, whatever runs is left
                alone. A job that a task sends comes before all of them, the last one first, since someone who has a
                slot may wait for it.

        Raises:
            JobExistsError: the name is taken by another job, or it cannot be told whether it is another.
            JobError: a future or job belongs to another queue.
            TypeError, ValueError: an option is not what it must be.
            WorkbenchError, BacklogError: Redis or Kafka cannot be reached.
        """
        if not iterables:
            raise TypeError("map() needs at least one iterable beside the function")
        checked = options.check(
            name=name,
            if_exists=if_exists,
            chunksize=chunksize,
            retries=retries,
            backoff=backoff,
            max_delay=max_delay,
            retry_on=retry_on,
            timeout=timeout,
            max_crashes=max_crashes,
            start_after=start_after,
            deadline=deadline,
            priority=priority,
        )
        iterables = tuple(self._values_of(iterable) for iterable in iterables)
        items = iterables[0] if len(iterables) == 1 else _zipped(iterables)
        return self._send(fn, items, "item" if len(iterables) == 1 else "star", kwargs, checked)

    def starmap(
        self,
        fn: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        /,
        *,
        kwargs: dict[str, Any] | None = None,
        **given: Unpack[Given],
    ) -> Job:
        """Call fn(*item) for each item, on the workers. Returns at once; see map, also for the options."""
        return self._send(fn, self._values_of(iterable), "star", kwargs, options.check(**given))

    def map_frame(
        self,
        fn: Callable[..., Any],
        df: pd.DataFrame,
        /,
        *,
        by: Any = None,
        chunks: int | None = None,
        kwargs: dict[str, Any] | None = None,
        **given: Unpack[Given],
    ) -> Job:
        """Call fn on each row, group or block of a DataFrame, on the workers. Returns at once.

        The job is one as of map, with a task for each part: job.results() gives what fn returned, in order, and
        job.to_frame() the frame put together again, here or wherever the job is found:

            queue.map_frame(score, df).to_frame()                    score(row: Series)
            queue.map_frame(fit, df, by="city").to_frame()           fit(group: DataFrame), the column city included
            queue.map_frame(model.predict, df, chunks=16).to_frame() predict(block: DataFrame)

        What to_frame() gives, by what fn returns:

            =====================  =====================  ===============================  ======================
            fn returns             row                    group                            block
            =====================  =====================  ===============================  ======================
            scalar, list           column `value`, df's   column `value`, indexed by key   column `value`, a row
                                   index                                                   for each block
            dict, Series           a column for each key, a row for each group, indexed    a row for each block
                                   df's index             by key
            frame, Series, array   (a frame's rows below  df's index and order             df's index and order
            with the part's rows   row's label)
            frame with others      rows below row's label rows below the group's key       rows one below the other
            =====================  =====================  ===============================  ======================

        An array counts as having the part's rows when it is as long; it gives the column `value`, or columns 0, 1, ...
        Labels that df's index has more than once stay so. Where fn failed, rows are missing values, or not there when
        nobody knows how many there were; a warning says so, and to_frame(meta=True) has one row for each part, with
        state and error. An empty frame is one empty block, no row and no group.

        Args:
            fn: called with a Series (as by DataFrame.apply with axis=1: of the columns' common dtype, with the row's
                label as its name) or a frame. A group has its key as its `name`, as in pandas.
            by: what DataFrame.groupby takes: a column, a list of them, a function. Groups are sorted by key. Unlike in
                pandas, rows with a missing key are a group, too. Categories that do not occur are none.
            chunks: the number of blocks of consecutive rows. A block should be worth its way: some MB, some seconds.
            kwargs: keyword arguments that are the same for every call.
            given: see map.

        Raises:
            TypeError, ValueError: df is no DataFrame; both by and chunks; and as map.
            KeyError: df has no such column.
        """
        from yadtq_nb.client import fan

        chosen = options.check(**given)
        parts, total = fan.fan_out(df, by, chunks)
        return self._send(fn, parts, "part", kwargs, chosen, total=total)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call fn(*args, **kwargs) on a worker. Returns its future at once.

        Everything is passed to fn; options go through queue.options(name=..., retries=...).submit(fn, ...). A future
        or job of this queue among the arguments is awaited on the queue, and passed by value; see map.

        Raises:
            JobError: a future or job belongs to another queue.
        """
        return self._submit(fn, args, kwargs, options.defaults())

    def options(self, **given: Unpack[Given]) -> Options:
        """Return a view of this queue on which map, starmap and submit use these options; see map for them.

        Raises:
            TypeError, ValueError: an option is not what it must be.
        """
        options.check(**given)
        return Options(self, given)

    def _submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], chosen: JobOptions) -> Any:
        _check_call(fn)
        link = self._link()
        key = _key(fn, [(args, kwargs)], {}, "call", chosen)
        packet = link.packet(fn, {}, "call", link.environment(fn), chosen, key)
        if not packet.named and not packet.deadline:
            return link.post_one(packet, (args, kwargs))[0]
        link.check(args, kwargs)
        return self._post(link, packet, [(args, kwargs)], 1, 1, chosen.if_exists)[0]

    def _send(
        self,
        fn: Callable[..., Any],
        iterable: Iterable[Any],
        style: CallStyle,
        kwargs: dict[str, Any] | None,
        chosen: JobOptions,
        *,
        total: int | None = None,
    ) -> Job:
        _check_call(fn)
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TypeError(f"kwargs must be a mapping of keyword arguments, not {kwargs!r}")
        # A copy, so that what the caller does to the list afterwards changes nothing.
        items = list(iterable) if isinstance(iterable, Sized) else iter(iterable)
        total = len(items) if isinstance(items, list) else total
        link = self._link()
        if isinstance(items, list) and not _BY_VALUE.isdisjoint(map(type, items)):
            link.check(*(item for item in items if type(item) in _BY_VALUE))
        key = _key(fn, items, kwargs or {}, style, chosen)
        packet = link.packet(fn, kwargs or {}, style, link.environment(fn, items), chosen, key)
        return self._post(link, packet, items, total, chosen.chunksize, chosen.if_exists)

    def _values_of(self, iterable: Iterable[Any]) -> Iterable[Any]:
        """Return what is to be mapped over: a job stands for its values."""
        if not isinstance(iterable, Job):
            return iterable
        self._link().check(iterable)
        return iterable.later()

    def _post(
        self,
        link: Link,
        packet: Packet,
        items: list[Any] | Iterator[Any],
        total: int | None,
        chunksize: int | None,
        if_exists: IfExists | None,
    ) -> Job:
        try:
            claimed = link.claim(packet, total, if_exists)
            if isinstance(claimed, Job):
                return claimed
            return link.post(claimed, items, total, chunksize)
        except BaseException:  # Ctrl-C, or a server that has gone: the same cell can be run again
            link.withdraw(packet)
            raise

    # Finding.

    def job(self, name_or_id: str) -> Job:
        """Return a job of this queue, whoever has sent it.

        Raises:
            JobNotFoundError: the queue knows no such job.
            WorkbenchError: Redis cannot be reached.
        """
        from yadtq_nb.client.job import attach

        if not isinstance(name_or_id, str):
            raise TypeError(f"a job is asked for by its name or id, a string, not {name_or_id!r}")
        link = self._link()
        found = patiently(lambda: link.store.find(name_or_id), PATIENCE)
        record = patiently(lambda: link.store.record(found), PATIENCE) if found else None
        if not found:
            # The name of a single call was made up, and is taken from nobody: it stands in its record only.
            listed = patiently(link.store.records, PATIENCE)
            record = next((one for one in listed if one.name == name_or_id), None)
        if record is None:
            raise JobNotFoundError(
                f"queue {self.name!r} knows no job {name_or_id!r}; queue.jobs() lists those that it knows",
                job=name_or_id,
            )
        return attach(link, record)

    def jobs(self) -> pd.DataFrame:
        """Return the jobs of this queue, newest first: counts, bytes kept, and when each expires.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        from yadtq_nb.client import tables

        return tables.jobs(self._link().store.records())

    def workers(self) -> pd.DataFrame:
        """Return the nodes that serve this queue, and those that were seen within the last day.

        As the last expression of a cell it is the live card of the whole queue; what is made from it (a selection, a
        copy) is shown as any DataFrame.

        Raises:
            WorkbenchError: Redis cannot be reached.
        """
        from yadtq_nb.client import tables

        return tables.workers(self._link().store.workers(), self)

    def dead(self) -> pd.DataFrame:
        """Return the records that workers have refused, newest first: when, where from, why, size, job if known.

        Raises:
            BacklogError: Kafka cannot be reached.
        """
        from yadtq_nb.backlog.dead import read_dead
        from yadtq_nb.client import tables

        return tables.dead(list(read_dead(self._settings(), self.name)))

    # Clients.

    def close(self) -> None:
        """Close this process's clients of the queue; jobs go on."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid():
            opened[2].close()

    def _leave(self) -> None:
        """Close at once: the servers are about to end."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid():
            opened[2].leave()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.name, self._settings())

    def _ipython_display_(self) -> None:
        """Show the whole queue, live: all workers, and all jobs of the last day."""
        from yadtq_nb.client.shown import Overview
        from yadtq_nb.notebook.live import display_queue

        self._live = display_queue(Overview(self._link()), self._live)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Return the HTML and text forms, for hosts that do not ask for _ipython_display_."""
        from yadtq_nb.client.shown import Overview
        from yadtq_nb.notebook.markup import line_bundle, static_bundle
        from yadtq_nb.notebook.snapshot import queue_snapshot

        try:
            return static_bundle(queue_snapshot(Overview(self._link())))
        except YadtqError as exc:
            return line_bundle(f"<Queue {self.name!r}: {exc}>")

    def __repr__(self) -> str:
        where = "the local stack" if self._given is None else self._given.kafka
        return f"<Queue {self.name!r} on {where}>"

    def _settings(self) -> Config:
        """Return where the servers are; the local stack is started if it is not up."""
        if self._given is not None:
            return self._given
        from yadtq_nb import local

        return local.ensure_up(self.name)

    def _link(self) -> Link:
        """Return this process's clients, opened on first use, and anew after a fork or when the servers have moved."""
        from yadtq_nb.client.link import Link

        config = self._settings()
        with self._lock:
            if self._opened is not None and self._opened[:2] == (os.getpid(), config):
                return self._opened[2]
            link = Link(config, self.name, wake=self._settings if self._given is None else None)
            self._opened = (os.getpid(), config, link)
        return link


class Options:
    """A queue with options for what is sent through it."""

    def __init__(self, queue: Queue, given: Given) -> None:
        self._queue = queue
        self._given = given

    def map(self, fn: Callable[..., Any], /, *iterables: Iterable[Any], kwargs: dict[str, Any] | None = None) -> Job:
        """See Queue.map."""
        return self._queue.map(fn, *iterables, kwargs=kwargs, **self._given)

    def starmap(
        self, fn: Callable[..., Any], iterable: Iterable[Iterable[Any]], /, *, kwargs: dict[str, Any] | None = None
    ) -> Job:
        """See Queue.starmap."""
        return self._queue.starmap(fn, iterable, kwargs=kwargs, **self._given)

    def map_frame(
        self,
        fn: Callable[..., Any],
        df: pd.DataFrame,
        /,
        *,
        by: Any = None,
        chunks: int | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Job:
        """See Queue.map_frame."""
        return self._queue.map_frame(fn, df, by=by, chunks=chunks, kwargs=kwargs, **self._given)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """See Queue.submit."""
        # Options are a part of the queue. A delay is counted from here.
        return self._queue._submit(fn, args, kwargs, options.check(**self._given))


#: What is awaited where it is an argument.
_BY_VALUE: Final = frozenset((TaskFuture, Later, Job))
_NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def _check_call(fn: Callable[..., Any]) -> None:
    if not callable(fn):
        raise TypeError(f"the first argument must be callable, not {type(fn).__name__}")


def _key(
    fn: Callable[..., Any],
    items: list[Any] | Iterator[Any],
    kwargs: Mapping[str, Any],
    style: CallStyle,
    chosen: JobOptions,
) -> bytes:
    """Return what a job is compared by when its name is wanted again; nothing for one that nobody named."""
    if chosen.name is None:
        return b""
    from yadtq_nb.client import sameness
    from yadtq_nb.client.link import function_name

    return sameness.of(fn, function_name(fn), items, kwargs=kwargs, style=style, options=chosen).packed()


def _zipped(iterables: tuple[Iterable[Any], ...]) -> Iterable[Any]:
    """Zip as map does; the result has a length when all have one."""
    zipped = zip(*iterables, strict=False)
    return list(zipped) if all(isinstance(iterable, Sized) for iterable in iterables) else zipped


def _rebuild(name: str, config: Config) -> Queue:
    return Queue(name, config=config)
