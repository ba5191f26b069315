"""Values as the columns of a DataFrame, each of the narrowest real dtype.

What is missing is NaN, NaT or NA: whole numbers stay whole, and booleans boolean. A column is of dtype object only when
no real one fits: mixed types, integers past 64 bits, arrays, lists, objects of one's own.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd

#: Where a frame's dtypes come from, as pandas names it.
Backend = Literal["numpy_nullable", "pyarrow"]
Columns = dict[Any, Any]

#: Records with more keys than this in all are kept whole: a column each would be of no use to anyone.
MAX_COLUMNS: Final = 1_000

_MISSING: Final = {type(None), type(pd.NA), type(pd.NaT)}
#: Python's own scalars that have a dtype, each with those to be tried in turn.
_PLAIN: Final[dict[type, tuple[Any, ...]]] = {
    float: (np.float64,),
    int: (np.int64, np.uint64),
    bool: (np.bool_,),
    complex: (np.complex128,),
}
#: What only pyarrow has a dtype for, in pandas.api.types.infer_dtype's words.
_ARROW_ONLY: Final = {"date", "time", "decimal", "bytes"}


# --- One column -------------------------------------------------------------------------------------------------------


def column(values: Sequence[Any], where: npt.NDArray[np.bool_]) -> Any:
    """Return the values as one column, missing where `where` is false."""
    if where.all():
        return fill(values, None, len(values))
    places = np.flatnonzero(where)
    return fill([values[place] for place in places.tolist()], places, len(values))


def fill(found: Sequence[Any], places: npt.NDArray[np.intp] | None, length: int) -> Any:
    """Return a column of `length` rows with `found` at `places` (everywhere if None)."""
    kinds = set(map(type, found))
    if kinds & _MISSING and kinds != {type(pd.NaT)}:
        there = np.fromiter((type(value) not in _MISSING for value in found), dtype=bool, count=len(found))
        places = np.flatnonzero(there) if places is None else places[there]
        found = [value for value, kept in zip(found, there.tolist(), strict=True) if kept]
        kinds -= _MISSING
    narrow = _narrow(found, kinds)
    if places is None or len(places) == length:
        return narrow
    if not len(places):
        return np.full(length, np.nan)
    rows = np.full(length, -1, dtype=np.intp)
    rows[places] = np.arange(len(places))
    return spread(narrow, rows)


def spread(array: Any, rows: npt.NDArray[np.intp]) -> Any:
    """Return the array's elements at `rows`, missing where that is -1."""
    if type(array) is pd.arrays.NumpyExtensionArray:  # not text, which derives from it
        array = array.to_numpy()
    if (rows < 0).any():
        dtype = nullable(array.dtype)
        array = array if dtype is None else pd.array(array, dtype=dtype)
    if not len(array):
        return pd.Series(array).reindex(range(len(rows))).array
    return pd.api.extensions.take(array, rows, allow_fill=True)


def nullable(dtype: Any) -> str | None:
    """Return the name of the dtype for whole numbers or booleans with missing ones, or None where none is needed."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iub":
        return None
    return "boolean" if dtype.kind == "b" else dtype.name.replace("int", "Int").replace("u", "U")


def strings(objects: npt.NDArray[np.object_]) -> Any:
    """Return text as a column; None is missing."""
    # Before pandas 3 there is no "str" dtype: the name meant Python's str, by which None becomes the word "None".
    try:
        return pd.array(objects, dtype="str" if int(pd.__version__.split(".")[0]) >= 3 else "string")
    except UnicodeEncodeError:
        # A lone surrogate, as a file's name that is not UTF-8 has: pyarrow, where pandas keeps text, takes none.
        return pd.array(objects, dtype=pd.StringDtype("python", na_value=np.nan))


def _narrow(found: Sequence[Any], kinds: set[type]) -> Any:
    """Return values of these types, none of them missing, as an array."""
    kind = next(iter(kinds)) if len(kinds) == 1 else object
    for dtype in _PLAIN.get(kind, ()) or _numpy_scalar(kind):
        try:
            return np.fromiter(found, dtype=dtype, count=len(found))
        except OverflowError:
            continue
    # By iteration: numpy would take equal arrays, or lists of one length, for more dimensions.
    objects = np.fromiter(found, dtype=object, count=len(found))
    if kind is str:
        return strings(objects)
    inferred = pd.Series(objects, dtype=object).infer_objects()
    if inferred.dtype != object:
        return inferred.array
    # With NaN among them.
    word = pd.api.types.infer_dtype(objects, skipna=True)
    if word == "string":
        return strings(objects)
    return pd.array([None if value != value else value for value in found], "boolean") if word == "boolean" else objects


def _numpy_scalar(kind: type) -> tuple[Any, ...]:
    """Return the dtype of one of numpy's numbers, so that a float32 stays one."""
    number = issubclass(kind, np.number | np.bool_) and not issubclass(kind, np.timedelta64)
    # pandas knows none of more than 64 bits.
    return (kind,) if number and not issubclass(kind, np.longdouble | np.clongdouble) else ()


