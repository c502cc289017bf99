"""A table on disk: a folder of Parquet files and `manifest.json`, written whole, read whole, or checked row by row."""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dtrpo_ray.data.rules import GOOD, Expected, check_table, rules_of, verdicts
from dtrpo_ray.data.schemas import CONTRACT_VERSION, MAY_BE_NULL, SCHEMAS, table_name
from dtrpo_ray.errors import DataError
from dtrpo_ray.files import sha256_file, whole_file, write_json

TABLE_MANIFEST, QUARANTINE = "manifest.json", "quarantine.jsonl"
FILE_ROWS = 20_000  # rows of one Parquet file, so that Ray Data has files to spread
DUPLICATE = "duplicate id"
IDS_AT_ONCE = 2_000_000  # ids that the search for repeated ones holds, about 200 MB


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was refused: `reason` is a name in docs/data.md, `detail` says what was found."""

    origin: str
    reason: str
    detail: str


class Counts(TypedDict):
    """Rows that were read: the good ones, and the refused by reason, most frequent first; they add up to `rows`.

    `ignored` counts the good rows that have something in a column that is no part of them, by column. `truncated` are
    good rows whose prompt was cut. `files` are the rows of the table by file, if there are several.
    """

    rows: int
    good: int
    refused: dict[str, int]
    ignored: NotRequired[dict[str, int]]
    truncated: NotRequired[int]
    files: NotRequired[dict[str, int]]


def counts_of(good: int, refused: Mapping[str, int], ignored: Mapping[str, int], truncated: int) -> Counts:
    """Return counts; those of nothing are left out."""
    some = {reason: count for reason, count in refused.items() if count}
    counts: Counts = {"rows": good + sum(some.values()), "good": good, "refused": some}
    if ignored:
        counts["ignored"] = dict(sorted(ignored.items()))
    if truncated:
        counts["truncated"] = truncated
    return counts


class ManifestFile(TypedDict):
    """A file of a table in its manifest."""

    rows: int
    sha256: str


class Manifest(TypedDict):
    """The contents of `manifest.json`; `counts` are those of an import, whose first rows are decoded as `examples`."""

    table: str
    contract_version: int
    rows: int
    files: dict[str, ManifestFile]
    counts: NotRequired[Counts]
    examples: NotRequired[list[dict[str, str]]]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of checking a file or folder; `examples` are rows as decoded from their ids, by column."""

    source: str
    table: str
    totals: Counts
    refused: tuple[Rejected, ...]
    examples: tuple[dict[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as text: counts, the first row of each reason, and examples."""
        first = {row.reason: f"  {row.reason}: {row.detail} ({row.origin})" for row in reversed(self.refused)}
        shown = [
            f"  {name:<9} {text!r}" for number, row in enumerate(self.examples, 1)
            for name, text in {"example": number, **row}.items()
        ]  # fmt: skip
        told = [f"  warning: {text}" for text in self.warnings]
        return [f"{self.source}: {self.table}", *count_lines(self.totals), *first.values(), *told, *shown]


def count_lines(totals: Counts) -> list[str]:
    """Return counts as the lines of a table of text that adds up, and below it what is no part of the sum."""
    rows = [*totals["refused"].items(), ("good", totals["good"]), ("rows", totals["rows"])]
    below = [("prompt truncated", totals["truncated"])] if "truncated" in totals else []
    below += [(f"ignored: {column}", count) for column, count in totals.get("ignored", {}).items()]
    files = totals.get("files", {})
    whole = max(sum(files.values()), 1)
    shares = [f"  {count / whole:>7.1%} of the table, {count:,} rows: {file}" for file, count in files.items()]
    return [*(f"  {name:<22}{count:>10,}" for name, count in rows + below), *shares]


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read every Parquet file of a folder (or one file) and check it against `schema`.

    Raises DataError naming the file for a missing or unreadable file, another table or version, or a broken row.
    """
    whole = pa.concat_tables(check_table(read_file(file, schema), str(file)) for file in table_files(path))
    duplicates = len(whole) - pc.count_distinct(whole["row_id"]).as_py()
    if duplicates:
        raise DataError(f"{path}: {duplicates} row(s) repeat a row_id; each row needs its own")
    return whole


def table_files(path: Path) -> list[Path]:
    """Return the Parquet files of a folder by name, or the one file. Raises DataError if there is none."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no Parquet files here")
    return files


def read_file(file: Path, schema: pa.Schema) -> pa.Table:
    """Read one file in the columns and types of `schema`; a column that may be null may also be absent.

    Raises DataError naming the file.
    """
    try:
        table = pq.read_table(file)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({error}); write it anew") from None
    missing = [name for name in schema.names if name not in table.schema.names]
    if needed := sorted(set(missing) - MAY_BE_NULL):
        raise DataError(f"{file}: column {needed[0]} is missing; expected the table {table_name(schema)}")
    for name in missing:
        table = table.append_column(schema.field(name), pa.nulls(len(table), schema.field(name).type))
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{file}: not the types of {table_name(schema)} ({error}); write it anew") from None


@dataclass(frozen=True, slots=True)
class TablePart:
    """Some rows of a table, as row numbers of files (None: all), and the name of the file that they become."""

    name: str
    rows: Mapping[Path, pa.Array | None]

    def __str__(self) -> str:
        first, *others = self.rows
        return f"{first} and {len(others)} more file(s)" if others else str(first)

    def read(self, schema: pa.Schema) -> pa.Table:
        """Return the rows, each checked against the rules of `schema`. Raises DataError naming file and row."""
        whole = ((file, rows, read_file(file, schema)) for file, rows in self.rows.items())
        picked = ((file, table if rows is None else table.take(rows)) for file, rows, table in whole)
        return pa.concat_tables(check_table(table, str(file)) for file, table in picked)


def file_parts(files: Sequence[Path]) -> list[TablePart]:
    """Return one part for each file."""
    return [TablePart(file.name, {file: None}) for file in files]


def row_parts(files: Sequence[Path], part: np.ndarray) -> list[TablePart]:
    """Return the rows of a table in parts; `part` has the part of each row over all files, -1 to leave it out.

    Rows stay in their order.
    """
    starts = np.cumsum([0, *(pq.read_metadata(file).num_rows for file in files)])
    order = np.argsort(part, kind="stable")
    order = order[part[order] >= 0]
    made: list[TablePart] = []
    for number, rows in enumerate(np.split(order, np.flatnonzero(np.diff(part[order])) + 1)):
        of = np.searchsorted(starts, rows, side="right") - 1
        held = {files[f]: pa.array(rows[of == f] - starts[f], pa.int32()) for f in np.unique(of)}
        made.append(TablePart(f"part-{number:05d}.parquet", held))
    return made


def prompt_parts(files: Sequence[Path], size: int) -> list[TablePart]:
    """Return parts of whole prompts, each of `size` rows or a few more; prompts stay in their order."""
    ids = pq.read_table(list(files), columns=["prompt_id"])["prompt_id"]
    prompt = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    before = np.cumsum(np.bincount(prompt)) - np.bincount(prompt)  # rows of earlier prompts
    return row_parts(files, (before // size)[prompt])


def id_shares(rows: int) -> int:
    """Return the number of shares in which `repeated_rows` should look at the ids of `rows` rows."""
    return max(1, -(-rows // IDS_AT_ONCE))


def repeated_rows(files: Sequence[Path], share: int = 0, shares: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return int [repeats] twice: the rows that repeat a row_id, and the first row that has it, counted over all files.

    Only one of the `shares` of the ids is looked at and held in memory.
    """
    held, rows, before = list[pa.Array](), [np.arange(0)], 0
    for file in files:
        ids = pq.read_table(file, columns=["row_id"])["row_id"].combine_chunks().cast(pa.large_string())
        ids = ids.cast(pa.large_binary()).fill_null(b"")  # which need not be UTF-8
        own = np.arange(len(ids))
        if shares > 1:
            hashes = np.fromiter(map(zlib.crc32, ids.to_pylist()), np.uint32, len(ids))
            own = np.flatnonzero(hashes % shares == share)
        held.append(ids.take(pa.array(own)))
        rows.append(before + own)
        before += len(ids)
    codes = pa.chunked_array(held, pa.large_binary()).combine_chunks().dictionary_encode().indices.to_numpy()
    first, row = np.unique(codes, return_index=True)[1][codes], np.concatenate(rows)
    repeats = first != np.arange(len(row))
    return row[repeats], row[first[repeats]]


def places_of(files: Sequence[Path], rows: np.ndarray) -> list[tuple[Path, int]]:
    """Return the file of each row that is counted over all files, and its number there."""
    starts = np.cumsum([0, *(pq.read_metadata(file).num_rows for file in files)])
    at = np.searchsorted(starts, rows, side="right") - 1
    return [(files[file], row) for file, row in zip(at, (rows - starts[at]).tolist(), strict=True)]


def with_columns(table: pa.Table, columns: dict[str, list[Any]]) -> pa.Table:
    """Return a table with some of its columns replaced, in the types that they had."""
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    return table


def schema_of(path: Path) -> pa.Schema | None:
    """Return the schema that the columns of a folder or file fit, None if none does."""
    try:
        names = set(pq.read_schema(table_files(path)[0]).names)
    except (DataError, OSError, pa.ArrowInvalid):
        return None
    return next((schema for schema in SCHEMAS if names >= set(schema.names) - MAY_BE_NULL), None)


def check_folder(path: Path, schema: pa.Schema, expected: Expected | None = None) -> Report:
    """Check every row of every file against every rule; one file at a time is in memory.

    Raises DataError naming a file that cannot be read, or whose bytes are not those of its manifest.
    """
    check_manifest(path)
    rules, files, rows = rules_of(schema, expected), table_files(path), 0
    refused: dict[tuple[Path, int], Rejected] = {}
    for file in files:
        found = verdicts(read_file(file, schema), rules)
        rows += len(found)
        for number in np.flatnonzero(found != GOOD).tolist():
            rule = rules[found[number]]
            refused[file, number] = Rejected(f"{file}:{number + 1}", rule.name, rule.says)
    for share in range(id_shares(rows)):
        repeats = (places_of(files, found) for found in repeated_rows(files, share, id_shares(rows)))
        for (file, number), (first, at) in zip(*repeats, strict=True):
            repeated = Rejected(f"{file}:{number + 1}", DUPLICATE, f"the row_id of {first}:{at + 1}")
            refused.setdefault((file, number), repeated)
    bad = tuple(refused[place] for place in sorted(refused))
    counts = counts_of(rows - len(bad), dict(Counter(row.reason for row in bad).most_common()), {}, 0)
    return Report(str(path), table_name(schema), counts, bad)


def write_whole(table: pa.Table, path: Path) -> None:
    """Write a Parquet file, whole or not at all."""
    with whole_file(path) as partial:
        pq.write_table(table, partial)


def write_shards(table: pa.Table, out: Path) -> None:
    """Write a table as part-00000.parquet, part-00001.parquet ... of at most FILE_ROWS rows, then its manifest."""
    for number, start in enumerate(range(0, len(table), FILE_ROWS)):
        pq.write_table(table.slice(start, FILE_ROWS), out / f"part-{number:05d}.parquet")
    write_manifest(out, table.schema)


def write_manifest(
    folder: Path,
    schema: pa.Schema,
    counts: Counts | None = None,
    rows: int | None = None,
    examples: list[dict[str, str]] | None = None,
) -> None:
    """Write `manifest.json`: the table, its files with rows and SHA-256, and the `counts` and `examples` of an import.

    Raises DataError if the files do not hold `rows` rows, where that is known.
    """
    files: dict[str, ManifestFile] = {
        file.name: {"rows": pq.read_metadata(file).num_rows, "sha256": sha256_file(file)}
        for file in sorted(folder.glob("*.parquet"))
    }
    found = sum(entry["rows"] for entry in files.values())
    if rows is not None and found != rows:
        raise DataError(f"{folder}: its files hold {found} rows, {rows} were written; make it anew with --fresh")
    record: Manifest = {
        "table": table_name(schema),
        "contract_version": CONTRACT_VERSION,
        "rows": found,
        "files": files,
    }
    if counts is not None:
        record["counts"] = counts
    if examples:
        record["examples"] = examples
    write_json(folder / TABLE_MANIFEST, record)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, None if it has none. Raises DataError if it is damaged."""
    try:
        record: Manifest = json.loads((folder / TABLE_MANIFEST).read_text())
        record["files"].items()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{folder / TABLE_MANIFEST}: damaged ({error!r}); write the table anew") from None
    return record


def check_manifest(folder: Path) -> None:
    """Raise DataError naming the first file that is missing, new or changed since the manifest was written."""
    record = read_manifest(folder)
    if record is None:
        return
    there = {file.name for file in folder.glob("*.parquet")}
    for name, entry in record["files"].items():
        if name not in there:
            raise DataError(f"{folder / name}: missing, though the manifest lists it; make the table anew")
        if sha256_file(folder / name) != entry["sha256"]:
            raise DataError(f"{folder / name}: hash mismatch, changed since its manifest was written; make it anew")
    for name in sorted(there - set(record["files"])):
        raise DataError(f"{folder / name}: not in the manifest; move it away, or make the table anew")


def quarantine_lines(rejected: Iterable[Rejected]) -> str:
    """Return a JSON line {origin, reason, detail} for each refused row; it quotes no text of the row."""
    return "".join(json.dumps(asdict(row)) + "\n" for row in rejected)
