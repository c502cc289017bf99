"""A job's task -> the tables and the tokenizer that its stages read: examples, or imported files; and `dtrpo check`."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.config.job import Job
from dtrpo_ray.config.task import FilesTask, PuzzleTask
from dtrpo_ray.data import tables
from dtrpo_ray.data.formats.base import Format
from dtrpo_ray.data.formats.files import Shard, data_files, plan_shards
from dtrpo_ray.data.formats.preferences import preference_format
from dtrpo_ray.data.formats.prompts import prompt_format
from dtrpo_ray.data.formats.reading import first_rows
from dtrpo_ray.data.formats.responses import response_format
from dtrpo_ray.data.formats.tokenize import Target, split_origins, tokenize_preferences, tokenize_responses
from dtrpo_ray.data.ragged import list_lengths
from dtrpo_ray.data.rules import Expected, row_tokens
from dtrpo_ray.data.schemas import CONTRACT_VERSION, EXAMPLE, ID_COLUMNS, TrajectoryRow
from dtrpo_ray.data.tables import Counts, Rejected, Report
from dtrpo_ray.data.tasks.puzzles import generate_puzzles, puzzle_module
from dtrpo_ray.errors import DataError
from dtrpo_ray.files import read_json, whole_file, write_json
from dtrpo_ray.method.trajectory import Origin
from dtrpo_ray.models import tokenizer as tokenizers

# type of a task -> how the format of its files is recognised
FORMAT_OF: dict[str, Callable[[str], Format[Any]]] = {
    "preferences": preference_format,
    "trajectories": response_format,
    "prompts": prompt_format,
}


def job_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model directory, of `model.tokenizer`, or of the puzzle's characters."""
    if source := job.model.path or job.model.tokenizer:
        return tokenizers.load_tokenizer(source)
    assert job.puzzle is not None
    return tokenizers.character_tokenizer(puzzle_module(job.puzzle).ALPHABET)


def write_examples(
    job: Job, tokenizer: PreTrainedTokenizerBase, block_size: int, block_origin: Origin, out: Path
) -> dict[str, int]:
    """Write generated SFT examples on a model's grid as Parquet (the table example/v1). Return how many there are.

    Prompts are those of `puzzle_request`. Raises DataError for text that the tokenizer cannot encode.
    """
    assert job.sft is not None
    assert job.puzzle is not None
    rows = generate_puzzles(job.puzzle, job.sft.num_examples, "train", job.seed)
    end, task = None, job.puzzle
    if not puzzle_module(task).FIXED_LENGTH:
        turn_end = tokenizers.turn_end_id(tokenizer) if task.in_words else None
        end = tokenizers.eos_token_id(tokenizer) if turn_end is None else turn_end
    # puzzles share their answers: a few hundred texts of a hundred thousand
    prompt_ids = cache(lambda text: puzzle_ids(task, tokenizer, text))
    answer_ids = cache(lambda text, start: tokenizers.encode_response(tokenizer, text, start, block_size, end))
    prompts = [prompt_ids(row["prompt"]) for row in rows]
    starts = [len(prompt) if block_origin == "global" else 0 for prompt in prompts]  # on the grid
    answers = [answer_ids(row["answer"], start) for row, start in zip(rows, starts, strict=True)]
    versions, ids = [CONTRACT_VERSION] * len(rows), [f"example-{i:08d}" for i in range(len(rows))]
    columns = {"contract_version": versions, "row_id": ids, "prompt_ids": prompts, "chosen_ids": answers}
    tables.write_shards(pa.table(columns, schema=EXAMPLE), out)
    return {"examples": len(rows)}


