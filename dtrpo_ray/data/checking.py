"""`dtrpo check DATA`: a table of ours against its rules, or files of others against their format, row by row."""

from contextlib import suppress
from pathlib import Path
from types import ModuleType

from dtrpo_ray.data.formats import preferences, prompts, responses
from dtrpo_ray.data.formats.files import data_files
from dtrpo_ray.data.rows import tokenizer_hash
from dtrpo_ray.data.rules import Expected
from dtrpo_ray.data.tables import Rejected, Report, check_folder, schema_of
from dtrpo_ray.errors import DataError
from dtrpo_ray.models.tokenizer import load_tokenizer

READERS: dict[str, ModuleType] = {"preferences": preferences, "trajectories": responses, "prompts": prompts}


def check_data(
    source: str, max_tokens: int | None = None, tokenizer: Path | None = None, kind: str | None = None
) -> list[Report]:
    """A report of a table, or one of each file. Raises DataError for what cannot be read or recognised.

    Where they are given, a table's rows have at most `max_tokens`, and ids of the `tokenizer` directory. Files are read
    as a task of type `kind` reads them, or else as the first of READERS that knows their columns.
    """
    schema = None if "://" in source else schema_of(Path(source))
    if schema is not None:
        digest = None if tokenizer is None else tokenizer_hash(load_tokenizer(tokenizer))
        return [check_folder(Path(source), schema, Expected(digest, max_tokens))]
    return [_check_file(file, (kind,) if kind else tuple(READERS)) for file in data_files(source)]


def _check_file(file: str, kinds: tuple[str, ...]) -> Report:
    kind, *others = kinds
    module = READERS[kind]
    try:
        form = module.recognise(file)
    except DataError as unknown:
        for other in others:
            with suppress(DataError):
                return _check_file(file, (other,))
        raise unknown
    good, rejected = 0, list[Rejected]()
    for row in module.read_file(file):
        if isinstance(row, Rejected):
            rejected.append(row)
        else:
            good += len(row.origins) if kind == "preferences" else 1
    name = f"prompts, {form.name}" if kind == "prompts" else form.name
    return Report(file, name, good + len(rejected), tuple(rejected))
