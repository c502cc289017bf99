"""Files of rows, local or in a bucket -> raw rows, each with its origin; and what every format's parser refuses by.

A row that cannot be decoded is a `Refusal` in its own place: it spoils itself and not its file.
"""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from dtrpo_ray.errors import DataError, DtrpoError
from dtrpo_ray.stages import joined
from dtrpo_ray.tables import Rejected

ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".txt")
SHARD_ROWS = 5_000  # rows that one task reads
HEAD_ROWS = 1_000  # by whose columns a file is recognised
SHARE_BYTES = 1 << 27  # of a file, for each time that it is read to pair a share of its prompts
_CHUNK_BYTES = 1 << 23
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = ("", *"0123456789.eE+-")  # may go on in one of these, or after the end of what was read
_CUT = 16  # characters before the end of a text within which an error may come from its being cut there


class Refusal(Exception):
    """(reason, detail) of one row; it never leaves the importers."""


T = TypeVar("T")


class Layout(Protocol):
    """A layout of rows; a file has it if it has all its columns."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...


L = TypeVar("L", bound=Layout)


def parted(rows: Iterable[T | Rejected]) -> tuple[list[T], list[Rejected]]:
    """The rows that became something, and those that were refused."""
    good: list[T] = []
    rejected: list[Rejected] = []
    for row in rows:
        rejected.append(row) if isinstance(row, Rejected) else good.append(row)
    return good, rejected


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a file that one task reads: `rows` rows (of JSONL: lines) from number `first` (from 0) on, or all.

    `start` is the byte of a JSONL file where that row begins, else 0. Of rows that are paired by their prompts a part
    has one `share` of so many of the prompts.
    """

    file: str
    first: int = 0
    start: int = 0
    rows: int | None = None
    share: tuple[int, int] = (0, 1)

    def __str__(self) -> str:
        last = "the end" if self.rows is None else self.first + self.rows
        share = f", share {self.share[0] + 1} of {self.share[1]} of their prompts" if self.share[1] > 1 else ""
        return f"{self.file}, rows {self.first + 1} to {last}{share}"


def first_rows(shards: list[Shard], most: int) -> tuple[list[Shard], int]:
    """The parts that hold the first `most` rows of a file, which `shards` are all of, and how many rows those are."""
    origins = (origin for origin, _ in itertools.islice(raw_rows(Shard(shards[0].file)), most))
    [(taken, origin)] = deque(enumerate(origins, 1), maxlen=1) or [(0, ":0")]
    end = int(origin.rsplit(":", 1)[1])  # blank lines are no rows, but have numbers
    cut = [replace(s, rows=min(s.rows or end, end - s.first)) for s in shards if s.first < end]
    return cut, taken


def data_files(where: str) -> list[str]:
    """The files behind a path or URI: itself, or those of a folder (one of `datasets` included), by name.

    Raises DataError for a path that is not there, a folder without data, and a `datasets` folder of several splits.
    """
    filesystem, path = open_filesystem(where)
    with _readable(where):
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{where}: cannot be read (No such file or directory); check the path")
        if info.type == pafs.FileType.File:
            return [where]
        found = filesystem.get_file_info(pafs.FileSelector(path))
    names = {item.base_name for item in found}
    for name, read in (("dataset_dict.json", _refuse_splits), ("state.json", _files_of_state)):
        if name in names:
            with filesystem.open_input_stream(f"{path}/{name}") as stream:
                return read(where, stream.read())
    files = sorted(n for n in names if n.endswith(ENDINGS[:-1]) and n not in ("dataset_info.json", "manifest.json"))
    if not files:
        raise DataError(f"{where}: a folder without data; expected files ending in {', '.join(ENDINGS[:-1])}")
    return [joined(where, name) for name in files]


def _refuse_splits(where: str, dataset_dict: bytes) -> list[str]:
    """Raise DataError that names the splits of a `datasets` folder by its dataset_dict.json."""
    try:
        splits = sorted(map(str, json.loads(dataset_dict)["splits"]))
    except (ValueError, LookupError, TypeError, RecursionError):
        splits = []
    example = joined(where, (splits or ["train"])[0])
    raise DataError(f"{where}: holds the splits {', '.join(splits) or '?'}; name one, for example {example}") from None


