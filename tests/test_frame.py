"""A job as a DataFrame: a row for each item, columns of real dtypes."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import sys
from collections import namedtuple
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from yadtq_nb.client.columns import MAX_COLUMNS
from yadtq_nb.client.frame import META_COLUMNS, build_frame
from yadtq_nb.model import State

Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Score:
    accuracy: float
    parts: list[int]


class Packed(msgspec.Struct):
    low: int
    high: int


def _frame(items: list[Any] | None, values: list[Any], states: Any = None, **named: Any) -> pd.DataFrame:
    number = len(values)
    plain = {
        "errors": {},
        "workers": ["w-1"] * number,
        "started": np.full(number, 1_700_000_000.25),
        "seconds": np.full(number, 0.5),
        "attempts": np.ones(number, dtype=np.uint16),
    }
    return build_frame(items, values, b"S" * number if states is None else states, **{**plain, **named})


def test_scalars_give_one_input_and_one_value_column() -> None:
    frame = _frame([1, 2], [0.5, 1.5])
    assert list(frame.columns) == ["input", "value", *META_COLUMNS]
    assert frame.index.name == "index"
    assert frame.dtypes["input"] == np.int64
    assert frame.dtypes["value"] == np.float64
    assert frame.dtypes["attempt"] == np.int64
    assert frame["started"].iloc[0] == pd.Timestamp("2023-11-14 22:13:20.25", tz="UTC")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2], "int64"),
        ([1, 2.5], "float64"),
        ([True, False], "bool"),
        ([np.int64(1), 2], "int64"),
        ([np.float64(1), np.nan], "float64"),
        ([1, None], "Int64"),
        ([True, None], "boolean"),
        ([0.5, None], "float64"),
        ([2**63, None], "UInt64"),
        ([2**70, 1], "object"),
        ([1, "one"], "object"),
        ([None, None], "float64"),
        ([np.float32(1), np.float32(2)], "float32"),
        ([np.int8(1), None], "Int8"),
        ([np.uint16(1), None], "UInt16"),
        ([np.bool_(True), False], "bool"),
        ([1, pd.NA], "Int64"),
        ([True, np.nan], "boolean"),
        ([1j, 2j], "complex128"),
        ([np.datetime64("2024-01-01", "ns"), None], "datetime64[ns]"),
        ([np.timedelta64(1, "ns"), pd.NaT], "timedelta64[ns]"),
        ([pd.Period("2024-01", "M"), None], "period[M]"),
        ([datetime.date(2024, 1, 1), None], "object"),
    ],
)
def test_dtype_is_the_narrowest_real_one(values: list[Any], dtype: str) -> None:
    assert str(_frame(None, values).dtypes["value"]) == dtype


def test_strings_and_times_get_their_own_dtypes() -> None:
    assert _frame(None, ["a", None])["value"].isna().tolist() == [False, True]
    if int(pd.__version__.split(".")[0]) >= 3:
        assert _frame(None, ["a", "b"]).dtypes["value"] == "str"
    assert _frame(None, [pd.Timestamp("2024-01-01"), None]).dtypes["value"].kind == "M"
    assert not any(dtype.kind == "O" and dtype.name == "object" for dtype in _frame(None, [1]).dtypes)


def test_failed_rows_are_missing_and_whole_numbers_stay_whole() -> None:
    frame = _frame(None, [2**60, "what stood here before", 3], b"SFS", errors={1: "ValueError: bad"})
    assert str(frame.dtypes["value"]) == "Int64"
    assert frame["value"].tolist() == [2**60, pd.NA, 3]
    assert frame["state"].tolist() == ["succeeded", "failed", "succeeded"]
    assert frame["error"].isna().tolist() == [True, False, True]
    assert frame["error"][1] == "ValueError: bad"


def test_task_that_never_started_has_no_times_and_no_worker() -> None:
    started = np.array([1.7e9, np.nan])
    states = [State.SUCCEEDED, State.QUEUED]
    frame = _frame(None, [1, None], states, started=started, seconds=started * 0, workers=["w-1", ""], attempts=[1, 0])
    assert frame.loc[1, ["started", "seconds", "worker", "value"]].isna().all()
    assert frame["state"].tolist() == ["succeeded", "queued"]


def test_bytes_that_are_no_outcome_mean_queued() -> None:
    assert _frame(None, [1, None, None], b"S\0C")["state"].tolist() == ["succeeded", "queued", "cancelled"]


def test_dicts_become_a_column_for_each_key_on_both_sides() -> None:
    frame = _frame([{"c": 1, "gamma": 0.5}, {"c": 2}], [{"score": 0.9}, {"score": 0.8, "epochs": 3}])
    assert list(frame.columns) == ["input_c", "input_gamma", "score", "epochs", *META_COLUMNS]
    assert frame["epochs"].tolist() == [pd.NA, 3]
    assert frame["input_gamma"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        (Point(1, 2), ["x", "y"]),
        (Score(0.5, [1, 2]), ["accuracy", "parts"]),
        (Packed(1, 2), ["low", "high"]),
        ({1: "a", "1": "b"}, ["1", "1_2"]),
    ],
)
def test_records_are_expanded(value: Any, columns: list[str]) -> None:
    frame = _frame(None, [value, None, value], b"SFS")
    assert list(frame.columns[: -len(META_COLUMNS)]) == columns
    assert frame.loc[1, columns].isna().all()


def test_series_and_structured_rows_become_rows() -> None:
    frame = _frame(None, [pd.Series({"a": 1, "b": "x"}), pd.Series({"a": 2, "c": 0.5}, dtype=object)])
    assert frame["a"].tolist() == [1, 2]
    assert frame["b"].isna().tolist() == [False, True]
    assert (frame.dtypes["a"], frame.dtypes["c"]) == (np.int64, np.float64)
    rows = np.array([(1, 0.5), (2, 1.5)], dtype=[("n", "i4"), ("x", "f4")])
    frame = _frame(list(rows), [0, 0])
    assert (str(frame.dtypes["input_n"]), str(frame.dtypes["input_x"])) == ("int32", "float32")


def test_series_that_name_a_value_twice_or_have_too_many_stay_whole() -> None:
    for whole in (pd.Series([1, 2], index=["a", "a"]), pd.Series(range(MAX_COLUMNS + 1))):
        assert _frame(None, [whole])["value"][0] is whole


def test_what_lies_below_the_top_of_a_record_is_not_copied() -> None:
    score = Score(0.5, [1, 2])
    assert _frame(None, [score])["parts"][0] is score.parts


@pytest.mark.parametrize("odd", [3, "text", [1, 2], None])
def test_records_among_other_values_stay_whole(odd: Any) -> None:
    frame = _frame(None, [{"a": 1}, odd])
    assert "value" in frame.columns
    assert frame["value"][0] == {"a": 1}


def test_records_with_too_many_keys_stay_whole() -> None:
    frame = _frame(None, [{str(key): 1 for key in range(MAX_COLUMNS + 1)}])
    assert list(frame.columns) == ["value", *META_COLUMNS]


def test_arrays_lists_and_sets_are_kept_as_they_are() -> None:
    for whole in (np.arange(3), np.eye(2), [1, 2, 3], (1, 2), {1, 2}):
        frame = _frame([whole, whole], [whole, whole])
        assert frame["value"][0] is whole
        assert frame["input"][1] is whole


def test_arguments_of_starmap_are_named_by_the_parameters() -> None:
    frame = _frame([(1, "a"), (2, "b")], [0, 0], style="star", parameters=["seed", "kind"])
    assert list(frame.columns[:2]) == ["seed", "kind"]
    assert frame.dtypes["seed"] == np.int64


def test_arguments_without_a_known_name_are_numbered() -> None:
    frame = _frame([(1, 2, 3), (1, 2)], [0, 0], style="star", parameters=["first"])
    assert list(frame.columns[:3]) == ["first", "input_1", "input_2"]
    assert frame["input_2"].tolist() == [3, pd.NA]


def test_submitted_call_shows_positional_and_named_arguments() -> None:
    frame = _frame([((1,), {"gamma": 0.5})], [0], style="call", parameters=["c", "gamma"])
    assert frame.loc[0, ["c", "gamma"]].tolist() == [1, 0.5]


def test_names_that_clash_get_a_suffix_and_ours_stay() -> None:
    frame = _frame([(1, 2)], [{"state": "on", "x": 3, "index": 4}], style="star", parameters=["x", "seconds"])
    assert list(frame.columns) == ["x", "seconds_input", "state_value", "x_value", "index_value", *META_COLUMNS]
    frame.reset_index()


def test_empty_job_gives_an_empty_frame_with_all_columns() -> None:
    frame = _frame([], [])
    assert list(frame.columns) == ["input", "value", *META_COLUMNS]
    assert len(frame) == 0


def test_job_without_inputs_leaves_the_input_columns_out() -> None:
    assert list(_frame(None, [1]).columns) == ["value", *META_COLUMNS]


def test_frames_are_put_below_one_another_under_their_items_index() -> None:
    tables = [pd.DataFrame({"x": [1, 2]}, index=pd.Index(["a", "b"], name="k")), pd.DataFrame({"x": [3]}, index=["c"])]
    frame = _frame(["left", "right"], tables)
    assert list(frame.columns) == ["x"]
    assert frame.index.tolist() == [(0, "a"), (0, "b"), (1, "c")]
    assert frame.loc[1, "x"].tolist() == [3]
    assert frame.index.names == ["index", None]


def test_frames_with_several_index_levels_keep_them_and_their_names_are_ours_and_theirs() -> None:
    table = pd.DataFrame({("a", "b"): [1, 2]}, index=pd.MultiIndex.from_tuples([(1, 2), (3, 4)], names=["index", "k"]))
    frame = _frame(None, [table, table])
    assert frame.index.names == ["index", "index_value", "k"]
    assert frame.columns.tolist() == [("a", "b")]
    frame.reset_index()


def test_tasks_without_a_frame_are_warned_of_and_have_a_row_with_meta() -> None:
    table = pd.DataFrame({"x": [2**60, 1], "state": [True, False]}, index=[7, 8])
    given: Any = {"states": b"SFSS", "errors": {1: "ValueError: bad"}}
    with pytest.warns(UserWarning, match=r"1 of 4 tasks have no result \(the first of them: task 1: ValueError: bad\)"):
        assert len(_frame([1, 2, 3, 4], [table, None, None, table], **given)) == 4
    frame = _frame([1, 2, 3, 4], [table, None, None, table], **given, meta=True)
    assert list(frame.columns) == ["input", "x", "state_value", *META_COLUMNS]
    assert [task for task, _ in frame.index] == [0, 0, 1, 2, 3, 3]
    assert frame["input"].tolist() == [1, 1, 2, 3, 4, 4]
    assert frame["x"].tolist() == [2**60, 1, pd.NA, pd.NA, 2**60, 1]
    assert frame["state"].tolist() == ["succeeded", "succeeded", "failed", "succeeded", "succeeded", "succeeded"]
    assert (str(frame.dtypes["x"]), str(frame.dtypes["state_value"])) == ("Int64", "boolean")
    assert frame.loc[3].index.tolist() == [7, 8]


def test_column_that_some_frames_lack_keeps_whole_numbers_and_truth() -> None:
    frame = _frame(None, [pd.DataFrame({"n": [2**60], "t": [True]}), pd.DataFrame({"x": [0.5]}), pd.DataFrame()])
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {"n": "Int64", "t": "boolean", "x": "float64"}
    assert frame["n"].tolist() == [2**60, pd.NA]


def test_frames_that_are_all_empty_give_their_columns_and_no_rows() -> None:
    frame = _frame(None, [pd.DataFrame({"x": []}), pd.DataFrame(), None])
    assert list(frame.columns) == ["x"]
    assert len(frame) == 0
    assert len(_frame(None, [pd.DataFrame({"x": []}), None], meta=True)) == 2


def test_frames_among_other_values_stay_whole() -> None:
    table = pd.DataFrame({"x": [1]})
    frame = _frame(None, [table, 3])
    assert frame["value"][0] is table
    assert frame["value"][1] == 3


def test_meta_false_leaves_the_outcome_out() -> None:
    assert list(_frame([1], [2], meta=False).columns) == ["input", "value"]


def test_nullable_dtypes_on_request_and_whole_floats_stay_floats() -> None:
    frame = _frame([1, 2], [1.0, None], dtype_backend="numpy_nullable")
    names = ["input", "value", "state", "seconds", "attempt"]
    assert [str(frame.dtypes[name]) for name in names] == ["Int64", "Float64", "string", "Float64", "Int64"]
    assert frame["value"][1] is pd.NA


def test_arrow_dtypes_on_request_also_where_numpy_has_none() -> None:
    pytest.importorskip("pyarrow")
    values = [
        {"n": 1, "x": 1.0, "s": "a", "d": datetime.date(2024, 1, 1), "m": decimal.Decimal("1.5"), "own": [1], "b": b""},
        {"n": None, "x": 2.0, "s": None, "d": None, "m": None, "own": {}, "b": b"1"},
    ]
    frame = _frame(None, values, dtype_backend="pyarrow")
    found = {name: str(frame.dtypes[name]) for name in ("n", "x", "d", "own", "b", "state", "started")}
    assert found == {
        "n": "int64[pyarrow]",
        "x": "double[pyarrow]",
        "d": "date32[day][pyarrow]",
        "own": "object",
        "b": "binary[pyarrow]",
        "state": found["state"],
        "started": "timestamp[us, tz=UTC][pyarrow]",
    }
    assert found["state"].endswith("string[pyarrow]")
    assert frame["m"].tolist() == [decimal.Decimal("1.5"), pd.NA]
    stacked = _frame(None, [pd.DataFrame({"a": [1], "b": pd.Categorical(["u"])})] * 2, dtype_backend="pyarrow")
    assert str(stacked.dtypes["a"]) == "int64[pyarrow]"


def test_missing_pyarrow_and_unknown_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'numpy_nullable', 'pyarrow' or None, not 'polars'"):
        _frame([], [], dtype_backend="polars")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        _frame([], [], dtype_backend="pyarrow")


def test_text_that_cannot_be_encoded_is_kept_as_it_is() -> None:
    names = ["a.txt", "caf\udce9.txt"]  # as os.listdir gives a name that is not UTF-8
    frame = _frame(names, names)
    assert (frame.input.tolist(), frame.value.tolist()) == (names, names)
    assert _frame(None, [names[1], None]).value.tolist()[0] == names[1]


def test_million_scalars_have_real_dtypes() -> None:
    number = 1_000_000
    frame = _frame(list(range(number)), [each * 0.5 for each in range(number)])
    assert len(frame) == number
    assert (str(frame.input.dtype), str(frame.value.dtype)) == ("int64", "float64")
