"""Whether two jobs are the same: a key of a function, its options and its items that no new kernel changes.

    of(fn, items, ...) ──▶ Sameness ──▶ travels with the manifest, lies beside the job
    differences(theirs, ours)      ──▶ what a person would call the parts that differ

Pickles cannot be compared: they name files with the kernel's pid and classes by random ids, and sets come in the order
of a random seed. Here a function is its code without names of files, numbers of lines and docstrings; its defaults;
what it closes over; the globals that it uses; and the same of every function and class of the notebook, and of local
modules, that it reaches. What is installed counts by its name. Each of these is a part with a key of its own, so that
the part that differs can be named. Objects count by what pickle would take of them.
"""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import hashlib
import importlib.util
import marshal
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import msgspec

from yadtq_nb import source
from yadtq_nb.client.options import JobOptions
from yadtq_nb.model import CallStyle

#: Changes when keys are made in another way: then older ones cannot be compared.
_SCHEME: Final = 1
#: Most keys that are kept of the items, each of one item or of so many neighbours as it takes.
_BLOCKS: Final = 16_384
#: Bytes kept of each of them: the key of all items tells whether one differs, these tell which.
_SHORT: Final = 4
_SIZE: Final = 16
#: Most parts that are kept apart; the others have one key together.
_MOST_PARTS: Final = 1_000
#: Most differences that a message names.
_MOST_NAMED: Final = 5
#: Since Python 3.13 a code object says whether its first constant is a docstring.
_HAS_DOCSTRING: Final = 0x4000000
#: Of a class that was made by a class statement, and not in C.
_IN_PYTHON: Final = 1 << 9

#: Written by marshal in a form that depends on nothing but their value.
_PLAIN: Final = frozenset({int, float, complex, str, bytes, bool, type(None), type(...)})
_NESTED: Final = frozenset({list, tuple, dict})
#: How deep these are looked into.
_DEPTH: Final = 8
_MARSHAL: Final = 2
_METHODS: Final = (
    types.FunctionType,
    staticmethod,
    classmethod,
    property,
    functools.cached_property,
    functools._lru_cache_wrapper,
    functools.partialmethod,
)
_BY_NAME: Final = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
)
_OF_SLOTS: Final = (types.MemberDescriptorType, types.GetSetDescriptorType)

_pack = msgspec.msgpack.Encoder().encode


class Sameness(msgspec.Struct, frozen=True, array_like=True):
    """What two jobs are compared by."""

    scheme: int = _SCHEME
    #: Such as "3.11": code differs from version to version.
    python: str = ""
    #: Name of the function.
    function: str = ""
    style: CallStyle = "item"
    #: What a person calls a part of the function -> its key.
    parts: dict[str, bytes] = {}
    #: Options that bear on outcomes -> their value, to be shown.
    options: dict[str, str] = {}
    #: Number of items, or -1 when it is not known.
    count: int = -1
    #: The key of all items.
    items: bytes = b""
    #: The beginning of the key of each item, or of each so many neighbours.
    blocks: bytes = b""
    #: Why the job has no key, or "".
    trouble: str = ""

    def packed(self) -> bytes:
        """Return it as it travels."""
        return _pack(self)

    def is_same(self, other: Sameness) -> bool:
        """Tell whether both have a key, and the same."""
        return not self.trouble and self == other


def unpack(packed: bytes) -> Sameness:
    """Read what Sameness.packed made; what cannot be read cannot be compared."""
    try:
        return msgspec.msgpack.decode(packed, type=Sameness)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Sameness(trouble="it was sent without a key, or by another version of yadtq-nb")