# --- Records ----------------------------------------------------------------------------------------------------------


def value_columns(
    values: Sequence[Any], succeeded: npt.NDArray[np.bool_], name: Callable[[Any], Hashable] = str
) -> Columns:
    """Return results as columns: one for each key of records, else one that is named "value"."""
    found = record_columns(values, succeeded, name)
    return {"value": column(values, succeeded)} if found is None else found


def record_columns(
    values: Sequence[Any], where: npt.NDArray[np.bool_], name: Callable[[Any], Hashable] = str
) -> Columns | None:
    """Return a column for each key, or None unless all the values there are records, with a sensible number of keys.

    Args:
        name: makes a column's label of a key.
    """
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
    columns: Columns = {}
    for key in keys:
        there = np.fromiter((key in record for record in records), dtype=bool, count=len(records))
        found = [record[key] for record in records if key in record]
        label = name(key)
        label = free(label, columns) if isinstance(label, str) else label
        columns[label] = fill(found, places[there], len(values))
    return columns or None


def _read_records(values: Sequence[Any], places: npt.NDArray[np.intp]) -> list[Mapping[Any, Any]] | None:
    readers: dict[type, Callable[[Any], Mapping[Any, Any] | None] | None] = {}
    records: list[Mapping[Any, Any]] = []
    for place in places.tolist():
        value = values[place]
        kind = type(value)
        if kind not in readers:
            readers[kind] = _reader(kind)
        read = readers[kind]
        record = None if read is None else read(value)
        if record is None:
            return None
        records.append(record)
    return records


def _reader(kind: type) -> Callable[[Any], Mapping[Any, Any] | None] | None:
    """Return what reads the top level of a record of this type, or None if it is none."""
    if issubclass(kind, dict):
        return lambda value: value
    if issubclass(kind, pd.Series):
        return lambda value: dict(zip(value.index, value.array, strict=True)) if value.index.is_unique else None
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return lambda value: dict(zip(value._fields, value, strict=True))
    if issubclass(kind, np.void):
        return lambda value: {name: value[name] for name in value.dtype.names} if value.dtype.names else None
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


# --- Names ------------------------------------------------------------------------------------------------------------


def free(name: str, taken: Container[Any], suffix: str = "") -> str:
    """Return the name, with the suffix, and a number, if need be, so that it is not taken."""
    return next(each for each in _candidates(name, suffix) if each not in taken)


def _candidates(name: str, suffix: str) -> Iterator[str]:
    yield name
    if suffix:
        yield name + suffix
    number = 2
    while True:
        yield f"{name}{suffix}_{number}"
        number += 1


# --- Backends ---------------------------------------------------------------------------------------------------------


def check_backend(backend: Any) -> None:
    """Refuse what is no backend, or is not installed.

    Raises:
        ValueError: it is not one of pandas' names.
        ImportError: pyarrow is not installed; the message has the command.
    """
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(f"dtype_backend must be 'numpy_nullable', 'pyarrow' or None, not {backend!r}")
    if backend == "pyarrow":
        try:
            importlib.import_module("pyarrow")
        except ImportError as exc:
            raise ImportError("dtype_backend='pyarrow' needs pyarrow: pip install pyarrow") from exc


def with_backend(frame: pd.DataFrame, backend: Backend | None) -> pd.DataFrame:
    """Return the frame with dtypes of that backend; what has none there stays as it is.

    Unlike DataFrame.convert_dtypes, floats that happen to be whole stay floats.
    """
    if backend is None:
        return frame
    convert = _to_arrow if backend == "pyarrow" else _to_nullable
    made = pd.DataFrame(
        {place: convert(frame.iloc[:, place]) for place in range(frame.shape[1])}, index=frame.index, copy=False
    )
    made.columns = frame.columns
    return made


def _to_nullable(series: pd.Series[Any]) -> Any:
    if isinstance(series.dtype, np.dtype) and series.dtype.kind == "f" and series.dtype.itemsize in (4, 8):
        return pd.array(series.to_numpy(), dtype="Float64" if series.dtype.itemsize == 8 else "Float32")
    dtype: Any = nullable(series.dtype)
    if dtype is not None:
        return pd.array(series.to_numpy(), dtype=dtype)
    return series.astype("string").array if series.dtype == "str" else series.array


def _to_arrow(series: pd.Series[Any]) -> Any:
    import pyarrow as pa

    own = series.dtype == object and pd.api.types.infer_dtype(series, skipna=True) not in _ARROW_ONLY
    if own or isinstance(series.dtype, pd.CategoricalDtype | pd.ArrowDtype):
        return series.array
    try:
        return pd.arrays.ArrowExtensionArray(pa.array(series, from_pandas=True))
    except (pa.ArrowException, NotImplementedError, TypeError, ValueError):  # such as complex numbers, or a Period
        return series.array
