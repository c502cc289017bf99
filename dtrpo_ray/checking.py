"""`dtrpo check DATA`: a table of ours against its rules, or files of others against their format, row by row."""

from pathlib import Path
from typing import Any

from dtrpo_ray.errors import DataError
from dtrpo_ray.importers import preferences, responses
from dtrpo_ray.importers.files import data_files
from dtrpo_ray.rows import tokenizer_hash
from dtrpo_ray.rules import Expected
from dtrpo_ray.tables import Rejected, Report, check_folder, schema_of
from dtrpo_ray.tokenizer import load_tokenizer


def check_data(source: str, max_tokens: int | None = None, tokenizer: Path | None = None) -> list[Report]:
    """A report of a table, or one of each file. Raises DataError for what cannot be read or recognised.

    Where they are given, a table's rows have at most `max_tokens`, and ids of the `tokenizer` directory.
    """
    schema = None if "://" in source else schema_of(Path(source))
    if schema is not None:
        digest = None if tokenizer is None else tokenizer_hash(load_tokenizer(tokenizer))
        return [check_folder(Path(source), schema, Expected(digest, max_tokens))]
    return [_check_file(file) for file in data_files(source)]


def _check_file(file: str) -> Report:
    try:
        form: Any = preferences.recognise(file)
        rows, rejected = preferences.read_preferences(file)
        good = sum(len(row.origins) for row in rows)
    except DataError as not_preferences:
        try:
            form = responses.recognise(file)
        except DataError:
            raise not_preferences from None
        samples, rejected = responses.read_responses(file)
        good = len(samples)
    return Report(file, form.name, good + len(rejected), tuple[Rejected, ...](rejected))
