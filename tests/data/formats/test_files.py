"""Where rows lie: every kind of file, local, in memory and behind fsspec; parts that add up to the whole."""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrpo_ray.data.formats import files
from dtrpo_ray.data.formats.files import Shard, data_files, file_name, plan_shards, sha256_data
from dtrpo_ray.data.formats.reading import raw_rows
from dtrpo_ray.errors import DataError
from dtrpo_ray.files import open_filesystem

PACK = {".gz": gzip.compress, ".zst": partial(pa.compress, codec="zstd", asbytes=True)}
ROWS = [{"number": i, "text": f"row {i}"} for i in range(23)]


def write(path: Path, rows: list[Any]) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(rows).schema) as out:
            out.write_table(pa.Table.from_pylist(rows), max_chunksize=6)
    else:
        whole = json.dumps(rows).encode() if ".json" in path.suffixes else lines
        path.write_bytes(PACK.get(path.suffix, bytes)(whole))
    return str(path)


@pytest.mark.parametrize(
    "ending", [".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".parquet", ".arrow"]
)
@pytest.mark.parametrize("size", [1, 5, 6, 23, 100])
def test_the_parts_of_a_file_are_its_rows_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, size: int
) -> None:
    monkeypatch.setattr(files, "PART_ROWS", size)
    file = write(tmp_path / f"rows{ending}", ROWS)
    shards = plan_shards(file)
    assert len(shards) == 1 or ending in (".jsonl", ".parquet")
    found = [row for shard in shards for row in raw_rows(shard)]
    assert found == [(f"{file}:{i}", row) for i, row in enumerate(ROWS, 1)]


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


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".json"])
def test_a_uri_reads_like_a_path(tmp_path: Path, ending: str) -> None:
    """memory:// goes the way of every filesystem that only fsspec knows."""
    local = write(tmp_path / f"rows{ending}", ROWS)
    uri = f"memory://bucket{ending}/rows{ending}"
    with fsspec.open(uri, "wb") as out:
        out.write(Path(local).read_bytes())
    assert data_files(f"memory://bucket{ending}") == [uri]
    assert [value for shard in plan_shards(uri) for _, value in raw_rows(shard)] == ROWS
    assert next(raw_rows(Shard(uri)))[0] == f"{uri}:1"
    assert sha256_data(uri) == sha256_data(local)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".json"])
def test_an_object_store_reads_like_a_disk(tmp_path: Path, remote: str, ending: str) -> None:
    local, folder = write(tmp_path / f"rows{ending}", ROWS), f"{remote}/rows{ending}"
    filesystem, path = open_filesystem(f"{folder}/rows{ending}")
    assert filesystem.type_name in ("s3", "gcs")
    with filesystem.open_output_stream(path, compression=None) as out:
        out.write(Path(local).read_bytes())
    assert data_files(folder) == [f"{folder}/rows{ending}"]
    shards = plan_shards(f"{folder}/rows{ending}", rows=5)
    assert [value for shard in shards for _, value in raw_rows(shard)] == ROWS
    assert sha256_data(f"{folder}/rows{ending}") == sha256_data(local)
    with pytest.raises(DataError, match=r"/gone: .*not exist|/gone: .*No such"):
        data_files(f"{remote}/gone")


def test_a_file_is_named_by_its_path_or_by_all_of_its_url() -> None:
    assert file_name("s3://b/rows.jsonl?region=x") == "s3://b/rows.jsonl"
    assert file_name("https://host/get?name=rows.jsonl") == "https://host/get?name=rows.jsonl"
    assert file_name("/data/what?.jsonl") == "/data/what?.jsonl"


def test_the_options_of_a_uri_go_with_its_files(tmp_path: Path, bucket: str) -> None:
    """As a store that is not Amazon's is named: s3://bucket/folder?endpoint_override=...&scheme=http."""
    filesystem, _ = open_filesystem(bucket)
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


@pytest.mark.parametrize(
    ("names", "held", "pattern", "taken"),
    [
        (["train.jsonl", "test.jsonl"], "test, train", "train*", ["train.jsonl"]),
        (
            ["train_prefs-00000-of-00001.parquet", "test_prefs-00000-of-00001.parquet"],
            "test_prefs, train_prefs",
            "train_prefs*",
            ["train_prefs-00000-of-00001.parquet"],
        ),
        (["pairs.jsonl", "validation.jsonl"], "files of none, valid", "pairs*", ["pairs.jsonl"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "dataset_infos.json"], None, "*", []),
        (["contest.jsonl", "evaluate.jsonl", "trainer.jsonl"], None, "*", []),
    ],
)
def test_a_folder_of_several_splits_is_no_answer(
    tmp_path: Path, names: list[str], held: str | None, pattern: str, taken: list[str]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    if held is None:
        assert data_files(str(tmp_path)) == [str(tmp_path / n) for n in sorted(names) if n != "dataset_infos.json"]
        return
    with pytest.raises(DataError, match=f"holds the splits {held}; name one, for example"):
        data_files(str(tmp_path))
    assert data_files(f"{tmp_path}/{pattern}") == [str(tmp_path / name) for name in taken]


def test_a_clone_of_the_hub_has_its_files_in_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text("{}")
    write(tmp_path / "data" / "train.jsonl", ROWS)
    assert data_files(str(tmp_path)) == [str(tmp_path / "data" / "train.jsonl")]


def test_json_lines_in_a_json_file_are_rows(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "rows.jsonl", ROWS)).rename(tmp_path / "rows.json")
    assert [row for _, row in raw_rows(Shard(str(file)))] == ROWS
