"""Mutated records, by a seeded random: none is executed, and nothing but the declared errors is raised."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import pytest

from yadtq_nb import codec, journal
from yadtq_nb.client.board import Outcomes
from yadtq_nb.errors import CodecError
from yadtq_nb.model import ChunkHead, Environment, Manifest, Seal, Segment
from yadtq_nb.slots.capture import Capture
from yadtq_nb.slots.slot import Slot
from yadtq_nb.slots.wire import PROGRESS_SIZE, Order, Setup
from yadtq_nb.workbench.jobs import Stored

SECRET: Final = b"a secret of the tests"
SEED: Final = 20_261_124
#: Records that lack the right signature, and records that were changed before they were signed.
MUTATED: Final = 100_000
SIGNED: Final = 20_000

#: What was unpickled, of what must never be.
executed: list[str] = []


def spring() -> None:
    executed.append("unpickled")


class Trap:
    """Tells when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return spring, ()


def make_chunk(items: list[Any], secret: bytes = SECRET, **options: Any) -> bytes:
    function = b"".join(codec.dumps((Trap(), {})))
    fields: dict[str, Any] = {
        "job": "job",
        "number": 3,
        "first": 30,
        "count": len(items),
        "function": codec.content_hash(function),
        "function_name": "f",
        "function_size": len(function),
        "style": "item",
        "concurrent": False,
        "environment": Environment(cwd="/", path=("/a", "/b")),
        **options,
    }
    return codec.encode_chunk(secret, ChunkHead(**fields), function, codec.dumps(items))


def make_segment(values: list[Any], secret: bytes = SECRET) -> bytes:
    count = len(values)
    segment = Segment("job", 3, 30, count, b"", b"S" * count, {}, bytes(8 * count), bytes(8 * count), "node")
    return codec.encode_segment(secret, segment, codec.dumps(values))


def originals() -> list[bytes]:
    """Small and compressed chunks, outcomes, blobs, entries: signed rightly, and trapped."""
    big = [Trap(), "x" * 20_000]
    return [
        make_chunk([Trap(), 1]),
        make_chunk(big),
        make_chunk([Trap(), 1], b"another secret"),
        make_chunk([Trap(), 1], b""),
        make_segment([Trap(), 1]),
        make_segment(big),
        codec.seal(SECRET, codec.FUNCTION, *codec.dumps((Trap(), {}))),
        codec.seal(SECRET, codec.ARGUMENTS, *codec.dumps(big)),
        journal.encode(SECRET, Manifest("job", "name", "f", 1.0, 5))[1],
        b"".join(codec.dumps([Trap()])),
        b'{"task-id": "1", "task": "multiply", "args": [4, 5]}',
        b"",
    ]


