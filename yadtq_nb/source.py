"""The local source tree beside a notebook: how it travels, and how a slot takes its place.

    notebook   collect(function) ──▶ Tree: an archive of the .py files, named by its content
    slot       enter(environment, archive, directory): sys.path and working directory as in the notebook

Local is what lies below the working directory or a directory of sys.path that is neither the standard library nor
an installed package. On the notebook's own host a slot uses the same directories, but takes the source of every file
in the archive from the archive: a job runs what was there when it was submitted, even if a file is edited meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.machinery
import os
import socket
import sys
import sysconfig
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from yadtq_nb.errors import ConfigError
from yadtq_nb.model import Environment

#: A tree with more than this is not sent whole: files, and bytes.
MAX_FILES: Final = 2_000
MAX_BYTES: Final = 8 * 1024 * 1024
#: Directory entries that are looked at before a directory counts as too big.
_MAX_ENTRIES: Final = 20_000
#: How long a directory that was too big is not looked at again, in seconds.
_TOO_BIG_FOR: Final = 300.0
#: A file that changed so shortly before it was read may change again without a new time stamp, in nanoseconds: the
#: kernel's clock ticks every few ms, and a time stamp of whole seconds comes from a coarse file system.
_RACY: Final = 50_000_000
_RACY_COARSE: Final = 2_000_000_000
#: Objects that are searched for the names of modules.
_MAX_OBJECTS: Final = 2_000

_ENVIRONMENTS: Final = frozenset({"pyvenv.cfg", "conda-meta"})
_SKIPPED: Final = frozenset({"node_modules", "__pycache__", "site-packages", "dist-packages"})
_PACKAGE: Final = os.path.dirname(os.path.abspath(__file__))
_HOST: Final = socket.gethostname()

Stamp: TypeAlias = tuple[int, int, int, int]


class Tree(msgspec.Struct, frozen=True):
    """The local source files that a job takes along."""

    #: 32 hex digits of the archive's SHA-256.
    hash: str
    #: Directory on this machine that it was taken from: the working directory, where that is part of it.
    root: str
    archive: bytes


class Archive(msgspec.Struct, frozen=True, array_like=True):
    """What is in Tree.archive."""

    #: Directories on the submitter's machine.
    roots: tuple[str, ...]
    #: Number of the root, path below it with slashes, content; sorted.
    files: tuple[tuple[int, str, bytes], ...]


class _TooBigError(Exception):
    """A directory is over the limits."""


def collect(function: object, *extra: object, roots: Sequence[str | os.PathLike[str]] | None = None) -> Tree | None:
    """Return the local source that function and extra may need, or None when they need none.

    Args:
        roots: directories to take instead of the working directory and the local part of sys.path.

    Raises:
        ConfigError: the local modules in use are themselves over the limits.
    """
    return _collector.collect((function, *extra), roots)


class Collector:
    """Collects, and remembers what it has read as long as the files' time stamps stay."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[Any, ...] = ()
        self._roots: list[str] = []
        self._loaded: dict[str, str] = {}
        #: How many modules there were at the last look, and which came last; and what was found.
        self._newest = (0, "")
        self._loaded_now: frozenset[str] = frozenset()
        self._snapshots: dict[tuple[str, ...], _Snapshot] = {}
        self._tops: dict[str, tuple[Stamp, frozenset[str]]] = {}
        self._too_big: dict[str, float] = {}
        self._last: tuple[tuple[Any, ...], Tree | None] = ((), None)

    def collect(self, objects: Iterable[object], roots: Sequence[str | os.PathLike[str]] | None) -> Tree | None:
        """See collect()."""
        with self._lock:
            self._find_roots(roots)
            loaded = self._loaded_tops()
            tops = {root: self._top_names(root) for root in self._roots}
            wanted = loaded | (_mentioned(objects) & frozenset().union(*tops.values()))
            if not wanted:
                return None
            outer = [root for root in self._roots if not any(_below(root, other) for other in self._roots)]
            return self._archive(outer, [self._snapshot(root, wanted) for root in outer])

    def _find_roots(self, given: Sequence[str | os.PathLike[str]] | None) -> None:
        cwd = os.getcwd()
        key = (cwd, tuple(given if given is not None else sys.path), given is None)
        if key != self._key:
            places = [cwd, *sys.path] if given is None else [os.fspath(place) for place in given]
            found = dict.fromkeys(os.path.abspath(os.path.join(cwd, place)) for place in places)
            self._roots = [place for place in found if is_local(place) and os.path.isdir(place)]
            self._key, self._loaded, self._newest = key, {}, (0, "")

    def _loaded_tops(self) -> frozenset[str]:
        """Return the top names of the local modules that are loaded."""
        # Whatever is loaded comes last. To go through some thousand modules takes a tenth of a millisecond.
        newest = (len(sys.modules), next(reversed(sys.modules)))
        if newest == self._newest:
            return self._loaded_now
        self._newest = newest
        loaded = self._loaded
        for name in sys.modules.keys() - loaded.keys():
            file = getattr(sys.modules.get(name), "__dict__", {}).get("__file__")
            local = isinstance(file, str) and name not in ("__main__", "__mp_main__") and self._holds(file)
            loaded[name] = name.partition(".")[0] if local else ""
        self._loaded_now = frozenset(filter(None, loaded.values()))
        return self._loaded_now

    def _holds(self, file: str) -> bool:
        return is_local(file) and any(_below(file, root) for root in self._roots)

    def _top_names(self, root: str) -> frozenset[str]:
        """Return what can be imported from root, and perhaps more: names of directories."""
        with contextlib.suppress(OSError):
            now, stamp = time.time_ns(), _stamp(root)
            known = self._tops.get(root)
            if known and known[0] == stamp:
                return known[1]
            names = frozenset(name.removesuffix(".py") for name in islice(os.listdir(root), _MAX_ENTRIES))
            if now > _settled(stamp):
                self._tops[root] = (stamp, names)
            return names
        return frozenset()

    def _snapshot(self, root: str, wanted: frozenset[str]) -> _Snapshot:
        """Return all of root, or just the modules that are wanted where all would be too much."""
        if self._too_big.get(root, 0.0) < time.monotonic():
            try:
                return self._refreshed((root,))
            except _TooBigError:
                self._too_big[root] = time.monotonic() + _TOO_BIG_FOR
        inner = [place for place in self._roots if place == root or _below(place, root)]
        names = sorted(os.path.join(place, name) for place in inner for name in wanted)
        targets = [path for name in names for path in (name + ".py", name) if os.path.exists(path)]
        try:
            return self._refreshed(tuple(targets))
        except _TooBigError as exc:
            raise ConfigError(
                f"the local modules below {root} that this work uses are over {MAX_FILES:,} files or "
                f"{MAX_BYTES // 2**20} MB ({exc}): install them as a package on the workers, or start the notebook in "
                "a smaller directory"
            ) from None

    def _refreshed(self, targets: tuple[str, ...]) -> _Snapshot:
        snapshot = self._snapshots.setdefault(targets, _Snapshot(targets))
        snapshot.refresh()
        return snapshot

    def _archive(self, roots: list[str], snapshots: list[_Snapshot]) -> Tree | None:
        key = (tuple(roots), *[(id(snapshot), snapshot.version) for snapshot in snapshots])
        if key != self._last[0]:
            self._last = key, _pack(roots, [snapshot.contents for snapshot in snapshots])
        return self._last[1]


