"""A job as a DataFrame: one row for each item, in columns of real dtypes.

    index | input columns | value columns | state  error  worker  started  seconds  attempt

Records (dicts, named tuples, dataclasses, msgspec structs and what has `model_dump`) become a column for each key,
if every one of them is a record; anything else stays whole in one column. What is missing, such as the value of a task
that failed, is NaN, NaT or NA, and whole numbers stay whole.

Importing this module imports pandas: import it where a frame is first asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd

from yadtq_nb.model import STATE_OF_CODE, BrokenItem, CallStyle, State

#: The columns that every frame has; an input or value column of such a name gets a suffix.
META_COLUMNS: Final = ("state", "error", "worker", "started", "seconds", "attempt")
#: Records with more keys than this in all are kept whole: a column each would be of no use to anyone.
MAX_COLUMNS: Final = 1_000

_STATES: Final = tuple(State)
#: What a byte that is no outcome stands for.
_UNFINISHED: Final = State.QUEUED

Columns = dict[str, Any]


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
) -> pd.DataFrame:
    """Return one row for each task, by index.

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
    """
    codes = _state_codes(states)
    succeeded = codes == _STATES.index(State.SUCCEEDED)
    inputs = {} if items is None else _input_columns(items, style, parameters)
    columns = _named_apart(inputs, _value_columns(values, succeeded))
    columns |= {
        "state": _strings(np.array([str(state) for state in _STATES], dtype=object)[codes]),
        "error": _strings(_scattered(errors, len(codes))),
        "worker": _worker_column(workers),
        "started": _utc(started),
        "seconds": np.asarray(seconds, dtype=np.float64),
        "attempt": np.asarray(attempts, dtype=np.int64),
    }
    return pd.DataFrame(columns, index=pd.RangeIndex(len(codes), name="index"), copy=False)


# --- Input ------------------------------------------------------------------------------------------------------------


def _input_columns(items: Sequence[Any], style: CallStyle, parameters: Sequence[str]) -> Columns:
    # A broken item is not there: it could not be sent, or cannot be read here.
    there = np.fromiter((type(item) is not BrokenItem for item in items), dtype=bool, count=len(items))
    if style == "item":
        found = _record_columns(items, there)
        if found is None:
            return {"input": _column(items, there)}
        return {f"input_{key}": column for key, column in found.items()}
    calls = [_by_parameter(item, style, parameters) for item in items]
    there = np.fromiter((call is not None for call in calls), dtype=bool, count=len(calls))
    return _record_columns(calls, there) or ({"input": _column(calls, there)} if calls else {})


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


# --- Values -----------------------------------------------------------------------------------------------------------


def _value_columns(values: Sequence[Any], succeeded: npt.NDArray[np.bool_]) -> Columns:
    found = _record_columns(values, succeeded)
    return {"value": _column(values, succeeded)} if found is None else found


def _record_columns(values: Sequence[Any], where: npt.NDArray[np.bool_]) -> Columns | None:
    """Return a column for each key, or None unless all the values there are records, with a sensible number of keys."""
    places = np.flatnonzero(where)
    # One look at the first spares a million scalars the closer one.
    if not len(places) or _reader(type(values[places[0]])) is None:
        return None
    records = _read_records(values, places)
    if records is None:
        return None
    keys: dict[Any, None] = {}
    for record in records:
        keys.update(dict.fromkeys(record))
        if len(keys) > MAX_COLUMNS:
            return None
    return _columns_of(records, list(keys), places, len(values)) or None


def _read_records(values: Sequence[Any], places: npt.NDArray[np.intp]) -> list[Mapping[Any, Any]] | None:
    readers: dict[type, Callable[[Any], Mapping[Any, Any]] | None] = {}
    records = []
    for place in places.tolist():
        value = values[place]
        kind = type(value)
        if kind not in readers:
            readers[kind] = _reader(kind)
        read = readers[kind]
        if read is None:
            return None
        records.append(read(value))
    return records


def _reader(kind: type) -> Callable[[Any], Mapping[Any, Any]] | None:
    """Return what reads the top level of a record of this type, or None if it is none."""
    if issubclass(kind, dict):
        return lambda value: value
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return lambda value: dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    elif issubclass(kind, msgspec.Struct):
        names = list(kind.__struct_fields__)
    elif callable(getattr(kind, "model_dump", None)):
        return lambda value: value.model_dump()
    else:
        return None
    # Field by field: dataclasses.asdict would copy whatever lies below.
    return lambda value: {name: getattr(value, name) for name in names}


def _columns_of(
    records: list[Mapping[Any, Any]], keys: list[Any], places: npt.NDArray[np.intp], length: int
) -> Columns:
    columns: Columns = {}
    for key in keys:
        there = np.fromiter((key in record for record in records), dtype=bool, count=len(records))
        found = [record[key] for record in records if key in record]
        columns[_free(str(key), columns)] = _fill(found, places[there], length)
    return columns


# --- Names ------------------------------------------------------------------------------------------------------------


def _named_apart(inputs: Columns, values: Columns) -> Columns:
    """Put both side by side: a name that is taken gets the suffix _input or _value, and a number if need be."""
    columns: Columns = {}
    for found, suffix in ((inputs, "_input"), (values, "_value")):
        for name, column in found.items():
            columns[_free(name, {*columns, *META_COLUMNS, "index"}, suffix)] = column
    return columns


def _free(name: str, taken: Container[str], suffix: str = "") -> str:
    return next(each for each in _candidates(name, suffix) if each not in taken)


def _candidates(name: str, suffix: str) -> Iterator[str]:
    yield name
    if suffix:
        yield name + suffix
    number = 2
    while True:
        yield f"{name}{suffix}_{number}"
        number += 1


# --- Columns ----------------------------------------------------------------------------------------------------------


def _column(values: Sequence[Any], where: npt.NDArray[np.bool_]) -> Any:
    """Return the values as one column, missing where `where` is false."""
    if where.all():
        return _fill(values, None, len(values))
    places = np.flatnonzero(where)
    return _fill([values[place] for place in places.tolist()], places, len(values))


def _fill(found: Sequence[Any], places: npt.NDArray[np.intp] | None, length: int) -> Any:
    """Return a column of `length` rows with `found` at `places` (everywhere if None), of the narrowest real dtype."""
    # By iteration: numpy would take equal arrays, or lists of one length, for more dimensions.
    objects = np.fromiter(found, dtype=object, count=len(found))
    missing = np.fromiter((value is None for value in found), dtype=bool, count=len(found))
    if missing.all() and len(found):
        places = np.arange(0) if places is None else places[:0]
        objects = objects[:0]
    elif missing.any():
        places = np.flatnonzero(~missing) if places is None else places[~missing]
        objects = objects[~missing]
    column = pd.Series(objects, dtype=object).infer_objects()
    if places is None or len(places) == length:
        return column.array
    if not len(places):
        return np.full(length, np.nan)
    return _spread(column, places, length)


def _spread(column: pd.Series[Any], places: npt.NDArray[np.intp], length: int) -> Any:
    """Put a column into a longer one; whole numbers and booleans get a dtype that knows of missing ones."""
    if column.dtype.kind in "iu":
        column = column.astype("UInt64" if column.dtype.kind == "u" else "Int64")
    elif column.dtype.kind == "b":
        column = column.astype("boolean")
    spread = np.full(length, -1, dtype=np.intp)
    spread[places] = np.arange(len(places))
    return pd.api.extensions.take(column.array, spread, allow_fill=True)


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
    return _strings(np.fromiter((worker or None for worker in workers), dtype=object, count=len(workers)))


def _scattered(errors: Mapping[int, str], length: int) -> npt.NDArray[np.object_]:
    lines = np.full(length, None, dtype=object)
    for index, line in errors.items():
        lines[index] = line
    return lines


def _strings(objects: npt.NDArray[np.object_]) -> Any:
    # Before pandas 3 there is no "str" dtype: the name meant Python's str, by which None becomes the word "None".
    return pd.array(objects, dtype="str" if int(pd.__version__.split(".")[0]) >= 3 else "string")


def _utc(started: npt.NDArray[np.float64]) -> Any:
    unknown = np.isnan(started)
    microseconds = np.rint(np.where(unknown, 0.0, started) * 1e6).astype("datetime64[us]")
    microseconds[unknown] = np.datetime64("NaT")
    return pd.DatetimeIndex(microseconds).tz_localize("UTC")
