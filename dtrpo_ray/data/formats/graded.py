"""Answers that a file scores, ranks, or compares -> the best and the worst of a row, or an answer with its score.

Of equal answers the first counts. A row whose best answer is no better than its worst is refused as a `tie`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dtrpo_ray.data.formats.dialogue import HUMAN, prompt_of, read_dialogue, with_system
from dtrpo_ray.data.formats.parsing import Messages, Prompt, Record, Refusal, as_float, as_integer, as_text

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # between the turns of HelpSteer2's prompts

Pair = tuple[Prompt, str, str]  # prompt, chosen, rejected


@dataclass(frozen=True, slots=True)
class AnswerList:
    """A column with a list of answers: the fields of their text and grade, and those `beside` them that are left out.

    A `lower` grade is better if it is a rank.
    """

    column: str
    text: str
    grade: str
    beside: frozenset[str]
    lower: bool = False

    def pair(self, row: Record) -> Pair:
        """Return the prompt of a row, its best answer and its worst."""
        answers = [self._answer(item, row) for item in row.items(self.column)]
        if not answers:
            raise Refusal("no answer", f"{self.column} is empty")
        best, worst = max(answers, key=lambda answer: answer[1]), min(answers, key=lambda answer: answer[1])
        if best[1] == worst[1]:
            raise Refusal("tie", f"{len(answers)} of {self.column} have the same {self.grade}")
        return asked(row), best[0], worst[0]

    def _answer(self, item: object, row: Record) -> tuple[str, float]:
        answer = Record.of_row(item)
        text = answer.text(self.text)
        grade = as_float(answer.require(self.grade), f"{self.column}.{self.grade} is")
        row.leave(*(f"{self.column}.{name}" for name in answer.ignored(self.beside)))
        return text, -grade if self.lower else grade


@dataclass(frozen=True, slots=True)
class TwoAnswers:
    """Two columns of answers; `prefers` returns a number above 0 if the second is the better one, 0 for a tie."""

    first: str
    second: str
    prefers: Callable[[Record], float]

    def pair(self, row: Record) -> Pair:
        """Return the prompt of a row, the better answer and the worse."""
        first, second, prefers = row.text(self.first), row.text(self.second), self.prefers(row)
        if prefers == 0:
            raise Refusal("tie", "neither answer is preferred")
        return (asked(row), second, first) if prefers > 0 else (asked(row), first, second)


def asked(row: Record) -> Messages:
    """Return the prompt of a row as messages: text is the user's turn, or a dialogue with the marks of its set."""
    text_alone = isinstance(row.fields.get("history"), str)  # SHP; Alpaca's history is a list
    prompt = row.text("history") if text_alone else prompt_of(row)
    if not isinstance(prompt, str):
        return prompt
    if text_alone:
        return [{"role": "user", "content": prompt}]
    if prompt.startswith(HUMAN):  # Nectar, which opens the assistant's turn
        turns = read_dialogue(prompt, "prompt")
        return with_system(row, turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns)
    first, *rest = _TURN.split(prompt)
    turns = [{"role": "user", "content": first}]
    turns += [{"role": who.lower(), "content": text} for who, text in zip(rest[::2], rest[1::2], strict=True)]
    return with_system(row, turns)


def strength(column: str, scale: int = 3) -> Callable[[Record], float]:
    """Return a function that reads how much the second answer is preferred, from -`scale` to `scale`."""

    def prefers(row: Record) -> float:
        found = as_float(row.require(column), f"{column} is")
        if not -scale <= found <= scale:
            raise Refusal("bad value", f"{column} is {found:g}; expected {-scale} to {scale}")
        return found

    return prefers


def flags(*columns: str) -> Callable[[Record], float]:
    """Return a function that reads the number of the better answer, 0 or 1, on which all `columns` must agree."""

    def prefers(row: Record) -> float:
        found = {name: as_integer(row.get(name), name) for name in columns if row.get(name) is not None}
        if not found:
            raise Refusal("missing field", " and ".join(columns))
        if not set(found.values()) <= {0, 1}:
            raise Refusal("bad value", f"{found}; expected 0 or 1")
        if len(set(found.values())) > 1:
            raise Refusal("answers disagree", f"{' and '.join(found)} name different answers; ignore one of them")
        return 1 if found.popitem()[1] else -1

    return prefers


def first_if_one(column: str) -> Callable[[Record], float]:
    """Return a function that reads 1 where the first answer is better and 0 where the second is."""
    return lambda row: -1 if row.label(column) else 1


def scored(answer: str, score: str, row: Record) -> tuple[Prompt, str, float]:
    """Return the prompt of a row of one answer, the answer and its score."""
    return asked(row), as_text(row.require(answer), answer), as_float(row.require(score), f"{score} is")


@dataclass(frozen=True, slots=True)
class GradedFormat:
    """A public set: its columns, how a row becomes a pair, and the columns that are left out."""

    name: str
    columns: tuple[str, ...]
    pair: Callable[[Record], Pair]
    beside: frozenset[str] = frozenset()


_ULTRAFEEDBACK = frozenset(["annotations", "critique", "custom_system_prompt", "principle"])
_HARM = [f"response_{n}_{what}" for what in ("source", "harm_category", "severity_level", "sha256") for n in (0, 1)]
_STATED = ("preference_statement", "preference_elaboration", "three_most_similar_preferences")
_SHP = [f"{name}_{side}" for name in ("c_root_id", "created_at_utc") for side in "AB"]

GRADED: tuple[GradedFormat, ...] = (
    GradedFormat(
        "Nectar",
        ("prompt", "answers", "good_natured|num_responses"),
        AnswerList("answers", "answer", "rank", frozenset(), lower=True).pair,
        frozenset(["turns", "good_natured"]),
    ),
    GradedFormat(
        "UltraFeedback's completions",
        ("instruction", "completions"),
        AnswerList("completions", "response", "overall_score", _ULTRAFEEDBACK).pair,
        frozenset(["correct_answers", "incorrect_answers"]),
    ),
    GradedFormat(
        "Stack Exchange, votes",
        ("question", "answers", "qid"),
        AnswerList("answers", "text", "pm_score", frozenset(["author_profile", "selected"])).pair,
        frozenset(["qid"]),
    ),
    GradedFormat(
        "Stack Exchange, paired",
        ("question", "response_j", "response_k"),
        TwoAnswers("response_j", "response_k", lambda row: -1).pair,
        frozenset(["qid"]),
    ),
    GradedFormat(
        "HelpSteer3",
        ("context", "response1", "response2", "overall_preference"),
        TwoAnswers("response1", "response2", strength("overall_preference")).pair,
        frozenset(["individual_preference"]),
    ),
    GradedFormat(
        "HelpSteer2, preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        TwoAnswers("response_1", "response_2", strength("preference_strength")).pair,
        frozenset([*_STATED, "all_preferences_unprocessed"]),
    ),
    GradedFormat(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", "better_response_id|safer_response_id"),
        TwoAnswers("response_0", "response_1", flags("better_response_id", "safer_response_id")).pair,
        frozenset(["prompt_source", *_HARM]),
    ),
    GradedFormat(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        TwoAnswers("human_ref_A", "human_ref_B", first_if_one("labels")).pair,
        frozenset(["upvote_ratio", "seconds_difference", *_SHP]),
    ),
)
HELPSTEER2 = frozenset(["correctness", "coherence", "complexity", "verbosity"])
