"""A part of a file -> batches of raw rows: Python's values, or Arrow's columns where they have the types asked for.

A row that cannot be decoded is a `Refusal` in its own place: it spoils itself and not its file.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from dtrpo_ray.data.formats.columns import lists_of
from dtrpo_ray.data.formats.files import ENDINGS, Shard, file_name, open_filesystem, readable
from dtrpo_ray.data.formats.parsing import Refusal
from dtrpo_ray.data.rules import list_lengths
from dtrpo_ray.errors import DataError

BATCH_ROWS = 2_000
HEAD_ROWS = 1_000  # by whose columns a file is recognised
_CHUNK_BYTES = 1 << 23
_BATCH_BYTES = 1 << 26  # beyond which a batch has fewer rows
_DEEP = 700  # brackets of a line with fewer of which Python's parser cannot lose its way
# Arrow reads the first three, which are no JSON to Python, an integer of any length, and -0 as a float
_ODD_NUMBER = re.compile(rb"(?:Inf|-NaN|-0)\s*[,\]}]|\d{300}")
_BOM = b"\xef\xbb\xbf"
_BLANK = object()  # the value of a line without a row
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = ("", *"0123456789.eE+-")  # may go on in one of these, or after the end of what was read
_CUT = 16  # characters before the end of a text within which an error may come from its being cut there


class Layout(Protocol):
    """A layout of rows; a file has it if it has all its columns."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...


L = TypeVar("L", bound=Layout)


class Batch(Protocol):
    """Consecutive rows of a file, the first of which is number `first`, counted from 1."""

    @property
    def first(self) -> int: ...

    def __len__(self) -> int: ...

    def values(self, places: Sequence[int]) -> list[Any]:
        """The values of these rows; a Refusal for one that cannot be decoded, _BLANK for a line without a row."""

    def table(self, schema: pa.Schema) -> pa.Table | None:
        """All rows in columns of these types, null where a row has none, or None where they cannot be had so.

        May raise what Arrow raises for values of other types.
        """


def batches(shard: Shard) -> Iterator[Batch]:
    """The rows of a part, up to BATCH_ROWS at a time. Raises DataError for a file that cannot be read."""
    file, name = shard.file, file_name(shard.file)
    filesystem, path = open_filesystem(file)
    with readable(file):
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from _line_batches(shard, filesystem, path)
        elif name.endswith(".json"):
            yield from _list_batches(shard, filesystem, path)
        elif name.endswith(".parquet"):
            with filesystem.open_input_file(path) as stream:
                yield from _parquet_batches(shard, pq.ParquetFile(stream))
        elif name.endswith(".arrow"):
            with filesystem.open_input_file(path) as stream:
                yield from _cut(shard, 0, _arrow_batches(stream))
        elif name.endswith(".txt"):
            with filesystem.open_input_stream(path) as stream:
                yield _Values(1, [stream.read().decode("utf-8", "surrogateescape")])
        else:
            raise DataError(f"{file}: unknown kind of file; expected a name ending in {', '.join(ENDINGS)}")


def raw_rows(shard: Shard) -> Iterator[tuple[str, Any]]:
    """(origin, value) of each row; the value is a Refusal where the row could not be decoded.

    An origin is "file:line" for JSONL and "file:row" for other kinds, counted from 1. Raises DataError for a file that
    cannot be read.
    """
    for batch in batches(shard):
        yield from named_values(shard.file, batch, range(len(batch)))


