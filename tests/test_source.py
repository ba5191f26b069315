"""The source tree that travels: what is taken, that edits are noticed, and where it is unpacked."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from yadtq_nb import source
from yadtq_nb.errors import ConfigError
from yadtq_nb.model import Environment
from yadtq_nb.source import Archive, Collector, Tree, collect

PACKAGE = str(Path(__file__).parent.parent)


def notebook_function(code: str, name: str = "f") -> Callable[..., Any]:
    """Return a function as a notebook's cells define it."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(code, scope)  # the code is a literal of a test
    return scope[name]  # type: ignore[no-any-return]


def files(tree: Tree | None) -> dict[str, bytes]:
    assert tree is not None
    return {name: data for _, name, data in msgspec.msgpack.decode(tree.archive, type=Archive).files}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "notebook"
    (root / "package" / "inner").mkdir(parents=True)
    (root / "helpers.py").write_text("A = 1\n")
    (root / "package" / "__init__.py").write_text("")
    (root / "package" / "inner" / "deep.py").write_text("B = 2\n")
    (root / "data.csv").write_text("1,2\n")
    return root


def test_work_that_mentions_no_local_module_takes_nothing(root: Path) -> None:
    assert collect(notebook_function("import math\ndef f(x): return math.sqrt(x)"), roots=[root]) is None


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n import helpers",
        "def f():\n from package.inner import deep",
        "def f():\n def g():\n  import helpers\n return g",
        "def g():\n import helpers\ndef f(): return g()",
        "class G:\n def h(self):\n  import helpers\ndef f(): return G().h()",
        "import importlib\ndef f(): return importlib.import_module('package.inner')",
        "def g():\n import helpers\nTABLE = {'g': [g]}\ndef f(): return TABLE['g'][0]()",
        "import functools\ndef g():\n import helpers\nf = functools.partial(g)",
        "def make():\n def g():\n  import helpers\n return lambda: g()\nf = make()",
        "class G:\n @property\n def p(self):\n  import helpers\nf = G().__class__",
        "class G:\n def __call__(self):\n  import helpers\nf = G()",
    ],
)
def test_import_that_has_not_happened_yet_takes_the_whole_tree(root: Path, code: str) -> None:
    found = files(collect(notebook_function(code), roots=[root]))
    assert set(found) == {"helpers.py", "package/__init__.py", "package/inner/deep.py"}
    assert found["helpers.py"] == b"A = 1\n"


def test_loaded_local_module_takes_the_tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "loaded_helper.py").write_text("def f(): pass\n")
    monkeypatch.syspath_prepend(str(root))
    import loaded_helper  # type: ignore[import-not-found]  # made a line ago

    assert "loaded_helper.py" in files(collect(loaded_helper.f, roots=[root]))
    assert "loaded_helper.py" in files(collect(functools.partial(print, loaded_helper.f), roots=[root]))
    del sys.modules["loaded_helper"]


def test_environments_caches_and_hidden_directories_stay_at_home(root: Path) -> None:
    for name in (".git", "node_modules", "__pycache__", "venv", "lib/site-packages"):
        (root / name).mkdir(parents=True)
        (root / name / "x.py").write_text("")
    (root / "venv" / "pyvenv.cfg").write_text("")
    tree = collect(notebook_function("def f(): import helpers"), roots=[root])
    assert set(files(tree)) == {"helpers.py", "package/__init__.py", "package/inner/deep.py"}


def test_circle_of_links_ends(root: Path) -> None:
    (root / "package" / "again").symlink_to(root, target_is_directory=True)
    assert collect(notebook_function("def f(): import helpers"), roots=[root]) is not None


def test_hash_depends_on_names_and_contents_only(root: Path) -> None:
    function = notebook_function("def f(): import helpers")
    first = Collector().collect([function], [root])
    os.utime(root / "helpers.py", (1, 1))
    (root / "data.csv").write_text("other")
    assert Collector().collect([function], [root]) == first
    (root / "helpers.py").rename(root / "helpers2.py")
    (root / "helpers.py").write_text("A = 1\n")
    assert Collector().collect([function], [root]) != first


def test_every_edit_is_noticed_even_of_the_same_size_and_time(root: Path) -> None:
    function = notebook_function("def f(): import helpers")
    hashes = set()
    for version in range(50):
        (root / "helpers.py").write_text(f"A = {version:03}\n")
        os.utime(root / "helpers.py", ns=(10**18, 10**18))
        hashes.add(collect(function, roots=[root]).hash)  # type: ignore[union-attr]  # it mentions helpers
    assert len(hashes) == 50


def age(root: Path) -> None:
    """Wait until the time stamps of what was just made can be trusted."""
    stamps = [os.stat(path).st_ctime_ns for path in [root, *root.rglob("*")]]
    time.sleep(max(0.0, (max(stamps) + source._RACY - time.time_ns()) / 1e9) + 0.01)  # no event tells the time


def test_edits_new_and_deleted_files_are_noticed_in_a_tree_that_has_settled(root: Path) -> None:
    function = notebook_function("def f(): import helpers")
    collector = Collector()
    collector.collect([function], [root])
    age(root)
    settled = collector.collect([function], [root])
    assert collector.collect([function], [root]) is settled
    (root / "package" / "inner" / "deep.py").write_text("B = 3\n")
    assert files(collector.collect([function], [root]))["package/inner/deep.py"] == b"B = 3\n"
    (root / "package" / "new.py").write_text("")
    assert "package/new.py" in files(collector.collect([function], [root]))
    (root / "package" / "new.py").unlink()
    (root / "package" / "inner" / "deep.py").write_text("B = 2\n")
    assert collector.collect([function], [root]) == settled