def of(
    fn: Callable[..., Any],
    name: str,
    items: Sequence[Any] | Iterator[Any],
    *,
    kwargs: Mapping[str, Any],
    style: CallStyle,
    options: JobOptions,
) -> Sameness:
    """Return what a job is compared by; where it has no key, why not.

    Args:
        name: of the function, to be shown.
    """
    known = Sameness(
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        function=name,
        style=style,
        options=_shown(options),
        count=len(items) if isinstance(items, Sequence) else -1,
    )
    keys = _Keys()
    try:
        keys.part("the function", lambda: keys.of(fn))
        for key, value in sorted(kwargs.items()):
            keys.part(f"the keyword argument {key!r}", functools.partial(keys.of, value))
        if not isinstance(items, Sequence):
            raise _NoKeyError("its items are an iterator, which can be drawn only once")
        whole, blocks = _key_items(keys, items)
    except _NoKeyError as exc:
        return msgspec.structs.replace(known, parts=keys.parts, trouble=str(exc))
    return msgspec.structs.replace(known, parts=keys.parts, items=whole, blocks=blocks)


def differences(theirs: Sameness, ours: Sameness) -> list[str]:
    """Name what differs, as far as it can be told, the most telling first."""
    if theirs.scheme != ours.scheme:
        return []
    found = []
    for what, there, here in (
        ("the function", theirs.function, ours.function),
        ("Python", theirs.python, ours.python),
        ("the way that items are passed", _CALLED[theirs.style], _CALLED[ours.style]),
        *((option, theirs.options.get(option), value) for option, value in ours.options.items()),
    ):
        if there != here:
            found.append(f"{what} ({there} there, {here} here)")
    # Another function differs in all its parts, and so does the code of another Python.
    if theirs.function == ours.function and theirs.python == ours.python:
        names = dict.fromkeys([*ours.parts, *theirs.parts])
        unequal = [name for name in names if theirs.parts.get(name) != ours.parts.get(name)]
        known = bool(theirs.trouble or ours.trouble)
        found += [name for name in unequal if not known or (name in ours.parts and name in theirs.parts)]
    if theirs.count != ours.count and min(theirs.count, ours.count) >= 0:
        found.append(f"the number of items ({theirs.count} there, {ours.count} here)")
    elif theirs.items != ours.items and theirs.items and ours.items:
        found.append(_differing_items(theirs, ours))
    if len(found) > _MOST_NAMED:
        found[_MOST_NAMED:] = [f"{len(found) - _MOST_NAMED} more"]
    return found


_CALLED: Final[dict[CallStyle, str]] = {"item": "one by one", "star": "as several arguments", "call": "by submit"}


def _shown(options: JobOptions) -> dict[str, str]:
    """Return the options that bear on what comes out, and not on when or how fast."""
    return {
        "retries": str(options.retries),
        "backoff": f"{options.backoff:g} s",
        "max_delay": f"{options.max_delay:g} s",
        "retry_on": ", ".join(cls.__qualname__ for cls in options.retry_types),
        "timeout": f"{options.timeout:g} s" if options.timeout else "none",
        "max_crashes": str(options.max_crashes or "the queue's"),
    }


def _differing_items(theirs: Sameness, ours: Sameness) -> str:
    pairs = zip(_cut(theirs.blocks), _cut(ours.blocks), strict=False)
    size = _block_size(ours.count)
    places = [number * size for number, (there, here) in enumerate(pairs) if there != here]
    if not places:
        return "the items"
    named = [
        f"item {place}" if size == 1 else f"some of the items {place} to {min(place + size, ours.count) - 1}"
        for place in places[:3]
    ]
    return ", ".join(named) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _cut(blocks: bytes) -> Iterator[bytes]:
    return (blocks[start : start + _SHORT] for start in range(0, len(blocks), _SHORT))


