"""A DataFrame fanned out by row, group or block, and put together again."""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal, assert_series_equal

from yadtq_nb import LocalCluster, Queue, codec
from yadtq_nb.client import fan
from yadtq_nb.model import BrokenItem

pytestmark = pytest.mark.one_stack

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])


def _frame() -> pd.DataFrame:
    return pd.DataFrame(
        {"city": ["b", "a", "b", None, "a"], "x": [1, 2, 3, 4, 5], "y": [0.5, 1.5, 2.5, 3.5, 4.5]},
        index=pd.Index([10, 11, 10, 12, 13], name="id"),
    )


def _parts(df: pd.DataFrame, by: Any = None, chunks: int | None = None) -> list[Any]:
    """Return the parts as a worker, and then the client, has them."""
    parts, number = fan.fan_out(df, by, chunks)
    travelled: list[Any] = codec.loads(memoryview(b"".join(codec.dumps(list(parts)))))
    assert len(travelled) == number
    return travelled


def _run(
    fn: Callable[[Any], Any], df: pd.DataFrame, by: Any = None, chunks: int | None = None, failed: tuple[int, ...] = ()
) -> pd.DataFrame:
    parts = _parts(df, by, chunks)
    values = [None if i in failed else fn(part.open()) for i, part in enumerate(parts)]
    succeeded = np.array([i not in failed for i in range(len(parts))], dtype=bool)
    whole = fan.put_together(parts, values, succeeded, dict.fromkeys(failed, "ValueError: bad"))
    assert whole is not None
    return whole


# Rows.


@pytest.mark.parametrize(
    "df",
    [
        _frame(),
        _frame()[["x", "y"]],
        _frame()[["x"]].astype("Int64"),
        _frame()[["x"]].astype("float32"),
        _frame()[["city"]],
        _frame().set_index("city", append=True),
        _frame().set_index(pd.date_range("2024-01-01", periods=5, tz="UTC")),
        _frame().set_index(pd.CategoricalIndex(list("abcab"), categories=list("cbaz"))),
        pd.DataFrame({("a", "b"): [1, 2], ("a", "c"): [3, 4]}),
        pd.DataFrame({0: [1, 2], 1: [3, 4]}),
        pd.DataFrame({"t": pd.to_datetime(["2024-01-01", None]), "n": [1, 2]}),
        pd.DataFrame([[1, 2], [3, 4]], columns=["twice", "twice"]),
    ],
)
def test_rows_are_the_series_that_apply_gives(df: pd.DataFrame) -> None:
    rows = [part.open() for part in _parts(df)]
    for place, row in enumerate(rows):
        assert_series_equal(row, df.iloc[place], check_names=False)
        assert str(row.name) == str(df.index.tolist()[place])
    whole = _run(lambda row: 1, df)
    assert whole.index.equals(df.index)
    assert whole.index.names == df.index.names
    assert whole.index.dtype == df.index.dtype


def test_scalars_of_rows_are_one_column_with_the_frames_index() -> None:
    df = _frame()
    whole = _run(lambda row: row.x * 2, df)
    assert_series_equal(whole["value"], df.apply(lambda row: row.x * 2, axis=1), check_names=False)


def test_series_of_rows_are_columns_as_in_apply() -> None:
    df = pd.DataFrame({0: [1, 2], 1: [3, 4]}, index=["a", "a"])
    assert_frame_equal(_run(lambda row: row * 2, df), df.apply(lambda row: row * 2, axis=1), check_column_type=False)
    assert list(_run(lambda row: {"s": 1, "t": "x"}, df).columns) == ["s", "t"]


def test_frames_of_rows_lie_below_the_rows_label() -> None:
    whole = _run(lambda row: pd.DataFrame({"n": range(row.x)}), _frame())
    assert whole.index.names == ["id", None]
    assert whole.index.tolist()[:3] == [(10, 0), (11, 0), (11, 1)]
    assert len(whole) == 15


