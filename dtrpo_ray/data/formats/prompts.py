"""Files of prompts -> `PromptRow`s: public test sets by their columns, a column `prompt` or `question`, or the prompts
of preference pairs."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtrpo_ray.data.formats import preferences
from dtrpo_ray.data.formats.batches import raw_rows, recognised
from dtrpo_ray.data.formats.columns import PROMPT, prompt_columns
from dtrpo_ray.data.formats.files import Shard, data_files, plan_shards
from dtrpo_ray.data.formats.parsing import Refusal, field, one_row, parted, text
from dtrpo_ray.data.formats.parsing import reference as as_reference
from dtrpo_ray.data.formats.preferences import (
    Prompt,
    messages,
    prompt_turns,
    require_text,
    require_utf8,
    row_object,
)
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.errors import DataError

ANSWERS = ("answer", "ground_truth", "ground_truth_answer")  # what a verifier compares with, if there is one


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt, "file:line" or "file:row" where it stands, and the reference answer if the file has one."""

    origin: str
    prompt: Prompt
    answer: str | None = None


def as_table(rows: Sequence[PromptRow]) -> pa.Table:
    """Prompts in columns."""
    columns = {"origin": [row.origin for row in rows], **prompt_columns([row.prompt for row in rows])}
    return pa.table(columns, schema=pa.schema(PROMPT))


@dataclass(frozen=True, slots=True)
class Format:
    """A layout of prompts; a file has it if it has all its columns. `parse` gives a row's prompt and answer."""

    name: str
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], tuple[Prompt, str | None]]


def recognise(file: str) -> Format | preferences.Format:
    """How a file holds its prompts, by the columns of its first rows. Raises DataError if it holds none."""
    try:
        if not (form := preferences.recognise(file)).unpaired:
            return form
    except DataError:
        pass
    return recognised(file, FORMATS, "prompts, or of pairs")


def read_prompts(where: str | Path) -> tuple[list[PromptRow], list[Rejected]]:
    """The prompts of a file or folder, and the rows refused.

    Raises DataError for a file that cannot be read, holds no row, or has no column of prompts.
    """
    return parted(row for file in data_files(str(where)) for row in read_file(file))


def read_file(file: str) -> Iterator[PromptRow | Rejected]:
    """The prompts of a file and the rows refused, one after the other."""
    form = recognise(file)
    for shard in plan_shards(file):
        yield from read_shard(form, shard)


def read_shard(form: Format | preferences.Format, shard: Shard) -> Iterator[PromptRow | Rejected]:
    """The prompts of one part of a file."""
    if isinstance(form, preferences.Format):
        for pair in preferences.read_shard(form, shard):
            yield pair if isinstance(pair, Rejected) else PromptRow(pair.origin, pair.prompt)
        return
    for origin, value in raw_rows(shard):
        try:
            with one_row():
                row = PromptRow(origin, *form.parse(row_object(value)))
                require_text(prompt_turns(row.prompt))
                require_utf8([row.answer])
        except Refusal as refusal:
            yield Rejected(origin, *refusal.args)
        else:
            yield row


def _human_eval(row: dict[str, Any]) -> tuple[Prompt, str | None]:
    """The beginning of a function; the verifier python_tests takes the three fields."""
    given = {name: text(field(row, name), name) for name in ("prompt", "test", "entry_point")}
    return given["prompt"], json.dumps(given)


def _mbpp(row: dict[str, Any]) -> tuple[Prompt, str | None]:
    """A task in words and its tests, which alone say the function's name; `prompt` is the sanitized set's `text`."""
    task = text(field(row, "text" if row.get("text") is not None else "prompt"), "text")
    tests = field(row, "test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise Refusal("wrong type", "test_list is not a list of text")
    imports = row.get("test_imports") or []
    before = [row.get("test_setup_code") or "", *(imports if isinstance(imports, list) else [imports])]
    setup = "\n".join(text(line, "test_setup_code") for line in before if line)
    answer = {"test_list": tests, "test_setup_code": setup}
    return f"{task}\nThe code must pass these tests:\n" + "\n".join(tests), json.dumps(answer)


def _ifeval(row: dict[str, Any]) -> tuple[Prompt, str | None]:
    answer = {name: field(row, name) for name in ("instruction_id_list", "kwargs")}
    return text(field(row, "prompt"), "prompt"), as_reference(answer, "kwargs")


def _mt_bench(row: dict[str, Any]) -> tuple[Prompt, str | None]:
    """The first turn: what comes next follows an answer that is not there yet."""
    turns = field(row, "turns")
    if not isinstance(turns, list) or not turns:
        raise Refusal("wrong type", "turns is not a list of text")
    return text(turns[0], "turns"), None


def _column(name: str) -> Callable[[dict[str, Any]], tuple[Prompt, str | None]]:
    """A column of prompts, as text or messages, beside which there may be one of ANSWERS."""

    def parse(row: dict[str, Any]) -> tuple[Prompt, str | None]:
        prompt = field(row, name)
        found = next((column for column in ANSWERS if row.get(column) is not None), None)
        answer = None if found is None else as_reference(row[found], found)
        return prompt if isinstance(prompt, str) else messages(prompt, name), answer

    return parse


FORMATS = (  # the first that fits
    Format("HumanEval", ("prompt", "test", "entry_point"), _human_eval),
    Format("IFEval", ("prompt", "instruction_id_list", "kwargs"), _ifeval),
    Format("MBPP", ("text", "test_list"), _mbpp),
    Format("MBPP, sanitized", ("prompt", "test_list"), _mbpp),
    Format("prompt", ("prompt",), _column("prompt")),
    Format("question", ("question",), _column("question")),
    Format("MT-bench", ("turns",), _mt_bench),
)
