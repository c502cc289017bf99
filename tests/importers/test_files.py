"""Files of rows: every kind, local, in memory and behind fsspec; parts that add up to the whole."""

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrpo_ray.errors import DataError
from dtrpo_ray.importers import batches, files
from dtrpo_ray.importers.batches import raw_rows
from dtrpo_ray.importers.files import Shard, data_files, file_name, plan_shards, sha256_uri
from dtrpo_ray.importers.parsing import Refusal

ROWS = [{"number": i, "text": f"row {i}"} for i in range(23)]


def write(path: Path, rows: list[Any]) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(rows).schema) as out:
            out.write_table(pa.Table.from_pylist(rows), max_chunksize=6)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".jsonl.gz", ".parquet", ".arrow"])
@pytest.mark.parametrize("size", [1, 5, 6, 23, 100])
def test_the_parts_of_a_file_are_its_rows_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, size: int
) -> None:
    monkeypatch.setattr(files, "SHARD_ROWS", size)
    file = write(tmp_path / f"rows{ending}", ROWS)
    shards = plan_shards(file)
    assert len(shards) == 1 or ending in (".jsonl", ".parquet")
    found = [row for shard in shards for row in raw_rows(shard)]
    assert found == [(f"{file}:{i}", row) for i, row in enumerate(ROWS, 1)]


def test_blank_lines_a_missing_last_line_end_and_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARD_ROWS", 2)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 3}\n\n\n{"a": 6}')
    found = [row for shard in plan_shards(str(file)) for row in raw_rows(shard)]
    assert found == [(f"{file}:{n}", {"a": n}) for n in (1, 3, 6)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    "values",
    [
        [],
        [{}],
        [{"a": 'é"]},\\', "b": [1, 2.5e-3, None, True]}, [], "x", 12, -1, 1.5, False, None, {"c": {"d": "\U0001f600"}}],
        ROWS,
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read_row_by_row_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, values: list[Any], indent: int | None
) -> None:
    monkeypatch.setattr(batches, "_CHUNK_BYTES", chunk)
    for number, ascii_only in enumerate((True, False)):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n")
        assert [value for _, value in raw_rows(Shard(str(file)))] == values
        assert [value for _, value in raw_rows(Shard(str(file), rows=1))] == values[:1]


@pytest.mark.parametrize(
    ("content", "after", "problem"),
    [
        ("", 0, "Expecting value"),
        ("[1 2]", 1, "expected ',' or ']' after a row"),
        ("[1, 2", 2, "expected ',' or ']' after a row"),
        ("[1,]", 1, "Expecting value"),
        ("[1] [2]", 1, "more text after its end"),
        ('{"a": 1}\n{"a": 2}', 1, "more text after its end"),
        ('[{"a": 1}, {"a": "x}]', 1, "Unterminated string starting at"),
        ('[{"a": tru}]', 0, "Expecting value"),
        ('[{"a": 1}e, {"a": 2}]', 1, "expected ',' or ']' after a row"),
        ("[" * 100_000, 0, "maximum recursion depth exceeded"),
        ("5", 0, "found int"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_broken_json_list_is_named_with_the_last_good_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, after: int, problem: str, chunk: int
) -> None:
    monkeypatch.setattr(batches, "_CHUNK_BYTES", chunk if len(content) < 1_000 else 1 << 20)  # quadratic
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError) as caught:
        list(raw_rows(Shard(str(tmp_path / "rows.json"))))
    where = f" after row {after}" if after else ""
    assert f"rows.json: no JSON list of rows{where} ({problem}" in str(caught.value)


def test_stray_bytes_in_a_json_list_spoil_their_own_row(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(b'[{"a": "\xff"}, {"a": "b"}]')
    assert [value["a"] for _, value in raw_rows(Shard(str(tmp_path / "rows.json")))] == ["\udcff", "b"]


def test_a_feather_file_reads_like_a_datasets_file(tmp_path: Path) -> None:
    file, table = tmp_path / "rows.arrow", pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table, max_chunksize=6)
    assert [value for _, value in raw_rows(Shard(str(file)))] == ROWS


def test_a_folder_that_datasets_saved_is_its_arrow_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package `datasets` wrote this kind of folder")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    found = [value for file in data_files(str(tmp_path / "saved")) for _, value in raw_rows(Shard(file))]
    assert found == ROWS
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"holds the splits test, train; name one, for example .*splits/test"):
        data_files(str(tmp_path / "splits"))
    assert len(data_files(str(tmp_path / "splits" / "train"))) == 1


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".json"])
def test_a_uri_reads_like_a_path(tmp_path: Path, ending: str) -> None:
    """memory:// goes the way of every filesystem that only fsspec knows."""
    local = write(tmp_path / f"rows{ending}", ROWS)
    uri = f"memory://bucket{ending}/rows{ending}"
    with fsspec.open(uri, "wb") as out:
        out.write(Path(local).read_bytes())
    assert data_files(f"memory://bucket{ending}") == [uri]
    assert [value for shard in plan_shards(uri) for _, value in raw_rows(shard)] == ROWS
    assert next(raw_rows(Shard(uri)))[0] == f"{uri}:1"
    assert sha256_uri(uri) == sha256_uri(local)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".json"])
