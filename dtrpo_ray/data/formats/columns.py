"""Operations on whole columns in Arrow: JSON texts and ids, and the refused rows."""

import hashlib
import json
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrpo_ray.data.ragged import list_lengths, lists_of
from dtrpo_ray.data.tables import Rejected

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
# a prompt, text or messages, which every table of an importer's rows begins with
PROMPT = [("origin", pa.string()), ("prompt", pa.string()), ("messages", MESSAGES)]
_COMPACT, _SPACED = (",", ":"), (", ", ": ")


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
