"""Lists of numbers of many rows as numpy arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, slots=True)
class Ragged:
    """A list of numbers for each row: `values` [any], of which a row has `lengths` [rows] from `starts` [rows] on.

    Rows may share values, lie in any order and leave gaps, so that picking rows and cutting them copies nothing.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Ragged":
        """Build it from lists of integers."""
        return cls.from_arrow(pa.array(lists, pa.list_(pa.int32())))

    @classmethod
    def from_arrow(cls, column: pa.ListArray | pa.ChunkedArray) -> "Ragged":
        """Build it from a list column; a null list has no values."""
        return cls.packed(pc.list_flatten(column).to_numpy(zero_copy_only=False), list_lengths(column))

    @classmethod
    def packed(cls, values: np.ndarray, lengths: np.ndarray) -> "Ragged":
        """Build it from values that lie row after row."""
        return cls(values, np.cumsum(lengths) - lengths, lengths)

    @classmethod
    def where(cls, first: np.ndarray, one: "Ragged", other: "Ragged") -> "Ragged":
        """Return the rows of `one` where `first` (bool [rows]) is True, else those of `other`."""
        starts = np.where(first, one.starts, other.starts + len(one.values))
        return cls(np.concatenate([one.values, other.values]), starts, np.where(first, one.lengths, other.lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def owner(self) -> np.ndarray:
        """Return int [total], the row of each number, row after row."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def flat(self) -> np.ndarray:
        """Return the numbers [total], row after row."""
        return np.asarray(self.values[_places(self.starts, self.lengths)])

    def take(self, rows: np.ndarray) -> "Ragged":
        """Return the rows with these numbers."""
        return Ragged(self.values, self.starts[rows], self.lengths[rows])

    def without_first(self, count: np.ndarray) -> "Ragged":
        """Return each row without its first `count` [rows] numbers."""
        return Ragged(self.values, self.starts + count, self.lengths - count)

    def append(self, count: Any, filler: Any) -> "Ragged":
        """Return each row with `count` times `filler` appended; both are one number, or [rows]."""
        lengths = self.lengths + count
        fillers = np.broadcast_to(np.asarray(filler, dtype=self.values.dtype), lengths.shape)
        longer = Ragged.packed(np.repeat(fillers, lengths), lengths)
        longer.values[_places(longer.starts, self.lengths)] = self.flat
        return longer

    def join(self, counts: np.ndarray) -> "Ragged":
        """Join rows: the first `counts[0]` become one, then the next `counts[1]`, and so on."""
        owner = np.repeat(np.arange(len(counts)), counts)
        sums = np.bincount(owner, self.lengths, minlength=len(counts)).astype(np.int64)
        return Ragged.packed(self.flat, sums)

    def any(self, true: np.ndarray) -> np.ndarray:
        """Return bool [rows]: whether `true` (bool [total], in the order of `flat`) is True for a number of the row."""
        return np.bincount(self.owner[true], minlength=len(self)) > 0

    def same_as(self, other: "Ragged") -> np.ndarray:
        """Return bool [rows]: whether both have the same numbers."""
        same = self.lengths == other.lengths
        rows = np.flatnonzero(same)
        one, two = self.take(rows), other.take(rows)
        same[rows] = ~one.any(one.flat != two.flat)
        return same

    def to_arrow(self, type: pa.DataType, known: np.ndarray | None = None) -> pa.ListArray:
        """Return a list column of this type, null where `known` (bool [rows]) is False."""
        lengths = self.lengths if known is None else np.where(known, self.lengths, 0)
        values = pa.array(Ragged(self.values, self.starts, lengths).flat, type.value_type)
        return lists_of(lengths, values, type, known)


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return int [total], the place of each number of rows of these `lengths` that begin at `starts`."""
    before = np.cumsum(lengths) - lengths
    return np.asarray(np.repeat(starts - before, lengths) + np.arange(lengths.sum()))


def lists_of(
    lengths: np.ndarray, values: pa.Array, type: pa.DataType | None = None, known: np.ndarray | None = None
) -> pa.ListArray:
    """Return a list column with `lengths` of the `values` in each row, null where `known` (bool [rows]) is False."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = None if known is None or not len(known) else pa.array(~known)
    return pa.ListArray.from_arrays(offsets, values, type=type or pa.list_(values.type), mask=mask)


def list_lengths(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return int [rows], the number of values of each list; a null list has none."""
    return np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(), dtype=np.int64)
