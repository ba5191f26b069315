"""A job as a DataFrame: one row for each item, in columns of real dtypes.

    index | input columns | value columns | state  error  worker  started  seconds  attempt

Records (dicts, named tuples, dataclasses, msgspec structs, Series, rows of a structured array, and what has
`model_dump`) become a column for each key, if every one of them is a record; anything else, arrays included, stays
whole in one column. What is missing, such as the value of a task that failed, is NaN, NaT or NA.

Where all results are frames, their rows are put one below the other:

    index, frame's own index | the frames' columns                                     meta=True also has the others

Importing this module imports pandas: import it where a frame is first asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from yadtq_nb.client.columns import (
    Backend,
    Columns,
    check_backend,
    column,
    free,
    nullable,
    record_columns,
    spread,
    strings,
    value_columns,
    with_backend,
)
from yadtq_nb.model import STATE_OF_CODE, BrokenItem, CallStyle, State

#: The columns that every frame has; an input or value column of such a name gets a suffix.
META_COLUMNS: Final = ("state", "error", "worker", "started", "seconds", "attempt")

_STATES: Final = tuple(State)
#: What a byte that is no outcome stands for.
_UNFINISHED: Final = State.QUEUED
_SUCCEEDED: Final = _STATES.index(State.SUCCEEDED)


def build_frame(
    items: Sequence[Any] | None,
    values: Sequence[Any],
    states: Sequence[State] | bytes | bytearray,
    errors: Mapping[int, str],
    workers: Sequence[str],
    started: npt.NDArray[np.float64],
    seconds: npt.NDArray[np.float64],
    attempts: npt.NDArray[Any],
    *,
    style: CallStyle = "item",
    parameters: Sequence[str] = (),
    meta: bool | None = None,
    dtype_backend: Backend | None = None,
    silent: bool = False,
) -> pd.DataFrame:
    """Return one row for each task, by index; where all values are frames, their rows.

    Args:
        items: what was mapped over, as the call style has it; None leaves the input columns out.
        values: the result of each task; what stands at a task that has not succeeded is ignored.
        states: the state of each task, or one byte each as in STATE_CODES; any other byte means QUEUED.
        errors: index to one line of text, for the tasks that failed.
        workers: the node that ran each task, "" for none.
        started: seconds since the epoch, NaN for a task that did not start.
        seconds: run time, NaN for none.
        attempts: how often each task was begun, 0 for never.
        style: how an item is given to the function.
        parameters: the names of the function's parameters, as far as they are known.
        meta: whether to have the META_COLUMNS; None for where each task is one row. With frames it also has the
            input columns, and one row for each task that gave no rows.
        dtype_backend: as pandas has it.
        silent: do not warn of tasks that gave no frame where others did.
    """
    check_backend(dtype_backend)
    codes = _state_codes(states)
    succeeded = codes == _SUCCEEDED
    stacked = are_frames(values, succeeded)
    inputs = {} if items is None or (stacked and not meta) else _input_columns(items, style, parameters)
    outcome = {
        "state": strings(np.array([str(state) for state in _STATES], dtype=object)[codes]),
        "error": strings(_scattered(errors, len(codes))),
        "worker": _worker_column(workers),
        "started": _utc(started),
        "seconds": np.asarray(seconds, dtype=np.float64),
        "attempt": np.asarray(attempts, dtype=np.int64),
    }
    index = pd.RangeIndex(len(codes), name="index")
    if stacked:
        if not (silent or meta):
            warn_of_missing(succeeded, errors)
        frame = stack(values, succeeded, index, Beside(inputs, outcome) if meta else None)
    else:
        columns = _named_apart(inputs, value_columns(values, succeeded))
        columns |= {} if meta is False else outcome
        frame = pd.DataFrame(columns, index=index, copy=False)
    return with_backend(frame, dtype_backend)


def warn_of_missing(succeeded: npt.NDArray[np.bool_], errors: Mapping[int, str]) -> None:
    """Warn that the result has no rows of the tasks that did not succeed, where no column says so."""
    missing = int((~succeeded).sum())
    if missing:
        first = f" (the first of them: task {min(errors)}: {errors[min(errors)]})" if errors else ""
        warnings.warn(
            f"{missing:,} of {len(succeeded):,} tasks have no result{first}: to_frame(meta=True) has a row for each",
            UserWarning,
            stacklevel=4,
        )


# --- Input ------------------------------------------------------------------------------------------------------------


def _input_columns(items: Sequence[Any], style: CallStyle, parameters: Sequence[str]) -> Columns:
    # A broken item is not there: it could not be sent, or cannot be read here.
    there = np.ones(len(items), dtype=bool)
    if BrokenItem in set(map(type, items)):
        there = np.fromiter((type(item) is not BrokenItem for item in items), dtype=bool, count=len(items))
    if style == "item":
        found = record_columns(items, there)
        if found is None:
            return {"input": column(items, there)}
        return {f"input_{key}": each for key, each in found.items()}
    calls = [_by_parameter(item, style, parameters) for item in items]
    there = np.fromiter((call is not None for call in calls), dtype=bool, count=len(calls))
    return record_columns(calls, there) or ({"input": column(calls, there)} if calls else {})


def _by_parameter(item: Any, style: CallStyle, parameters: Sequence[str]) -> dict[str, Any] | None:
    """Return the arguments of one call by name; those without a known name are input_0, input_1, ...

    None where the item is no arguments, so that its task has failed.
    """
    if type(item) is BrokenItem:
        return None
    known = len(parameters)
    try:
        arguments, named = item if style == "call" else (item, {})
        positional = {
            parameters[place] if place < known else f"input_{place}": value for place, value in enumerate(arguments)
        }
    except Exception:  # it cannot be iterated, or raises when it is
        return None
    return {**positional, **named}


def _named_apart(inputs: Columns, values: Columns) -> Columns:
    """Put both side by side: a name that is taken gets the suffix _input or _value, and a number if need be."""
    columns: Columns = {}
    for found, suffix in ((inputs, "_input"), (values, "_value")):
        for name, each in found.items():
            columns[free(name, {*columns, *META_COLUMNS, "index"}, suffix)] = each
    return columns


# --- Frames one below the other ---------------------------------------------------------------------------------------


class Beside:
    """What is repeated beside each row of a task's frame."""

    def __init__(self, inputs: Columns, outcome: Columns) -> None:
        self.inputs = inputs
        self.outcome = outcome