def test_an_object_store_reads_like_a_disk(tmp_path: Path, remote: str, ending: str) -> None:
    local, folder = write(tmp_path / f"rows{ending}", ROWS), f"{remote}/rows{ending}"
    filesystem, path = files.open_filesystem(f"{folder}/rows{ending}")
    assert filesystem.type_name in ("s3", "gcs")
    with filesystem.open_output_stream(path, compression=None) as out:
        out.write(Path(local).read_bytes())
    assert data_files(folder) == [f"{folder}/rows{ending}"]
    shards = plan_shards(f"{folder}/rows{ending}", rows=5)
    assert [value for shard in shards for _, value in raw_rows(shard)] == ROWS
    assert sha256_uri(f"{folder}/rows{ending}") == sha256_uri(local)
    with pytest.raises(DataError, match=r"/gone: .*not exist|/gone: .*No such"):
        data_files(f"{remote}/gone")


def test_no_row_is_read_beyond_those_asked_for(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1}, {"a": tru}]')
    assert [value for _, value in raw_rows(Shard(str(tmp_path / "rows.json"), rows=1))] == [{"a": 1}]


def test_a_file_is_named_by_its_path_or_by_all_of_its_url() -> None:
    assert file_name("s3://b/rows.jsonl?region=x") == "s3://b/rows.jsonl"
    assert file_name("https://host/get?name=rows.jsonl") == "https://host/get?name=rows.jsonl"
    assert file_name("/data/what?.jsonl") == "/data/what?.jsonl"


def test_the_options_of_a_uri_go_with_its_files(tmp_path: Path, bucket: str) -> None:
    """As a store that is not Amazon's is named: s3://bucket/folder?endpoint_override=...&scheme=http."""
    filesystem, _ = files.open_filesystem(bucket)
    for number in (0, 1):
        with filesystem.open_output_stream(f"bucket/options/{number}.jsonl") as out:
            out.write(Path(write(tmp_path / "rows.jsonl", ROWS[number::2])).read_bytes())
    found = data_files(f"{bucket}/options?region=us-east-1")
    assert found == [f"{bucket}/options/{number}.jsonl?region=us-east-1" for number in (0, 1)]
    rows = [row for file in found for shard in plan_shards(file, rows=5) for row in raw_rows(shard)]
    assert [value for _, value in rows] == ROWS[0::2] + ROWS[1::2]
    assert rows[-1][0] == f"{found[1]}:{len(ROWS[1::2])}"


@pytest.mark.parametrize("state", ["", "{", "[]", "{}", '{"_data_files": [5]}', '{"_data_files": 5}', "[" * 100_000])
def test_a_broken_state_of_datasets_is_named(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"state\.json: not what datasets writes"):
        data_files(str(tmp_path))


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere://a/b: cannot be opened"):
        data_files("nowhere://a/b")
    with pytest.raises(DataError, match="No such file or directory"):
        data_files(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match=r"a folder without data; expected files ending in \.json, \.jsonl"):
        data_files(str(tmp_path))


def test_a_row_that_cannot_be_decoded_keeps_its_place(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n{\n{"a": 3}\n')
    (_, one), (where, two), (_, three) = raw_rows(Shard(str(file)))
    assert (one, three, where) == ({"a": 1}, {"a": 3}, f"{file}:2")
    assert isinstance(two, Refusal)
    assert two.args[0] == "bad JSON"
