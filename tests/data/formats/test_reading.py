"""Batches of raw rows: lines, JSON lists and Arrow files, whole or broken; batches that end anywhere."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dtrpo_ray.data.formats import files, reading
from dtrpo_ray.data.formats.files import Shard, plan_shards
from dtrpo_ray.data.formats.parsing import Refusal
from dtrpo_ray.data.formats.reading import first_rows, raw_batches, raw_rows
from dtrpo_ray.errors import DataError

ROWS = [{"number": i, "text": f"row {i}"} for i in range(23)]


def test_blank_lines_a_missing_last_line_end_and_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PART_ROWS", 2)
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
    monkeypatch.setattr(reading, "_CHUNK_BYTES", chunk)
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
        ('{"a": 1}\n{"a": 2}\n[]', 2, "more text after its end"),
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
    monkeypatch.setattr(reading, "_CHUNK_BYTES", chunk if len(content) < 1_000 else 1 << 20)  # quadratic
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


def test_no_row_is_read_beyond_those_asked_for(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1}, {"a": tru}]')
    assert [value for _, value in raw_rows(Shard(str(tmp_path / "rows.json"), rows=1))] == [{"a": 1}]


def test_a_row_that_cannot_be_decoded_keeps_its_place(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n{\n{"a": 3}\n')
    (_, one), (where, two), (_, three) = raw_rows(Shard(str(file)))
    assert (one, three, where) == ({"a": 1}, {"a": 3}, f"{file}:2")
    assert isinstance(two, Refusal)
    assert two.args[0] == "bad JSON"


@pytest.mark.parametrize("most", [1, 5, 100])
@pytest.mark.parametrize("read", [1, 90, 1 << 20])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".arrow"])
def test_batches_hold_at_most_so_many_rows_and_all_of_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, read: int, most: int
) -> None:
    for name, value in {"BATCH_ROWS": most, "_BATCH_BYTES": read, "_CHUNK_BYTES": read}.items():
        monkeypatch.setattr(reading, name, value)
    file, lines = tmp_path / f"rows{ending}", "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if ending == ".arrow":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, pa.Table.from_pylist(ROWS).schema) as out:
            out.write_table(pa.Table.from_pylist(ROWS), max_chunksize=10)
    else:
        whole = {".jsonl": lines, ".jsonl.gz": gzip.compress(lines), ".json": json.dumps(ROWS).encode()}
        file.write_bytes(whole[ending])
    for rows in (None, 7, 23):
        found = list(raw_batches(Shard(str(file), rows=rows)))
        assert [row for batch in found for row in batch] == [(f"{file}:{i}", r) for i, r in enumerate(ROWS[:rows], 1)]
        assert max(map(len, found)) <= (1 if read == 1 else most)


def test_small_record_batches_are_joined(tmp_path: Path) -> None:
    table = pa.table({"number": pa.array(range(4_500)), "text": pa.array(["a", "b", "a"] * 1_500).dictionary_encode()})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table, max_chunksize=1)
    file = tmp_path / "rows.arrow"
    found = list(raw_batches(Shard(str(file), first=100)))
    assert [(batch[0][0], len(batch)) for batch in found] == [
        (f"{file}:{first}", rows) for first, rows in ((101, 2_000), (2_101, 2_000), (4_101, 400))
    ]
    assert [value["number"] for batch in found for _, value in batch] == list(range(100, 4_500))


@pytest.mark.parametrize("ending", [".json", ".jsonl.gz"])
def test_what_stands_before_a_break_is_read(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"rows{ending}"
    if ending == ".json":
        file.write_text(json.dumps(ROWS)[:-20])
    else:
        lines = "".join(json.dumps(row) + "\n" for row in ROWS * 1_000).encode()
        file.write_bytes(gzip.compress(lines)[:-1_000])
    found = raw_rows(Shard(str(file)))
    assert [next(found)[1] for _ in ROWS[:-1]] == ROWS[:-1]
    assert sum(shard.rows or 0 for shard in first_rows([Shard(str(file))], 20)[0]) == 20
    with pytest.raises(DataError, match=r"no JSON list of rows after row 22|cannot be read"):
        list(found)


def test_a_csv_has_text_in_its_columns_and_bad_rows_spoil_themselves(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    long = "x" * 200_000  # beyond the limit that csv has by itself
    messages = "\"[{'role': 'user'}]\""
    lines = ["\ufeffprompt,label", '"a, ""b""\n\nc",1', "", f"{long},", "x", "x,y,z", f"{messages},1", "é,0"]
    stray = b"\xff,1\n"
    file.write_bytes("\n".join([*lines, ""]).encode() + stray)
    found = dict(raw_rows(Shard(str(file))))
    good = {place.rpartition(":")[2]: row for place, row in found.items() if isinstance(row, dict)}
    assert good == {
        "1": {"prompt": 'a, "b"\n\nc', "label": "1"},
        "2": {"prompt": long, "label": ""},
        "6": {"prompt": "é", "label": "0"},
        "7": {"prompt": "\udcff", "label": "1"},
    }
    bad = [row.args for row in found.values() if isinstance(row, Refusal)]
    assert [reason for reason, _ in bad] == ["bad CSV", "bad CSV", "wrong type"]
    assert bad[0][1] == "1 cells for 2 columns"
    assert first_rows([Shard(str(file))], 3) == ([Shard(str(file), rows=3)], 3)


def test_an_open_quote_ends_a_csv(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('a\nb\n"c\nd\n')
    with pytest.raises(DataError, match=r"rows\.csv: no CSV after row 1 \(unexpected end of data\)"):
        list(raw_rows(Shard(str(tmp_path / "rows.csv"))))