def _block_size(count: int) -> int:
    return max(1, -(-count // _BLOCKS))


def _key_items(keys: _Keys, items: Sequence[Any]) -> tuple[bytes, bytes]:
    """Return the key of all items, and the short ones."""
    size = _block_size(len(items))
    blocks = [items[start : start + size] for start in range(0, len(items), size)]
    if _is_plain(list(items)):
        found = [_hash(marshal.dumps(list(block), _MARSHAL)) for block in blocks]
    else:
        found = [_key_block(keys, block, number * size) for number, block in enumerate(blocks)]
    return _hash(*found), b"".join([key[:_SHORT] for key in found])


def _key_block(keys: _Keys, block: Sequence[Any], start: int) -> bytes:
    try:
        # A list of plain values is written as above: whether another item has none must not show here.
        return _hash(marshal.dumps(list(block), _MARSHAL) if _is_plain(list(block)) else keys.sequence("list", block))
    except _NoKeyError as exc:
        last = start + len(block) - 1
        place = f"item {start}" if start == last else f"one of the items {start} to {last}"
        raise _NoKeyError(f"{place}: {exc}") from exc


class _NoKeyError(Exception):
    """Something has no key that another kernel would find, too; the message says what."""


def _hash(*parts: bytes) -> bytes:
    """Hash parts with their lengths, so that nothing can move from one to the next."""
    lengths = marshal.dumps(tuple(map(len, parts)), _MARSHAL)
    return hashlib.blake2b(b"".join((lengths, *parts)), digest_size=_SIZE).digest()


def _hash_buffer(tag: bytes, buffer: Any) -> bytes:
    found = hashlib.blake2b(tag, digest_size=_SIZE)
    found.update(buffer)
    return found.digest()


def _leaf(value: Any) -> bytes:
    """Return the key of what holds plain values only; short ones are their own."""
    written = marshal.dumps(value, _MARSHAL)
    return written if len(written) <= 2 * _SIZE else _hash(b"plain", written)


class _Keys:
    """Makes keys, and notes those of the parts of functions and classes on its way."""

    def __init__(self) -> None:
        self.parts: dict[str, bytes] = {}
        #: By id; what they are of is held, so that no id is used again.
        self._known: dict[int, bytes] = {}
        self._held: list[Any] = []
        #: What is being keyed now, by id, to how deep it lies: an object may hold itself.
        self._open: dict[int, int] = {}
        self._labels: dict[str, int] = {}
        self._way_of: dict[type, Callable[[_Keys, Any], bytes] | None] = {}
        self._modules: set[str] = set()

    def part(self, name: str, key: Callable[[], bytes]) -> None:
        """Note the key of a part under a name for people.

        Raises:
            _NoKeyError: it has none.
        """
        try:
            found = key()
        except _NoKeyError as exc:
            raise exc if ": " in str(exc) else _NoKeyError(f"{name}: {exc}") from exc
        if len(self.parts) >= _MOST_PARTS:
            rest = "other functions, classes and variables"
            self.parts[rest] = _hash(self.parts.get(rest, b""), name.encode(), found)
        else:
            self.parts[name] = found

    def of(self, value: Any) -> bytes:
        """Return the key of anything.

        Raises:
            _NoKeyError: it has none.
        """
        kind = type(value)
        if kind in _PLAIN:
            return _leaf(value)
        if kind in _NESTED and _is_plain([value]):
            return _leaf(value)
        known = self._known.get(id(value))
        if known is not None:
            return known
        if id(value) in self._open:
            return _hash(b"itself", str(len(self._open) - self._open[id(value)]).encode())
        self._open[id(value)] = len(self._open)
        try:
            key = self._of_object(value, kind)
        except _NoKeyError:
            raise
        except RecursionError:
            raise _NoKeyError(f"a {kind.__qualname__} is nested too deeply") from None
        except Exception as exc:  # whatever the user's object does when it is asked for its state
            raise _NoKeyError(f"a {kind.__qualname__} cannot be told from others ({exc})") from exc
        finally:
            del self._open[id(value)]
        self._known[id(value)] = key
        self._held.append(value)
        return key

    def _of_object(self, value: Any, kind: type) -> bytes:
        if kind in (list, tuple):
            return self.sequence(kind.__name__, value)
        if kind in (dict, types.MappingProxyType):
            return self.sequence("dict", chain.from_iterable(value.items()))
        if kind in (set, frozenset):
            return _hash(kind.__name__.encode(), *sorted(map(self.of, value)))
        if isinstance(value, type):
            return self._class(value)
        if kind not in self._way_of:
            self._way_of[kind] = next((way for cls, way in self._ways if issubclass(kind, cls)), None)
        if (found := self._way_of[kind]) is not None:
            return found(self, value)
        package = kind.__module__.partition(".")[0]
        if package == "numpy" and (key := self._numpy(value)) is not None:
            return key
        if package == "pandas" and (key := self._pandas(value)) is not None:
            return key
        return self._reduced(value, kind)

    def sequence(self, tag: str, values: Iterable[Any]) -> bytes:
        return _hash(tag.encode(), *map(self.of, values))

    # Code.

    def _function(self, fn: types.FunctionType) -> bytes:
        if not _is_own(fn):
            return _named(fn)
        label, key = self._label(fn)
        self.part(f"the code of {label}", lambda: self._code(fn.__code__))
        code = fn.__code__
        positional = code.co_varnames[: code.co_argcount]
        defaults = dict(zip(reversed(positional), reversed(fn.__defaults__ or ()), strict=False))
        for name, value in {**defaults, **(fn.__kwdefaults__ or {})}.items():
            self.part(f"the default of {name!r} in {label}", functools.partial(self.of, value))
        for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
            self.part(f"the variable {name!r} that {label} closes over", functools.partial(self._cell, cell))
        # What an installed decorator uses besides is its own business.
        if _is_own_module(fn.__globals__.get("__name__")):
            for name in sorted(_global_names(code)):
                if name in fn.__globals__:
                    value = fn.__globals__[name]
                    self.part(f"the global {name!r} that {label} uses", functools.partial(self.of, value))
        self._imports(code, fn.__globals__.get("__package__") or "")
        for name, value in sorted(vars(fn).items()):
            if name != "__wrapped__":
                self.part(f"the attribute {name!r} of {label}", functools.partial(self.of, value))
        return key

    def _label(self, thing: Any) -> tuple[str, bytes]:
        """Return what to call a function or class, and its key: its parts are noted apart. It may use itself."""
        module = getattr(thing, "__module__", None) or "__main__"
        name = thing.__qualname__.rpartition("<locals>.")[2]
        label = name if module in ("__main__", "__mp_main__") else f"{module}.{name}"
        if hasattr(thing, "__wrapped__"):  # it has taken the name of what it calls
            label = f"the decorator of {label}"
        self._labels[label] = number = self._labels.get(label, 0) + 1
        label += f" (number {number})" if number > 1 else ""
        key = _hash(b"own", label.encode())
        self._known[id(thing)] = key
        self._held.append(thing)
        return label, key

    def _code(self, code: types.CodeType) -> bytes:
        constants: list[Any] = list(code.co_consts)
        documented = (
            bool(code.co_flags & _HAS_DOCSTRING) if sys.version_info >= (3, 13) else not code.co_name.startswith("<")
        )
        if documented and code.co_flags & 2 and constants and isinstance(constants[0], str):  # 2: a function's
            constants[0] = None
        plain = (
            code.co_code,
            code.co_exceptiontable,
            code.co_flags,
            code.co_argcount,
            code.co_posonlyargcount,
            code.co_kwonlyargcount,
            code.co_names,
            code.co_varnames,
            code.co_freevars,
            code.co_cellvars,
        )
        return _hash(b"code", marshal.dumps(plain, _MARSHAL), *map(self.of, constants))

    def _cell(self, cell: types.CellType) -> bytes:
        try:
            value = cell.cell_contents
        except ValueError:  # nothing in it yet
            return _hash(b"empty")
        return _hash(b"cell", self.of(value))

    def _class(self, cls: type) -> bytes:
        if not _is_own(cls):
            return _named(cls)
        label, key = self._label(cls)
        self.part(f"the bases of {label}", lambda: self.sequence("bases", [type(cls), *cls.__bases__]))
        values = vars(cls)
        if issubclass(cls, enum.Enum):
            members = [(name, member._value_) for name, member in cls.__members__.items()]
            self.part(f"the members of {label}", lambda: self.of(members))
            values = {n: v for n, v in values.items() if n not in cls.__members__ and not n.startswith("_")}  # type: ignore[assignment]  # only read
        for name, value in sorted(values.items()):
            if isinstance(value, _METHODS) or not (
                name.startswith("__") or name == "_abc_impl" or isinstance(value, _OF_SLOTS)
            ):
                self.part(f"the attribute {name!r} of {label}", functools.partial(self.of, value))
        return key

    def _module(self, module: types.ModuleType) -> bytes:
        self._import(module.__name__)
        return _hash(b"module", module.__name__.encode())

    def _imports(self, code: types.CodeType, package: str) -> None:
        for name in sorted(_imported(code, package)):
            self._import(name)

    def _import(self, name: str) -> None:
        """Note the code of a local module, and of those that it imports: as it is on disk, since that travels."""
        if name in self._modules or name == "__main__":
            return
        self._modules.add(name)
        outer = name.rpartition(".")[0]
        if outer:
            self._import(outer)
        try:
            spec = importlib.util.find_spec(name) if not outer or outer in sys.modules else None
        except (ImportError, ValueError, AttributeError):  # then it fails on the workers, too
            return
        if spec is None or not spec.origin or not spec.has_location or not source.is_local(spec.origin):
            return
        code = getattr(spec.loader, "get_code", lambda _: None)(name)
        if code is not None:
            self.part(f"the module {name}", lambda: self._code(code))
            self._imports(code, name if spec.submodule_search_locations is not None else outer)

    def _by_name(self, value: Any) -> bytes:
        owner = getattr(value, "__self__", None)
        held = b"" if owner is None or isinstance(owner, types.ModuleType) else self.of(owner)
        kind = getattr(value, "__objclass__", None)
        return _hash(b"builtin", _named(value), held, _named(kind) if kind is not None else b"")

    _ways: Final[tuple[tuple[Any, Callable[[_Keys, Any], bytes]], ...]] = (
        (types.FunctionType, _function),
        (types.CodeType, _code),
        (types.CellType, _cell),
        (types.ModuleType, _module),
        (types.MethodType, lambda keys, method: keys.sequence("method", (method.__self__, method.__func__))),
        (_BY_NAME, _by_name),
        ((staticmethod, classmethod), lambda keys, found: keys.sequence(type(found).__name__, (found.__func__,))),
        (property, lambda keys, found: keys.sequence("property", (found.fget, found.fset, found.fdel))),
        (functools.cached_property, lambda keys, found: keys.sequence("cached", (found.func,))),
        (
            functools._lru_cache_wrapper,
            lambda keys, found: keys.sequence("lru", (found.__wrapped__, found.cache_parameters())),
        ),
        (functools.partial, lambda keys, found: keys.sequence("partial", (found.func, found.args, found.keywords))),
        (enum.Enum, lambda keys, member: keys.sequence("member", (type(member), member.name))),
        (pathlib.PurePath, lambda keys, path: keys.sequence("path", (type(path), str(path)))),
        ((bytearray, memoryview), lambda _keys, found: _hash(b"bytes", type(found).__name__.encode(), bytes(found))),
    )

    # Data.

    def _numpy(self, value: Any) -> bytes | None:
        import numpy as np

        if isinstance(value, np.dtype):
            return _hash(b"dtype", repr(value.descr if value.fields else value.str).encode())
        if isinstance(value, np.generic):
            return None if value.dtype.hasobject else _hash(b"scalar", self.of(value.dtype), value.tobytes())
        if type(value) not in (np.ndarray, np.memmap):
            return None
        shape = repr(value.shape).encode()
        if value.dtype.hasobject:
            return _hash(b"array", shape, self.of(value.dtype), self.sequence("objects", value.ravel().tolist()))
        flat = np.ascontiguousarray(value).reshape(-1)
        return _hash_buffer(_hash(b"array", shape, self.of(value.dtype)), flat.view(np.uint8) if flat.size else b"")

    def _pandas(self, value: Any) -> bytes | None:
        import pandas as pd

        if isinstance(value, pd.DataFrame):
            columns = [value.iloc[:, n].array for n in range(value.shape[1])]
            return self.sequence("frame", (value.columns, value.index, *columns))
        if isinstance(value, pd.Series):
            return self.sequence("series", (value.name, value.index, value.array))
        if isinstance(value, pd.MultiIndex):
            levels = [value.get_level_values(n) for n in range(value.nlevels)]
            return self.sequence("index", levels)
        if isinstance(value, pd.Index):
            return self.sequence("index", (list(value.names), value.array))
        if isinstance(value, pd.Categorical):
            return self.sequence("categories", (value.codes, value.categories, value.ordered))
        if isinstance(value, pd.api.extensions.ExtensionArray):
            numpy = getattr(value, "_ndarray", None)  # no copy of what is one of numpy's
            if numpy is not None and numpy.dtype.kind != "O":
                return self.sequence("extension", (str(value.dtype), numpy))
            hashed = pd.util.hash_array(value, categorize=False) if str(value.dtype) != "object" else value.tolist()
            return self.sequence("extension", (str(value.dtype), hashed))
        return None

    def _reduced(self, value: Any, kind: type) -> bytes:
        """Return the key of what pickle would take of an object."""
        reduce = copyreg.dispatch_table.get(kind)
        found = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        if isinstance(found, str):
            return _hash(b"global", str(getattr(value, "__module__", "")).encode(), found.encode())
        make, arguments, state, listed, paired, *_ = (*tuple[Any, ...](found), None, None, None)
        key = _hash(b"object", self.of(make), *map(self.of, arguments), b"", self._state(state))
        if listed is None and paired is None:
            return key
        return _hash(key, self.sequence("items", listed or ()), *map(self.of, chain.from_iterable(paired or ())))

    def _state(self, state: Any) -> bytes:
        if isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, dict | None) for part in state):
            return _hash(b"slots", *map(self._state, state))
        # Attributes have no order.
        if type(state) is dict and set(map(type, state)) <= {str}:
            names = sorted(state)
            return self.of([*names, *map(state.__getitem__, names)])
        return self.of(state)


