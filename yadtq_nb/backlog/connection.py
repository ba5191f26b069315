"""Settings and errors at Kafka's door, and the topics of a queue."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import msgspec
from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec  # type: ignore[attr-defined]  # exported, but not in __all__

from yadtq_nb.config import Config
from yadtq_nb.errors import BacklogError
from yadtq_nb.model import LANES, Lane

_T = TypeVar("_T")

_library_log = logging.getLogger("yadtq_nb.kafka")

#: Seconds that Kafka may take to answer before it counts as away.
TIMEOUT: Final = 10.0
#: Bytes of refused records that are kept.
_DEAD_BYTES: Final = str(256 * 1024 * 1024)
#: Seconds that a client may take to end.
_ENDING: Final = 3.0
#: Seconds between looks at what has gone wrong while an answer is waited for.
_LOOK: Final = 0.1
#: What a broker means for good: waiting does not help.
_REFUSALS: Final = (KafkaError._AUTHENTICATION, KafkaError._SSL)


class Topic(msgspec.Struct, frozen=True):
    """The tasks topic of a queue, in its present life: made again, it has another id and its offsets start at 0.

    On a broker in memory it has another name, too: see Topics.
    """

    name: str
    id: str
    partitions: int


@contextlib.contextmanager
def translate_kafka_errors(config: Config) -> Iterator[None]:
    """Raise ours, from theirs."""
    try:
        yield
    except KafkaException as exc:
        error = exc.args[0] if exc.args else exc
        reason = error.str() if isinstance(error, KafkaError) else str(error)
        raise BacklogError(f"Kafka at {config.kafka} cannot be used: {reason}; {_remedy(error)}") from exc
    except TimeoutError as exc:
        raise BacklogError(
            f"Kafka at {config.kafka} did not answer in time; check YADTQ_KAFKA (or kafka=) and the broker"
        ) from exc


def _remedy(error: object) -> str:
    """Say what to do about an error of the library."""
    options = "kafka_options (YADTQ_KAFKA_OPTIONS, or [kafka_options] in yadtq.toml)"
    code = error.code() if isinstance(error, KafkaError) else None
    if code == KafkaError._AUTHENTICATION:
        return f"check sasl.username, sasl.password and sasl.mechanism in {options}"
    if code == KafkaError._SSL:
        return f"check ssl.ca.location in {options}: it must name the authority that signed the broker's certificate"
    if code == KafkaError._INVALID_ARG:
        return f"check {options}"
    if code in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT):
        # To a broker that wants TLS or a password, silence is all that is heard without.
        return f"check YADTQ_KAFKA (or kafka=), the broker, and security.protocol in {options}"
    return "check YADTQ_KAFKA (or kafka=) and the broker"


def passes_by_itself(error: KafkaError) -> bool:
    """Tell whether an error may be gone without anyone doing anything about it."""
    return error.retriable() or error.code() in (
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TRANSPORT,
        KafkaError._RESOLVE,
        KafkaError._PARTITION_EOF,
        KafkaError._TIMED_OUT,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    )


def settings(config: Config, **more: Any) -> dict[str, Any]:
    """Return librdkafka's settings: ours, then the user's."""
    # Through logging: librdkafka's own way, standard error, would write into whatever cell runs.
    quiet = {"logger": _library_log, "log_level": 4, "log.connection.close": False}
    # By default it looks for a broker that was away for long only every ten seconds.
    soon = {"reconnect.backoff.max.ms": 1_000}
    return {"bootstrap.servers": config.kafka, **quiet, **soon, **more, **config.kafka_options}


def reading(config: Config, group: str, **more: Any) -> dict[str, Any]:
    """Return the settings of a consumer that nobody commits for unasked."""
    # What others write to our topics in a transaction, and do not end, holds up nothing that comes after it.
    ours = {"group.id": group, "enable.auto.commit": False, "isolation.level": "read_uncommitted"}
    return settings(config, **ours, **more)


def let_go(held: list[_T], end: Callable[[_T], object] = lambda _: None, *, wait: float = _ENDING) -> None:
    """End a client of librdkafka, given as the only item of a list, and wait for it so many seconds at most.

    One whose broker went away at the wrong moment waits for a thread of its own for ever (librdkafka 2.16): that costs
    some memory, and must not cost the thread that wants to be rid of it.
    """

    def run() -> None:
        client = held.pop()
        with contextlib.suppress(KafkaException, RuntimeError):
            end(client)
        del client

    thread = threading.Thread(target=run, name="yadtq-ending", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends, and the client with it
        return
    thread.join(wait)


def tasks_topic(queue: str, lane: Lane) -> str:
    """Chunks that wait in a lane."""
    return f"yadtq.{queue}.tasks" if lane == "normal" else f"yadtq.{queue}.tasks.{lane}"


def jobs_topic(queue: str) -> str:
    """Manifests, seals and blobs, compacted: what a wiped workbench is filled from again."""
    return f"yadtq.{queue}.jobs"


def events_topic(queue: str) -> str:
    """The flight recorder."""
    return f"yadtq.{queue}.events"


def dead_topic(queue: str) -> str:
    """Records that were refused, with the reason."""
    return f"yadtq.{queue}.dead"


#: Seconds between looks for a topic that was just made.
_LOOK_AGAIN: Final = 0.05
#: What the name of a tasks topic ends in where each of its lives has another: when it was made, and a random number.
_LIFE: Final = re.compile(r"-[0-9a-f]{24}$")


class Topics:
    """The topics of one lane of a queue, looked at and made where they are missing.

    Tansu 0.6 takes records for a topic that was deleted, and they get in the way of the next topic of that name: its
    records lie one over another, and some are lost. So each life of a tasks topic has a name of its own there, the
    lane's with a suffix; where two were made at once, the first by name holds.
    """

    def __init__(self, config: Config, queue: str, lane: Lane = "normal") -> None:
        self._config = config
        self._queue = queue
        self._lane = lane
        self._tasks = tasks_topic(queue, lane)
        self._renames = config.reading == "wake"
        #: The queue's other lanes, as far as they were there at the last look; only the normal lane looks for them.
        self.others: frozenset[Lane] = frozenset()
        #: What went wrong last on the way to the broker: the library itself says no more than that it took too long.
        self._trouble: KafkaError | None = None
        self._connect()

    def _connect(self) -> None:
        with translate_kafka_errors(self._config):
            # The futures of its calls fail once the client is collected: it is kept.
            self._admin = AdminClient(settings(self._config, error_cb=self._note_trouble))

    def ensure(self, patience: float = 0.0) -> Topic:
        """Make what is missing, and return the tasks topic as it is.

        Args:
            patience: seconds for which it is tried again, should Kafka go away meanwhile.

        Raises:
            BacklogError: Kafka cannot be reached or refuses.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                return self._ensure()
            except BacklogError as exc:
                error = exc.__cause__.args[0] if isinstance(exc.__cause__, KafkaException) else None
                passes = isinstance(error, KafkaError) and passes_by_itself(error)
                if not passes or time.monotonic() > deadline:
                    raise
                _library_log.warning("waiting: %s", exc)
                time.sleep(_LOOK)

    def _ensure(self) -> Topic:
        try:
            with translate_kafka_errors(self._config):
                found = self._found_or_made()
        except BacklogError:
            # A client that a broker has told of no controller, as one does that was stopped for a while and goes on,
            # waits for one, and asks again only after five minutes.
            held = [self._admin]
            self._connect()
            let_go(held, wait=0.0)
            raise
        if found is None:
            raise BacklogError(f"topic {self._tasks} was made on {self._config.kafka}, but is not there")
        return found

    def _found_or_made(self) -> Topic | None:
        found, whole = self._describe()
        if found is None or not whole:
            self._create(found.name if found is not None else self._new_name())
            # A broker tells of a new topic a moment after it has made it.
            deadline = time.monotonic() + TIMEOUT
            while (found is None or not whole) and time.monotonic() < deadline:
                time.sleep(_LOOK_AGAIN)
                found, whole = self._describe()
        return found

    def ends(self, topic: Topic) -> dict[int, int]:
        """Return the offset after the last task record of each partition, in one round trip.

        Raises:
            BacklogError: Kafka cannot be reached or refuses.
        """
        return self._offsets(topic, range(topic.partitions), OffsetSpec.latest())  # type: ignore[no-untyped-call]  # brings no types

    def trim(self, topic: Topic, marks: Mapping[int, int], before: float) -> None:
        """Delete task records that lie before the marks of their partitions, and were written before that time.

        Without it the topic would grow for ever: it has no retention, which would delete what nobody has read yet.

        Args:
            marks: partition -> offset before which all is finished, for good.
            before: seconds since the epoch.

        Raises:
            BacklogError: Kafka cannot be reached or refuses.
        """
        starts = self._offsets(topic, marks, OffsetSpec.earliest())  # type: ignore[no-untyped-call]  # brings no types
        # -1 where all were written before.
        young = self._offsets(topic, marks, OffsetSpec.for_timestamp(int(before * 1000)))
        stops = {p: mark if young[p] < 0 else min(mark, young[p]) for p, mark in marks.items()}
        places = [TopicPartition(topic.name, p, stop) for p, stop in stops.items() if stop > starts[p]]
        if places:
            with translate_kafka_errors(self._config):
                for future in self._admin.delete_records(places, request_timeout=TIMEOUT).values():
                    self._wait(future)

    def _offsets(self, topic: Topic, partitions: Iterable[int], which: OffsetSpec) -> dict[int, int]:
        wanted = {TopicPartition(topic.name, partition): which for partition in partitions}
        with translate_kafka_errors(self._config):
            found = self._admin.list_offsets(wanted, request_timeout=TIMEOUT)
            return {place.partition: int(self._wait(future).offset) for place, future in found.items()}

    def delete(self) -> None:
        """Delete the tasks, and the events with the normal lane: on a broker in memory, to have that memory back.

        Raises:
            BacklogError: Kafka cannot be reached or refuses.
        """
        with translate_kafka_errors(self._config):
            names = self._lives([self._lane])[self._lane]
            names += [events_topic(self._queue)] if self._lane == "normal" else []
            for future in self._admin.delete_topics(names, request_timeout=TIMEOUT).values():
                self._wait(future)

    def close(self) -> None:
        """End the client: it keeps threads of its own."""
        held = [self._admin]
        del self._admin
        let_go(held)

    def _note_trouble(self, error: KafkaError) -> None:
        # That all brokers are down comes right after the reason.
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._trouble = error

    def _wait(self, future: Future[_T]) -> _T:
        """Wait for an answer; a broker that refuses this client is not asked again and again until time is up."""
        self._trouble, deadline = None, time.monotonic() + TIMEOUT + 1
        while not future.done():
            futures.wait([future], _LOOK)
            self._admin.poll(0)
            if self._trouble is not None and self._trouble.code() in _REFUSALS:
                raise KafkaException(self._trouble)
            if time.monotonic() > deadline:
                break
        try:
            return future.result(0)
        except (KafkaException, TimeoutError) as exc:
            late = isinstance(exc, TimeoutError) or exc.args[0].code() == KafkaError._TIMED_OUT
            if late and self._trouble is not None:
                raise KafkaException(self._trouble) from exc
            raise

    def _describe(self) -> tuple[Topic | None, bool]:
        """Return the tasks topic, and whether those beside it are there, too: all that may be gone is made again."""
        lanes = LANES if self._lane == "normal" else (self._lane,)
        beside = [topic(self._queue) for topic in (jobs_topic, events_topic, dead_topic)]
        names = [*beside, *(lives[0] for lives in self._lives(lanes).values())]
        futures = self._admin.describe_topics(TopicCollection(names), request_timeout=TIMEOUT)
        described = [self._described(futures[name]) for name in names]
        tasks = described[len(beside) :]
        found = {lane: topic for lane, topic in zip(lanes, tasks, strict=True) if topic is not None}
        self.others = frozenset(found) - {self._lane}
        return found.get(self._lane), None not in described[: len(beside)]

    def _lives(self, lanes: Iterable[Lane]) -> dict[Lane, list[str]]:
        """Return what the tasks topics of these lanes are called, or would be: the first of each holds."""
        names = {lane: tasks_topic(self._queue, lane) for lane in lanes}
        if not self._renames:
            return {lane: [name] for lane, name in names.items()}
        there = sorted(self._list())
        return {
            lane: [found for found in there if _LIFE.sub("", found) == name != found] or [name]
            for lane, name in names.items()
        }

    def _list(self) -> Iterable[str]:
        self._trouble = None
        try:
            return self._admin.list_topics(timeout=TIMEOUT).topics
        except KafkaException as exc:
            self._admin.poll(0)  # what went wrong on the way
            if self._trouble is not None:
                raise KafkaException(self._trouble) from exc
            raise

    def _described(self, future: Future[Any]) -> Topic | None:
        try:
            found = self._wait(future)
        except KafkaException as exc:
            if exc.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            raise
        return Topic(found.name, str(found.topic_id), len(found.partitions)) if found.partitions else None

    def _new_name(self) -> str:
        return f"{self._tasks}-{time.time_ns():016x}{secrets.token_hex(4)}" if self._renames else self._tasks

    def _create(self, tasks: str) -> None:
        replication = self._config.replication or -1
        # What waits must never vanish by age; only what happened may.
        kept = {"retention.ms": "-1", "retention.bytes": "-1"}
        # What is said of a job is of use as long as the workbench keeps the job, if it never ends.
        last = {"cleanup.policy": "compact,delete", "retention.ms": str(int(4000 * self._config.keep))}
        topics = [
            NewTopic(tasks, self._config.partitions, replication, config=kept),
            NewTopic(jobs_topic(self._queue), 1, replication, config=last),
            NewTopic(events_topic(self._queue), 1, replication),
            NewTopic(dead_topic(self._queue), 1, replication, config={"retention.bytes": _DEAD_BYTES}),
        ]
        for future in self._admin.create_topics(topics, request_timeout=TIMEOUT).values():
            try:
                self._wait(future)
            except KafkaException as exc:
                # Another node or client was first.
                if exc.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