def are_frames(values: Sequence[Any], where: npt.NDArray[np.bool_]) -> bool:
    """Tell whether all the values there are frames; None stands for one without rows."""
    found = (values[place] for place in np.flatnonzero(where).tolist())
    first = next((value for value in found if value is not None), None)
    return isinstance(first, pd.DataFrame) and all(value is None or isinstance(value, pd.DataFrame) for value in found)


def concatenate(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put frames one below the other; a column that some lack is missing there, and its whole numbers stay whole."""
    # One without rows has nothing to say of dtypes.
    frames = [frame for frame in frames if len(frame)] or [max(frames, key=lambda frame: frame.shape[1])]
    if any(not frame.columns.equals(frames[0].columns) for frame in frames):
        everywhere = set.intersection(*(set(frame.columns) for frame in frames))
        frames = [_made_nullable(frame, everywhere) for frame in frames]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # pandas 2, of columns in which all is missing
        return pd.concat(frames)


def _made_nullable(frame: pd.DataFrame, everywhere: set[Any]) -> pd.DataFrame:
    if not frame.columns.is_unique:
        return frame
    dtypes = {name: nullable(dtype) for name, dtype in frame.dtypes.items() if name not in everywhere}
    return frame.astype({name: dtype for name, dtype in dtypes.items() if dtype is not None})


def stack(
    values: Sequence[Any], where: npt.NDArray[np.bool_], index: pd.Index[Any], beside: Beside | None = None
) -> pd.DataFrame:
    """Return the rows of all frames, in order, indexed by what `index` has for each task and by their own index.

    Args:
        beside: columns with a row for each task, repeated for each row of its frame; then a task without rows has one
            row, in which all of the frame's is missing.
    """
    frames = {i: values[i] for i in np.flatnonzero(where).tolist() if values[i] is not None}
    body = concatenate(list(frames.values()))
    counts = np.zeros(len(values), dtype=np.intp)
    counts[list(frames)] = [len(frame) for frame in frames.values()]
    if beside is None:
        body.index = _under(index.take(np.repeat(np.arange(len(values)), counts)), body.index)
        return body
    repeated = np.maximum(counts, 1)
    tasks = np.repeat(np.arange(len(values)), repeated)
    rows = np.where(np.repeat(counts > 0, repeated), np.cumsum(np.repeat(counts > 0, repeated)) - 1, -1)
    wide = pd.DataFrame({i: spread(body.iloc[:, i].array, rows) for i in range(body.shape[1])}, copy=False)
    wide.columns = _labels_apart(body.columns, beside)
    wide.index = _under(index.take(tasks), _spread_index(body.index, rows))
    left, right = (
        pd.DataFrame(each, pd.RangeIndex(len(values))).take(tasks) for each in (beside.inputs, beside.outcome)
    )
    left.index = right.index = wide.index
    return pd.concat([left, wide, right], axis=1)


def _labels_apart(labels: pd.Index[Any], beside: Beside) -> list[Any]:
    taken = {*beside.inputs, *META_COLUMNS, "index"}
    return [free(label, taken, "_value") if isinstance(label, str) else label for label in labels]


def _spread_index(index: pd.Index[Any], rows: npt.NDArray[np.intp]) -> pd.Index[Any]:
    levels = [index.get_level_values(level) for level in range(index.nlevels)]
    arrays = [pd.Index(spread(level.array, rows), name=level.name) for level in levels]
    return arrays[0] if len(arrays) == 1 else pd.MultiIndex.from_arrays(arrays)


def _under(outer: pd.Index[Any], inner: pd.Index[Any]) -> pd.MultiIndex:
    levels = [each.get_level_values(level) for each in (outer, inner) for level in range(each.nlevels)]
    names: list[Any] = []
    for name in (level.name for level in levels):
        names.append(free(name, names, "_value") if isinstance(name, str) else name)
    return pd.MultiIndex.from_arrays(levels, names=names)


# --- Outcomes ---------------------------------------------------------------------------------------------------------


def succeeded(states: bytes | bytearray) -> npt.NDArray[np.bool_]:
    """Tell for each task whether it has a value, by a byte as in STATE_CODES."""
    return np.equal(_state_codes(states), _SUCCEEDED)


def _state_codes(states: Sequence[State] | bytes | bytearray) -> npt.NDArray[np.intp]:
    """Return the place of each state in _STATES."""
    if isinstance(states, (bytes, bytearray)):
        table = np.full(256, _STATES.index(_UNFINISHED), dtype=np.intp)
        for code, state in STATE_OF_CODE.items():
            table[code] = _STATES.index(state)
        return table[np.frombuffer(states, dtype=np.uint8)]
    places = {state: place for place, state in enumerate(_STATES)}
    return np.fromiter((places[state] for state in states), dtype=np.intp, count=len(states))


def _worker_column(workers: Sequence[str]) -> Any:
    return strings(np.array([worker or None for worker in workers], dtype=object))


def _scattered(errors: Mapping[int, str], length: int) -> npt.NDArray[np.object_]:
    lines = np.full(length, None, dtype=object)
    for index, line in errors.items():
        lines[index] = line
    return lines


def _utc(started: npt.NDArray[np.float64]) -> Any:
    unknown = np.isnan(started)
    microseconds = np.rint(np.where(unknown, 0.0, started) * 1e6).astype("datetime64[us]")
    microseconds[unknown] = np.datetime64("NaT")
    return pd.DatetimeIndex(microseconds).tz_localize("UTC")
