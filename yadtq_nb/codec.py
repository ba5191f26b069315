"""Bytes and back: sealed frames, pickles with out-of-band buffers, chunks and segments.

Every frame is signed: an HMAC-SHA256 under the queue's secret covers all of it, and nothing is decompressed or
unpickled before it is verified. The kind is signed too, so that a result cannot be passed off as a task.

    frame   "YQ" version kind flags hmac[32] body
    pickle  count sizes... pickle, then each out-of-band buffer, aligned to 16 bytes
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import hmac
import io
import pickle
import re
import struct
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final, TypeAlias

import msgspec
import zstandard

from yadtq_nb import errors
from yadtq_nb.errors import FormatError, RemoteTraceback, SignatureError, TaskCrashedError, TaskError
from yadtq_nb.model import ChunkHead, ErrorInfo, Segment
from yadtq_nb.salvage import load_each

Buffer: TypeAlias = "bytes | bytearray | memoryview"

CHUNK: Final = b"c"
SEGMENT: Final = b"s"
FUNCTION: Final = b"f"
TREE: Final = b"t"
ARGUMENTS: Final = b"a"
WRITTEN: Final = b"w"

_MAGIC: Final = b"YQ"
_VERSION: Final = 1
_PREFIX: Final = struct.Struct("<2sBcB")
_HEADER: Final = _PREFIX.size + 32
_COMPRESSED: Final = 1

#: Bodies shorter than this are not worth compressing, in bytes.
_COMPRESS_FROM: Final = 16 * 1024
#: Compression is tried on this much first, in bytes.
_SAMPLE: Final = 16 * 1024
#: Buffers shorter than this stay inside the pickle, in bytes.
_OUT_OF_BAND_FROM: Final = 4 * 1024
_ALIGN: Final = 16
_COUNT: Final = struct.Struct("<I")
#: Largest chunk that is fed, packed or unpacked, in bytes: clients make none of half that size.
MAX_CHUNK: Final = 4 * 1024 * 1024
#: Most tasks in a chunk that is read: clients make none of a tenth of that.
_MOST_TASKS: Final = 100_000
_UINT32: Final = 2**32
#: What may be a part of a file's or a key's name.
_NAME: Final = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]{0,127}")
_SETS_CLASS: Final = re.compile(rb"_class_setstate")

#: What decoding msgpack or JSON raises: text that is no UTF-8 is no error of msgspec's own.
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_SAME_VERSION: Final = "install the same version of yadtq-nb on the notebook and the workers"

_encode = msgspec.msgpack.Encoder().encode
_decode_chunk = msgspec.msgpack.Decoder(ChunkHead).decode
_decode_segment = msgspec.msgpack.Decoder(Segment).decode


def seal(secret: bytes, kind: bytes, *parts: Buffer) -> bytes:
    """Sign parts, and compress them when that pays."""
    flags = 0
    if sum(map(len, parts)) >= _COMPRESS_FROM:
        body = b"".join(parts)
        compressor = zstandard.ZstdCompressor(level=1)
        if len(body) <= 4 * _SAMPLE:  # trying a sample first would cost as much
            smaller = compressor.compress(body)
            parts, flags = ((smaller,), _COMPRESSED) if len(smaller) < 0.8 * len(body) else ((body,), 0)
        elif len(compressor.compress(body[:_SAMPLE])) < 0.8 * _SAMPLE:
            parts, flags = (compressor.compress(body),), _COMPRESSED
        else:
            parts = (body,)
    prefix = _PREFIX.pack(_MAGIC, _VERSION, kind, flags)
    signature = _sign(secret, prefix, parts)
    return b"".join((prefix, signature, *parts))


def unseal(secret: bytes, kind: bytes, frame: Buffer, *, most: int | None = None) -> memoryview:
    """Verify a frame and return its body.

    Args:
        most: bytes that the body may have at most.

    Raises:
        FormatError: not a frame, of another version or kind, or too large.
        SignatureError: not signed with this secret, or not as it was signed.
    """
    view = memoryview(frame)
    if len(view) < _HEADER or bytes(view[:2]) != _MAGIC:
        raise FormatError(
            "not a yadtq record: it does not start with the magic bytes, or is cut short; "
            "send tasks by Queue.map or Queue.submit only"
        )
    _, version, found, flags = _PREFIX.unpack_from(view)
    if version != _VERSION:
        raise FormatError(
            f"record of format version {version}, but this side knows version {_VERSION}: {_SAME_VERSION}"
        )
    if most is not None:
        _check_size(len(view), most)
    body = view[_HEADER:]
    if not hmac.compare_digest(_sign(secret, view[: _PREFIX.size], (body,)), view[_PREFIX.size : _HEADER]):
        raise SignatureError(
            "record is not signed with this queue's secret, or was changed or cut short on its way: "
            "set the same YADTQ_SECRET (or secret=) in the notebook and on every worker"
        )
    if found != kind:
        raise FormatError(f"record of kind {found!r} where kind {kind!r} was expected")
    if flags & _COMPRESSED:
        try:
            if most is not None:
                _check_size(zstandard.frame_content_size(body), most)
            return memoryview(zstandard.ZstdDecompressor().decompress(body))
        except (zstandard.ZstdError, MemoryError) as exc:
            raise FormatError(f"record cannot be decompressed: {exc}") from exc
    return body


def dumps(obj: object) -> list[Buffer]:
    """Pickle by cloudpickle, with large buffers beside the pickle and not copied into it.

    Raises:
        Exception: whatever pickling raises.
    """
    buffers: list[memoryview] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < _OUT_OF_BAND_FROM:
            return True
        buffers.append(raw)
        return False

    with io.BytesIO() as file:
        _pickler()(file, protocol=5, buffer_callback=keep_in_band).dump(obj)
        data = file.getvalue()
    sizes = [len(data), *(buffer.nbytes for buffer in buffers)]
    head = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    parts: list[Buffer] = [head, data]
    position = len(head) + len(data)
    for buffer in buffers:
        padding = -position % _ALIGN
        parts += [bytes(padding), buffer]
        position += padding + buffer.nbytes
    return parts


def loads(data: Buffer) -> Any:
    """Unpickle what dumps made. Arrays are writable views of one copy of data, not copies each.

    Raises:
        FormatError: cut short.
        Exception: whatever unpickling raises.
    """
    pickled, buffers = _parts(data)
    return pickle.loads(pickled, buffers=buffers)


def loads_each(
    data: Buffer, *, follow: Callable[[int], object] | None = None, poison: Collection[int] = ()
) -> list[Any]:
    """Unpickle a list that loads fails on: an Unreadable with what it raises stands for each item that is to blame.

    Args:
        follow, poison: see salvage.load_each.

    Raises:
        FormatError: cut short.
        Exception: whatever unpickling raises, where no single item is to blame.
    """
    return load_each(*_parts(data), follow=follow, poison=poison)


def loads_each_home(data: Buffer) -> list[Any]:
    """Do what loads_each does, for what loads_home fails on."""
    return load_each(*_parts(data), _HomeClasses)


def loads_home(data: Buffer) -> Any:
    """Unpickle what a worker has made of this process's own: classes that are known here stay as they are.

    Raises:
        FormatError: cut short.
        Exception: whatever unpickling raises.
    """
    pickled, buffers = _parts(data)
    if not sets_classes(pickled):
        return pickle.loads(pickled, buffers=buffers)
    return _HomeUnpickler(io.BytesIO(pickled), buffers=buffers).load()


def sets_classes(pickled: Buffer) -> bool:
    """Tell whether unpickling sets the attributes of classes, which may be known by then."""
    return _SETS_CLASS.search(pickled) is not None


def _pickler() -> Callable[..., pickle.Pickler]:
    """Return cloudpickle's pickler, which takes more of a notebook along than it does by itself."""
    spawned = sys.modules.get("__mp_main__")
    if spawned is not None:
        import cloudpickle

        # multiprocessing's name for the script in a process that it has spawned: no worker can import it either.
        cloudpickle.register_pickle_by_value(spawned)
    return _pickler_class()


