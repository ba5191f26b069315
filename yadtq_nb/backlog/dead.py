"""What was refused: the records of the dead topic, each the original bytes with a note of why, as a header."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from yadtq_nb import codec
from yadtq_nb.backlog.connection import TIMEOUT, dead_topic, let_go, reading, translate_kafka_errors
from yadtq_nb.config import Config
from yadtq_nb.errors import FormatError

#: Name of the header that holds the note.
HEADER: Final = "yadtq"
#: Bytes of an original that are kept: a longer one still lies where it was read.
KEPT: Final = 256 * 1024
#: Seconds to wait for more behind the end that the broker has told.
_TAIL: Final = 0.3
#: Longest reason or name, in characters.
_LONGEST: Final = 2_000

_encode = msgspec.json.Encoder().encode


class Dead(msgspec.Struct, frozen=True, kw_only=True):
    """Why a record was refused, and where it came from."""

    #: Cause and remedy.
    reason: str
    #: Name of the error, such as "SignatureError".
    error: str
    #: Life of the tasks topic that it came from, with the place in it; "" and -1 when that is not known.
    topic_id: str
    partition: int
    offset: int
    #: Bytes of the original; of these, the first KEPT lie in the record.
    size: int
    #: Seconds since the epoch.
    time: float
    #: Node that refused it.
    node: str
    #: Job id, as far as the record can be read; of one with a wrong signature it is only what it says of itself.
    job: str = ""
    job_name: str = ""
    #: Number of the chunk in its job, or -1.
    chunk: int = -1

    @property
    def key(self) -> str:
        """Name of the record: refused twice, because a node died in between, it is still one."""
        return f"{self.topic_id}/{self.partition}/{self.offset}" if self.offset >= 0 else f"{self.job}:{self.chunk}"


def encode(note: Dead) -> bytes:
    """Return a note as it travels."""
    return _encode(_plain(note))


def decode(data: bytes) -> Dead:
    """Read a note.

    Raises:
        FormatError: it is none.
    """
    try:
        return _plain(msgspec.json.decode(data, type=Dead))
    except codec.UNREADABLE as exc:
        raise FormatError(f"a note on the dead topic cannot be read: {exc}") from exc


def read_dead(config: Config, queue: str) -> Iterator[Dead]:
    """Yield what was refused, oldest first, each record once.

    Raises:
        BacklogError: Kafka cannot be reached.
    """
    seen: set[str] = set()
    for note in _notes(config, queue):
        if note.key not in seen:
            seen.add(note.key)
            yield note


def _notes(config: Config, queue: str) -> Iterator[Dead]:
    # The last offset may be that of no record, but of the end of a transaction.
    more: dict[str, Any] = {"fetch.wait.max.ms": 10} if config.reading == "wake" else {"enable.partition.eof": True}
    with translate_kafka_errors(config):
        consumer = Consumer(reading(config, f"yadtq.{queue}.dead", **more))
        try:
            low, high = _bounds(consumer, queue)
            if low >= high:
                return
            consumer.assign([TopicPartition(dead_topic(queue), 0, low)])
            reached = low
            while True:
                message = consumer.poll(_TAIL if reached >= high else TIMEOUT)
                if message is None and reached >= high:
                    return
                if message is None:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
                if (error := message.error()) is None:
                    reached = (message.offset() or 0) + 1
                    if (note := _note(message.headers())) is not None:
                        yield note
                elif error.code() == KafkaError._PARTITION_EOF:
                    reached = max(reached, message.offset() or 0)
                # Of a partition with batches of several records Tansu says a smaller end than it has.
                if reached >= high and config.reading != "wake":
                    return
        finally:
            let_go([consumer], Consumer.close)


def _bounds(consumer: Consumer, queue: str) -> tuple[int, int]:
    """Return where the dead topic begins and ends; a queue of an older version has none."""
    # Asked first: for the ends of a topic that is not there the library waits until time is up.
    if consumer.list_topics(dead_topic(queue), timeout=TIMEOUT).topics[dead_topic(queue)].error is not None:
        return 0, 0
    try:
        low, high = consumer.get_watermark_offsets(TopicPartition(dead_topic(queue), 0), timeout=TIMEOUT)
    except KafkaException as exc:
        if exc.args[0].code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION):
            return 0, 0
        raise
    return low, high


def _note(headers: object) -> Dead | None:
    """Return the note among a record's headers; what somebody else has put on this topic has none."""
    for name, value in headers if isinstance(headers, list) else ():
        if name == HEADER and isinstance(value, bytes):
            try:
                return decode(value)
            except FormatError:
                return None
    return None


def _plain(note: Dead) -> Dead:
    """Return a note without what a terminal would obey, or JSON cannot hold: whoever wrote the record chose it."""
    texts = {name: value for name, value in msgspec.structs.asdict(note).items() if isinstance(value, str)}
    return msgspec.structs.replace(note, **{name: _plain_text(text) for name, text in texts.items()})


def _plain_text(text: str) -> str:
    text = text[:_LONGEST].encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
