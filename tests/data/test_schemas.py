"""The page on data describes the tables, field by field."""

import re

import pyarrow as pa
import pytest
from example_rows import KINDS
from paths import ROOT

from dtrpo_ray.data.schemas import MAY_BE_NULL, TRAJECTORY

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_the_page_on_data_lists_the_fields_in_order(kind: str) -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    section = page.split(f"## {kind}:")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.*) \|$", section, re.MULTILINE)
    names = {pa.int32(): "int32", pa.int64(): "int64", pa.string(): "string", pa.float64(): "float64"}
    names |= {pa.list_(pa.int32()): "list of int32", pa.list_(pa.float32()): "list of float32"}
    names |= {TRAJECTORY.field("sampler").type: "struct"}
    assert [(n, t) for n, t, _ in listed] == [(field.name, names[field.type]) for field in KINDS[kind][0]]
    assert {n for n, _, meaning in listed if "*may be null*" in meaning} == MAY_BE_NULL & {n for n, _, _ in listed}


def test_the_page_on_data_lists_the_sampler_s_fields() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    (meaning,) = re.findall(r"^\| `sampler` \| struct \| (.*) \|$", page, re.MULTILINE)
    assert re.findall(r"`(\w+)`", meaning) == [field.name for field in TRAJECTORY.field("sampler").type]
