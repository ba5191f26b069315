"""What two jobs are compared by: the same in every kernel, and another as soon as something is changed that counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from kernels import Kernel, start_kernel

from yadtq_nb.client import options, sameness
from yadtq_nb.client.sameness import Sameness, differences, unpack

NOTEBOOK = '''
import dataclasses, enum, functools, math, pathlib, collections, datetime
import numpy as np, pandas as pd
import beside

LIMIT = 3
TABLE = np.arange(5.0)
UNUSED = "not used by anyone"

class Colour(enum.Enum):
    RED = 1
    BLUE = 2

Point = collections.namedtuple("Point", "x y")

@dataclasses.dataclass
class Setting:
    depth: int = 2
    names: set = dataclasses.field(default_factory=lambda: {"a", "b", "c"})

class Model:
    rate = 0.5

    def __init__(self, setting):
        self.setting = setting

    @property
    def twice(self):
        return self.rate * 2

    def fit(self, x):
        return x * self.rate

class Deep(Model):
    def fit(self, x):
        return super().fit(x) + 1

@functools.cache
def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

def helper(x):
    """Say what it does."""
    return x + LIMIT

def logged(fn):
    @functools.wraps(fn)
    def inner(*args):
        return fn(*args)
    return inner

@logged
def called(x):
    return beside.area(x, 2) + math.sqrt(4)

def make(power):
    def raised(x, times=2, *, plus=0):
        if x in {"red", "green", "blue"}:
            return [y for y in range(3) if y in (1, 2)]
        return helper(x) ** power + times + plus + TABLE[0] + called(x)
    return raised

factor = make(2)

def work(item, scale=1.5):
    model = Deep(Setting())
    return factor(item) * model.fit(scale) + model.twice + even(4) + Colour.RED.value + Point(1, 2).x

ITEMS = [
    1, 2.5, "three", b"four", None, (5, 6), [7, [8]], {"b": 1, "a": 2}, {"x", "y", "z"}, frozenset({"p", "q", "r"}),
    pathlib.Path("data") / "file.csv", Setting(), Model(Setting(depth=4)), Colour.BLUE, Point(3, 4), helper, Deep,
    np.arange(12).reshape(3, 4), np.float32(2.5), np.array(["a", None], dtype=object), np.asfortranarray(np.eye(3)),
    pd.DataFrame({"n": [1, 2], "s": ["u", "v"], "c": pd.Categorical(["k", "l"])}, index=[3, 4]), pd.Series([1.5, None]),
    datetime.datetime(2026, 1, 2), functools.partial(helper, 3), len, str.upper, np.mean, {"deep": {"s": {1, "1"}}},
]
KWARGS = {"scale": 2.0}
'''
KEY = """
from yadtq_nb.client import options, sameness
print(sameness.of(work, "work", ITEMS, kwargs=KWARGS, style="item", options=options.check(name="x")).packed().hex())
"""

#: What is changed, into what, and what the message says of it.
CHANGES = [
    ("return n == 0", "return 0 == n", "the code of even"),
    ("return x + LIMIT", "return x - LIMIT", "the code of helper"),
    ("return fn(*args)", "return fn(*args) or 0", "the code of the decorator of called"),
    ("beside.area(x, 2)", "beside.area(x, 3)", "the code of called"),
    ("return x * self.rate", "return x / self.rate", "the code of Model.fit"),
    ("super().fit(x) + 1", "super().fit(x) + 2", "the code of Deep.fit"),
    ("return self.rate * 2", "return self.rate * 3", "the code of Model.twice"),
    ("class Deep(Model)", "class Deep(Setting, Model)", "the bases of Deep"),
    ("rate = 0.5", "rate = 0.25", "the attribute 'rate' of Model"),
    ("BLUE = 2", "BLUE = 3", "the members of Colour"),
    ('lambda: {"a", "b", "c"}', 'lambda: {"a", "b", "d"}', "the code of Setting.<lambda>"),
    ("depth: int = 2", "depth: int = 3", "the attribute 'depth' of Setting"),
    ("make(2)", "make(3)", "the variable 'power' that raised closes over"),
    ("times=2", "times=4", "the default of 'times' in raised"),
    ("plus=0", "plus=1", "the default of 'plus' in raised"),
    ("scale=1.5", "scale=1.25", "the default of 'scale' in work"),
    ("LIMIT = 3", "LIMIT = 4", "the global 'LIMIT' that helper uses"),
    ("np.arange(5.0)", "np.arange(5.0) + 1", "the global 'TABLE' that raised uses"),
    ('{"red", "green", "blue"}', '{"red", "green", "black"}', "the code of raised"),
    ("if y in (1, 2)", "if y in (1, 3)", "the code of raised"),
    ("range(3)", "range(4)", "the code of raised"),
    ('"scale": 2.0', '"scale": 2.5', "the keyword argument 'scale'"),
    ("2.5, ", "2.25, ", "item 1"),
    ("1, 2.5", "True, 2.5", "item 0"),
    ("[7, [8]]", "[7, [9]]", "item 6"),
    ('{"b": 1, "a": 2}', '{"a": 2, "b": 1}', "item 7"),
    ('{"x", "y", "z"}', '{"x", "y", "w"}', "item 8"),
    ('"file.csv"', '"file.txt"', "item 10"),
    ("depth=4", "depth=5", "item 12"),
    ("Colour.BLUE", "Colour.RED", "item 13"),
    ("Point(3, 4)", "Point(3, 5)", "item 14"),
    ("reshape(3, 4)", "reshape(4, 3)", "item 17"),
    ("np.arange(12)", "np.arange(12, dtype=np.int32)", "item 17"),
    ("np.float32(2.5)", "np.float64(2.5)", "item 18"),
    ('["a", None]', '["b", None]', "item 19"),
    ("np.eye(3)", "np.eye(3) * 2", "item 20"),
    ('"s": ["u", "v"]', '"s": ["u", "w"]', "item 21"),
    ("index=[3, 4]", "index=[3, 5]", "item 21"),
    ("pd.Series([1.5, None])", 'pd.Series([1.5, None], name="n")', "item 22"),
    ("datetime(2026, 1, 2)", "datetime(2026, 1, 3)", "item 23"),
    ("partial(helper, 3)", "partial(helper, 4)", "item 24"),
    ("len, str.upper", "len, str.lower", "item 26"),
    ("np.mean,", "np.median,", "item 27"),
    ('{1, "1"}}', '{1, "2"}}', "item 28"),
    ("np.mean, ", "np.mean, 0, ", "the number of items (29 there, 30 here)"),
]
#: What makes no difference.
REMARKS = [
    ("def helper(x):", "# What it is for.\n\n\ndef helper(x):"),
    ("    return x + LIMIT", "    # Beyond the limit.\n\n    return x + LIMIT  # so it is"),
    ('"""Say what it does."""', '"""Say what it really does."""'),
    ("not used by anyone", "nor is this"),
    ('{"red", "green", "blue"}', '{"blue", "red", "green"}'),
    ('{"x", "y", "z"}', '{"z", "y", "x"}'),
    ("np.asfortranarray(np.eye(3))", "np.eye(3)"),
    ("LIMIT = 3", "LIMIT = 1 + 2"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kernel, Kernel]]:
    directory = tmp_path_factory.mktemp("notebooks")
    (directory / "beside.py").write_text("import deeper\ndef area(x, y):\n    return deeper.times(x, y)\n")
    (directory / "deeper.py").write_text("def times(x, y):\n    return x * y\n")
    with start_kernel(directory, seed=1) as one, start_kernel(directory, seed=2) as other:
        one.run(f"directory = {str(directory)!r}")
        yield one, other


@pytest.fixture(scope="module")
def original(kernels: tuple[Kernel, Kernel]) -> Sameness:
    return key_in(kernels[0])


def key_in(kernel: Kernel, old: str = "", new: str = "") -> Sameness:
    """Return the key of the notebook in a kernel, something changed in it."""
    assert old in NOTEBOOK
    found = unpack(bytes.fromhex(kernel.run(NOTEBOOK.replace(old, new, 1) + KEY)))
    assert not found.trouble
    return found


def test_key_is_the_same_in_two_kernels_and_in_any_order_of_a_set(
    kernels: tuple[Kernel, Kernel], original: Sameness
) -> None:
    one, other = kernels
    ask = "import os; print(os.getpid(), hash('a'), work.__code__.co_filename)"
    there = key_in(other)
    assert not set(one.run(ask).split()) & set(other.run(ask).split())
    assert there == original
    assert there.is_same(original)
    assert key_in(one) == original


@pytest.mark.parametrize(("old", "new"), REMARKS)
def test_what_makes_no_difference_makes_none(
    kernels: tuple[Kernel, Kernel], original: Sameness, old: str, new: str
) -> None:
    assert key_in(kernels[1], old, new) == original


@pytest.mark.parametrize(("old", "new", "name"), CHANGES)
def test_what_was_changed_is_named(
    kernels: tuple[Kernel, Kernel], original: Sameness, old: str, new: str, name: str
) -> None:
    changed = key_in(kernels[1], old, new)
    assert not changed.is_same(original)
    assert name in differences(original, changed)
    assert len(differences(original, changed)) <= 3


def test_module_beside_the_notebook_counts_by_its_code_however_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("import deeper\ndef area(x, y):\n    return deeper.times(x, y)\n")
    deeper = tmp_path / "deeper.py"
    keys = []
    for seed, source in enumerate(("x * y", "x * y  # a remark", "y * x")):
        deeper.write_text(f"def times(x, y):\n    return {source}\n")
        with start_kernel(tmp_path, seed=seed) as kernel:
            keys.append(key_in(kernel))
    assert keys[0] == keys[1]
    assert differences(keys[0], keys[2]) == ["the module deeper"]


# In this process.


def of(items: Any, fn: Any = len, **given: Any) -> Sameness:
    chosen = options.check(name="x", **given)
    return sameness.of(fn, "fn", items, kwargs={}, style="item", options=chosen)


def test_options_that_bear_on_outcomes_are_compared_and_others_are_not() -> None:
    assert of([1], priority="low", chunksize=3, deadline=9, start_after=1) == of([1])
    assert differences(of([1]), of([1], retries=2)) == ["retries (0 there, 2 here)"]
    assert differences(of([1]), of([1], timeout=2.5)) == ["timeout (none there, 2.5 s here)"]
    assert differences(of([1]), of([1], retry_on=(KeyError, OSError))) == [
        "retry_on (Exception there, KeyError, OSError here)"
    ]


def test_one_item_of_many_is_found_to_within_some_neighbours() -> None:
    items = list(range(100_000))
    changed = [*items[:77_777], -1, *items[77_778:]]
    (where,) = differences(of(items), of(changed))
    first, last = (int(word) for word in where.split() if word.isdigit())
    assert first <= 77_777 <= last <= first + 9
    assert differences(of([0] * 5), of([1] * 5)) == ["item 0, item 1, item 2 and 2 more"]


@pytest.mark.parametrize(
    ("items", "why"),
    [
        (iter([1]), "its items are an iterator"),
        ([1, (x for x in ())], "item 1: a generator cannot be told from others"),
        ([[[threading.Lock()]]], "item 0: a lock cannot be told from others"),
    ],
)
def test_what_has_no_key_says_why(items: Any, why: str) -> None:
    found = of(items)
    assert found.trouble.startswith(why)
    assert not found.is_same(found)


def test_function_that_holds_what_has_no_key_says_where() -> None:
    lock = threading.Lock()
    found = of([1], lambda x: (lock, x))
    assert found.trouble.startswith("the variable 'lock' that test_sameness.<lambda> closes over: a lock cannot")


def test_objects_that_hold_themselves_have_a_key() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    again: list[Any] = [1]
    again.append(again)
    assert of([ring]) == of([again])
    assert of([ring]) != of([[1, [1, ring]]])
    assert not of([ring]).trouble


def test_values_that_are_equal_but_not_the_same_differ() -> None:
    kinds = [1, 1.0, True, "1", b"1", np.int64(1), np.float64(1), np.array(1), (1,), [1], {1}, frozenset({1}), {1: 1}]
    assert len({of([kind]).items for kind in kinds}) == len(kinds)
    assert of([[1, [2]]]) != of([[1, 2]])
    assert of([["ab", "c"]]) != of([["a", "bc"]])


@pytest.mark.parametrize(
    "column",
    [
        [1, 2, 3],
        [1.0, None, 2.0],
        ["a", "b", None],
        [[1], {2}, "x"],
        pd.array([1, None, 3], dtype="Int64"),
        pd.date_range("2026-01-01", periods=3, tz="UTC"),
        pd.Categorical(["a", "b", "a"], ordered=True),
        pd.array([True, None, False], dtype="boolean"),
        pd.period_range("2026-01", periods=3, freq="M"),
    ],
)
def test_frames_are_compared_by_what_they_hold(column: Any) -> None:
    frame = pd.DataFrame({"a": column, "b": 1})
    assert of([frame]) == of([frame.copy()]) == of([pd.DataFrame({"b": 1, "a": column})[["a", "b"]]])
    for other in (frame[::-1], frame.rename(columns={"a": "c"}), frame[["b", "a"]], frame.set_index("a"), frame[:2]):
        assert of([frame]) != of([other])


def test_what_cannot_be_read_cannot_be_compared() -> None:
    assert "without a key" in unpack(b"").trouble
    assert "without a key" in unpack(b"\xc1").trouble
