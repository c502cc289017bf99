"""Files of prompts -> `PromptRow`s: a column `prompt` or `question`, or the prompts of preference pairs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dtrpo_ray.errors import DataError
from dtrpo_ray.importers import preferences
from dtrpo_ray.importers.files import Refusal, Shard, data_files, one_row, parted, plan_shards, raw_rows, reference
from dtrpo_ray.importers.preferences import (
    HEAD_ROWS,
    Prompt,
    messages,
    prompt_turns,
    require_text,
    require_utf8,
    row_object,
)
from dtrpo_ray.tables import Rejected

COLUMNS = ("prompt", "question")  # the first that a file has
ANSWERS = ("answer", "ground_truth", "ground_truth_answer")  # what a verifier compares with, if there is one


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt, "file:line" or "file:row" where it stands, and the reference answer if the file has one."""

    origin: str
    prompt: Prompt
    answer: str | None = None


Form = preferences.Format | str
"""A format of pairs, or the column that holds the prompt."""


def recognise(file: str) -> Form:
    """How a file holds its prompts, by the columns of its first rows. Raises DataError if it holds none."""
    try:
        if not (form := preferences.recognise(file)).unpaired:
            return form
    except DataError:
        pass
    rows = [value for _, value in islice(raw_rows(Shard(file)), HEAD_ROWS) if isinstance(value, dict)]
    columns = {name for row in rows for name, value in row.items() if value is not None}
    for name in COLUMNS:
        if name in columns:
            return name
    found = ", ".join(sorted(columns)) or "none (no row is a JSON object)"
    raise DataError(f"{file}: no column of prompts among {found}; known are {', '.join(COLUMNS)}, and pairs")


def read_prompts(where: str | Path) -> tuple[list[PromptRow], list[Rejected]]:
    """The prompts of a file or folder, and the rows refused.

    Raises DataError for a file that cannot be read, holds no row, or has no column of prompts.
    """
    return parted(row for file in data_files(str(where)) for row in _read_file(file))


def _read_file(file: str) -> Iterator[PromptRow | Rejected]:
    form = recognise(file)
    for shard in plan_shards(file):
        yield from read_shard(form, shard)


def read_shard(form: Form, shard: Shard) -> Iterator[PromptRow | Rejected]:
    """The prompts of one part of a file."""
    if not isinstance(form, str):
        for pair in preferences.read_shard(form, shard):
            yield pair if isinstance(pair, Rejected) else PromptRow(pair.origin, pair.prompt)
        return
    for origin, value in raw_rows(shard):
        try:
            with one_row():
                row = _row(origin, row_object(value), form)
        except Refusal as refusal:
            yield Rejected(origin, *refusal.args)
        else:
            yield row


def _row(origin: str, row: dict[str, Any], column: str) -> PromptRow:
    if (prompt := row.get(column)) is None:
        raise Refusal("missing field", column)
    prompt = prompt if isinstance(prompt, str) else messages(prompt, column)
    found = next((name for name in ANSWERS if row.get(name) is not None), None)
    answer = None if found is None else reference(row[found], found)
    require_text(prompt_turns(prompt))
    require_utf8([answer])
    return PromptRow(origin, prompt, answer)
