"""Every rule, with the row it names; and all together: a row breaks one or none, and the counts add up."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from example_rows import KINDS, MASK, Row, preference, table_of
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from dtrpo_ray.data.ragged import Ragged
from dtrpo_ray.data.rules import GOOD, Expected, block_ranks, check_table, rules_of, verdicts
from dtrpo_ray.data.schemas import MAY_BE_NULL, PREFERENCE, table_name
from dtrpo_ray.data.tables import DUPLICATE
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import block_slices, dense_steps

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_a_table_names_itself_and_a_valid_one_passes(kind: str) -> None:
    table = table_of(kind, {})
    assert table_name(table.schema) == kind
    assert broken(table) == [None] * 3
    assert check_table(table, "here") is table


@kinds
def test_an_empty_table_and_one_in_many_chunks_pass(kind: str) -> None:
    table = table_of(kind, {})
    assert broken(table.slice(0, 0)) == []
    assert broken(pa.concat_tables([table.slice(2), table.slice(0, 2)])) == [None] * 3


SIDES = [("trajectory/v1", "response_ids"), ("preference/v1", "chosen_ids"), ("preference/v1", "rejected_ids")]
NO_STEPS: Row = {f"{side}_{name}": None for side in ("chosen", "rejected") for name in ("steps", "types")}
ALIGNED: Row = {"prompt_ids": [1, 2, 3, 4], **NO_STEPS}
BROKEN: list[tuple[str, Row, str]] = [
    *[
        (kind, {"contract_version": v}, "contract_version is not 1; convert the store")
        for kind in KINDS
        for v in (0, 2)
    ],
    *[(kind, {"prompt_ids": [1, None]}, "prompt_ids holds a null") for kind in KINDS],
    *[(kind, {ids: [None] * 6}, f"{ids} holds a null") for kind, ids in SIDES],
    ("trajectory/v1", {"steps": [0, 1, None, 2, 3, 3]}, "steps holds a null"),
    ("trajectory/v1", {"steps": [0, 1, 2, 2, 3, -3]}, "steps holds a number below -2"),
    ("trajectory/v1", {"types": [0, 0, 0, 0, 0, 3]}, "types holds a number that is not 0, 1, 2"),
    *[
        (
            "trajectory/v1",
            change,
            "types and steps disagree: -2 is the step of a token that no step chose, and of no other",
        )
        for change in ({"types": [1, 0, 0, 0, 0, 0]}, {"steps": [0, 1, -2, 2, 3, -1]})
    ],
    *[
        (
            "trajectory/v1",
            {"ranks": ranks},
            "ranks are not a partition: each block's must be 0, 1, .. in the order of its steps",
        )
        for ranks in ([0, 1, 1, 1, 2, -1], [1, 0, 0, 0, 1, -1], [0, 1, 0, 0, 1, 2], [0, 0, 0, 0, 1, -1])
    ],
    *[(kind, {"prompt_ids": [1, -4]}, "prompt_ids holds a number below 0") for kind in KINDS],
    *[(kind, {"mask_id": -1}, "mask_id is below 0") for kind in list(KINDS)[:2]],
    ("preference/v1", {"rejected_ids": [-4, 8], **NO_STEPS}, "rejected_ids holds a number below 0"),
    ("trajectory/v1", {"num_forwards": -1}, "num_forwards is below 0"),
    ("trajectory/v1", {"denoising_steps": -1}, "denoising_steps is below 0"),
    *[("trajectory/v1", {"shift": shift}, "shift is neither 0 nor 1") for shift in (-1, 2)],
    *[
        ("trajectory/v1", {"temperature": t}, "temperature is below 0 or not finite")
        for t in (-0.5, float("nan"), float("inf"))
    ],
    *[
        ("trajectory/v1", {"logps": [-1.0, logp, 0, 0, 0, 0]}, "logps holds a number above 0, or NaN")
        for logp in (0.5, float("nan"))
    ],
    ("trajectory/v1", {"support": "most"}, "support is not full or truncated"),
    ("trajectory/v1", {"reward": float("nan")}, "reward is not finite"),
    ("trajectory/v1", {"reward_source": ""}, "reward has no reward_source: name its source"),
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
        {"rejected_ids": [MASK, 8], **NO_STEPS},
        "rejected_ids holds the mask token: the response was never finished",
    ),
    *[
        (kind, {"prompt_ids": [1, MASK]}, "prompt_ids holds the mask token: nothing would fill it")
        for kind in list(KINDS)[:2]
    ],
    (
        "trajectory/v1",
        {"response_ids": [3] * 5, "steps": None, "ranks": None, "types": None, "logps": None},
        "response_ids does not end on the block grid: the terminal block must be whole",
    ),
    (
        "preference/v1",
        {"chosen_ids": [3] * 3, **NO_STEPS},
        "chosen_ids does not end on the block grid: the terminal block must be whole",
    ),
    (
        "preference/v1",
        {"rejected_ids": [3] * 3, **NO_STEPS},
        "rejected_ids does not end on the block grid: the terminal block must be whole",
    ),
    *[(kind, {"block_size": size}, "block_size is below 1") for kind in list(KINDS)[:2] for size in (0, -4)],
    *[(kind, {"block_origin": "prompt"}, "block_origin is not global or response") for kind in list(KINDS)[:2]],
    ("trajectory/v1", {"steps": [0] * 5}, "steps and response_ids differ in length"),
    ("trajectory/v1", {"logps": [0.0] * 7}, "logps and response_ids differ in length"),
    ("preference/v1", {"chosen_steps": [0] * 3}, "chosen_steps and chosen_ids differ in length"),
    ("preference/v1", {"rejected_steps": [0] * 2}, "rejected_steps and rejected_ids differ in length"),
    *[
        (
            "preference/v1",
            {"rejected_ids": [3, 8], **steps},
            "chosen_ids and rejected_ids are identical, and no steps tell them apart: nothing to prefer",
        )
        for steps in (
            NO_STEPS,
            {"rejected_steps": None, "rejected_types": None},  # known on one side alone
            {"rejected_steps": [1, 0], "rejected_types": [0, 0]},
        )
    ],
]


def test_the_same_tokens_in_other_steps_are_another_side() -> None:
    same = {"rejected_ids": [3, 8], "rejected_steps": [0, 0], "rejected_types": [0, 0]}
    assert broken(table_of("preference/v1", same)) == [None] * 3


@pytest.mark.parametrize(("kind", "change", "rule"), BROKEN)
def test_a_broken_row_breaks_one_rule_and_both_are_named(kind: str, change: Row, rule: str) -> None:
    table = table_of(kind, change)
    assert broken(table) == [None, rule, None]
    with pytest.raises(DataError) as caught:
        check_table(table, "part-0.parquet")
    assert str(caught.value) == f"part-0.parquet: row b: {rule}"


@kinds
def test_null_is_refused_in_every_field_but_those_an_import_leaves_open(kind: str) -> None:
    schema, _ = KINDS[kind]
    for name in schema.names:
        _, middle, _ = broken(table_of(kind, {name: None}))
        if name == "contract_version":
            assert middle == "contract_version is not 1; convert the store"
        elif name not in MAY_BE_NULL:
            assert middle == f"{name} is null"
        else:
            assert middle in (None, *NEEDED.get(name, ()))


NEEDED = {
    "steps": ["ranks are not a partition: each block's must be 0, 1, .. in the order of its steps"],
    "reward_source": [f"{r} has no reward_source: name its source" for r in ("reward", "chosen_reward")],
}


def test_a_row_counts_under_the_first_rule_it_breaks() -> None:
    """So the counts by rule and the good rows add up to the table."""
    rows = [
        preference("a"),
        preference("b") | {"chosen_steps": [0]},
        preference("c") | {"chosen_steps": [0], "mask_id": 8},
        preference("d") | {"mask_id": 8},
        preference("e") | {"contract_version": 2, "mask_id": 8},
    ]
    table = pa.Table.from_pylist(rows, schema=PREFERENCE)
    rules = rules_of(PREFERENCE)
    found = [None if v == GOOD else rules[v].name for v in verdicts(table, rules)]
    assert found == [None, "lengths differ", "lengths differ", "mask token", "unknown version"]


def test_what_only_the_caller_knows_is_a_rule_too() -> None:
    table = table_of("preference/v1", {"tokenizer_hash": "3" * 64})
    assert broken(table, Expected(tokenizer_hash="1" * 64))[1].startswith("tokenizer_hash is not 111111111111...")
    untold = table_of("preference/v1", {"tokenizer_hash": None})
    assert broken(untold, Expected(tokenizer_hash="1" * 64))[1].startswith("tokenizer_hash is not 111111111111...")
    assert broken(table, Expected(max_tokens=8)) == [None] * 3
    assert broken(table, Expected(max_tokens=7)) == ["prompt and response have more than 7 tokens"] * 3


def test_text_that_is_not_utf8_spoils_its_row_alone() -> None:
    raw = pa.array([b"ok", b"\xff", b"ok"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    table = table_of("trajectory/v1", {})
    table = table.set_column(table.schema.get_field_index("response"), "response", texts)
    assert broken(table) == [None, "response is not UTF-8", None]
    table = table_of("trajectory/v1", {})
    table = table.set_column(
        table.schema.get_field_index("row_id"), "row_id", pa.concat_arrays([texts.slice(1, 1)] * 3)
    )
    with pytest.raises(DataError, match=r"here: row \\xff: row_id is not UTF-8"):
        check_table(table, "here")


@kinds
def test_a_row_without_an_id_is_named_by_its_number(kind: str) -> None:
    for missing, rule in (("", "row_id is empty"), (None, "row_id is null")):
        with pytest.raises(DataError, match=f"here: row number 2: {rule}"):
            check_table(table_of(kind, {"row_id": missing}), "here")


@given(
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(-2, 5), max_size=12)), min_size=1, max_size=5),
    st.integers(1, 5),
)
def test_ranks_of_a_column_are_those_of_its_rows(rows: list[tuple[int, list[int]]], size: int) -> None:
    steps = [np.array(s, dtype=np.int64) for _, s in rows]
    starts, lengths = np.array([start for start, _ in rows]), np.array([len(s) for s in steps])
    ranks = block_ranks(Ragged.packed(np.concatenate(steps), lengths), starts, np.full(len(rows), size))
    expected = [dense_steps(s, block_slices(start, len(s), size)) for (start, _), s in zip(rows, steps, strict=True)]
    assert ranks.tolist() == [r for row in expected for r in row.tolist()]


def broken(table: pa.Table, expected: Expected | None = None) -> list[Any]:
    """What each row's first broken rule says, None for a good row."""
    rules = rules_of(table.schema, expected)
    return [None if v == GOOD else rules[v].says for v in verdicts(table, rules)]


def test_the_page_on_data_lists_every_rule() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    listed = set(re.findall(r"^\| `([\w -]+)` \|", page.split("| rule |")[1].split("\n## ")[0], re.MULTILINE))
    expected = Expected("x", 1)
    assert listed == {rule.name for schema, _ in KINDS.values() for rule in rules_of(schema, expected)} | {DUPLICATE}
