"""The files behind a path or URI, and the parts in which they are read."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from dtrpo_ray.errors import DataError
from dtrpo_ray.files import join_path, open_filesystem, sha256_stream

PACKED = {".gz": "gzip", ".zst": "zstd"}  # the endings of compressed text, and pyarrow's names
TEXTS = (".json", ".jsonl", ".csv")
ENDINGS = (*TEXTS, *(text + packed for text in TEXTS for packed in PACKED), ".parquet", ".arrow", ".txt")
KNOWN = f"{', '.join(TEXTS)} (also {', '.join(PACKED)}), .parquet, .arrow"
PART_ROWS = 5_000  # rows of a file that one task reads
SHARE_BYTES = 1 << 27  # a larger file of unpaired rows is read several times, each time for a share of its prompts
NO_DATA = ("dataset_info.json", "dataset_infos.json", "manifest.json")  # of `datasets`, the Hub and our own tables
_CHUNK_BYTES = 1 << 23
_SPLIT = re.compile(r"(?:^|[^a-z])(train|test|valid|val|dev|eval)(?:ing|ation|uation)?(?:[^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a file that one task reads: `rows` rows (of JSONL: lines) from number `first` (from 0) on, or all.

    `start` is the byte of a JSONL file where that row begins, else 0. A part of unpaired rows has one `share` of the
    prompts, given as (number, count). An import gives it a `name` that is unique in the job.
    """

    file: str
    first: int = 0
    start: int = 0
    rows: int | None = None
    share: tuple[int, int] = (0, 1)
    name: str = ""

    def __str__(self) -> str:
        last = "the end" if self.rows is None else self.first + self.rows
        share = f", share {self.share[0] + 1} of {self.share[1]} of their prompts" if self.share[1] > 1 else ""
        return f"{self.file}, rows {self.first + 1} to {last}{share}"


def data_files(where: str) -> list[str]:
    """Return the files behind a path or URI: itself, or those of a folder (also one of `datasets`), by name.

    A `*` in the last name stands for any text. A folder of the Hub has its files in `data`. Raises DataError for a path
    that is not there, a folder without data, and a folder that holds several splits.
    """
    folder, name = _split_name(where)
    pattern = name if "*" in name else "*"
    where = folder if "*" in name else where
    filesystem, path = open_filesystem(where)
    with readable(where):
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
    files = sorted(n for n in names if n.endswith(ENDINGS[:-1]) and n not in NO_DATA and fnmatchcase(n, pattern))
    if not files and "data" in names:
        return data_files(join_path(where, "data"))
    if not files:
        raise DataError(f"{where}: a folder without data; expected files ending in {KNOWN}")
    if len(splits := sorted({split_of(name) for name in files})) > 1:
        first = next((split for split in splits if split.startswith("train")), splits[-1])
        held = ", ".join(split or "files of none" for split in splits)
        raise DataError(f"{where}: holds the splits {held}; name one, for example {join_path(where, first + '*')}")
    return [join_path(where, name) for name in files]


def _split_name(where: str) -> tuple[str, str]:
    """Return the folder of a path or URI, with the URI's options, and its last name."""
    path, mark, options = where.partition("?") if "://" in where else (where, "", "")
    folder, slash, name = path.rpartition("/")
    return (folder or slash or ".") + mark + options, name


def split_of(name: str) -> str:
    """Return the split that a file's name tells, as on the Hub: what stands before "-00000-of-00001", or the word."""
    word = _SPLIT.search(name)
    shard = re.match(r"(.+)-\d{5}-of-\d{5}\.", name)
    return "" if word is None else shard[1] if shard else word[1].lower()


def _refuse_splits(where: str, dataset_dict: bytes) -> list[str]:
    """Raise DataError that names the splits of a `datasets` folder by its dataset_dict.json."""
    try:
        splits = sorted(map(str, json.loads(dataset_dict)["splits"]))
    except (ValueError, LookupError, TypeError, RecursionError):
        splits = []
    example = join_path(where, (splits or ["train"])[0])
    raise DataError(f"{where}: holds the splits {', '.join(splits) or '?'}; name one, for example {example}") from None


def _files_of_state(where: str, state_json: bytes) -> list[str]:
    """Return the files of a `datasets` folder by its state.json."""
    try:
        state = json.loads(state_json)
        selection = state.get("_indices_data_files")
        files = [join_path(where, entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        place = join_path(where, "state.json")
        raise DataError(f"{place}: not what datasets writes ({error!r}); save the data anew") from None
    if selection:
        raise DataError(f"{where}: the dataset is a selection of rows; call flatten_indices() and save it again")
    return files


def file_name(file: str) -> str:
    """Return a path or URI whose ending shows the kind of file: without the options of a URI (`?region=...`)."""
    path = file.partition("?")[0]
    return path if "://" in file and path.endswith(ENDINGS) else file


def split_packed(file: str) -> tuple[str, str | None]:
    """Return a name whose ending shows the kind of its contents, and pyarrow's name of its compression."""
    name = file_name(file)
    found = next((ending for ending in PACKED if name.endswith(ending)), "")
    return name.removesuffix(found), PACKED.get(found)


def sha256_data(file: str) -> str:
    """Return the SHA-256 of a file's bytes, wherever it is. Raises DataError for one that cannot be read."""
    filesystem, path = open_filesystem(file)
    with readable(file), filesystem.open_input_stream(path) as stream:
        return sha256_stream(stream)


def plan_shards(file: str, rows: int | None = None) -> list[Shard]:
    """Split a file into parts of `rows` rows, or PART_ROWS; only JSON lines and Parquet can be entered midway."""
    rows = rows or PART_ROWS
    name = file_name(file)
    filesystem, path = open_filesystem(file)
    with readable(file):
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
    """Return parts that each read the whole file, for a share of its prompts that fits into memory."""
    filesystem, path = open_filesystem(file)
    with readable(file):
        size = filesystem.get_file_info(path).size or 0
    packed = not file_name(file).endswith((*TEXTS, ".arrow"))
    shares = max(1, -(-size * (4 if packed else 1) // SHARE_BYTES))
    return [Shard(file, share=(number, shares)) for number in range(shares)]


@contextmanager
def readable(file: str) -> Iterator[None]:
    """Turn errors of reading a file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read ({error}); check the path, or fetch the file again") from None
