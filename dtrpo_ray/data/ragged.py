"""Lists of numbers of many rows as numpy arrays."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, slots=True)
class Ragged:
    """A list of numbers for each row: `values` [any], of which a row has `lengths` [rows] from `starts` [rows] on.

    Rows may share values, lie in any order and leave gaps, so that picking rows copies nothing.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_arrow(cls, column: pa.ListArray | pa.ChunkedArray) -> "Ragged":
        """Build it from a list column; a null list has no values."""
        return cls.packed(pc.list_flatten(column).to_numpy(zero_copy_only=False), list_lengths(column))

    @classmethod
    def packed(cls, values: np.ndarray, lengths: np.ndarray) -> "Ragged":
        """Build it from values that lie row after row."""
        return cls(values, np.cumsum(lengths) - lengths, lengths)

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


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return int [total], the place of each number of rows of these `lengths` that begin at `starts`."""
    before = np.cumsum(lengths) - lengths
    return np.asarray(np.repeat(starts - before, lengths) + np.arange(lengths.sum()))


def list_lengths(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return int [rows], the number of values of each list; a null list has none."""
    return np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(), dtype=np.int64)
