"""A part of a file -> its raw rows, one by one or in batches of bounded size.

A row that cannot be decoded becomes a `Refusal` in its own place, so that it spoils itself and not its file.
"""

import codecs
import csv
import io
import itertools
import json
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dtrpo_ray.data.formats.files import KNOWN, Shard, readable, split_packed
from dtrpo_ray.data.formats.parsing import MOST, Refusal
from dtrpo_ray.errors import DataError
from dtrpo_ray.files import open_filesystem

BATCH_ROWS = 2_000
_BATCH_BYTES = 1 << 26  # a batch that grows beyond this ends early
_CHUNK_BYTES = 1 << 23
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = ("", *"0123456789.eE+-")  # characters, or the end of the text, after which a number may go on
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_CUT = 16  # an error so close to the end of the text may come from the text being cut there


class _Row(NamedTuple):
    """A raw row: its number in the file from 1, its value, and about how many bytes it takes."""

    number: int
    value: Any
    size: float


def raw_rows(shard: Shard) -> Iterator[tuple[str, Any]]:
    """Yield (origin, value) of each row; the value is a Refusal if the row could not be decoded.

    An origin is "file:line" for JSONL and "file:row" for other kinds, counted from 1. Raises DataError for a file that
    cannot be read.
    """
    for row in _read(shard):
        yield f"{shard.file}:{row.number}", row.value


def raw_batches(shard: Shard) -> Iterator[list[tuple[str, Any]]]:
    """Yield the `raw_rows` in lists of up to BATCH_ROWS rows and about _BATCH_BYTES."""
    batch, size = list[tuple[str, Any]](), 0.0
    for row in _read(shard):
        batch.append((f"{shard.file}:{row.number}", row.value))
        size += row.size
        if len(batch) >= BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0.0
    if batch:
        yield batch


def first_rows(shards: list[Shard], most: int) -> tuple[list[Shard], int]:
    """Return the parts that hold the first `most` rows of a file, and how many rows they have.

    `shards` are all parts of the file.
    """
    numbers = (row.number for row in itertools.islice(_read(Shard(shards[0].file)), most))
    [(taken, end)] = deque(enumerate(numbers, 1), maxlen=1) or [(0, 0)]  # blank lines have numbers and are no rows
    cut = [replace(s, rows=min(s.rows or end, end - s.first)) for s in shards if s.first < end]
    return cut, taken


def count_rows(file: str) -> int:
    """Return how many rows a file has; others than Parquet are read for it."""
    if not split_packed(file)[0].endswith(".parquet"):
        return sum(1 for _ in _read(Shard(file)))
    filesystem, path = open_filesystem(file)
    with readable(file), filesystem.open_input_file(path) as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


# === kinds of files ===


def _read(shard: Shard) -> Iterator[_Row]:
    file, (name, packed) = shard.file, split_packed(shard.file)
    filesystem, path = open_filesystem(file)
    with readable(file):
        if read := next((read for ending, read in _TEXTS.items() if name.endswith(ending)), None):
            with filesystem.open_input_file(path) as source:
                source.seek(shard.start)
                yield from read(shard, pa.CompressedInputStream(source, packed) if packed else source)
        elif name.endswith(".parquet"):
            with filesystem.open_input_file(path) as stream:
                yield from _read_parquet(shard, pq.ParquetFile(stream))
        elif name.endswith(".arrow"):
            with filesystem.open_input_file(path) as stream:
                yield from _read_columns(shard, 0, _arrow_batches(stream))
        elif name.endswith(".txt"):
            with filesystem.open_input_stream(path) as stream:
                text = stream.read().decode("utf-8", "surrogateescape")
                yield _Row(1, {"text": text}, len(text))
        else:
            raise DataError(f"{file}: unknown kind of file; expected a name ending in {KNOWN}, .txt")


def _read_lines(shard: Shard, stream: pa.NativeFile) -> Iterator[_Row]:
    reader = io.BufferedReader(stream)
    for number, line in enumerate(itertools.islice(reader, shard.rows), shard.first + 1):
        data = line.removeprefix(_BOM) if number == 1 else line
        if data.strip():
            yield _Row(number, _decode_json(data), len(data))


def _decode_json(data: bytes) -> Any:
    # stray bytes become lone surrogates, so that they spoil their own row and not the whole file
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return Refusal("bad JSON", str(error))


def _read_list(shard: Shard, stream: pa.NativeFile) -> Iterator[_Row]:
    number = 0
    try:
        rows = _JsonText(stream).rows()
        for number, (value, size) in enumerate(itertools.islice(rows, shard.rows), 1):
            yield _Row(number, value, size)
    except (ValueError, RecursionError) as error:
        problem = f"no JSON list of rows after row {number} ({error})" if number else f"no JSON list of rows ({error})"
        raise DataError(f"{shard.file}: {problem}; rows one to a line belong in a .jsonl file") from None