def test_row_that_failed_is_missing_and_warned_of() -> None:
    with pytest.warns(UserWarning, match="1 of 5 tasks have no result"):
        whole = _run(lambda row: row.x, _frame(), failed=(1,))
    assert whole["value"].tolist() == [1, pd.NA, 3, 4, 5]


# Groups.


def test_groups_have_their_key_and_all_columns() -> None:
    groups = [part.open() for part in _parts(_frame(), by="city")]
    assert [group.name for group in groups][:2] == ["a", "b"]
    assert pd.isna(groups[2].name)
    assert groups[0].city.tolist() == ["a", "a"]
    assert [group.x.tolist() for group in groups] == [[2, 5], [1, 3], [4]]


def test_scalars_and_series_of_groups_are_rows_by_key_and_missing_keys_have_theirs() -> None:
    df = _frame()
    expected = df.groupby("city", dropna=False)["x"].sum()
    assert_series_equal(_run(lambda group: group.x.sum(), df, by="city")["value"], expected, check_names=False)
    means = _run(lambda group: group[["x", "y"]].mean(), df, by="city")
    assert_frame_equal(means, df.groupby("city", dropna=False)[["x", "y"]].mean())


def test_groups_by_several_columns_are_indexed_by_all() -> None:
    df = _frame().assign(even=[True, False, True, True, False])
    whole = _run(lambda group: len(group), df, by=["city", "even"])
    assert_series_equal(whole["value"], df.groupby(["city", "even"], dropna=False).size(), check_names=False)


def test_frames_like_their_group_are_put_back_in_order() -> None:
    df = _frame()
    whole = _run(lambda group: group.assign(share=group.x / group.x.sum()), df, by="city")
    expected = df.assign(share=df.x / df.groupby("city", dropna=False).x.transform("sum"))
    assert_frame_equal(whole, expected)
    column = _run(lambda group: group.x - group.x.mean(), df, by="city")
    assert list(column.columns) == ["x"]
    assert column.x.tolist() == [-1, -1.5, 1, 0, 1.5]


def test_series_of_groups_with_names_of_their_own_are_one_column() -> None:
    whole = _run(lambda group: pd.Series(group.x.to_numpy(), index=group.index, name=group.name), _frame(), by="city")
    assert list(whole.columns) == ["value"]


def test_what_groupby_takes_groups_and_bins_without_rows_are_none() -> None:
    df = pd.DataFrame({"t": pd.to_datetime(["2024-01-01", "2024-01-03", "2024-01-03"]), "x": [1, 2, 3]})
    assert _run(len, df, by=pd.Grouper(key="t", freq="D"))["value"].tolist() == [1, 2]
    assert _run(len, df, by=lambda label: label % 2)["value"].tolist() == [2, 1]
    assert _run(len, df, by=pd.Series([7, 8, 8]))["value"].tolist() == [1, 2]


def test_frames_unlike_their_group_lie_below_its_key() -> None:
    whole = _run(lambda group: group.nlargest(1, "x")[["x"]], _frame(), by="city")
    assert whole.index.names == ["city", "id"]
    assert whole.x.tolist() == [5, 3, 4]


def test_categories_that_do_not_occur_are_no_group() -> None:
    df = _frame().assign(city=pd.Categorical(["b", "a", "b", None, "a"], categories=["c", "b", "a"]))
    whole = _run(lambda group: len(group), df, by="city")
    assert whole["value"].tolist() == [2, 2, 1]
    assert whole.index.tolist()[:2] == ["b", "a"]
    assert str(whole.index.dtype) == "category"


def test_group_that_failed_leaves_its_rows_missing_and_in_place() -> None:
    with pytest.warns(UserWarning, match=r"task 1: ValueError: bad"):
        whole = _run(lambda group: group[["x"]], _frame(), by="city", failed=(1,))
    assert whole.index.tolist() == [10, 11, 10, 12, 13]
    assert whole.x.tolist() == [pd.NA, 2, pd.NA, 4, 5]
    with pytest.warns(UserWarning, match="1 of 3"):
        assert _run(len, _frame(), by="city", failed=(1,))["value"].tolist() == [2, pd.NA, 1]


