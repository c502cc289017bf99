"""Files of prompts -> `PromptRow`s: public test sets by their columns, a column `prompt` or `question`, or the prompts
of preference pairs."""

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from dtrpo_ray.data.formats.base import Row, RowFormat, find_format
from dtrpo_ray.data.formats.dialogue import PROMPTS, prompt_of
from dtrpo_ray.data.formats.parsing import (
    AS_NAMED,
    Columns,
    Prompt,
    Record,
    Refusal,
    as_reference,
    as_text,
    require_text,
    require_utf8,
)
from dtrpo_ray.data.formats.preferences import PreferenceRow, preference_format
from dtrpo_ray.errors import DataError

ANSWERS = ("answer", "ground_truth", "ground_truth_answer")  # columns that a verifier compares a response with
# columns that hold answers or what belongs to them, which no prompt needs
BESIDE = frozenset({
    *("completion", "response", "responses", "output", "label", "kto_tag", "canonical_solution", "code", "solution"),
    *("challenge_test_list", "test_setup_code", "reference", "ability", "extra_info", "level"),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class PromptRow(Row):
    """A prompt, and the reference answer if the file has one."""

    prompt: Prompt
    answer: str | None = None

    def require(self) -> Self:
        """Return the prompt. Raises Refusal for one without text."""
        require_text(self.prompt)
        require_utf8(self.answer)
        return self

    @property
    def is_answered(self) -> bool:
        """Return whether the row has a reference answer."""
        return self.answer is not None


def prompt_format(file: str, task: Columns = AS_NAMED) -> RowFormat[PromptRow]:
    """Return how a file holds its prompts, by the columns of its first rows. Raises DataError if it holds none."""
    try:
        pairs = preference_format(file, task)
    except DataError:
        pairs = None
    if isinstance(pairs, RowFormat):
        return RowFormat(pairs.name, pairs.columns, partial(_prompt_of_pair, pairs), task=pairs.task)
    return replace(find_format(file, PROMPT_FORMATS, "prompts, or of pairs", task), beside=BESIDE)


def _prompt_of_pair(pairs: RowFormat[PreferenceRow], row: Record) -> PromptRow:
    pair = pairs.parse(row)
    assert isinstance(pair, PreferenceRow)
    return PromptRow(pair.require().prompt)


def _human_eval(row: Record) -> PromptRow:
    """The beginning of a function; the verifier python_tests takes the three fields."""
    fields = {name: row.text(name) for name in ("prompt", "test", "entry_point")}
    return PromptRow(fields["prompt"], json.dumps(fields))


def _mbpp(row: Record) -> PromptRow:
    """A task in words and its tests, which alone name the function; the sanitized set calls `text` `prompt`."""
    task = as_text(row.require("text" if row.get("text") is not None else "prompt"), "text")
    tests = row.require("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise Refusal("wrong type", "test_list is not a list of text")
    imports = row.get("test_imports") or []
    before = [row.get("test_setup_code") or "", *(imports if isinstance(imports, list) else [imports])]
    setup = "\n".join(as_text(line, "test_setup_code") for line in before if line)
    answer = {"test_list": tests, "test_setup_code": setup}
    return PromptRow(f"{task}\nThe code must pass these tests:\n" + "\n".join(tests), json.dumps(answer))


def _ifeval(row: Record) -> PromptRow:
    answer = {name: row.require(name) for name in ("instruction_id_list", "kwargs")}
    return PromptRow(row.text("prompt"), as_reference(answer, "kwargs"))


def _mt_bench(row: Record) -> PromptRow:
    """The first turn alone: the next one follows an answer that is not there yet."""
    turns = row.require("turns")
    if not isinstance(turns, list) or not turns:
        raise Refusal("wrong type", "turns is not a list of text")
    return PromptRow(as_text(turns[0], "turns"))


def _column(row: Record) -> PromptRow:
    """A column of prompts, as text or messages, beside which there may be one of ANSWERS or verl's ground truth."""
    found = next((column for column in ANSWERS if row.get(column) is not None), None)
    answer = None if found is None else row.reference(found)
    if answer is None and isinstance(verl := row.get("reward_model"), dict):
        answer = as_reference(verl.get("ground_truth"), "reward_model.ground_truth")
    return PromptRow(prompt_of(row), answer)


PROMPT_FORMATS = (
    RowFormat("HumanEval", ("prompt", "test", "entry_point"), _human_eval),
    RowFormat("IFEval", ("prompt", "instruction_id_list", "kwargs"), _ifeval),
    RowFormat("MBPP", ("text", "test_list"), _mbpp),
    RowFormat("MBPP, sanitized", ("prompt", "test_list"), _mbpp),
    RowFormat("prompt", ("|".join(PROMPTS),), _column),
    RowFormat("MT-bench", ("turns",), _mt_bench),
)