def _read_csv(shard: Shard, stream: pa.NativeFile) -> Iterator[_Row]:
    """Yield the rows below a line of column names, all of them text; a line end between quotes belongs to its cell."""
    csv.field_size_limit(MOST)
    lines = io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig", "surrogateescape", newline="")
    reader, number = csv.reader(lines, strict=True), 0
    try:
        names = next(reader, [])
        for number, cells in enumerate(itertools.islice(filter(None, reader), shard.rows), 1):
            yield _Row(number, _decode_cells(names, cells), sum(map(len, cells)))
    except csv.Error as error:
        raise DataError(f"{shard.file}: no CSV after row {number} ({error}); save the file anew") from None


def _decode_cells(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return Refusal("bad CSV", f"{len(cells)} cells for {len(names)} columns")
    row = dict(zip(names, cells, strict=True))
    if lists := [name for name, cell in row.items() if _MESSAGES.match(cell)]:
        return Refusal("wrong type", f"{lists[0]} is a list of messages as text; keep them in JSON lines or Parquet")
    return row


_TEXTS = {".jsonl": _read_lines, ".json": _read_list, ".csv": _read_csv}


class _JsonText:
    """The text of a JSON file of a list of rows, or of rows one after another; kept as far as the next row goes."""

    def __init__(self, stream: Any) -> None:
        # stray bytes become lone surrogates, so that they spoil their own row and not the whole file
        self.stream, self.decode = stream, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at = "", 0

    def rows(self) -> Iterator[tuple[Any, int]]:
        """Yield each row and its characters. Raises ValueError if the text is no JSON, no list and no object."""
        if self._next() != "[":
            mark = "{"
            while mark == "{":  # one row, or JSON lines, which the Hub's .json files often are
                row, size = self._value()
                if not isinstance(row, dict):
                    raise ValueError(f"found {type(row).__name__}")
                yield row, size
                mark = self._next()
        else:
            mark = "["
            while mark != "]":
                self.at += 1
                if mark == "[" and self._next() == "]":
                    break
                yield self._value()
                if (mark := self._next()) not in (",", "]"):
                    raise ValueError("expected ',' or ']' after a row")
            self.at += 1
        if self._next():
            raise ValueError("more text after its end")

    def _next(self) -> str:
        """Return the next character that is not white space, or "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _value(self) -> tuple[Any, int]:
        self._next()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _CUT
                if not cut or not self._more():
                    raise ValueError(error.msg) from None
            else:
                length = end - self.at
                may_go_on = isinstance(value, int | float) and self.text[end : end + 1] in _NUMBER
                if not may_go_on or not self._more():
                    self.at += length
                    return value, length

    def _more(self) -> bool:
        # each reading doubles the text, so that a long row is parsed only a few times
        chunk = self.stream.read(max(_CHUNK_BYTES, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + self.decode(chunk, final=not chunk), 0
        return bool(chunk)


def _read_parquet(shard: Shard, source: pq.ParquetFile) -> Iterator[_Row]:
    """Yield the rows of a part, reading only the row groups that hold some of them."""
    sizes = [source.metadata.row_group(g).num_rows for g in range(source.num_row_groups)]
    ends = list(itertools.accumulate(sizes))
    last = ends[-1] if ends and shard.rows is None else shard.first + (shard.rows or 0)
    groups = [g for g, end in enumerate(ends) if end > shard.first and end - sizes[g] < last]
    if groups:
        begin = ends[groups[0]] - sizes[groups[0]]
        yield from _read_columns(shard, begin, source.iter_batches(BATCH_ROWS, row_groups=groups))


def _arrow_batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:  # `datasets` writes a stream
        yield from pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:  # Feather
        stream.seek(0)
        reader = pa.ipc.open_file(stream)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _read_columns(shard: Shard, begin: int, batches: Iterable[pa.RecordBatch]) -> Iterator[_Row]:
    """Yield the part's rows of record batches that start at row `begin` of the file, counted from 0."""
    end = sys.maxsize if shard.rows is None else shard.first + shard.rows
    for batch in batches:
        first, last = max(shard.first, begin), min(end, begin + len(batch))
        size = batch.nbytes / max(len(batch), 1)
        # Python's values take several times the memory of Arrow's, so not all of a batch are made at once
        step = int(min(BATCH_ROWS, max(1, _BATCH_BYTES // max(size, 1))))
        for start in range(first, last, step):
            values = _decode_columns(batch.slice(start - begin, min(step, last - start)))
            yield from (_Row(number, value, size) for number, value in enumerate(values, start + 1))
        begin += len(batch)
        if begin >= end:
            return


def _decode_columns(batch: pa.RecordBatch) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [Refusal("bad UTF-8", str(error))]
        return [row for i in range(len(batch)) for row in _decode_columns(batch.slice(i, 1))]
