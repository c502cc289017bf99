"""Tables on disk: read whole, checked row by row, and the manifest that names what changed."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_rows import KINDS, example, preference, table_of

from dtrpo_ray.data.schemas import EXAMPLE, PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import (
    Counts,
    Rejected,
    check_folder,
    id_shares,
    places_of,
    quarantine_lines,
    read_table,
    repeated_rows,
    schema_of,
    write_manifest,
    write_shards,
)
from dtrpo_ray.errors import DataError

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_a_folder_reads_as_its_files_in_order(tmp_path: Path, kind: str) -> None:
    schema, make = KINDS[kind]
    for number in (1, 0):
        rows = [make(f"{number}-{i}") for i in range(2)]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / f"part-{number}.parquet")
    whole = read_table(tmp_path, schema)
    assert whole["row_id"].to_pylist() == ["0-0", "0-1", "1-0", "1-1"]
    assert whole.schema.equals(schema)


def test_wider_integers_and_further_columns_are_taken_down_to_the_schema(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"note": "x", **example()}])  # as another writer would: int64
    pq.write_table(table, tmp_path / "part.parquet")
    assert read_table(tmp_path, EXAMPLE).schema.equals(EXAMPLE)


def test_read_errors_name_the_file_and_the_fault(tmp_path: Path) -> None:
    def refuse(path: Path, schema: pa.Schema, message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            read_table(path, schema)
        assert str(caught.value).startswith(f"{path}:")

    refuse(tmp_path, EXAMPLE, "no Parquet files here")
    refuse(tmp_path / "none.parquet", EXAMPLE, "no such file")
    file = tmp_path / "part.parquet"
    file.write_bytes(b"PAR1 not so PAR1")
    refuse(file, EXAMPLE, "not a readable Parquet file")
    pq.write_table(table_of("example/v1", {}), file)
    refuse(file, PREFERENCE, "column prompt_id is missing; expected the table preference/v1")
    pq.write_table(pa.Table.from_pylist([example() | {"prompt_ids": ["one"]}]), file)
    refuse(file, EXAMPLE, "not the types of example/v1")
    pq.write_table(pa.Table.from_pylist([example() | {"prompt_ids": [2**40]}]), file)
    refuse(file, EXAMPLE, "not the types of example/v1")
    pq.write_table(table_of("example/v1", {"contract_version": 2}), file)
    refuse(file, EXAMPLE, "row b: contract_version is not 1")


def test_a_row_id_repeated_within_or_across_files_is_refused(tmp_path: Path) -> None:
    pq.write_table(table_of("example/v1", {}), tmp_path / "part-0.parquet")
    pq.write_table(table_of("example/v1", {"row_id": "a"}), tmp_path / "part-1.parquet")
    with pytest.raises(DataError, match=r"3 row\(s\) repeat a row_id; each row needs its own"):
        read_table(tmp_path, EXAMPLE)
    with pytest.raises(DataError, match=r"1 row\(s\) repeat a row_id"):
        read_table(tmp_path / "part-1.parquet", EXAMPLE)


@kinds
def test_a_table_is_known_by_its_columns(tmp_path: Path, kind: str) -> None:
    write_shards(table_of(kind, {}), tmp_path)
    assert schema_of(tmp_path) is KINDS[kind][0]
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    assert schema_of(tmp_path / "other.parquet") is None


def test_columns_that_may_be_null_may_be_absent(tmp_path: Path) -> None:
    table = table_of("trajectory/v1", {}).drop_columns(["ranks", "types", "sampler", "data_hash"])
    pq.write_table(table, tmp_path / "part.parquet")
    assert read_table(tmp_path, TRAJECTORY)["ranks"].null_count == 3


def test_a_check_counts_every_row_once_and_says_where_it_stands(tmp_path: Path) -> None:
    rows = [preference(i) for i in "abc"] + [preference("d") | {"mask_id": 8}, preference("a")]
    pq.write_table(pa.Table.from_pylist(rows, schema=PREFERENCE), tmp_path / "part-0.parquet")
    more = [preference("e") | {"chosen_ids": [4, 5, 6, 7, 8, 8]}, preference("b"), preference("f")]
    pq.write_table(pa.Table.from_pylist(more, schema=PREFERENCE), tmp_path / "part-1.parquet")
    report = check_folder(tmp_path, PREFERENCE)
    assert report.totals == {
        "rows": 8,
        "good": 4,
        "refused": {"duplicate id": 2, "mask token": 1, "lengths differ": 1},
    }
    assert sum(report.totals["refused"].values()) + report.totals["good"] == report.totals["rows"]
    one, two = tmp_path / "part-0.parquet", tmp_path / "part-1.parquet"
    assert [row.origin for row in report.refused] == [f"{one}:4", f"{one}:5", f"{two}:1", f"{two}:2"]
    assert report.refused[3] == Rejected(f"{two}:2", "duplicate id", f"the row_id of {one}:2")
    assert [line.split() for line in report.lines()][1] == ["duplicate", "id", "2"]


@pytest.mark.parametrize("shares", [1, 2, 7])
def test_repeated_rows_are_found_in_each_share_of_the_ids(tmp_path: Path, shares: int) -> None:
    files = [tmp_path / f"{name}.parquet" for name in "ab"]
    ids = [[f"{i % 40}" for i in range(50)], [f"{i}" for i in range(35, 60)]]
    for file, names in zip(files, ids, strict=True):
        pq.write_table(pa.table({"row_id": names}), file)
    found = [tuple(places_of(files, rows) for rows in repeated_rows(files, share, shares)) for share in range(shares)]
    assert sum(bool(repeats) for repeats, _ in found) > shares / 2
    rows = {row: first for share in found for row, first in zip(*share, strict=True)}
    within = {(files[0], 40 + i): (files[0], i) for i in range(10)}
    across = {(files[1], i): (files[0], 35 + i) for i in range(5)}
    assert rows == within | across
    assert sum(len(repeats) for repeats, _ in found) == len(rows)
    pq.write_table(pa.table({"row_id": [1, 2, 2]}), tmp_path / "numbers.parquet")
    numbers = tmp_path / "numbers.parquet"
    assert [rows.tolist() for rows in repeated_rows([numbers])] == [[2], [1]]
    assert [rows.tolist() for rows in repeated_rows([])] == [[], []]
    assert [id_shares(n) for n in (0, 1, 2_000_000, 2_000_001)] == [1, 1, 1, 2]


def test_ids_that_are_not_utf8_are_counted_and_not_decoded(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([preference("a"), preference("b"), preference("c")], schema=PREFERENCE)
    raw = pa.array([b"a", b"\xff", b"\xff"], pa.binary())
    ids = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    at = table.schema.get_field_index("row_id")
    pq.write_table(table.set_column(at, table.schema.field(at), ids), tmp_path / "part-0.parquet")
    assert check_folder(tmp_path, PREFERENCE).totals == {"rows": 3, "good": 1, "refused": {"bad UTF-8": 2}}
    with pytest.raises(DataError, match=r"part-0\.parquet: row \\xff: row_id is not UTF-8"):
        read_table(tmp_path, PREFERENCE)


def test_the_manifest_names_a_file_that_is_missing_new_or_changed(tmp_path: Path) -> None:
    write_shards(table_of("example/v1", {}), tmp_path)
    counts: Counts = {"rows": 3, "good": 3, "refused": {}}
    write_manifest(tmp_path, EXAMPLE, counts)
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert (record["table"], record["rows"], record["counts"]) == (
        "example/v1",
        3,
        {"rows": 3, "good": 3, "refused": {}},
    )
    assert check_folder(tmp_path, EXAMPLE).totals == {"rows": 3, "good": 3, "refused": {}}
    part = tmp_path / "part-00000.parquet"
    whole = part.read_bytes()
    pq.write_table(table_of("example/v1", {"row_id": "z"}), part)
    with pytest.raises(DataError, match=r"part-00000\.parquet: hash mismatch, changed since its manifest"):
        check_folder(tmp_path, EXAMPLE)
    part.write_bytes(whole)
    pq.write_table(table_of("example/v1", {}), tmp_path / "new.parquet")
    with pytest.raises(DataError, match=r"new\.parquet: not in the manifest"):
        check_folder(tmp_path, EXAMPLE)
    (tmp_path / "new.parquet").unlink()
    part.rename(tmp_path / "gone")
    with pytest.raises(DataError, match=r"part-00000\.parquet: missing, though the manifest lists it"):
        check_folder(tmp_path, EXAMPLE)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        check_folder(tmp_path, EXAMPLE)


def test_the_quarantine_file_is_one_json_object_a_line() -> None:
    text = quarantine_lines([Rejected("f:1", "mask token", "why"), Rejected("f:2", "bad JSON", "so")])
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[1] == {"origin": "f:2", "reason": "bad JSON", "detail": "so"}