def _files_of_state(where: str, state_json: bytes) -> list[str]:
    """The files of a `datasets` folder by its state.json."""
    try:
        state = json.loads(state_json)
        selection = state.get("_indices_data_files")
        files = [joined(where, entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{joined(where, 'state.json')}: not what datasets writes ({error!r}); save the data anew"
        ) from None
    if selection:
        raise DataError(f"{where}: a selection of rows; save it with flatten_indices() first")
    return files


def open_filesystem(where: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI and the path in it: pyarrow's own (s3://, gs://, file://), else fsspec's.

    Raises DataError for a URI that neither opens.
    """
    if "://" not in where:
        return pafs.LocalFileSystem(), str(Path(where).resolve())
    try:
        return pafs.FileSystem.from_uri(where)
    except (ValueError, OSError) as refused:
        try:
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(where)
        except (ImportError, ValueError, OSError) as error:
            raise DataError(f"{where}: cannot be opened ({refused}; {error})") from None
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def file_name(file: str) -> str:
    """A path or URI by whose end the kind of file is known: without the options of a URI (`?region=...`)."""
    path = file.partition("?")[0]
    return path if "://" in file and path.endswith(ENDINGS) else file


def sha256_uri(file: str) -> str:
    """SHA-256 of a file's bytes, wherever it lies."""
    filesystem, path = open_filesystem(file)
    digest = hashlib.sha256()
    with _readable(file), filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def plan_shards(file: str, rows: int | None = None) -> list[Shard]:
    """A file in parts of `rows`, else SHARD_ROWS, rows; one part if it cannot be entered in the middle (gzip, JSON)."""
    rows = rows or SHARD_ROWS
    name = file_name(file)
    filesystem, path = open_filesystem(file)
    with _readable(file):
        if name.endswith(".parquet"):
            with filesystem.open_input_file(path) as stream:
                total = pq.ParquetFile(stream).metadata.num_rows
            return [Shard(file, first, 0, rows) for first in range(0, max(total, 1), rows)]
        if not name.endswith(".jsonl"):
            return [Shard(file)]
        shards, lines, at = [Shard(file, 0, 0, rows)], 0, 0
        with filesystem.open_input_stream(path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                cut = 0
                for _ in range(chunk.count(b"\n")):
                    cut = chunk.index(b"\n", cut) + 1
                    lines += 1
                    if lines % rows == 0:
                        shards.append(Shard(file, lines, at + cut, rows))
                at += len(chunk)
        return shards


def share_shards(file: str) -> list[Shard]:
    """A file whose rows must meet, whole in each part, for one share of its prompts that fits into memory."""
    filesystem, path = open_filesystem(file)
    with _readable(file):
        size = filesystem.get_file_info(path).size or 0
    packed = not file_name(file).endswith((".jsonl", ".json", ".arrow"))
    shares = max(1, -(-size * (4 if packed else 1) // SHARE_BYTES))
    return [Shard(file, share=(number, shares)) for number in range(shares)]


def raw_rows(shard: Shard) -> Iterator[tuple[str, Any]]:
    """(origin, value) of each row; the value is a Refusal where the row could not be decoded.

    An origin is "file:line" for JSONL and "file:row" for other kinds, counted from 1. Raises DataError for a file that
    cannot be read.
    """
    file, name = shard.file, file_name(shard.file)
    filesystem, path = open_filesystem(file)
    with _readable(file):
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(shard, filesystem, path)
        elif name.endswith(".json"):
            yield from _json_list(shard, filesystem, path)
        elif name.endswith(".parquet"):
            with filesystem.open_input_file(path) as stream:
                yield from _parquet_rows(shard, pq.ParquetFile(stream))
        elif name.endswith(".arrow"):
            with filesystem.open_input_file(path) as stream:
                yield from _numbered(shard, 0, _arrow_batches(stream))
        elif name.endswith(".txt"):
            with filesystem.open_input_stream(path) as stream:
                yield f"{file}:1", stream.read().decode("utf-8", "surrogateescape")
        else:
            raise DataError(f"{file}: unknown kind of file; expected a name ending in {', '.join(ENDINGS)}")


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


@contextmanager
def one_row() -> Iterator[None]:
    """Around the parsing of one row: what no check foresaw refuses that row, and stops no import."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, DtrpoError):
            raise
        raise Refusal("wrong type", f"{type(error).__name__}: {error}"[:200]) from None


def field(row: dict[str, Any], name: str) -> Any:
    """A field that must be there. Raises Refusal."""
    if row.get(name) is None:
        raise Refusal("missing field", name)
    return row[name]


def reference(value: Any, where: str) -> str | None:
    """A reference answer as a verifier reads it: text as it is, anything else as JSON. Raises Refusal."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        raise Refusal("wrong type", f"{where} is a {type(value).__name__}, neither text nor JSON") from None


def text(value: Any, where: str) -> str:
    """A value that must be text. Raises Refusal."""
    if not isinstance(value, str):
        raise Refusal("wrong type", f"{where} is a {type(value).__name__}, not text")
    return value


@contextmanager
def _readable(file: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read ({error}); check the path, or fetch the file again") from None


def _json_lines(shard: Shard, filesystem: pafs.FileSystem, path: str) -> Iterator[tuple[str, Any]]:
    with filesystem.open_input_file(path) as source:
        source.seek(shard.start)
        lines: Any = (
            gzip.GzipFile(fileobj=source) if file_name(shard.file).endswith(".gz") else io.BufferedReader(source)
        )
        for number, line in enumerate(lines, shard.first + 1):
            if shard.rows is not None and number > shard.first + shard.rows:
                return
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield f"{shard.file}:{number}", _decode_json(line)


def _json_list(shard: Shard, filesystem: pafs.FileSystem, path: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with filesystem.open_input_stream(path) as stream:
            for number, value in enumerate(itertools.islice(_JsonText(stream).rows(), shard.rows), 1):
                yield f"{shard.file}:{number}", value
    except (ValueError, RecursionError) as error:
        problem = f"no JSON list of rows after row {number} ({error})" if number else f"no JSON list of rows ({error})"
        raise DataError(f"{shard.file}: {problem}; rows one to a line belong in a .jsonl file") from None


class _JsonText:
    """A JSON file of a list of rows, or of one, which is held as far as its next row goes."""

    def __init__(self, stream: Any) -> None:
        # stray bytes become lone surrogates, so that they spoil their own row and not the whole file
        self.stream, self.decode = stream, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at = "", 0

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
        return bool(chunk)


def _parquet_rows(shard: Shard, source: pq.ParquetFile) -> Iterator[tuple[str, Any]]:
    """The rows of a part, reading only the row groups that hold some."""
    sizes = [source.metadata.row_group(g).num_rows for g in range(source.num_row_groups)]
    ends = list(itertools.accumulate(sizes))
    last = ends[-1] if ends and shard.rows is None else shard.first + (shard.rows or 0)
    groups = [g for g, end in enumerate(ends) if end > shard.first and end - sizes[g] < last]
    if groups:
        begin = ends[groups[0]] - sizes[groups[0]]
        yield from _numbered(shard, begin, source.iter_batches(1024, row_groups=groups))


def _numbered(shard: Shard, begin: int, batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, Any]]:
    """The part's rows of batches whose first row is number `begin` of the file."""
    end = None if shard.rows is None else shard.first + shard.rows
    for batch in batches:
        skip = max(shard.first - begin, 0)
        keep = len(batch) if end is None else min(len(batch), end - begin)
        for number, value in enumerate(_decode_arrow(batch.slice(skip, max(keep - skip, 0))), begin + skip + 1):
            yield f"{shard.file}:{number}", value
        begin += len(batch)


def _arrow_batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:  # what `datasets` writes
        yield from pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:  # Feather
        stream.seek(0)
        reader = pa.ipc.open_file(stream)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _decode_json(data: bytes) -> Any:
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