def _is_plain(values: list[Any]) -> bool:
    """Tell whether there are but plain values, and lists, tuples and dicts of such, not too deep."""
    for _ in range(_DEPTH):
        nested = set(map(type, values)) - _PLAIN
        if not nested:
            return True
        if not nested <= _NESTED:
            return False
        inner = [value for value in values if type(value) in _NESTED]
        values = list(chain.from_iterable(inner))  # of a dict, its keys
        if dict in nested:
            values += chain.from_iterable(value.values() for value in inner if type(value) is dict)
    return False


def _named(thing: Any) -> bytes:
    name = getattr(thing, "__qualname__", None) or thing.__name__
    return _hash(b"name", f"{getattr(thing, '__module__', None)}:{name}".encode())


def _is_own(thing: Any) -> bool:
    """Tell whether a function or class is the notebook's, or of a local module: then it counts by what it is."""
    if isinstance(thing, type) and not thing.__flags__ & _IN_PYTHON:
        return False
    if _is_own_module(thing.__module__):
        return True
    found: Any = sys.modules.get(thing.__module__)
    for name in thing.__qualname__.split("."):
        found = getattr(found, name, None)
    # What cannot be found under its name was made somewhere, as a lambda is.
    return found is not thing


def _is_own_module(name: str | None) -> bool:
    from cloudpickle import cloudpickle

    module = sys.modules.get(name or "__main__")
    if module is None or module.__name__ in ("__main__", "__mp_main__"):
        return True
    file = getattr(module, "__file__", None)
    return (file is not None and source.is_local(file)) or cloudpickle._is_registered_pickle_by_value(module)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _global_names(code: types.CodeType) -> set[str]:
    """Return the names of globals that code uses, that of inner functions and classes included."""
    return {
        str(step.argval)
        for each in _codes(code)
        for step in dis.get_instructions(each)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }


def _imported(code: types.CodeType, package: str) -> set[str]:
    """Return the names of the modules that code may import."""
    found = set()
    for each in _codes(code):
        before: list[Any] = [0, ()]
        for step in dis.get_instructions(each):
            if step.opname == "IMPORT_NAME":
                level, names = before[-2:]
                name = _absolute(str(step.argval), level if isinstance(level, int) else 0, package)
                found |= {name, *(f"{name}.{part}" for part in (names or ()) if part != "*")}
            before.append(step.argval)
    return found - {""}


def _absolute(name: str, level: int, package: str) -> str:
    if not level:
        return name
    base = package.rsplit(".", level - 1)[0]
    return f"{base}.{name}" if base and name else base