def puzzle_ids(task: PuzzleTask, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return a puzzle's prompt ids: a user's message where the task is in words and there is a chat template."""
    chat = task.in_words and tokenizer.chat_template is not None
    return tokenizers.encode_prompt(tokenizer, [{"role": "user", "content": prompt}] if chat else prompt)


def puzzle_request(
    task: PuzzleTask, tokenizer: PreTrainedTokenizerBase, prompt_id: str, puzzle: Mapping[str, str]
) -> TrajectoryRow:
    """Return the part of a trajectory that a puzzle {prompt, answer} gives, under the row id `prompt_id`."""
    text, answer = puzzle["prompt"], puzzle["answer"]
    ids = puzzle_ids(task, tokenizer, text)
    return {"row_id": prompt_id, "prompt_id": prompt_id, "prompt": text, "prompt_ids": ids, "answer": answer or None}


class PartSummary(Counts):
    """The counts of one part of a file; `made` are rows of the table, `good` the rows of the file in them."""

    made: int


class _RowsToDrop(TypedDict):
    rows: int  # of the file as it was
    refused: list[tuple[int, str, str]]  # (row, origin, origin of the first row that has its id)


@dataclass(frozen=True, slots=True)
class ImportJob:
    """The inputs of every importer of a task; picklable, the same on every machine.

    `grid` are the model's block_size, block_origin and shift, `data_hashes` the hash of each file.
    """

    task: FilesTask
    tokenizer: Path
    grid: Mapping[str, Any]
    data_hashes: Mapping[str, str]


class Importer:
    """Imports files part by part: read, validate, template, tokenize, bucket by length, write.

    A part of a file becomes `part-FILE-PART-BATCH-BUCKET.parquet`, the bucket being the next power of two of a row's
    tokens, and `refused-FILE-PART.jsonl`. Writing a part again gives the same bytes.
    """

    def __init__(self, source: ImportJob) -> None:
        self.task, self.hashes = source.task, source.data_hashes
        limits = self.task.model_dump(include={"max_prompt_tokens", "max_response_tokens"})
        self.target = Target(tokenizers.load_tokenizer(source.tokenizer), **limits, **source.grid)
        self.form: Callable[[str], Format[Any]] = cache(FORMAT_OF[self.task.type])

    def __call__(self, part: Shard, out: Path) -> PartSummary:
        """Import one part. Raises DataError for a file that cannot be read, and with `task.strict` for a bad row."""
        made, refused = 0, list[Rejected]()
        for batch, (rows, bad) in enumerate(self._batches(part)):
            table, unfit = self._tokenize(rows)
            table = tables.with_columns(table, {"data_hash": [self.hashes[part.file]] * len(table)})
            refused += (bad := bad + unfit)
            if bad and self.task.strict:
                raise DataError(f"{bad[0].origin}: {bad[0].reason}: {bad[0].detail} (strict)")
            made += len(table)
            write_buckets(table, out, f"part-{part.name}-{batch:04d}")
        (out / f"refused-{part.name}.jsonl").write_text(tables.quarantine_lines(refused))
        good, reasons = made * self.form(part.file).rows_each, Counter(row.reason for row in refused)
        return {"rows": good + len(refused), "good": good, "made": made, "refused": reasons}

    def _batches(self, part: Shard) -> Iterator[tuple[Any, list[Rejected]]]:
        """Yield rows to tokenize together, and the rows refused before that."""
        yield from self.form(part.file).batches(part)

    def _tokenize(self, rows: Any) -> tuple[pa.Table, list[Rejected]]:
        tokenize = tokenize_preferences if self.task.brings_pairs else tokenize_responses
        return tokenize(rows, self.target)


def import_parts(task: FilesTask, rows: int | None = None) -> list[Shard]:
    """Return the named parts of a task's files in their order, up to `max_rows` rows; one has `rows` or PART_ROWS."""
    parts: list[Shard] = []
    left = task.max_rows
    for number, file in enumerate(file for where in task.files for file in data_files(where)):
        shards = preference_format(file).shards(file, rows) if task.brings_pairs else plan_shards(file, rows)
        if left is not None:
            shards, taken = first_rows(shards, left)
            left -= taken
        parts += [replace(shard, name=f"{number:04d}-{i:05d}") for i, shard in enumerate(shards)]
    return parts


def finish_import(summaries: Sequence[PartSummary], schema: pa.Schema, out: Path) -> Counts:
    """Refuse rows that repeat one of another part, gather the quarantine and write the manifest. Return the counts.

    It may be cut off and run again: the rows to drop are noted before any file is rewritten.
    """
    made = sum(summary["made"] for summary in summaries)
    refused, shares = Counter[str](), tables.id_shares(made)
    with whole_file(out / tables.QUARANTINE) as partial, partial.open("w") as quarantine:
        for file in sorted(out.glob("refused-*.jsonl")):
            quarantine.write(file.read_text())
        for share in range(shares):
            doomed = _duplicates(out, share, shares)
            _drop(doomed, out)
            for _, origin, first in (repeat for entry in doomed.values() for repeat in entry["refused"]):
                rows = [Rejected(where, "duplicate row", f"the same as {first}") for where in split_origins(origin)]
                quarantine.write(tables.quarantine_lines(rows))
                refused["duplicate row"] += len(rows)
                made -= 1
    good = sum(summary["good"] for summary in summaries) - refused["duplicate row"]
    for summary in summaries:
        refused.update(summary["refused"])
    by_reason = {reason: count for reason, count in refused.most_common() if count}
    counts: Counts = {"rows": sum(summary["rows"] for summary in summaries), "good": good, "refused": by_reason}
    tables.write_manifest(out, schema, counts, made)
    return counts


def _duplicates(out: Path, share: int, shares: int) -> dict[str, _RowsToDrop]:
    """Return the rows that repeat a row_id, by file name; they are found once and then noted in a file.

    Only one share of the ids is looked at, and only the origins of repeated rows are held.
    """
    note, files = out / f"duplicates-{share:05d}.json", sorted(out.glob("part-*.parquet"))
    if note.exists():
        return dict(read_json(note))
    found, column = tables.repeated_rows(files, share, shares), pa.schema([("origin", pa.string())])
    origins = pads.dataset(files, column).take(pa.array(np.concatenate(found)))["origin"].to_numpy()
    repeats = zip(tables.places_of(files, found[0]), *np.split(origins, 2), strict=True)
    doomed: dict[str, _RowsToDrop] = {
        file.name: {
            "rows": pq.read_metadata(file).num_rows,
            "refused": [(row, origin, first) for (_, row), origin, first in own],
        }
        for file, own in groupby(repeats, key=lambda repeat: repeat[0][0])
    }
    write_json(note, doomed)
    return doomed


def _drop(doomed: dict[str, _RowsToDrop], out: Path) -> None:
    """Rewrite the files that hold rows to drop, unless that was done before."""
    for name, entry in doomed.items():
        table = pq.read_table(out / name)
        if len(table) == entry["rows"]:
            keep = np.ones(len(table), dtype=bool)
            keep[[row for row, _, _ in entry["refused"]]] = False
            tables.write_whole(table.filter(pa.array(keep)), out / name)


def write_buckets(table: pa.Table, out: Path, name: str) -> None:
    """Write rows of like length together: `NAME-00512.parquet` holds those of 257 to 512 tokens."""
    tokens = row_tokens(*(list_lengths(table[name]) for name in ID_COLUMNS if name in table.schema.names))
    bucket = 2 ** np.ceil(np.log2(np.maximum(tokens, 1))).astype(np.int64)
    for size in np.unique(bucket):
        tables.write_whole(table.filter(pa.array(bucket == size)), out / f"{name}-{size:05d}.parquet")


# === dtrpo check ===


def check_data(
    source: str, max_tokens: int | None = None, tokenizer: Path | None = None, kind: str | None = None
) -> list[Report]:
    """Return a report of a table, or one for each file. Raises DataError for what cannot be read or recognised.

    A table's rows must have at most `max_tokens`, and ids of the tokenizer in the directory `tokenizer`, where these
    are given. Files are read as a task of type `kind` reads them, or else as the first type that knows their columns.
    """
    schema = None if "://" in source else tables.schema_of(Path(source))
    if schema is not None:
        digest = None if tokenizer is None else tokenizers.tokenizer_hash(tokenizers.load_tokenizer(tokenizer))
        return [tables.check_folder(Path(source), schema, Expected(digest, max_tokens))]
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
