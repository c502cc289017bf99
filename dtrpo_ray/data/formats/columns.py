"""Operations on whole columns: lists of numbers in numpy, JSON texts and ids in Arrow, and the refused rows."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import methodcaller
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrpo_ray.data.rules import list_lengths
from dtrpo_ray.data.tables import Rejected

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
# a prompt, text or messages, which every table of an importer's rows begins with
PROMPT = [("origin", pa.string()), ("prompt", pa.string()), ("messages", MESSAGES)]
_COMPACT, _SPACED = (",", ":"), (", ", ": ")


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
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        values = np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum()))
        return cls(values, np.cumsum(lengths) - lengths, lengths)

    @classmethod
    def from_arrow(cls, column: pa.ListArray) -> "Ragged":
        """Build it from a list column; a null list has no values."""
        lengths = list_lengths(column)
        return cls(column.flatten().to_numpy(zero_copy_only=False), np.cumsum(lengths) - lengths, lengths)

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
        starts = np.cumsum(lengths) - lengths
        fillers = np.broadcast_to(np.asarray(filler, dtype=self.values.dtype), lengths.shape)
        values = np.repeat(fillers, lengths)
        values[_places(starts, self.lengths)] = self.flat
        return Ragged(values, starts, lengths)

    def join(self, counts: np.ndarray) -> "Ragged":
        """Join rows: the first `counts[0]` become one, then the next `counts[1]`, and so on."""
        owner = np.repeat(np.arange(len(counts)), counts)
        sums = np.bincount(owner, self.lengths, minlength=len(counts)).astype(np.int64)
        return Ragged(self.flat, np.cumsum(sums) - sums, sums)

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


def rows_batch(rows: Sequence[Any], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows, whose fields are the columns of `schema`, as arrays; a prompt is in `prompt` or in `messages`."""
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names if name != "messages"}
    columns["messages"] = [None if isinstance(prompt, str) else prompt for prompt in columns["prompt"]]
    columns["prompt"] = [prompt if isinstance(prompt, str) else None for prompt in columns["prompt"]]
    return pa.record_batch(columns, schema=schema)


class Refusals:
    """The refused rows of a table, each with the first reason that is found."""

    def __init__(self, rows: int) -> None:
        self.good = np.ones(rows, dtype=bool)
        self.found: dict[int, tuple[str, str]] = {}

    def refuse(self, bad: np.ndarray, reason: str, detail: Callable[[int], str]) -> None:
        """Refuse rows that are still good where `bad` (bool [rows]) is True; `detail` maps a row to its message."""
        for row in np.flatnonzero(bad & self.good).tolist():
            self.found[row] = (reason, detail(row))
        self.good &= ~bad

    def refuse_places(self, details: dict[int, str], reason: str, among: np.ndarray | None = None) -> None:
        """Refuse the rows of `details` for which `among` (bool [rows]) is True."""
        bad = np.zeros(len(self.good), dtype=bool)
        bad[list(details)] = True
        self.refuse(bad if among is None else bad & among, reason, lambda row: details[row])

    def to_rejected(self, origins: Callable[[int], list[str]]) -> list[Rejected]:
        """Return the refusals in the order of the rows, one for each of a row's `origins`."""
        return [Rejected(origin, *self.found[row]) for row in sorted(self.found) for origin in origins(row)]


def json_texts(column: pa.Array, *, canonical: bool = True) -> pa.StringArray:
    """Return the JSON of each row, as json.dumps writes it: text, integers, lists and structs of them, and null.

    `canonical`: sorted keys, no spaces, ASCII; else as json.dumps(row, ensure_ascii=False).
    """
    item, colon = _COMPACT if canonical else _SPACED
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        parts: list[Any] = []
        for name in sorted(names) if canonical else names:
            before = f"{item if parts else ''}{json.dumps(name)}{colon}"
            parts += [before, json_texts(column.field(name), canonical=canonical)]
        text = pc.binary_join_element_wise("{", *parts, "}", "")
    elif pa.types.is_list(column.type):
        inner = json_texts(column.flatten(), canonical=canonical)
        joined = pc.binary_join(lists_of(list_lengths(column), inner), item)
        text = pc.binary_join_element_wise("[", joined, "]", "")
    elif pa.types.is_string(column.type):
        # one call writes all texts; no line end of theirs is left bare, so that it can part them
        lines = json.dumps(column.fill_null("").to_pylist(), ensure_ascii=canonical, separators=("\n", ":"))[1:-1]
        text = pa.array(lines.split("\n") if len(column) else [], pa.string())
    else:
        assert pa.types.is_integer(column.type), column.type
        text = column.cast(pa.string())
    return pc.if_else(column.is_valid(), text, "null") if len(column) else pa.array([], pa.string())


def content_id(content: Any) -> str:
    """Return 16 hex digits of the SHA-256 of the canonical JSON: equal contents have equal ids in any file and run."""
    text = json.dumps(content, sort_keys=True, separators=_COMPACT)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_ids(texts: pa.StringArray) -> pa.StringArray:
    """Return the `content_id` of each canonical JSON."""
    digests = map(hashlib.sha256, texts.cast(pa.binary()).to_pylist())
    return pc.utf8_slice_codeunits(pa.array(map(methodcaller("hexdigest"), digests), pa.string()), 0, 16)


def first_places(texts: pa.StringArray) -> np.ndarray:
    """Return int [rows], the first row that has the same text."""
    codes = texts.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(codes, return_index=True)
    return np.asarray(first[codes])