@functools.cache
def _pickler_class() -> type[pickle.Pickler]:
    from cloudpickle import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
        # A table, and not reducer_override: pickle looks there anyway, so that it costs other objects nothing.
        dispatch_table = ChainMap(
            {
                **cloudpickle.Pickler._dispatch_table,
                functools._lru_cache_wrapper: _reduce_cached,
                functools.cached_property: _reduce_cached_property,
                types.CodeType: _reduce_code,
            },
            copyreg.dispatch_table,
        )

    return Pickler


def _reduce_code(code: types.CodeType) -> Any:
    """Take the name of its file along, which cloudpickle 3.1.3 leaves out: tracebacks show lines by it."""
    from cloudpickle import cloudpickle

    make, args = cloudpickle._code_reduce(code)
    return make, tuple(code.co_filename if type(arg) is str and arg == "<dynamic-code>" else arg for arg in args)


def _reduce_cached(function: Any) -> Any:
    """Take a function under functools.cache along, with an empty cache, unless it can be imported."""
    from cloudpickle import cloudpickle

    found = cloudpickle._lookup_module_and_qualname(function)
    if found is not None and not cloudpickle._is_registered_pickle_by_value(found[0]):
        return function.__reduce__()
    # Given once more as state: when a function calls itself by its name, its cache is made before it is whole.
    made_anew = ("__wrapped__", "cache_parameters")
    state = {name: value for name, value in vars(function).items() if name not in made_anew}
    return _cached, (function.cache_parameters(), function.__wrapped__), state