def mutate(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Return data with one to three changes, each of a random kind."""
    mutated = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(mutated) + 1)
        # The head is where decisions are made.
        place = min(place, 80) if chance.random() < 0.5 else place
        match chance.randrange(7):
            case 0 if place < len(mutated):
                mutated[place] ^= 1 << chance.randrange(8)
            case 1 if place < len(mutated):
                mutated[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 2:
                del mutated[place:]
            case 3:
                del mutated[place : place + chance.randint(1, 8)]
            case 4:
                mutated[place:place] = chance.randbytes(chance.randint(1, 8))
            case 5:
                other = chance.choice(others)
                mutated[place:] = other[place:]
            case _:
                mutated[place : place + 4] = chance.choice((b"\xff\xff\xff\xff", bytes(4), b"\x00\x00\x00\x80"))
    return bytes(mutated)


@pytest.fixture
def open_in_slot() -> Iterator[Callable[[bytes], object]]:
    """Open a record as a slot does, which verifies it and unpickles it then."""
    ours, theirs = socket.socketpair()
    nothing_is_run = cast("Capture", None)
    slot = Slot(theirs, memoryview(bytearray(PROGRESS_SIZE)).cast("I"), nothing_is_run)
    slot._setup = Setup(SECRET, "node", "/nowhere")
    slot._enter = lambda *_: None  # type: ignore[method-assign]  # this process stays where it is
    order = Order("job", 3, 30, 2, (), {}, "", "", "")
    with ours, theirs:
        yield lambda record: slot._open(order, bytearray(record))


def open_in_client(record: bytes) -> object:
    """Open outcomes as a client does."""
    return Outcomes(SECRET, "job", Stored("3.0", record, b"")).values()


def test_traps_are_executed_when_the_signature_is_right(open_in_slot: Callable[[bytes], object]) -> None:
    executed.clear()
    open_in_client(make_segment([Trap(), 1]))
    assert executed, "the tests below would prove nothing"
    executed.clear()
    open_in_slot(make_chunk([Trap(), 1]))
    assert len(executed) == 2, "function and item"


def test_mutated_records_are_refused_and_never_executed(open_in_slot: Callable[[bytes], object]) -> None:
    chance = random.Random(SEED)
    seeds = originals()
    right = {seed for seed in seeds if is_signed(seed)}
    executed.clear()
    for number in range(MUTATED):
        record = mutate(chance.choice(seeds), seeds, chance)
        if record in right:
            continue
        for read in (open_in_slot, open_in_client) if number % 2 else (open_in_client, open_in_slot):
            try:
                read(record)
            except CodecError:
                continue
            pytest.fail(f"record {number} of seed {SEED} was taken: {record[:100]!r}")
        assert not executed, f"record {number} of seed {SEED} was executed"
    assert not executed


def is_signed(record: bytes) -> bool:
    kinds = (codec.CHUNK, codec.SEGMENT, codec.FUNCTION, codec.ARGUMENTS, b"j")
    for kind in kinds:
        try:
            codec.unseal(SECRET, kind, record)
        except CodecError:
            continue
        return True
    return False


def test_mutated_bodies_with_a_right_signature_raise_declared_errors_only() -> None:
    chance = random.Random(SEED)
    head = codec.unseal(SECRET, codec.CHUNK, make_chunk([1, "x" * 5_000]))
    segment = codec.unseal(SECRET, codec.SEGMENT, make_segment([1, 2]))
    entries = [journal.encode(SECRET, entry)[1] for entry in (Manifest("job", "n", "f", 1.0, 5), Seal("job", 1))]
    bodies = [bytes(head), bytes(segment), *(bytes(codec.unseal(SECRET, b"j", entry)) for entry in entries)]
    readers: list[tuple[bytes, Callable[[bytes], object]]] = [
        (codec.CHUNK, lambda frame: codec.decode_chunk(SECRET, frame, most=codec.MAX_CHUNK)),
        (codec.SEGMENT, lambda frame: codec.decode_segment(SECRET, frame)),
        (b"j", lambda frame: journal.decode(SECRET, "manifest/job", frame)),
        (b"j", lambda frame: journal.decode(SECRET, "seal/job", frame)),
        (b"j", lambda frame: journal.decode(SECRET, "blob/job", frame)),
    ]
    refused = 0
    for number in range(SIGNED):
        body = mutate(chance.choice(bodies), bodies, chance)
        kind, read = chance.choice(readers)
        try:
            read(signed(kind, chance.choice((0, 0, 0, 1)), body))
        except CodecError:
            refused += 1
        except Exception as exc:
            pytest.fail(f"body {number} of seed {SEED} raised {exc!r}: {body[:100]!r}")
    assert refused > SIGNED / 2


def signed(kind: bytes, flags: int, body: bytes) -> bytes:
    """Sign a body as it is, also where the flags say that it is compressed and it is not."""
    prefix = codec._PREFIX.pack(b"YQ", 1, kind, flags)
    return prefix + codec._sign(SECRET, prefix, (body,)) + body


def test_mutated_framing_of_pickles_raises_declared_errors_only() -> None:
    import numpy as np

    chance = random.Random(SEED)
    whole = b"".join(codec.dumps([np.zeros(2_000), np.ones(3_000), "x"]))
    for number in range(SIGNED):
        data = mutate(whole[:64], [whole], chance) + whole[64:]
        try:
            codec._parts(data[: chance.randrange(len(data))] if number % 2 else data)
        except CodecError:
            continue
        except Exception as exc:
            pytest.fail(f"framing {number} of seed {SEED} raised {exc!r}: {data[:64]!r}")


def test_pickle_that_is_cut_short_anywhere_is_refused() -> None:
    import numpy as np

    # Of odd lengths, so that there is padding between them.
    whole = b"".join(codec.dumps([np.zeros(5_001, dtype=np.uint8), np.zeros(5_003, dtype=np.uint8)]))
    for end in [*range(200), *range(len(whole) - 200, len(whole))]:
        with pytest.raises(CodecError, match="cut short"):
            codec._parts(whole[:end])


WRONG: Final = [
    {"job": "a\0b"},
    {"job": ""},
    {"job": "../../etc"},
    {"function": "/etc/passwd"},
    {"function": "x" * 5_000},
    {"environment": Environment(tree="..")},
    {"number": -1},
    {"number": 2**40},
    {"first": -1},
    {"first": 2**32},
    {"count": 0},
    {"count": 2**40},
    {"total": -5},
    {"created": float("nan")},
    {"created": float("inf")},
]


@pytest.mark.parametrize("options", WRONG, ids=repr)
def test_head_that_would_harm_whoever_goes_by_it_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CodecError, match="out of range; install the same version"):
        codec.decode_chunk(SECRET, make_chunk([1], **options))


def test_oversized_records_are_refused_with_their_sizes_before_they_are_unpacked() -> None:
    small = make_chunk(["x" * 100_000_000])
    assert len(small) < codec.MAX_CHUNK
    for record in (small, b"YQ\x01c\x00" + bytes(codec.MAX_CHUNK)):
        with pytest.raises(CodecError, match=r"at most 4,194,304 are read"):
            codec.decode_chunk(SECRET, record, most=codec.MAX_CHUNK)