def named_values(file: str, batch: Batch, places: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """(origin, value) of these rows of a batch, lines without a row left out."""
    with readable(file):
        values = batch.values(places)
    for place, value in zip(places, values, strict=True):
        if value is not _BLANK:
            yield f"{file}:{batch.first + place}", value


def typed(batch: Batch, schema: pa.Schema) -> pa.Table | None:
    """A batch in columns of these types, or None if a row has another type, or text that is not UTF-8."""
    try:
        if (table := batch.table(schema)) is not None:
            table.validate(full=True)
    except (pa.ArrowException, UnicodeError):
        return None
    return table


def first_rows(shards: list[Shard], most: int) -> tuple[list[Shard], int]:
    """The parts that hold the first `most` rows of a file, which `shards` are all of, and how many rows those are."""
    origins = (origin for origin, _ in itertools.islice(raw_rows(Shard(shards[0].file)), most))
    [(taken, origin)] = deque(enumerate(origins, 1), maxlen=1) or [(0, ":0")]
    end = int(origin.rsplit(":", 1)[1])  # blank lines are no rows, but have numbers
    cut = [replace(s, rows=min(s.rows or end, end - s.first)) for s in shards if s.first < end]
    return cut, taken


def recognised(file: str, layouts: Sequence[L], kind: str) -> L:
    """The first of `layouts` that a file has, by the columns of its first rows. Raises DataError if it has none."""
    rows = [value for _, value in itertools.islice(raw_rows(Shard(file)), HEAD_ROWS) if isinstance(value, dict)]
    # columns of many rows, not of one: a row that lacks its prompt is a bad row, not another format
    columns = {name for row in rows for name, value in row.items() if value is not None}
    for layout in layouts:
        if columns.issuperset(layout.columns):
            return layout
    found = ", ".join(sorted(columns)) or "none (no row is a JSON object)"
    known = "; ".join(f"{layout.name} ({', '.join(layout.columns)})" for layout in layouts)
    raise DataError(f"{file}: columns of no known format of {kind}: {found}; known are {known}")


# === kinds of files ===


@dataclass(frozen=True, slots=True)
class _Lines:
    """Of JSONL."""

    first: int
    lines: list[bytes]

    def __len__(self) -> int:
        return len(self.lines)

    def values(self, places: Sequence[int]) -> list[Any]:
        return [_decode_json(self.lines[place]) for place in places]

    def table(self, schema: pa.Schema) -> pa.Table | None:
        data = b"".join(self.lines)
        if len(data) > 2 * _BATCH_BYTES or _ODD_NUMBER.search(data):
            return None
        lines = pa.array(self.lines, pa.binary())
        ends = [pc.ends_with(lines, end) for end in ("}\n", "}\r\n", "}")]
        # a value ends in "}" and another begins with "{" in the next line: only so has each line one row
        whole = pc.and_(pc.starts_with(lines, "{"), pc.or_(pc.or_(ends[0], ends[1]), ends[2]))
        brackets = pc.add(pc.count_substring(lines, "["), pc.count_substring(lines, "{"))
        if not pc.all(pc.and_(whole, pc.less(brackets, _DEEP))).as_py():
            return None
        how = pj.ReadOptions(use_threads=False, block_size=len(data) + 1)
        known = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        table = pj.read_json(pa.BufferReader(data), how, known)
        return table.select(schema.names) if len(table) == len(self) else None


@dataclass(frozen=True, slots=True)
class _Values:
    """Of a kind that is read value by value."""

    first: int
    held: list[Any]

    def __len__(self) -> int:
        return len(self.held)

    def values(self, places: Sequence[int]) -> list[Any]:
        return [self.held[place] for place in places]

    def table(self, schema: pa.Schema) -> pa.Table | None:
        return None


@dataclass(frozen=True, slots=True)
class _Columns:
    """Of a kind that Arrow holds."""

    first: int
    batch: pa.RecordBatch

    def __len__(self) -> int:
        return len(self.batch)

    def values(self, places: Sequence[int]) -> list[Any]:
        rows = _decode_arrow(self.batch)
        return [rows[place] for place in places]

    def table(self, schema: pa.Schema) -> pa.Table | None:
        self.batch.validate(full=True)  # text that is not UTF-8 spoils its row, whatever column it is in
        return pa.table(_fields(self.batch.schema, self.batch.column, len(self), schema), schema=schema)


def _fields(
    found: Iterable[pa.Field], column: Callable[[int], pa.Array], rows: int, wanted: Iterable[pa.Field]
) -> list[pa.Array]:
    """The fields of a table or struct that are wanted, null ones where it has none. Raises ArrowTypeError."""
    names = [field.name for field in found]
    if repeated := [field.name for field in wanted if names.count(field.name) > 1]:
        raise pa.ArrowTypeError(f"{repeated[0]} twice")
    return [
        _as_type(column(names.index(f.name)), f.type) if f.name in names else pa.nulls(rows, f.type) for f in wanted
    ]


def _as_type(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    """A column whose values are of this type in whatever form Arrow holds them. Raises ArrowTypeError."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    found, t = column.type, pa.types
    if column.null_count == len(column):
        return pa.nulls(len(column), wanted)
    if t.is_list(wanted) and (t.is_list(found) or t.is_large_list(found)):
        values = _as_type(column.flatten(), wanted.value_type)
        return lists_of(list_lengths(column), values, wanted, np.asarray(column.is_valid()))
    if t.is_struct(wanted) and t.is_struct(found):
        fields = _fields(found, column.field, len(column), wanted)
        return pa.StructArray.from_arrays(fields, fields=list(wanted), mask=column.is_null())
    if t.is_null(wanted) and (t.is_list(found) or t.is_string(found)):  # empty ones say nothing either
        lengths = pc.list_value_length(column) if t.is_list(found) else pc.binary_length(column)
        if not pc.any(pc.greater(lengths, 0)).as_py():
            return pa.nulls(len(column))
    kinds = ((t.is_string, t.is_large_string), (t.is_integer,), (t.is_floating, t.is_integer))
    for kind, *like in kinds:
        if kind(wanted) and any(same(found) for same in (kind, *like)):
            return column.cast(wanted)
    raise pa.ArrowTypeError(f"{found} is not {wanted}")


def _line_batches(shard: Shard, filesystem: pafs.FileSystem, path: str) -> Iterator[Batch]:
    first, left = shard.first + 1, shard.rows
    with filesystem.open_input_file(path) as source:
        source.seek(shard.start)
        packed = file_name(shard.file).endswith(".gz")
        reader = io.BufferedReader(gzip.GzipFile(fileobj=source) if packed else source)  # type: ignore[arg-type]
        while left != 0:
            lines, broken = list[bytes](), None
            try:
                lines.extend(itertools.islice(reader, BATCH_ROWS if left is None else min(BATCH_ROWS, left)))
            except (OSError, EOFError, zlib.error) as error:  # what was read before it is good
                broken = error
            if first == 1 and lines:
                lines[0] = lines[0].removeprefix(_BOM)
            yield from (_Lines(first + a, lines[a:b]) for a, b in _by_bytes(list(map(len, lines))))
            if broken is not None:
                raise broken
            if not lines:
                return
            first, left = first + len(lines), None if left is None else left - len(lines)


def _by_bytes(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Rows of these sizes from one number to another, each time of about _BATCH_BYTES at most."""
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // _BATCH_BYTES)) + 1
    return itertools.pairwise([0, *cuts.tolist(), len(sizes)] if sizes else [])


def _list_batches(shard: Shard, filesystem: pafs.FileSystem, path: str) -> Iterator[Batch]:
    number, held, chunks = 0, list[Any](), 1
    try:
        with filesystem.open_input_stream(path) as stream:
            text = _JsonText(stream)
            for number, value in enumerate(itertools.islice(text.rows(), shard.rows), 1):
                held.append(value)
                if len(held) == BATCH_ROWS or text.chunks > chunks + _BATCH_BYTES // _CHUNK_BYTES:
                    yield _Values(number - len(held) + 1, held)
                    held, chunks = [], text.chunks
    except (ValueError, RecursionError) as error:
        if held:
            yield _Values(number - len(held) + 1, held)
        problem = f"no JSON list of rows after row {number} ({error})" if number else f"no JSON list of rows ({error})"
        raise DataError(f"{shard.file}: {problem}; rows one to a line belong in a .jsonl file") from None
    if held:
        yield _Values(number - len(held) + 1, held)


class _JsonText:
    """A JSON file of a list of rows, or of one, which is held as far as its next row goes."""

    def __init__(self, stream: Any) -> None:
        # stray bytes become lone surrogates, so that they spoil their own row and not the whole file
        self.stream, self.decode = stream, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at, self.chunks = "", 0, 0

    def rows(self) -> Iterator[Any]:
        """Raises ValueError for what is no JSON, no list and no object."""
        if self._next() != "[":
            if not isinstance(row := self._value(), dict):
                raise ValueError(f"found {type(row).__name__}")
            yield row
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
        """The next character that is no white space, nothing at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _value(self) -> Any:
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
                    return value

    def _more(self) -> bool:
        chunk = self.stream.read(max(_CHUNK_BYTES, len(self.text) - self.at))  # a long row is parsed but a few times
        self.text, self.at = self.text[self.at :] + self.decode(chunk, final=not chunk), 0
        self.chunks += 1
        return bool(chunk)


def _parquet_batches(shard: Shard, source: pq.ParquetFile) -> Iterator[Batch]:
    """The rows of a part, reading only the row groups that hold some."""
    sizes = [source.metadata.row_group(g).num_rows for g in range(source.num_row_groups)]
    ends = list(itertools.accumulate(sizes))
    last = ends[-1] if ends and shard.rows is None else shard.first + (shard.rows or 0)
    groups = [g for g, end in enumerate(ends) if end > shard.first and end - sizes[g] < last]
    if groups:
        begin = ends[groups[0]] - sizes[groups[0]]
        yield from _cut(shard, begin, source.iter_batches(BATCH_ROWS, row_groups=groups))


def _cut(shard: Shard, begin: int, found: Iterable[pa.RecordBatch]) -> Iterator[Batch]:
    """The part's rows of Arrow's batches, whose first row is number `begin` of the file, from 0; small ones joined."""
    end = None if shard.rows is None else shard.first + shard.rows
    held, first = list[pa.RecordBatch](), max(shard.first, begin) + 1
    for batch in found:
        skip = max(shard.first - begin, 0)
        keep = len(batch) if end is None else min(len(batch), end - begin)
        held.append(batch.slice(skip, max(keep - skip, 0)))
        begin += len(batch)
        while sum(map(len, held)) >= BATCH_ROWS:
            whole = pa.Table.from_batches(held)
            yield from _joined(first, whole.slice(0, BATCH_ROWS))
            held, first = whole.slice(BATCH_ROWS).to_batches(), first + BATCH_ROWS
        if sum(batch.nbytes for batch in held) >= _BATCH_BYTES:
            yield from _joined(first, pa.Table.from_batches(held))
            held, first = [], first + sum(map(len, held))
    if held:
        yield from _joined(first, pa.Table.from_batches(held))


def _joined(first: int, table: pa.Table) -> Iterator[Batch]:
    """A table in one batch, or in several where it is larger than _BATCH_BYTES or Arrow cannot join its columns."""
    rows = max(1, len(table) * _BATCH_BYTES // max(table.nbytes, _BATCH_BYTES))
    with contextlib.suppress(pa.ArrowNotImplementedError):
        table = table.combine_chunks()
    for batch in table.to_batches(max_chunksize=rows):
        yield _Columns(first, batch)
        first += len(batch)


def _arrow_batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:  # what `datasets` writes
        yield from pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:  # Feather
        stream.seek(0)
        reader = pa.ipc.open_file(stream)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _decode_json(data: bytes) -> Any:
    if not data.strip():
        return _BLANK
    # stray bytes become lone surrogates, so that they spoil their own row and not the whole file
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return Refusal("bad JSON", str(error))


def _decode_arrow(batch: pa.RecordBatch) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [Refusal("bad UTF-8", str(error))]
        return [row for i in range(len(batch)) for row in _decode_arrow(batch.slice(i, 1))]
