"""Answers that a file scores, ranks or compares become one pair, in the columns of public sets; ties are counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from public_sets import ASK, GRADED, HELP, PAIRED, Value
from read_rows import read_preferences

from dtrpo_ray.data.formats.files import Shard
from dtrpo_ray.data.formats.graded import AnswerList
from dtrpo_ray.data.formats.parsing import Columns, Record, Refusal
from dtrpo_ray.data.formats.preferences import preference_format
from dtrpo_ray.data.formats.tokenize import Target, tokenize_preferences
from dtrpo_ray.models.tokenizer import load_tokenizer


def read(tmp_path: Path, *rows: Any) -> tuple[list[Any], list[Any]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(file)


@pytest.mark.parametrize("name", GRADED)
def test_a_public_set_of_graded_answers_becomes_its_best_against_its_worst(tmp_path: Path, name: str) -> None:
    (pair,), rejected = read(tmp_path, GRADED[name])
    assert (pair.prompt, pair.chosen, pair.rejected, rejected) == ([ASK], "So.", "No.", [])


@pytest.mark.parametrize("name", GRADED)
def test_no_column_and_no_field_of_an_answer_disappears(tmp_path: Path, name: str) -> None:
    _, (refused,) = read(tmp_path, GRADED[name], GRADED[name] | {"notes": "SECRET"})
    assert (refused.reason, "notes" in refused.detail) == ("unknown column", True)
    for column, value in GRADED[name].items():
        if isinstance(value, list) and len(value) == 3:
            worse = [value[0] | {"notes": "SECRET"}, *value[1:]]
            _, (refused,) = read(tmp_path, GRADED[name], GRADED[name] | {column: worse})
            assert (refused.reason, "notes" in refused.detail) == ("unknown column", True)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    (pair,), _ = read(tmp_path, GRADED["UltraFeedback"])
    inner = ("annotations", "critique", "custom_system_prompt", "fine-grained_score", "model", "principle")
    outer = {"source", "models", "correct_answers", "incorrect_answers"}
    assert set(pair.ignored) == outer | {f"completions.{name}" for name in inner}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Nectar", {"answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]}),
        ("HelpSteer3", {"overall_preference": 0}),
        ("HelpSteer2, preferences", {"preference_strength": 0}),
    ],
)
def test_ties_are_counted(tmp_path: Path, name: str, change: Value) -> None:
    rows, refused = read(tmp_path, GRADED[name], GRADED[name] | change)
    assert (len(rows), [row.reason for row in refused]) == (1, ["tie"])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("PKU-SafeRLHF", {"safer_response_id": 0}, "answers disagree"),
        ("PKU-SafeRLHF", {"safer_response_id": 2}, "bad value"),
        ("PKU-SafeRLHF", {"safer_response_id": None, "better_response_id": None}, "missing field"),
        ("HelpSteer3", {"overall_preference": 4}, "bad value"),
        ("HelpSteer3", {"overall_preference": "1"}, "wrong type"),
        ("SHP", {"labels": 2}, "wrong type"),
        ("Nectar", {"answers": []}, "no answer"),
        ("Nectar", {"answers": ["a"]}, "not an object"),
        ("Nectar", {"answers": [{"answer": "a", "rank": None}]}, "missing field"),
        ("Nectar", {"answers": [{"answer": "a", "rank": 1}]}, "tie"),
    ],
)
def test_a_grade_that_cannot_be_read_refuses_its_row(tmp_path: Path, name: str, change: Value, reason: str) -> None:
    rows, refused = read(tmp_path, GRADED[name], GRADED[name] | change)
    assert (len(rows), [row.reason for row in refused]) == (1, [reason])


def test_a_task_takes_one_of_two_flags(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GRADED["PKU-SafeRLHF"] | {"safer_response_id": 0}) + "\n")
    (pair,) = preference_format(str(file), Columns(ignored=frozenset(["better_response_id"]))).read(Shard(str(file)))
    assert (pair.chosen, pair.rejected) == ("No.", "So.")
    assert "better_response_id" in pair.ignored


def test_scored_rows_of_a_prompt_meet_and_ties_are_counted(tmp_path: Path) -> None:
    """HelpSteer2: the best against the worst, the second best against the second worst; each answer once."""
    scores = {"a": 1, "b": 4, "c": 3, "d": 0, "e": 2, "f": 2}
    rows = [HELP | {"response": text, "helpfulness": score} for text, score in scores.items()]
    pairs, refused = read(tmp_path, *rows, *(HELP | {"prompt": "One?", "response": "x", "helpfulness": 3} for _ in "1"))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("b", "d"), ("c", "a")]
    assert pairs[0].prompt == [ASK]
    assert Counter(row.reason for row in refused) == {"tie": 2, "no partner": 1}


def test_turns_in_the_text_of_helpsteer2_become_messages(tmp_path: Path) -> None:
    prompt = "a\n<extra_id_1>Assistant\nb\n\n<extra_id_1>User\nc"
    (pair,), _ = read(
        tmp_path, *(HELP | {"prompt": prompt, "response": t, "helpfulness": s} for t, s in (("x", 1), ("y", 2)))
    )
    assert [(turn["role"], turn["content"]) for turn in pair.prompt] == [
        ("user", "a"),
        ("assistant", "b\n"),
        ("user", "c"),
    ]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=6), st.booleans())
def test_the_best_is_better_than_the_worst_or_it_is_a_tie(grades: list[int], lower: bool) -> None:
    form = AnswerList("answers", "text", "grade", frozenset(), lower)
    row = {"prompt": "Why?", "answers": [{"text": f"{i}", "grade": grade} for i, grade in enumerate(grades)]}
    if len(set(grades)) == 1:
        with pytest.raises(Refusal, match="tie"):
            form.pair(Record(row))
        return
    _, chosen, rejected = form.pair(Record(row))
    best, worst = (min(grades), max(grades)) if lower else (max(grades), min(grades))
    assert (int(chosen), int(rejected)) == (grades.index(best), grades.index(worst))


COLUMNS = ("prompt", "chosen", "rejected")


@pytest.mark.parametrize("name", [*PAIRED, *GRADED])
def test_the_documentation_shows_what_a_public_set_becomes(tmp_path: Path, name: str) -> None:
    row = (PAIRED | GRADED)[name]
    (pair,), rejected = read(tmp_path, row)
    tokenizer = load_tokenizer(ROOT / "jobs" / "data" / "tokenizer")
    table, refused = tokenize_preferences([pair], Target(tokenizer, 1, max_prompt_tokens=99, max_response_tokens=99))
    assert (rejected, refused) == ([], [])
    prompt, *sides = (repr(tokenizer.decode(table[f"{column}_ids"][0].as_py())) for column in COLUMNS)
    lines = [f"{name}: {', '.join(row)}", f"  {prompt} + {' or '.join(sides)}"]
    lines.append(f"  ignored: {', '.join(sorted(pair.ignored)) or '-'}")
    assert "\n".join(lines) in (ROOT / "docs" / "data.md").read_text()