class _Snapshot:
    """The .py files below some directories, read again when their time stamps change or cannot be trusted yet."""

    def __init__(self, targets: tuple[str, ...]) -> None:
        self._targets = targets
        self._stamps: dict[str, Stamp] = {}
        self._scanned = 0
        #: False while something may change without a new time stamp.
        self._trusted = False
        self.contents: dict[str, bytes] = {}
        #: Grows with every change.
        self.version = 0

    def refresh(self) -> None:
        """Bring contents up to date.

        Raises:
            _TooBigError: over the limits.
        """
        if not self._unchanged():
            self._scan()

    def _unchanged(self) -> bool:
        stamps = self._stamps
        try:
            return self._trusted and list(map(_stamp, stamps)) == list(stamps.values())
        except OSError:  # something was deleted
            return False

    def _scan(self) -> None:
        now = time.time_ns()
        stamps: dict[str, Stamp] = {}
        contents: dict[str, bytes] = {}
        for path in _walk(self._targets):
            with contextlib.suppress(OSError):
                stamp = stamps[path] = _stamp(path)  # before reading: what changes in between is seen next time
                if path.endswith(".py") and path not in contents:
                    contents[path] = self._known(path, stamp) or Path(path).read_bytes()
        _check(contents)
        self._stamps, self._scanned = stamps, now
        self._trusted = now > max(map(_settled, stamps.values()), default=0)
        if contents != self.contents:
            self.contents = contents
            self.version += 1

    def _known(self, path: str, stamp: Stamp) -> bytes | None:
        if self._stamps.get(path) != stamp or self._scanned <= _settled(stamp):
            return None
        return self.contents.get(path)


def _check(contents: dict[str, bytes]) -> None:
    size = sum(map(len, contents.values()))
    if len(contents) > MAX_FILES or size > MAX_BYTES:
        raise _TooBigError(f"{len(contents):,} files, {size / 2**20:.1f} MB")