# Blocks.


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 100])
def test_blocks_are_consecutive_and_come_back_as_they_were(chunks: int) -> None:
    df = _frame()
    blocks = [part.open() for part in _parts(df, chunks=chunks)]
    assert len(blocks) == min(chunks, 5)
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    assert_frame_equal(_run(lambda block: block, df, chunks=chunks), df)
    assert_frame_equal(_run(lambda block: block, df.reset_index(), chunks=chunks), df.reset_index())


def test_arrays_as_long_as_their_block_are_columns() -> None:
    df = _frame()
    whole = _run(lambda block: block.x.to_numpy() * 2, df, chunks=2)
    assert_frame_equal(whole, pd.DataFrame({"value": df.x * 2}))
    assert _run(lambda block: np.ones((len(block), 3)), df, chunks=2).shape == (5, 3)


def test_blocks_that_are_filtered_lie_one_below_the_other() -> None:
    df = _frame()
    assert_frame_equal(_run(lambda block: block[block.x > 2], df, chunks=2), df[df.x > 2])
    whole = _run(lambda block: block.x.sum(), df, chunks=2)
    assert (whole["value"].tolist(), whole.index.name) == ([3, 12], "block")


def test_dtypes_survive_the_way() -> None:
    df = pd.DataFrame(
        {
            "c": pd.Categorical(list("aab")),
            "i": pd.array([1, None, 3], dtype="Int8"),
            "s": pd.array(["a", None, "b"], dtype="string"),
            "t": pd.date_range("2024-01-01", periods=3, tz="Europe/Berlin"),
            "o": [[1], {}, None],
        },
        index=pd.MultiIndex.from_tuples([(1, "a"), (1, "a"), (2, "b")], names=["n", None]),
    )
    assert_frame_equal(_run(lambda block: block, df, chunks=2), df)
    assert_frame_equal(_run(lambda group: group, df, by="c"), df)


def test_arrow_columns_travel_without_the_rest_of_their_frame() -> None:
    pytest.importorskip("pyarrow")
    df = pd.DataFrame({"x": range(100_000)}, dtype="int64[pyarrow]")
    parts, _ = fan.fan_out(df, None, 100)
    assert sum(map(len, codec.dumps(next(parts)))) < 20_000


def test_fanning_out_copies_nothing_until_a_part_is_sent() -> None:
    df = pd.DataFrame(np.zeros((100_000, 10)))
    tracemalloc.start()
    try:
        parts = list(fan.fan_out(df, None, 8)[0])
        made = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made < 1_000_000 or int(pd.__version__.split(".")[0]) < 3
    # One buffer beside the pickle, and not a copy within it.
    assert [len(each) for each in codec.dumps(parts[0]) if len(each) > 10_000] == [12_500 * 10 * 8]


def test_frame_that_is_changed_afterwards_is_sent_as_it_was() -> None:
    df = _frame()
    parts, _ = fan.fan_out(df, None, 1)
    df["x"] = 0
    df.loc[10, "y"] = -1.0
    cut = codec.loads(memoryview(b"".join(codec.dumps(next(parts)))))
    assert_frame_equal(cut.open(), _frame())


# What is not there.


def test_empty_frames() -> None:
    df = _frame().iloc[:0]
    assert_frame_equal(_run(lambda block: block, df, chunks=3), df)
    assert len(_run(len, df)) == len(_run(len, df, by="city")) == 0


def test_rows_without_columns() -> None:
    assert _run(len, pd.DataFrame(index=[3, 4]))["value"].tolist() == [0, 0]


def test_parts_that_have_gone_are_left_out() -> None:
    parts = _parts(_frame(), by="city")
    values = [part.open()[["x"]] for part in parts]
    parts[1] = BrokenItem(1, "")
    with pytest.warns(UserWarning, match="1 of 3"):
        whole = fan.put_together(parts, values, np.array([True, False, True]), {})
    assert whole is not None
    assert whole.x.tolist() == [2, 4, 5]
    assert fan.put_together([BrokenItem(0, "")], [None], np.array([False]), {}) is None


