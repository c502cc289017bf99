"""The tables: their fields, every rule with the row it names, and the files they are read from."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrpo_ray.errors import DataError
from dtrpo_ray.records import (
    EXAMPLE,
    MAY_BE_NULL,
    PREFERENCE,
    TRAJECTORY,
    check_table,
    read_table,
    table_name,
    violations,
)

Row = dict[str, Any]
MASK, BLOCK = 9, 4


def trajectory(row_id: str = "a") -> Row:
    return {
        "contract_version": 1,
        "row_id": row_id,
        "prompt_id": "p",
        "prompt": "12",
        "response": "345",
        "prompt_ids": [1, 2],
        "response_ids": [3, 4, 5, 8, 8, 8],
        "steps": [0, 1, 2, 2, 3, -1],
        "logps": [-0.5] * 6,
        "num_forwards": 4,
        "reward": 1.0,
        "reward_source": "module:score",
        "block_size": BLOCK,
        "block_origin": "global",
        "mask_id": MASK,
        "temperature": 1.0,
        "denoising_steps": 2,
        "seed": 7,
        "engine": "engine/1",
        "model_hash": "0" * 64,
    }


def preference(row_id: str = "a") -> Row:
    return {
        "contract_version": 1,
        "row_id": row_id,
        "prompt_id": "p",
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 8],
        "rejected_ids": [4, 5, 6, 7, 8, 8],
        "chosen_steps": [1, 0],
        "rejected_steps": [0, 1, 0, 1, 2, 3],
        "chosen_reward": 1.0,
        "rejected_reward": 0.0,
        "block_size": BLOCK,
        "block_origin": "global",
        "mask_id": MASK,
    }


def example(row_id: str = "a") -> Row:
    return {"contract_version": 1, "row_id": row_id, "prompt_ids": [1, 2], "chosen_ids": [3, 8]}


KINDS: dict[str, tuple[pa.Schema, Callable[..., Row]]] = {
    "trajectory/v1": (TRAJECTORY, trajectory),
    "preference/v1": (PREFERENCE, preference),
    "example/v1": (EXAMPLE, example),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def table_of(kind: str, change: Row) -> pa.Table:
    """Three rows of which the middle one, "b", is changed."""
    schema, make = KINDS[kind]
    return pa.Table.from_pylist([make("a"), make("b") | change, make("c")], schema=schema)


@kinds
def test_a_table_names_itself_and_a_valid_one_passes(kind: str) -> None:
    table = table_of(kind, {})
    assert table_name(table.schema) == kind
    assert list(violations(table)) == []
    assert check_table(table, "here") is table


@kinds
def test_an_empty_table_and_one_in_many_chunks_pass(kind: str) -> None:
    table = table_of(kind, {})
    assert list(violations(table.slice(0, 0))) == []
    assert list(violations(pa.concat_tables([table.slice(2), table.slice(0, 2)]))) == []


SIDES = [("trajectory/v1", "response_ids"), ("preference/v1", "chosen_ids"), ("preference/v1", "rejected_ids")]
ALIGNED: Row = {"prompt_ids": [1, 2, 3, 4], "chosen_steps": None, "rejected_steps": None}
BROKEN: list[tuple[str, Row, str]] = [
    *[
        (kind, {"contract_version": v}, "contract_version is not 1; convert the store")
        for kind in KINDS
        for v in (0, 2)
    ],
    *[(kind, {"prompt_ids": [1, None]}, "prompt_ids holds a null") for kind in KINDS],
    *[(kind, {ids: [None] * 6}, f"{ids} holds a null") for kind, ids in SIDES],
    ("trajectory/v1", {"steps": [0, 1, None, 2, 3, 3]}, "steps holds a null"),
    ("example/v1", {"chosen_ids": []}, "chosen_ids is empty"),
    ("trajectory/v1", {**ALIGNED, "response_ids": [], "steps": [], "logps": None}, "response_ids is empty"),
    ("preference/v1", {**ALIGNED, "chosen_ids": [], "rejected_ids": [4] * 4}, "chosen_ids is empty"),
    ("preference/v1", {**ALIGNED, "chosen_ids": [4] * 4, "rejected_ids": []}, "rejected_ids is empty"),
    (
        "trajectory/v1",
        {"response_ids": [3, 4, 5, MASK, 8, 8]},
        "response_ids holds the mask token: the response was never finished",
    ),
    ("preference/v1", {"chosen_ids": [3, MASK]}, "chosen_ids holds the mask token: the response was never finished"),
    (
        "preference/v1",
        {"rejected_ids": [MASK, 8], "rejected_steps": None},
        "rejected_ids holds the mask token: the response was never finished",
    ),
    *[
        (kind, {"prompt_ids": [1, MASK]}, "prompt_ids holds the mask token: nothing would fill it")
        for kind in list(KINDS)[:2]
    ],
    (
        "trajectory/v1",
        {"response_ids": [3] * 5, "steps": [0] * 5, "logps": None},
        "response_ids does not end on the block grid: the terminal block must be whole",
    ),
    (
        "preference/v1",
        {"chosen_ids": [3] * 3, "chosen_steps": None},
        "chosen_ids does not end on the block grid: the terminal block must be whole",
    ),
    (
        "preference/v1",
        {"rejected_ids": [3] * 3, "rejected_steps": None},
        "rejected_ids does not end on the block grid: the terminal block must be whole",
    ),
    *[(kind, {"block_size": size}, "block_size is below 1") for kind in list(KINDS)[:2] for size in (0, -4)],
    *[(kind, {"block_origin": "prompt"}, "block_origin is not global or response") for kind in list(KINDS)[:2]],
    ("trajectory/v1", {"steps": [0] * 5}, "steps and response_ids differ in length"),
    ("trajectory/v1", {"logps": [0.0] * 7}, "logps and response_ids differ in length"),
    ("preference/v1", {"chosen_steps": [0] * 3}, "chosen_steps and chosen_ids differ in length"),
    ("preference/v1", {"rejected_steps": [0] * 2}, "rejected_steps and rejected_ids differ in length"),
    (
        "preference/v1",
        {"rejected_ids": [3, 8], "rejected_steps": None},
        "chosen_ids and rejected_ids are identical: nothing to prefer",
    ),
]


@pytest.mark.parametrize(("kind", "change", "rule"), BROKEN)
def test_a_broken_row_breaks_one_rule_and_both_are_named(kind: str, change: Row, rule: str) -> None:
    table = table_of(kind, change)
    assert list(violations(table)) == [(1, rule)]
    with pytest.raises(DataError) as caught:
        check_table(table, "part-0.parquet")
    assert str(caught.value) == f"part-0.parquet: row b: {rule}"


@kinds
def test_null_is_refused_in_every_field_but_those_an_import_leaves_open(kind: str) -> None:
    schema, _ = KINDS[kind]
    for name in schema.names:
        broken = {rule for _, rule in violations(table_of(kind, {name: None}))}
        assert (f"{name} is null" in broken) == (name not in MAY_BE_NULL)
    assert set(MAY_BE_NULL) == {"chosen_steps", "rejected_steps", "chosen_reward", "rejected_reward", "logps", "reward"}


def test_each_rule_names_its_first_offender() -> None:
    rows = [
        preference("a"),
        preference("b") | {"chosen_steps": [0]},
        preference("c") | {"chosen_steps": [0], "mask_id": 8},
    ]
    found = list(violations(pa.Table.from_pylist(rows, schema=PREFERENCE)))
    assert (1, "chosen_steps and chosen_ids differ in length") in found
    assert {row for row, rule in found if "mask token" in rule} == {2}
    assert len(found) == 3


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
    refuse(file, PREFERENCE, "column block_origin is missing; expected the table preference/v1")
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
def test_the_page_on_data_lists_the_fields_in_order(kind: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    section = page.split(f"## {kind}:")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.*) \|$", section, re.MULTILINE)
    names = {pa.int32(): "int32", pa.int64(): "int64", pa.string(): "string", pa.float64(): "float64"}
    names |= {pa.list_(pa.int32()): "list of int32", pa.list_(pa.float32()): "list of float32"}
    assert [(n, t) for n, t, _ in listed] == [(field.name, names[field.type]) for field in KINDS[kind][0]]
    assert {n for n, _, meaning in listed if "*may be null*" in meaning} == set(MAY_BE_NULL) & {n for n, _, _ in listed}