def _stamp(path: str) -> Stamp:
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _settled(stamp: Stamp) -> int:
    """Return from when on a reading can be trusted as long as the stamp stays."""
    coarse = not stamp[1] % 1_000_000_000
    return max(stamp[:2] if stamp[0] < time.time_ns() + _RACY_COARSE else stamp[1:2]) + (
        _RACY_COARSE if coarse else _RACY
    )


def _walk(targets: Iterable[str]) -> Iterator[str]:
    """Yield the directories and .py files at and below targets."""
    targets = frozenset(targets)
    waiting, seen, entries, files = sorted(targets), set[tuple[int, int]](), 0, 0
    while waiting:
        path = waiting.pop()
        if path.endswith(".py") and not os.path.isdir(path):
            yield path
            continue
        found = _list(path, seen, inner=path not in targets)
        if found is None:
            continue
        yield path
        for entry in found:
            entries += 1
            if entry.name.endswith(".py") and entry.is_file():
                files += 1
                yield entry.path
            elif entry.name[0] != "." and entry.name not in _SKIPPED and entry.is_dir():
                waiting.append(entry.path)
            if entries > _MAX_ENTRIES or files > MAX_FILES:
                raise _TooBigError(f"more than {min(entries, files):,} files")


def _list(path: str, seen: set[tuple[int, int]], *, inner: bool) -> list[os.DirEntry[str]] | None:
    """Return what is in a directory, or None when it is not to be entered: twice the same, or an environment."""
    try:
        where = os.stat(path)
        if (where.st_dev, where.st_ino) in seen or path == _PACKAGE:  # links may go in circles
            return None
        seen.add((where.st_dev, where.st_ino))
        with os.scandir(path) as found:
            entries = list(islice(found, _MAX_ENTRIES + 1))
    except OSError:
        return None
    return None if inner and any(entry.name in _ENVIRONMENTS for entry in entries) else entries


def _pack(roots: list[str], contents: list[dict[str, bytes]]) -> Tree | None:
    files = sorted(
        (number, os.path.relpath(path, root).replace(os.sep, "/"), data)
        for number, (root, found) in enumerate(zip(roots, contents, strict=True))
        for path, data in found.items()
    )
    if not files:
        return None
    archive = msgspec.msgpack.encode(Archive(tuple(roots), tuple(files)))
    return Tree(hashlib.sha256(archive).hexdigest()[:32], roots[0], archive)


def _below(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep) and path != root


def is_local(path: str) -> bool:
    """Return whether path is the user's own, not installed."""
    if _SKIPPED.intersection(path.split(os.sep)) or os.path.basename(path) == ".ipython":
        return False
    return path != _PACKAGE and not any(path == place or _below(path, place) for place in (*_INSTALLED, _PACKAGE))


