"""Parts of a DataFrame as they travel: what a task of Queue.map_frame is sent, and opens before its function is called.

A row travels as plain values, with what all rows of a chunk have in common once; a group or block is cut out of its
frame when it is pickled, and not before, so that cutting a frame copies nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd


class Shape:
    """What the rows of a frame have in common."""

    __slots__ = ("columns", "dtype", "index")

    def __init__(self, columns: pd.Index[Any], dtype: Any, index: pd.Index[Any]) -> None:
        self.columns = columns
        #: Of a row as a Series.
        self.dtype = dtype
        #: The frame's index without its labels.
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return Shape, (self.columns, self.dtype, self.index)


class Row:
    """One row; opened, a Series with the row's label as its name."""

    __slots__ = ("label", "shape", "values")

    def __init__(self, shape: Shape, label: Hashable, values: tuple[Any, ...]) -> None:
        self.shape = shape
        self.label = label
        self.values = values

    def __reduce__(self) -> tuple[Any, ...]:
        return Row, (self.shape, self.label, self.values)

    def open(self) -> pd.Series[Any]:
        import pandas as pd

        shape = self.shape
        row: pd.Series[Any] = pd.Series(list(self.values), index=shape.columns, name=self.label, dtype=shape.dtype)
        return row


class Part:
    """A group or block; opened, a frame, which for a group has the key as its `name`, as in pandas' own apply."""

    __slots__ = ("frame", "key", "places")

    def __init__(self, frame: pd.DataFrame, places: range | npt.NDArray[np.intp], key: pd.Index[Any] | None) -> None:
        self.frame = frame
        #: Where its rows stand in the whole frame.
        self.places = places
        #: The key of a group, as an index of length 1; None for a block.
        self.key = key

    def open(self) -> pd.DataFrame:
        if self.key is not None:
            object.__setattr__(self.frame, "name", self.key[0])
        return self.frame


class Uncut:
    """A Part that is still in its frame: it is cut out when it is pickled, and is a Part when it is unpickled."""

    __slots__ = ("frame", "key", "places")

    def __init__(self, frame: pd.DataFrame, places: range | npt.NDArray[np.intp], key: pd.Index[Any] | None) -> None:
        self.frame = frame
        self.places = places
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        import numpy as np

        # Taken and not sliced: a slice of an arrow column travels with all of it, and one of a block in pieces.
        rows = np.arange(self.places.start, self.places.stop) if isinstance(self.places, range) else self.places
        cut = self.frame.take(rows)
        if isinstance(self.places, range):  # a RangeIndex stays one
            cut.index = self.frame.index[self.places.start : self.places.stop]
        return Part, (cut, self.places, self.key)