def test_wrong_calls_are_named() -> None:
    with pytest.raises(TypeError, match="takes a pandas DataFrame, not list"):
        fan.fan_out([1], None, None)  # type: ignore[arg-type]  # that is the mistake
    with pytest.raises(ValueError, match="by= or chunks=, not both"):
        fan.fan_out(_frame(), "city", 2)
    with pytest.raises(ValueError, match="number of blocks, at least 1, not 0"):
        fan.fan_out(_frame(), None, 0)
    with pytest.raises(KeyError, match="town"):
        fan.fan_out(_frame(), "town", None)


# On workers.


def test_frame_is_fanned_out_over_workers_and_put_together_wherever_the_job_is_found(queue: Queue) -> None:
    df = _frame()
    jobs = {
        "rows": queue.map_frame(lambda row, by: row.x * by, df, kwargs={"by": 3}),
        "groups": queue.map_frame(lambda group: group.assign(n=len(group)), df, by="city"),
        "blocks": queue.options(retries=1).map_frame(lambda block: block.x.to_numpy(), df, chunks=2),
    }
    with_numbers = df.assign(n=df.groupby("city", dropna=False).x.transform("size"))
    for found in (jobs, {kind: queue.job(job.id) for kind, job in jobs.items()}):
        assert_frame_equal(found["rows"].to_frame(), pd.DataFrame({"value": df.x * 3}))
        assert_frame_equal(found["groups"].to_frame(), with_numbers)
        assert_frame_equal(found["blocks"].to_frame(), pd.DataFrame({"value": df.x}))
    assert jobs["rows"].results() == [3, 6, 9, 12, 15]
    each = jobs["groups"].to_frame(meta=True)
    assert each["state"].tolist() == ["succeeded"] * 5
    assert each["input"].isna().sum() == 1


def test_coroutines_take_parts_and_failures_have_a_row_of_their_own(queue: Queue) -> None:
    async def work(row: Any) -> int:
        await asyncio.sleep(0)
        if row.x == 4:
            raise ValueError("four")
        return int(row.x)

    job = queue.map_frame(work, _frame())
    with pytest.warns(UserWarning, match=r"task 3: ValueError: four"):
        assert job.to_frame()["value"].tolist() == [1, 2, 3, pd.NA, 5]
    frame = job.to_frame(meta=True, dtype_backend="numpy_nullable")
    assert frame["state"].tolist()[3] == "failed"
    assert frame["input"].tolist() == [10, 11, 10, 12, 13]
    with pytest.raises(ValueError, match="four"):
        job.results()


def test_large_blocks_and_many_rows(queue: Queue) -> None:
    df = pd.DataFrame(np.arange(1_200_000.0).reshape(300_000, 4), columns=list("abcd"))
    assert_frame_equal(queue.map_frame(lambda block: block * 2, df, chunks=3).to_frame(), df * 2)
    few = df.iloc[:20_000]
    assert_series_equal(queue.map_frame(lambda row: row.a, few).to_frame()["value"], few.a, check_names=False)


def test_frame_of_a_job_that_runs_has_what_there_is(cluster: LocalCluster, tmp_path: Any) -> None:
    gate = tmp_path / "open"

    def wait(row: Any) -> int:
        import time

        while row.x == 5 and not gate.exists():
            time.sleep(0.01)
        return int(row.x)

    with cluster.queue() as queue:
        job = queue.map_frame(wait, _frame(), chunksize=1)
        plain = queue.map(abs, [-1, -2])
        for index in range(4):
            job[index].result(30)
        assert job.to_frame(partial=True)["value"].tolist() == [1, 2, 3, 4, pd.NA]
        states = queue.job(job.id).to_frame(partial=True, meta=True)["state"].tolist()
        assert states == ["succeeded"] * 4 + ["queued"]
        plain.to_frame(partial=True)
        gate.touch()
        assert job.to_frame()["value"].tolist() == [1, 2, 3, 4, 5]