def _installed() -> tuple[str, ...]:
    places = {os.path.abspath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    for prefix in {sys.prefix, sys.base_prefix}:
        # Not any prefix: that of the system's Python is /usr, and /usr/src/app is somebody's work.
        if any(os.path.exists(os.path.join(prefix, mark)) for mark in _ENVIRONMENTS):
            places.add(os.path.abspath(prefix))
    return tuple(places)


_INSTALLED: Final = _installed()


def _mentioned(objects: Iterable[object]) -> frozenset[str]:
    """Return the names in the code of objects, and of what of __main__ they use, that may be names of modules."""
    names: set[str] = set()
    waiting, seen = list(objects), dict[int, object]()
    while waiting and len(seen) < _MAX_OBJECTS:
        thing = waiting.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing  # held, so that its id stays its own
            waiting += _parts(thing, names)
    return frozenset(name.partition(".")[0] for name in names)


def _parts(thing: object, names: set[str]) -> Iterable[object]:
    """Add the names that thing mentions, and return what is to be searched further."""
    if isinstance(thing, types.CodeType):
        names.update(thing.co_names)
        names.update(const for const in thing.co_consts if isinstance(const, str))  # import_module("helpers")
        return [const for const in thing.co_consts if isinstance(const, types.CodeType)]
    if isinstance(thing, types.ModuleType):
        names.add(thing.__name__)
        return ()
    if isinstance(thing, types.FunctionType):
        return _of_function(thing, names)
    if isinstance(thing, type):
        names.add(thing.__module__)
        return (*vars(thing).values(), *thing.__bases__) if thing.__module__ == "__main__" else ()
    if isinstance(thing, partial):
        return thing.func, thing.args, thing.keywords
    if isinstance(thing, types.MethodType | staticmethod | classmethod):
        return thing.__func__, getattr(thing, "__self__", None)
    if isinstance(thing, property):
        return thing.fget, thing.fset
    if isinstance(thing, list | tuple | set | frozenset):
        return islice(thing, 100)
    if isinstance(thing, dict):
        return islice(thing.values(), 100)
    return _of_instance(thing)


def _of_function(function: types.FunctionType, names: set[str]) -> Iterable[object]:
    names.add(function.__module__ or "")
    if function.__module__ not in ("__main__", None) and "<locals>" not in function.__qualname__:
        return ()  # travels by reference
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            cells.append(cell.cell_contents)
    code = function.__code__
    used = [function.__globals__[name] for name in _all_names(code) if name in function.__globals__]
    return code, function.__defaults__, function.__kwdefaults__, getattr(function, "__wrapped__", None), *cells, *used


def _all_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _all_names(const)


def _of_instance(thing: object) -> Iterable[object]:
    cls = type(thing)
    if cls.__module__ == "builtins":
        return ()
    state = getattr(thing, "__dict__", None)
    return (cls, state) if isinstance(state, dict) and cls.__module__ == "__main__" else (cls,)


_collector = Collector()  # one for the process, as what it remembers is the process's files and modules


def suits(entered: Environment, wanted: Environment) -> bool:
    """Return whether what wants one environment may run in a process that has entered another."""
    # Without a tree it needs no local modules, so those that are loaded do not matter.
    return entered == wanted or (not wanted.tree and wanted == msgspec.structs.replace(entered, tree="", tree_root=""))


def enter(environment: Environment, archive: bytes | None, directory: Path) -> str:
    """Take the submitter's place: set sys.path and the working directory, and return the latter.

    Args:
        archive: content of the Tree that environment names; None to import from the submitter's directories.
        directory: where trees are unpacked, shared by the slots of a node.

    Raises:
        OSError: the tree cannot be unpacked.
    """
    tree = msgspec.msgpack.decode(archive, type=Archive) if archive else Archive((), ())
    if environment.host == _HOST and os.path.isdir(environment.cwd):
        home, places = environment.cwd, [os.path.join(environment.cwd, place) for place in environment.path]
        _import_from({os.path.join(tree.roots[n], *name.split("/")): data for n, name, data in tree.files}, tree.roots)
    else:
        home, places = _elsewhere(environment, tree, directory)
    os.chdir(home)
    # Local places only: an installed package comes from this worker's own environment.
    local = [place for place in places if is_local(place) and os.path.isdir(place)]
    sys.path[:] = list(dict.fromkeys([*local, *(place for place in sys.path if place)]))
    importlib.invalidate_caches()
    return home


def _elsewhere(environment: Environment, tree: Archive, directory: Path) -> tuple[str, list[str]]:
    if not tree.files:
        empty = directory / "empty"
        empty.mkdir(parents=True, exist_ok=True)
        return str(empty), []
    top = _unpack(environment.tree, tree, directory)

    def moved(place: str) -> str | None:
        place = os.path.normpath(os.path.join(environment.cwd, place))
        for number, root in enumerate(tree.roots):
            if place == root or _below(place, root):
                return os.path.join(top, str(number), os.path.relpath(place, root))
        return None

    places = list(filter(None, map(moved, environment.path)))
    home = moved(environment.cwd) or os.path.join(top, "0")
    os.makedirs(home, exist_ok=True)
    return os.path.normpath(home), [os.path.normpath(place) for place in places] or [home]


def _unpack(name: str, tree: Archive, directory: Path) -> str:
    """Unpack tree once, whichever slot comes first, and return where."""
    target = directory / name
    if not target.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=directory, prefix=".new-"))
        for number, path, data in tree.files:
            file = (fresh / str(number) / path).resolve()
            if not file.is_relative_to(fresh.resolve()):
                raise ConfigError(f"source archive {name} holds a path that leads out of it: {path}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        with contextlib.suppress(OSError):  # another slot was first; what it has unpacked is the same
            fresh.rename(target)
    return str(target)


def _import_from(files: dict[str, bytes], roots: Iterable[str]) -> None:
    """Have modules below roots take their source from files, where it is in files, and never from a compiled cache.

    A .pyc is found valid by the second of the edit and the size: an edit from `return 1` to `return 2` in the same
    second would not be seen.
    """

    class Loader(importlib.machinery.SourceFileLoader):
        def path_stats(self, path: str) -> Any:  # noqa: ARG002  # the name is importlib's
            raise OSError  # no time stamp: the cache is neither read nor written

        def get_data(self, path: str) -> bytes:
            data = files.get(path)
            return super().get_data(path) if data is None else data

    finder: Callable[..., Any] = importlib.machinery.FileFinder.path_hook(
        (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
        (Loader, importlib.machinery.SOURCE_SUFFIXES),
    )

    def hook(path: str) -> Any:
        if not any(path == root or _below(path, root) for root in roots):
            raise ImportError(path)
        return finder(path)

    if files:
        sys.path_hooks.insert(0, hook)
        sys.path_importer_cache.clear()
