"""`dtrpo check DATA`: a table of ours against its rules, or files of others against their format, row by row."""

from contextlib import suppress
from pathlib import Path

from dtrpo_ray.data.formats.files import data_files
from dtrpo_ray.data.prepare import FORMAT_OF
from dtrpo_ray.data.rules import Expected
from dtrpo_ray.data.tables import Rejected, Report, check_folder, schema_of
from dtrpo_ray.errors import DataError
from dtrpo_ray.models.tokenizer import load_tokenizer, tokenizer_hash


def check_data(
    source: str, max_tokens: int | None = None, tokenizer: Path | None = None, kind: str | None = None
) -> list[Report]:
    """Return a report of a table, or one for each file. Raises DataError for what cannot be read or recognised.

    A table's rows must have at most `max_tokens`, and ids of the tokenizer in the directory `tokenizer`, where these
    are given. Files are read as a task of type `kind` reads them, or else as the first type that knows their columns.
    """
    schema = None if "://" in source else schema_of(Path(source))
    if schema is not None:
        digest = None if tokenizer is None else tokenizer_hash(load_tokenizer(tokenizer))
        return [check_folder(Path(source), schema, Expected(digest, max_tokens))]
    return [_check_file(file, (kind,) if kind else tuple(FORMAT_OF)) for file in data_files(source)]


def _check_file(file: str, kinds: tuple[str, ...]) -> Report:
    kind, *others = kinds
    try:
        form = FORMAT_OF[kind](file)
    except DataError as unknown:
        for other in others:
            with suppress(DataError):
                return _check_file(file, (other,))
        raise unknown
    good, rejected = 0, list[Rejected]()
    for row in (row for shard in form.shards(file) for row in form.read(shard)):
        if isinstance(row, Rejected):
            rejected.append(row)
        else:
            good += form.rows_each
    name = f"prompts, {form.name}" if kind == "prompts" else form.name
    return Report(file, name, good + len(rejected), tuple(rejected))