def _cached(parameters: dict[str, Any], function: Callable[..., Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _reduce_cached_property(found: functools.cached_property[Any]) -> Any:
    # Before Python 3.12 it holds a lock.
    state = {name: value for name, value in vars(found).items() if name not in ("func", "lock")}
    return functools.cached_property, (found.func,), state


class _HomeClasses:
    """cloudpickle sends a notebook's class with each instance, and would set the class here to what it was there.

    Its methods would then use copies of the notebook's globals, and what was assigned to the class would be undone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: set[int] = set()

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)  # type: ignore[misc]  # an unpickler's
        if module == "cloudpickle.cloudpickle" and name in ("_make_skeleton_class", "_make_skeleton_enum"):
            return functools.partial(self._make, found)
        if module == "cloudpickle.cloudpickle" and name == "_class_setstate":
            return functools.partial(self._set, found)
        return found

    def _make(self, make: Callable[..., type], *args: Any) -> type:
        from cloudpickle import cloudpickle

        *_, tracker_id, _ = args
        known = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
        cls = make(*args)
        if cls is known:
            self._known.add(id(cls))
        return cls

    def _set(self, set_state: Callable[[type, Any], type], cls: type, state: Any) -> type:
        return cls if id(cls) in self._known else set_state(cls, state)


class _HomeUnpickler(_HomeClasses, pickle.Unpickler):
    """Unpickles what belongs to this process."""


def _parts(data: Buffer) -> tuple[memoryview, list[memoryview]]:
    """Return the pickle and its buffers."""
    view = memoryview(data)
    try:
        (count,) = _COUNT.unpack_from(view)
        sizes = struct.unpack_from(f"<{count}Q", view, _COUNT.size)
    except struct.error as exc:
        raise FormatError("pickle is cut short") from exc
    position = _COUNT.size + 8 * count
    if not count or position + sum(sizes) > len(view):
        raise FormatError("pickle is cut short")
    if count == 1:
        return view[position : position + sizes[0]], []
    if view.readonly:
        view = memoryview(bytearray(view))
    data_end = position + sizes[0]
    buffers: list[memoryview] = []
    end = data_end
    for size in sizes[1:]:
        start = end + (-end % _ALIGN)
        end = start + size
        if end > len(view):
            raise FormatError("pickle is cut short")
        buffers.append(view[start:end])
    return view[position:data_end], buffers


def encode_chunk(secret: bytes, head: ChunkHead, function: Buffer, arguments: Iterable[Buffer]) -> bytes:
    """Make the sealed record of a chunk: head, the function's pickle (or nothing), the arguments' pickle."""
    encoded = _encode(head)
    return seal(secret, CHUNK, _COUNT.pack(len(encoded)), encoded, function, *arguments)


def decode_chunk(secret: bytes, record: Buffer, *, most: int | None = None) -> tuple[ChunkHead, memoryview, memoryview]:
    """Verify a chunk's record and return its head, function pickle and arguments pickle, nothing unpickled.

    Args:
        most: bytes that it may have at most, packed or unpacked.

    Raises:
        FormatError: malformed, too large, or of another version.
        SignatureError: not signed with this secret.
    """
    encoded, rest = _split(unseal(secret, CHUNK, record, most=most))
    try:
        head = _decode_chunk(encoded)
    except UNREADABLE as exc:
        raise FormatError(f"chunk cannot be read: {exc}; {_SAME_VERSION}") from exc
    if (wrong := _wrong_field(head)) is not None:
        raise FormatError(f"chunk cannot be read: its {wrong} is out of range; {_SAME_VERSION}")
    return head, rest[: head.function_size], rest[head.function_size :]


def encode_segment(secret: bytes, segment: Segment, values: Iterable[Buffer]) -> bytes:
    """Make the sealed frame of outcomes; values is the pickle of the list of the succeeded tasks' values."""
    encoded = _encode(segment)
    return seal(secret, SEGMENT, _COUNT.pack(len(encoded)), encoded, *values)


def decode_segment(secret: bytes, frame: Buffer) -> tuple[Segment, memoryview]:
    """Verify outcomes and return them with the pickle of their values, nothing unpickled.

    Raises:
        FormatError: malformed or of another version.
        SignatureError: not signed with this secret.
    """
    encoded, rest = _split(unseal(secret, SEGMENT, frame))
    try:
        return _decode_segment(encoded), rest
    except UNREADABLE as exc:
        raise FormatError(f"outcomes cannot be read: {exc}") from exc


def claimed_job(record: Buffer) -> str:
    """Return which job a record says that it belongs to, nothing verified: to be shown, and for nothing else."""
    view = memoryview(record)
    try:
        _, _, kind, flags = _PREFIX.unpack_from(view)
        if kind != CHUNK or flags & _COMPRESSED or len(view) > MAX_CHUNK:
            return ""
        job = _decode_chunk(_split(view[_HEADER:])[0]).job
    except (struct.error, FormatError, *UNREADABLE):
        return ""
    return job if _NAME.fullmatch(job) else ""


def revive(info: ErrorInfo | None, index: int) -> BaseException:
    """Bring a task's exception back as itself, with the remote traceback as its cause.

    One that cannot be pickled and unpickled comes as a TaskError with its type, message and traceback.
    """
    if info is None:
        return TaskError(f"task {index} has no outcome: it was cancelled or lost", index=index)
    error: BaseException | None = None
    if info.pickled:
        try:
            error = loads_home(info.pickled)
        except Exception as exc:  # whatever the user's exception does when it is unpickled
            return _stand_in(info, index, f" (it cannot be unpickled here: {type(exc).__name__}: {exc})")
    # A SystemExit, KeyboardInterrupt or CancelledError of a task would end the notebook's own work.
    if not isinstance(error, Exception):
        return _stand_in(info, index, "")
    if info.traceback:
        error.__cause__ = RemoteTraceback(info.traceback)
    return error


def _stand_in(info: ErrorInfo, index: int, why: str) -> TaskError:
    cls: type[TaskError] = getattr(errors, info.ours, TaskError)
    message = info.message if info.ours != "TaskError" else info.line(info.type_name) + why
    facts = msgspec.structs.asdict(info.crashed) if info.crashed is not None and cls is TaskCrashedError else {}
    error = cls(message, index=index, type_name=info.type_name, remote_traceback=info.traceback, **facts)
    if info.traceback:
        error.__cause__ = RemoteTraceback(info.traceback)
    return error


def content_hash(data: Buffer) -> str:
    """Name of a blob: 32 hex digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def fingerprint(secret: bytes) -> str:
    """Tell secrets apart without showing them: 16 hex digits."""
    return hmac.new(secret, b"yadtq fingerprint", hashlib.sha256).hexdigest()[:16]


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise FormatError(
            f"record of {size:,} bytes, where at most {most:,} are read: clients send larger arguments by reference; "
            "send tasks by Queue.map or Queue.submit only"
        )


def _wrong_field(head: ChunkHead) -> str | None:
    """Return the name of a field that would harm whoever goes by it, or None: names become those of keys and files."""
    named = (("job", head.job), ("function", head.function), ("source tree", head.environment.tree or "none"))
    for field, name in named:
        if _NAME.fullmatch(name) is None:
            return field
    if not 0 <= head.number < _UINT32:
        return "number"
    if not (head.first >= 0 and 1 <= head.count <= _MOST_TASKS and head.first + head.count <= _UINT32):
        return "number of tasks"
    if not -1 <= head.total <= _UINT32:
        return "total"
    if head.done and (len(head.done) != head.count or head.done.strip(b"01")):
        return "list of tasks"
    for need in head.needs:
        if _NAME.fullmatch(need.job) is None or need.first < 0 or not -1 <= need.count <= _UINT32 - need.first:
            return "list of needs"
    # Written so that it is wrong for what is not a number.
    return None if 0 <= head.created < 1e12 else "time"


def _split(body: memoryview) -> tuple[memoryview, memoryview]:
    try:
        (size,) = _COUNT.unpack_from(body)
    except struct.error as exc:
        raise FormatError("record is cut short") from exc
    if _COUNT.size + size > len(body):
        raise FormatError("record is cut short")
    return body[_COUNT.size : _COUNT.size + size], body[_COUNT.size + size :]


def _sign(secret: bytes, prefix: Buffer, parts: Iterable[Buffer]) -> bytes:
    signer = hmac.new(secret, prefix, hashlib.sha256)
    for part in parts:
        signer.update(part)
    return signer.digest()