def test_collecting_again_is_quick_when_nothing_has_changed(root: Path) -> None:
    for number in range(90):
        (root / f"module_{number}.py").write_text("pass\n")
    function = notebook_function("def f(): import helpers")
    collector = Collector()
    collector.collect([function], [root])
    age(root)
    collector.collect([function], [root])
    times = []
    for _ in range(50):
        began = time.perf_counter()
        collector.collect([function], [root])
        times.append(time.perf_counter() - began)
    assert min(times) < 0.001  # measured 0.2 ms; a shared machine gets some room


def test_huge_directory_sends_only_the_modules_in_use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_FILES", 10)
    (root / "projects").mkdir()
    for number in range(20):
        (root / "projects" / f"x{number}.py").write_text("")
    tree = Collector().collect([notebook_function("def f(): import package")], [root])
    assert set(files(tree)) == {"package/__init__.py", "package/inner/deep.py"}


def test_modules_over_the_limit_are_refused_with_the_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_BYTES", 10)
    (root / "helpers.py").write_text("#" * 100)
    with pytest.raises(ConfigError, match=str(root)):
        Collector().collect([notebook_function("def f(): import helpers")], [root])


def test_working_directory_and_path_are_the_roots_unless_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = root.parent / "src"
    other.mkdir()
    (other / "extra.py").write_text("")
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", ["", str(other), *sys.path])
    tree = Collector().collect([notebook_function("def f(): import extra, helpers")], None)
    assert tree is not None
    assert tree.root == str(root)
    assert {"extra.py", "helpers.py"} <= set(files(tree))


def test_this_package_and_installed_ones_are_not_local() -> None:
    assert not source.is_local(source._PACKAGE)
    assert not source.is_local(pytest.__file__)
    assert not source.is_local(os.__file__)


def enter(environment: Environment, tree: Tree | None, directory: Path, code: str) -> str:
    """Enter in a process of its own, run code there and return what it prints."""
    prepared = (
        f"import sys; sys.path.append({PACKAGE!r})\n"
        "import msgspec; from pathlib import Path; from yadtq_nb import model, source\n"
        "kind = tuple[model.Environment, bytes | None]\n"
        "environment, archive = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=kind)\n"
        f"source.enter(environment, archive, Path({str(directory)!r}))\n"
    )
    sent = msgspec.msgpack.encode((environment, tree.archive if tree else None))
    done = subprocess.run([sys.executable, "-c", prepared + code], input=sent, capture_output=True, check=False)
    assert not done.returncode, done.stderr.decode()
    return done.stdout.decode().strip()


def environment_of(root: Path, tree: Tree | None, host: str, *path: str) -> Environment:
    return Environment(str(root), ("", *path), host, tree.hash if tree else "", tree.root if tree else "")


def test_same_host_uses_the_submitters_directories(root: Path, tmp_path: Path) -> None:
    tree = collect(notebook_function("def f(): import helpers"), roots=[root])
    environment = environment_of(root, tree, socket.gethostname())
    code = "import os, helpers; print(helpers.__file__, os.getcwd(), helpers.A)"
    assert enter(environment, tree, tmp_path / "trees", code) == f"{root}/helpers.py {root} 1"
    assert enter(environment, None, tmp_path / "trees", code) == f"{root}/helpers.py {root} 1"
    assert not (tmp_path / "trees").exists()


def test_other_host_unpacks_once_and_maps_every_directory(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "src"
    other.mkdir()
    (other / "extra.py").write_text("C = 3\n")
    tree = collect(notebook_function("def f(): import helpers"), roots=[root, other])
    environment = environment_of(root, tree, "elsewhere", str(other))
    code = "import os, helpers, extra; from package.inner import deep; print(os.getcwd(), helpers.A, deep.B, extra.C)"
    assert tree is not None
    expected = f"{tmp_path}/trees/{tree.hash}/0 1 2 3"
    assert enter(environment, tree, tmp_path / "trees", code) == expected
    assert enter(environment, tree, tmp_path / "trees", code) == expected
    assert [path.name for path in (tmp_path / "trees").iterdir()] == [tree.hash]


def test_notebook_below_its_source_directory_keeps_its_place(root: Path, tmp_path: Path) -> None:
    tree = collect(notebook_function("def f(): import helpers"), roots=[root / "package", root])
    environment = environment_of(root / "package", tree, "elsewhere", str(root))
    code = "import os, helpers, inner.deep; print(os.path.basename(os.getcwd()), inner.deep.B)"
    assert enter(environment, tree, tmp_path / "trees", code) == "package 2"


def test_archive_cannot_write_outside_of_its_directory(tmp_path: Path) -> None:
    archive = msgspec.msgpack.encode(Archive(("/x",), ((0, "../../../evil.py", b""),)))
    with pytest.raises(ConfigError, match=r"evil\.py"):
        source.enter(Environment("/x", (), "elsewhere", "hash"), archive, tmp_path / "a" / "trees")
    assert not list(tmp_path.rglob("evil.py"))


def test_installed_packages_of_the_submitter_are_not_put_on_the_path(root: Path, tmp_path: Path) -> None:
    (root / "site-packages").mkdir()
    environment = environment_of(root, None, socket.gethostname(), str(root / "site-packages"))
    assert enter(environment, None, tmp_path, "print('site-packages' in ' '.join(sys.path[:2]))") == "False"
