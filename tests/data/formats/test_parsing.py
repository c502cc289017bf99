"""Helpers that parsers share: which errors refuse a row, and typed fields of a row."""

from typing import Any

import pytest

from dtrpo_ray.data.formats.parsing import Record, Refusal, as_label, as_reference, as_text, one_row
from dtrpo_ray.errors import DataError


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("a"), RecursionError("a"), OverflowError("a")])
def test_what_no_check_foresaw_refuses_the_row(error: Exception) -> None:
    with pytest.raises(Refusal) as caught, one_row():
        raise error
    assert caught.value.args == ("wrong type", f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("error", [DataError("the file"), Refusal("empty side", "chosen"), OSError("disk")])
def test_what_is_not_of_the_row_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, one_row():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("value", "found"), [(None, None), ("a", "a"), ([1, "b"], '[1, "b"]'), ({"x": None}, '{"x": null}')]
)
def test_a_reference_is_text_or_json(value: Any, found: str | None) -> None:
    assert as_reference(value, "answer") == found


def test_fields_are_there_and_are_text() -> None:
    assert (Record({"a": 0}).require("a"), as_text("b", "b")) == (0, "b")
    for use, reason in (
        (lambda: Record({"a": None}).require("a"), "missing field"),
        (lambda: as_text(5, "b"), "wrong type"),
    ):
        with pytest.raises(Refusal) as caught:
            use()
        assert caught.value.args[0] == reason
    with pytest.raises(Refusal, match="neither text nor JSON"):
        as_reference({1, 2}, "answer")


@pytest.mark.parametrize(("good", "bad"), [(True, False), (1, 0), ("true", "false"), ("True", " False"), ("1", "0")])
def test_a_label_is_true_or_false_in_any_spelling(good: Any, bad: Any) -> None:
    assert (as_label(good, "label"), as_label(bad, "label")) == (True, False)
    for value in (2, -1, "yes", 1.0, None, [1]):
        with pytest.raises(Refusal, match="neither true"):
            as_label(value, "label")
