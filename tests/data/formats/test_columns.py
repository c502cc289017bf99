"""Columns against Python's own lists and JSON, whatever they hold."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrpo_ray.data.formats.columns import (
    MESSAGES,
    Refusals,
    content_id,
    content_ids,
    first_places,
    json_texts,
)
from dtrpo_ray.data.tables import Rejected

INTS = pa.list_(pa.int32())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ['"', "\\", "\n", "\u2028", "\x7f\x85"]
)
TYPED = st.one_of(
    st.tuples(st.just(pa.string()), st.lists(st.none() | TEXT)),
    st.tuples(st.just(pa.int64()), st.lists(st.none() | st.integers(-(2**63), 2**63 - 1))),
    st.tuples(st.just(pa.list_(pa.string())), st.lists(st.none() | st.lists(st.none() | TEXT, max_size=3))),
    st.tuples(st.just(INTS), st.lists(st.none() | st.lists(st.integers(-5, 5), max_size=3))),
    st.tuples(
        st.just(MESSAGES),
        st.lists(st.none() | st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3)),
    ),
)


@given(TYPED, st.integers(0, 2))
def test_json_of_a_column_is_the_json_of_its_rows(typed: tuple[pa.DataType, list[Any]], skipped: int) -> None:
    column = pa.array(typed[1], typed[0]).slice(skipped)
    rows = column.to_pylist()
    canonical = json_texts(column)
    assert canonical.to_pylist() == [json.dumps(row, sort_keys=True, separators=(",", ":")) for row in rows]
    assert json_texts(column, canonical=False).to_pylist() == [json.dumps(row, ensure_ascii=False) for row in rows]
    assert content_ids(canonical).to_pylist() == [content_id(row) for row in rows]
    places = first_places(canonical).tolist()
    assert places == [canonical.to_pylist().index(text) for text in canonical.to_pylist()]


def test_a_row_is_refused_for_the_first_reason_found_and_once_for_each_of_its_origins() -> None:
    refusals = Refusals(4)
    refusals.refuse(np.array([False, True, False, True]), "one", lambda row: f"row {row}")
    refusals.refuse(np.array([True, True, False, False]), "two", str)
    assert refusals.good.tolist() == [False, False, True, False]
    assert refusals.to_rejected(lambda row: [f"f:{row}"] * (1 + (row == 3))) == [
        Rejected("f:0", "two", "0"),
        Rejected("f:1", "one", "row 1"),
        Rejected("f:3", "one", "row 3"),
        Rejected("f:3", "one", "row 3"),
    ]


def test_an_id_by_hand() -> None:
    assert content_id(["12", "345", "6"]) == "574b7c61614740fd"  # printf '["12","345","6"]' | sha256sum | cut -c1-16


@pytest.mark.parametrize("type", [pa.string(), pa.int32(), INTS, MESSAGES])
def test_no_rows_have_no_json(type: pa.DataType) -> None:
    assert json_texts(pa.array([], type)).to_pylist() == []
