"""Files of prompts -> `PromptRow`s: public test sets by their columns, a column `prompt` or `question`, or the prompts
of preference pairs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from dtrpo_ray.data.formats.base import RowFormat, attempt, find_format
from dtrpo_ray.data.formats.columns import PROMPT
from dtrpo_ray.data.formats.parsing import Prompt, Record, Refusal, as_reference, as_text, require_text, require_utf8
from dtrpo_ray.data.formats.preferences import PairFormat, preference_format
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.errors import DataError

ANSWERS = ("answer", "ground_truth", "ground_truth_answer")  # columns that a verifier compares a response with

Question = tuple[Prompt, str | None]  # (prompt, reference answer)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt, the "file:line" or "file:row" where it stands, and the reference answer if the file has one."""

    origin: str
    prompt: Prompt
    answer: str | None = None


PROMPTS = pa.schema(PROMPT)


@dataclass(frozen=True, slots=True)
class PromptFormat(RowFormat[PromptRow]):
    """A layout of prompts; `parse` returns a row's prompt and answer."""

    schema = PROMPTS
    parse: Callable[[Record], Question]

    def parse_row(self, origin: str, value: Any) -> Iterator[PromptRow | Rejected]:
        yield attempt(origin, self._row, value, origin)

    def _row(self, value: Any, origin: str) -> PromptRow:
        row = PromptRow(origin, *self.parse(Record.of_row(value)))
        require_text(row.prompt)
        require_utf8(row.answer)
        return row


def prompt_format(file: str) -> PromptFormat:
    """Return how a file holds its prompts, by the columns of its first rows. Raises DataError if it holds none."""
    try:
        pairs = preference_format(file)
    except DataError:
        pairs = None
    if isinstance(pairs, PairFormat):
        return PromptFormat(pairs.name, pairs.columns, partial(_prompt_of_pair, pairs))
    return find_format(file, PROMPT_FORMATS, "prompts, or of pairs")


def _prompt_of_pair(pairs: PairFormat, row: Record) -> Question:
    return pairs.pair(row.fields, "").prompt, None


def _human_eval(row: Record) -> Question:
    """The beginning of a function; the verifier python_tests takes the three fields."""
    fields = {name: row.text(name) for name in ("prompt", "test", "entry_point")}
    return fields["prompt"], json.dumps(fields)


def _mbpp(row: Record) -> Question:
    """A task in words and its tests, which alone name the function; the sanitized set calls `text` `prompt`."""
    task = as_text(row.require("text" if row.get("text") is not None else "prompt"), "text")
    tests = row.require("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise Refusal("wrong type", "test_list is not a list of text")
    imports = row.get("test_imports") or []
    before = [row.get("test_setup_code") or "", *(imports if isinstance(imports, list) else [imports])]
    setup = "\n".join(as_text(line, "test_setup_code") for line in before if line)
    answer = {"test_list": tests, "test_setup_code": setup}
    return f"{task}\nThe code must pass these tests:\n" + "\n".join(tests), json.dumps(answer)


def _ifeval(row: Record) -> Question:
    answer = {name: row.require(name) for name in ("instruction_id_list", "kwargs")}
    return row.text("prompt"), as_reference(answer, "kwargs")


def _mt_bench(row: Record) -> Question:
    """The first turn alone: the next one follows an answer that is not there yet."""
    turns = row.require("turns")
    if not isinstance(turns, list) or not turns:
        raise Refusal("wrong type", "turns is not a list of text")
    return as_text(turns[0], "turns"), None


def _column(name: str, row: Record) -> Question:
    """A column of prompts, as text or messages, beside which there may be one of ANSWERS."""
    row.require(name)
    found = row.first(ANSWERS)
    answer = None if found is None else row.reference(found)
    return row.prompt(name), answer


PROMPT_FORMATS = (
    PromptFormat("HumanEval", ("prompt", "test", "entry_point"), _human_eval),
    PromptFormat("IFEval", ("prompt", "instruction_id_list", "kwargs"), _ifeval),
    PromptFormat("MBPP", ("text", "test_list"), _mbpp),
    PromptFormat("MBPP, sanitized", ("prompt", "test_list"), _mbpp),
    PromptFormat("prompt", ("prompt",), partial(_column, "prompt")),
    PromptFormat("question", ("question",), partial(_column, "question")),
    PromptFormat("MT-bench", ("turns",), _mt_bench),
)
