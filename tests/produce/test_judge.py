"""Verdicts are read or named unreadable, both places are asked, and rewards are means over what came out."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrpo_ray.config.produce import JUDGE_TEMPLATE, JudgeConfig
from dtrpo_ray.produce.judge import Judge, mean_points, outcome, question, read_verdict, readable_prompt
from dtrpo_ray.produce.llm import GenerateParams, Reply


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A names the year.\nVerdict: A", 1.0),
        ("Verdict: B.", 0.0),
        ("**Verdict:** **B**", 0.0),
        ("**Verdict**: [[B]]", 0.0),
        ('verdict = "answer a"', 1.0),
        ("Final verdict: Response B is better.", 0.0),
        ("Verdict: tie", 0.5),
        ("Verdict: a tie", 0.5),
        ("Verdict: Neither.", 0.5),
        ("[[C]]", 0.5),
        ("Verdict: A, because B is wrong", 1.0),
        ("Verdict: A\nNo, I misread it.\nVerdict: B", 0.0),
        ("<think>Verdict: A? No.</think>\nVerdict: B", 0.0),
        ("So it is B.</think>Verdict: A", 1.0),
        (" B\n", 0.0),
        ("(Answer A)", 1.0),
        ("tie.", 0.5),
        ("Verdict: A or B", None),
        ("Verdict: A/B", None),
        ("Verdict: A, B", None),
        ("Verdict: a better answer would say why", None),
        ("Verdict: Apples", None),
        ("<think>Verdict: A", None),
        ("A is a letter.", None),
        ("Answer B is better.", None),
        ("verdict", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_is_none(reply: str, verdict: float | None) -> None:
    assert read_verdict(reply) == verdict


def test_a_question_is_filled_in_once() -> None:
    text = question("{prompt}|{first}|{second}|{other}", "{first}", "{second} {0}", "\\1 {prompt}")
    assert text == "{first}|{second} {0}|\\1 {prompt}|{other}"
    assert question(JUDGE_TEMPLATE, "Why?", "So.", "No.").count("\nSo.\n") == 1


def test_a_conversation_is_shown_with_its_roles() -> None:
    turns = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Why?"}]
    assert readable_prompt(json.dumps(turns)) == "system: Rules.\nuser: Why?"
    assert readable_prompt("Why?") == readable_prompt(json.dumps(turns[1:])) == "Why?"


def test_only_the_same_answer_in_both_places_decides() -> None:
    table = {pair: outcome(*pair) for pair in itertools.product((1.0, 0.0, 0.5, None), repeat=2)}
    assert table[1.0, 0.0] == ("decided", 1.0)
    assert table[0.0, 1.0] == ("decided", 0.0)
    assert table[0.5, 0.5] == ("tie", 0.5)
    assert table[1.0, 1.0] == table[0.0, 0.0] == table[0.5, 1.0] == ("inconsistent", 0.5)
    assert {name for pair, (name, _) in table.items() if None in pair} == {"unparsable"}
    for (straight, swapped), (_, points) in table.items():  # whoever comes first, the two share one point
        other = outcome(swapped, straight)[1]
        assert points is None if other is None else points == 1 - other


def test_a_reward_is_the_mean_of_what_came_out() -> None:
    assert mean_points(4, [(0, 1, 1.0), (0, 2, 0.5), (1, 2, None), (0, 3, None)]) == [0.75, 0.0, 0.5, None]


class Wordy:
    """Prefers the longer answer, or always the first place; says nothing to compare "?" with."""

    longest = 2000

    def __init__(self, biased: bool = False, template: str | None = None) -> None:
        self.biased, self.tokenizer, self.asked = biased, SimpleNamespace(chat_template=template), list[Any]()

    def encode(self, prompt: Any) -> Any:
        self.asked.append(prompt)
        return prompt if isinstance(prompt, str) else prompt[0]["content"]

    def generate(self, prompts: list[Any], how: GenerateParams) -> list[Reply]:
        assert how == GenerateParams(8, temperature=0.0)
        return [Reply(self.verdict(*text.split("|")), True) for text in prompts]

    def verdict(self, prompt: str, first: str, second: str) -> str:
        if "?" in first + second:
            return "Hm."
        if self.biased or len(first) == len(second):
            return "Verdict: A" if self.biased else "Verdict: tie"
        return f"Verdict: {'A' if len(first) > len(second) else 'B'}"


def judge(model: Wordy) -> Judge:
    template = "{prompt}|{first}|{second}"
    return Judge(JudgeConfig(model=Path("judge"), template=template, max_new_tokens=8), model)


def test_responses_of_a_prompt_are_judged_together_wherever_they_stand() -> None:
    made = judge(Wordy())
    rewards = made(["p", "q", "p", "p", "lone"], ["xx", "y", "xxx", "x", "z"], [None] * 5)
    assert rewards == [0.5, None, 1.0, 0.0, None]
    assert made.counts == {"decided": 3}


def test_a_judge_that_looks_at_places_alone_prefers_nothing() -> None:
    made = judge(Wordy(biased=True))
    assert made(["p", "p"], ["xx", "x"], [None] * 2) == [0.5, 0.5]
    assert made.counts == {"inconsistent": 1}


def test_what_cannot_be_read_or_does_not_fit_is_counted_and_gives_no_reward() -> None:
    made = judge(Wordy())
    assert made(["p"] * 3, ["x", "?", "x" * 1990], [None] * 3) == [None, None, None]
    assert made.counts == {"unparsable": 1, "too long": 2}


def test_a_judge_with_a_chat_template_is_asked_in_it() -> None:
    for template in (None, "chat"):
        model = Wordy(template=template)
        judge(model)(["p", "p"], ["x", "xx"], [None] * 2)
        wanted: list[Any] = ["p|x|xx", "p|xx|x"]
        assert model.asked == (wanted if template is None else [[{"role": "user", "content": t}] for t in wanted])
