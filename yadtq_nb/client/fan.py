"""A DataFrame fanned out into parts, and what became of them put together again.

    by=None      row      Series                as DataFrame.apply(fn, axis=1)
    by=keys      group    frame, keys included  as DataFrame.groupby(keys, dropna=False, observed=True).apply(fn)
    chunks=n     block    frame                 n blocks of consecutive rows

The parts lie with the job's inputs, so that whoever finds the job can put it together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from yadtq_nb.client.columns import Backend, Columns, spread, value_columns, with_backend
from yadtq_nb.client.frame import are_frames, concatenate, stack, warn_of_missing
from yadtq_nb.parts import Part, Row, Shape, Uncut

#: Rows that are taken out of the frame at a time.
_AT_A_TIME: Final = 4_096


# --- Out --------------------------------------------------------------------------------------------------------------


def fan_out(frame: pd.DataFrame, by: Any, chunks: int | None) -> tuple[Iterator[Row | Uncut], int]:
    """Return the parts of a frame, made as they are asked for, and their number.

    Raises:
        TypeError, ValueError: it is no frame, or by and chunks do not fit.
        KeyError: it has no such column.
    """
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"map_frame() takes a pandas DataFrame, not {type(frame).__name__}")
    if by is not None and chunks is not None:
        raise ValueError("map_frame() takes by= or chunks=, not both")
    # What the caller does to the frame afterwards changes nothing; pandas 3 copies what is written to, and only that.
    frame = frame.copy(deep=int(pd.__version__.split(".")[0]) < 3)
    if by is not None:
        return _groups(frame, by)
    if chunks is not None:
        return _blocks(frame, chunks)
    return _rows(frame), len(frame)


def _rows(frame: pd.DataFrame) -> Iterator[Row]:
    if not len(frame):
        return
    shape = Shape(frame.columns, frame.iloc[0].dtype, frame.index[:0])
    for start in range(0, len(frame), _AT_A_TIME):
        block = frame.iloc[start : start + _AT_A_TIME]
        cells = [block.iloc[:, place].tolist() for place in range(block.shape[1])]
        rows: Any = zip(*cells, strict=True) if cells else repeat((), len(block))
        for label, values in zip(block.index.tolist(), rows, strict=True):
            yield Row(shape, label, values)


def _groups(frame: pd.DataFrame, by: Any) -> tuple[Iterator[Uncut], int]:
    if not len(frame):
        return iter(()), 0
    # A row whose key is missing has a group, too: pandas would drop it without a word.
    groups = frame.groupby(by, dropna=False, observed=True)
    codes, sizes = groups.ngroup().to_numpy(), groups.size()
    order, ends = np.argsort(codes, kind="stable"), np.cumsum(sizes.to_numpy())
    places, keys = np.split(order, ends[:-1]), sizes.index
    # A Grouper's bins may be empty.
    filled = np.flatnonzero(sizes.to_numpy()).tolist()
    return (Uncut(frame, places[i], keys[i : i + 1]) for i in filled), len(filled)


def _blocks(frame: pd.DataFrame, chunks: Any) -> tuple[Iterator[Uncut], int]:
    if isinstance(chunks, bool) or not isinstance(chunks, int | np.integer) or chunks < 1:
        raise ValueError(f"chunks must be the number of blocks, at least 1, not {chunks!r}")
    # An empty frame is one block, so that its result has columns.
    number = max(1, min(int(chunks), len(frame)))
    ends = [len(frame) * i // number for i in range(number + 1)]
    return (Uncut(frame, range(ends[i], ends[i + 1]), None) for i in range(number)), number


# --- Home -------------------------------------------------------------------------------------------------------------


def labels(items: Sequence[Any]) -> list[Any]:
    """Return what stands for each part where it has a row of its own: a row's label, a group's key, a block's rows.

    What is no part, since it could not be sent or has gone, stays as it is.
    """
    return [_label(item) for item in items]


def _label(item: Any) -> Any:
    if isinstance(item, Row):
        return item.label
    if isinstance(item, Part):
        return f"{item.places[0]}:{item.places[-1] + 1}" if item.key is None and len(item.places) else _key(item)
    return item


def _key(part: Part) -> Any:
    return "" if part.key is None else part.key[0]


def put_together(
    items: Sequence[Any],
    values: Sequence[Any],
    succeeded: npt.NDArray[np.bool_],
    errors: Mapping[int, str],
    *,
    dtype_backend: Backend | None = None,
    silent: bool = False,
) -> pd.DataFrame | None:
    """Return the frame that the results make, or None when no part of it is there any more.

    Args:
        items: the parts; what is none was not sent, or has gone.
        values: what became of each; ignored where it has not succeeded.
        silent: do not warn of parts that have no result.
    """
    there = [i for i, item in enumerate(items) if isinstance(item, Row | Part)]
    if not there:
        return None if len(items) else pd.DataFrame()
    if not silent:
        warn_of_missing(succeeded, errors)
    parts, found = [items[i] for i in there], [values[i] for i in there]
    build = _from_rows if isinstance(parts[0], Row) else _from_parts
    return with_backend(build(parts, found, succeeded[there]), dtype_backend)


def _from_rows(rows: Sequence[Row], values: Sequence[Any], where: npt.NDArray[np.bool_]) -> pd.DataFrame:
    index = _index_of_rows(rows)
    if are_frames(values, where):
        return stack(values, where, index)
    return pd.DataFrame(value_columns(values, where, _same), index=index, copy=False)


def _index_of_rows(rows: Sequence[Row]) -> pd.Index[Any]:
    empty = rows[0].shape.index
    found = [row.label for row in rows]
    if isinstance(empty, pd.MultiIndex):
        levels = zip(zip(*found, strict=True), empty.levels, strict=True)
        arrays = [pd.Index(each, dtype=level.dtype) for each, level in levels]
        return pd.MultiIndex.from_arrays(arrays, names=empty.names)
    return pd.Index(found, dtype=empty.dtype, name=empty.name, tupleize_cols=False)


def _from_parts(parts: Sequence[Part], values: Sequence[Any], where: npt.NDArray[np.bool_]) -> pd.DataFrame:
    done = np.flatnonzero(where).tolist()
    if done and all(_is_like(values[i], parts[i].frame) for i in done):
        names = {values[i].name for i in done if isinstance(values[i], pd.Series)}
        name = next(iter(names)) if len(names) == 1 and None not in names else "value"
        return _in_place(parts, {i: _as_frame(values[i], parts[i].frame.index, name) for i in done})
    keys = _keys(parts)
    if are_frames(values, where):
        if parts[0].key is not None:
            return stack(values, where, keys)
        return concatenate([values[i] for i in done if values[i] is not None])
    columns: Columns = value_columns(values, where, _same)
    return pd.DataFrame(columns, index=keys, copy=False)


def _keys(parts: Sequence[Part]) -> pd.Index[Any]:
    keys = [part.key for part in parts if part.key is not None]
    return keys[0].append(keys[1:]) if keys else pd.RangeIndex(len(parts), name="block")


def _is_like(value: Any, part: pd.DataFrame) -> bool:
    """Tell whether a result has the rows of its part: the same index, or an array of one or two dimensions as long."""
    if isinstance(value, np.ndarray):
        return value.ndim in (1, 2) and len(value) == len(part)
    return isinstance(value, pd.DataFrame | pd.Series) and value.index.equals(part.index)


def _as_frame(value: Any, index: pd.Index[Any], name: Any) -> pd.DataFrame:
    if isinstance(value, pd.DataFrame):
        return value
    if isinstance(value, pd.Series):
        return value.to_frame(name)
    return pd.DataFrame(value, index=index, columns=["value"] if value.ndim == 1 else None)


def _in_place(parts: Sequence[Part], found: dict[int, pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all parts where they stood; those of parts without a result are missing."""
    body = concatenate(list(found.values()))
    where = np.concatenate([np.asarray(part.places, dtype=np.intp) for part in parts])
    has = np.repeat([i in found for i in range(len(parts))], [len(part.places) for part in parts])
    rows = np.where(has, np.cumsum(has) - 1, -1)
    order = np.argsort(where, kind="stable")
    index = parts[0].frame.index.append([part.frame.index for part in parts[1:]])
    if has.all():
        whole = body if (order[1:] > order[:-1]).all() else body.take(order)
        whole.index = index.take(order) if whole is not body else index
        return whole
    columns = {i: spread(body.iloc[:, i].array, rows[order]) for i in range(body.shape[1])}
    whole = pd.DataFrame(columns, index=index.take(order), copy=False)
    whole.columns = body.columns
    return whole


def _same(key: Any) -> Hashable:
    label: Hashable = key
    return label
