"""Answers that a file scores, ranks or compares become one pair, in the columns of public sets; ties are counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from read_rows import read_preferences

from dtrpo_ray.data.formats.files import Shard
from dtrpo_ray.data.formats.graded import AnswerList
from dtrpo_ray.data.formats.parsing import Columns, Record, Refusal
from dtrpo_ray.data.formats.preferences import preference_format

Value = dict[str, Any]
ASK = {"role": "user", "content": "Why?"}
RATED = {"annotations": {"helpfulness": {"Rating": "4"}}, "critique": "Fine.", "custom_system_prompt": "Be good."}
RATED |= {"principle": "helpfulness", "model": "m", "fine-grained_score": 4.0}
VOTED = {"answer_id": 1, "author": "a", "author_id": 2, "author_profile": "url", "selected": False}
SAFE = {
    f"response_{n}_{what}": value
    for what, value in (("source", "m"), ("harm_category", {"x": False}), ("severity_level", 0), ("sha256", "f"))
    for n in (0, 1)
}
STATED = {"preference_statement": "@", "preference_elaboration": "x", "three_most_similar_preferences": [{"a": 1}]}
SHP = {
    "post_id": "p",
    "domain": "d",
    "upvote_ratio": 0.9,
    "history": "Why?",
    "seconds_difference": 5.0,
    "score_ratio": 2.0,
}
SHP |= {f"{n}_{s}": 1 for n in ("score", "c_root_id", "created_at_utc") for s in "AB"}
HELP = {"prompt": "Why?", "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}

# the columns of public sets; SO, NO and MID are its best, worst and another answer
SETS: dict[str, Value] = {
    "Nectar": {
        "prompt": "\n\nHuman: Why?\n\nAssistant: ",
        "answers": [{"answer": text, "model": "m", "rank": n} for text, n in (("Mid.", 2), ("So.", 1), ("No.", 7))],
        "turns": 1, "num_responses": 3, "source": ["a"], "good_natured": True,
    },
    "UltraFeedback": {
        "source": "evol", "instruction": "Why?", "models": ["m"],
        "completions": [
            RATED | {"response": text, "overall_score": n} for text, n in (("No.", 2.5), ("So.", 9.0), ("Mid.", 5.0))
        ],
        "correct_answers": ["None"], "incorrect_answers": ["None"],
    },
    "Stack Exchange": {
        "qid": 5, "question": "Why?", "date": "2016", "metadata": ["url"],
        "answers": [VOTED | {"text": text, "pm_score": n} for text, n in (("So.", 4), ("No.", -1), ("Mid.", 0))],
    },
    "Stack Exchange, paired": {
        "qid": 5, "question": "Why?", "date": "2016", "metadata": ["url"], "response_j": "So.", "response_k": "No."
    },
    "HelpSteer3": {
        "domain": "general", "language": "english", "context": [ASK], "response1": "So.", "response2": "No.",
        "overall_preference": -2, "individual_preference": [{"score": -2, "reasoning": "x", "feedback1": "y"}],
    },
    "HelpSteer2, preferences": STATED | {
        "split": "train", "prompt": "Why?", "response_1": "No.", "response_2": "So.", "preference_strength": 1,
        "all_preferences_unprocessed": [{"a": 1}],
    },
    "PKU-SafeRLHF": SAFE | {
        "prompt": "Why?", "response_0": "No.", "response_1": "So.", "prompt_source": "p", "is_response_0_safe": False,
        "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 1,
    },
    "SHP": SHP | {"human_ref_A": "So.", "human_ref_B": "No.", "labels": 1},
}  # fmt: skip


def read(tmp_path: Path, *rows: Any) -> tuple[list[Any], list[Any]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(file)


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_of_graded_answers_becomes_its_best_against_its_worst(tmp_path: Path, name: str) -> None:
    (pair,), rejected = read(tmp_path, SETS[name])
    assert (pair.prompt, pair.chosen, pair.rejected, rejected) == ([ASK], "So.", "No.", [])


@pytest.mark.parametrize("name", SETS)
def test_no_column_and_no_field_of_an_answer_disappears(tmp_path: Path, name: str) -> None:
    _, (refused,) = read(tmp_path, SETS[name], SETS[name] | {"notes": "SECRET"})
    assert (refused.reason, "notes" in refused.detail) == ("unknown column", True)
    for column, value in SETS[name].items():
        if isinstance(value, list) and len(value) == 3:
            worse = [value[0] | {"notes": "SECRET"}, *value[1:]]
            _, (refused,) = read(tmp_path, SETS[name], SETS[name] | {column: worse})
            assert (refused.reason, "notes" in refused.detail) == ("unknown column", True)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    (pair,), _ = read(tmp_path, SETS["UltraFeedback"])
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
    rows, refused = read(tmp_path, SETS[name], SETS[name] | change)
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
    rows, refused = read(tmp_path, SETS[name], SETS[name] | change)
    assert (len(rows), [row.reason for row in refused]) == (1, [reason])


def test_a_task_takes_one_of_two_flags(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(SETS["PKU-SafeRLHF"] | {"safer_response_id": 0}) + "\n")
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
    (pair,), _ = read(tmp_path, *(HELP | {"prompt": prompt, "response": t, "helpfulness": s} for t, s in ("x1", "y2")))
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
