"""A job's task -> the tables and the tokenizer that its stages read: examples, or imported files; and `dtrpo check`."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.config.job import Job
from dtrpo_ray.config.task import FilesTask, PuzzleTask
from dtrpo_ray.config.train import SFTConfig
from dtrpo_ray.data import tables
from dtrpo_ray.data.formats.base import Format, Row
from dtrpo_ray.data.formats.examples import example_format
from dtrpo_ray.data.formats.files import Shard, data_files
from dtrpo_ray.data.formats.parsing import AS_NAMED, Columns
from dtrpo_ray.data.formats.preferences import PreferenceRow, common_length, preference_format
from dtrpo_ray.data.formats.prompts import prompt_format
from dtrpo_ray.data.formats.reading import count_rows, first_rows
from dtrpo_ray.data.formats.responses import response_format
from dtrpo_ray.data.formats.tokenize import (
    Target,
    split_origins,
    tokenize_examples,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_responses,
)
from dtrpo_ray.data.ragged import list_lengths
from dtrpo_ray.data.rules import Expected, row_tokens
from dtrpo_ray.data.schemas import EXAMPLE, ID_COLUMNS, PREFERENCE, TRAJECTORY, TrajectoryRow
from dtrpo_ray.data.tables import Counts, Rejected, Report
from dtrpo_ray.data.tasks.puzzles import generate_puzzles, puzzle_module
from dtrpo_ray.errors import DataError
from dtrpo_ray.files import read_json, whole_file, write_json
from dtrpo_ray.method.trajectory import Origin
from dtrpo_ray.models import tokenizer as tokenizers
from dtrpo_ray.models.registry import skeleton_of

EXAMPLES = 3  # rows that `dtrpo check` and the manifest show as they are trained on

Reader = FilesTask | SFTConfig  # a section that reads files


class Kind(NamedTuple):
    """How files are read: the format by their columns, rows to cells, and the table they become."""

    form: Callable[[str, Columns], Format[Any]]
    tokenize: Callable[[Any, Target], tuple[pa.Table, list[Rejected]]]
    schema: pa.Schema


# by the type of the section that reads them; in this order `dtrpo check` tries them
KINDS = {
    "preferences": Kind(preference_format, tokenize_preferences, PREFERENCE),
    "trajectories": Kind(response_format, tokenize_responses, TRAJECTORY),
    "sft": Kind(example_format, tokenize_examples, EXAMPLE),
    "prompts": Kind(prompt_format, tokenize_prompts, TRAJECTORY),
}


def format_of(task: Reader, answers: bool = False) -> Callable[[str], Format[Any]]:
    """Return the function that recognises the format of a file of a task; it raises DataError for an unknown one.

    With `answers` a row needs a reference answer.
    """
    columns = Columns(task.columns, frozenset(task.ignore_columns), answers)
    return cache(lambda file: KINDS[task.type].form(file, columns))


def job_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model directory, of `model.tokenizer`, or of the puzzle's characters or words."""
    if source := job.model.path or job.model.tokenizer:
        return tokenizers.load_tokenizer(source)
    assert job.puzzle is not None
    alphabet = puzzle_module(job.puzzle).ALPHABET
    return (
        tokenizers.character_tokenizer(alphabet) if isinstance(alphabet, str) else tokenizers.word_tokenizer(alphabet)
    )


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
    target = Target(tokenizer, block_size, **_limits(job.sft), block_origin=block_origin)
    answers = [answer_ids(row["answer"], target.start(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
    same = {**target.columns, "origin": None, "data_hash": None}
    columns: dict[str, Any] = {name: [value] * len(rows) for name, value in same.items()}
    columns |= {"row_id": [f"example-{i:08d}" for i in range(len(rows))], "prompt_ids": prompts, "chosen_ids": answers}
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
    """The counts of one part of a `file`; `made` are rows of the table, `good` the rows of the file in them."""

    file: str
    made: int
    examples: list[dict[str, str]]


@dataclass(slots=True)
class Tally:
    """What is counted while rows become tables; `good` counts rows of the file, as `ignored` and `truncated` do."""

    made: int = 0
    good: int = 0
    refused: list[Rejected] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, rows: Sequence[Row], each: int, table: pa.Table, target: Target) -> None:
        """Count the rows of a batch and the table that they became, and keep its first rows as examples.

        `each` rows of the file make one row.
        """
        self.made += len(table)
        self.good += len(table) * each
        for row in rows:
            self.ignored.update(dict.fromkeys(row.ignored, each))
        # answers to a prompt of a file have its origin and their number: "file:line#2"
        origins = ({origin, origin.rpartition("#")[0]} for origin in table["origin"].to_pylist())
        self.truncated += each * sum(not target.truncated.isdisjoint(names) for names in origins)
        target.truncated.clear()
        names = [name for name in ID_COLUMNS if name in table.schema.names]
        for row in table.select(names).slice(0, EXAMPLES - len(self.examples)).to_pylist():
            self.examples.append({n.removesuffix("_ids"): str(target.tokenizer.decode(row[n])) for n in names})

    def counts(self) -> Counts:
        """Return the counts; what was neither ignored nor truncated is left out."""
        refused = dict(Counter(row.reason for row in self.refused).most_common())
        return tables.counts_of(self.good, refused, self.ignored, self.truncated)


class _RowsToDrop(TypedDict):
    rows: int  # of the file as it was
    refused: list[tuple[int, str, str]]  # (row, origin, origin of the first row that has its id)


@dataclass(frozen=True, slots=True)
class ImportJob:
    """The inputs of every importer of a section; picklable, the same on every machine.

    `grid` are the model's block_size, block_origin and shift, `data_hashes` the hash of each file. With `answers` a row
    needs a reference answer.
    """

    task: Reader
    tokenizer: Path
    grid: Mapping[str, Any]
    data_hashes: Mapping[str, str]
    answers: bool = False


class Importer:
    """Imports files part by part: read, validate, template, tokenize, bucket by length, write.

    A part of a file becomes `part-FILE-PART-BATCH-BUCKET.parquet`, the bucket being the next power of two of a row's
    tokens, and `refused-FILE-PART.jsonl`. Writing a part again gives the same bytes.
    """

    def __init__(self, source: ImportJob) -> None:
        self.task, self.hashes = source.task, source.data_hashes
        self.target = Target(tokenizers.load_tokenizer(source.tokenizer), **_limits(self.task), **source.grid)
        self.form = format_of(self.task, source.answers)

    def __call__(self, part: Shard, out: Path) -> PartSummary:
        """Import one part. Raises DataError for a file that cannot be read, and with `task.strict` for a bad row."""
        tally, each = Tally(), self.form(part.file).rows_each
        for batch, (rows, bad) in enumerate(self._batches(part)):
            table, unfit = self._tokenize(rows)
            table = tables.with_columns(table, {"data_hash": [self.hashes[part.file]] * len(table)})
            tally.refused += (bad := bad + unfit)
            if bad and self.task.strict:
                raise DataError(f"{bad[0].origin}: {bad[0].reason}: {bad[0].detail} (strict)")
            tally.add(rows, each, table, self.target)
            write_buckets(table, out, f"part-{part.name}-{batch:04d}")
        (out / f"refused-{part.name}.jsonl").write_text(tables.quarantine_lines(tally.refused))
        return {**tally.counts(), "file": part.file, "made": tally.made, "examples": tally.examples}

    def _batches(self, part: Shard) -> Iterator[tuple[Any, list[Rejected]]]:
        """Yield rows to tokenize together, and the rows refused before that."""
        yield from self.form(part.file).batches(part)

    def _tokenize(self, rows: Any) -> tuple[pa.Table, list[Rejected]]:
        return KINDS[self.task.type].tokenize(rows, self.target)


def needs_answers(job: Job, section: Reader) -> bool:
    """Return whether the rows of a section need a reference answer, which the job's scorer compares with."""
    return section is job.task and job.score is not None and job.score.needs_answers


def _limits(task: Reader) -> dict[str, Any]:
    return {"max_prompt_tokens": task.max_prompt_tokens, "max_response_tokens": task.max_response_tokens}


def grid_of(path: Path) -> dict[str, Any]:
    """Return the block_size, block_origin and shift of the model in a directory."""
    model = skeleton_of(path)
    return {"block_size": model.block_size, "block_origin": model.block_origin, "shift": model.shift}


def import_parts(task: Reader, rows: int | None = None) -> list[Shard]:
    """Return the named parts of a task's files in their order, up to `max_rows` rows; one has `rows` or PART_ROWS.

    With `weights` each entry of `files` has its own limit.
    """
    parts: list[Shard] = []
    form, entries = format_of(task), [data_files(where) for where in task.files]
    limits = mixture_limits(task, entries)
    left, number = task.max_rows, 0
    for at, entry in enumerate(entries):
        left = limits[at] if limits else left
        for file in entry:
            shards = form(file).shards(file, rows)
            if left is not None:
                shards, taken = first_rows(shards, left)
                left -= taken
            parts += [replace(shard, name=f"{number:04d}-{i:05d}") for i, shard in enumerate(shards)]
            number += 1
    return parts


def mixture_limits(task: Reader, entries: Sequence[Sequence[str]]) -> list[int]:
    """Return how many rows to read of each entry of `files`: as many as their `weights` and `max_rows` allow."""
    if not task.weights:
        return []
    weights = [Fraction(str(weight)) for weight in task.weights]
    there = [sum(count_rows(file) for file in entry) for entry in entries]
    most = min(rows / weight for rows, weight in zip(there, weights, strict=True))
    if task.max_rows is not None:
        most = min(most, task.max_rows / sum(weights, Fraction()))
    limits = [int(most * weight) for weight in weights]
    if not min(limits):
        raise DataError(
            f"{task.files[limits.index(0)]}: with weights = {list(task.weights)} no row of it would be read"
        )
    return limits


def finish_import(summaries: Sequence[PartSummary], schema: pa.Schema, out: Path) -> Counts:
    """Refuse rows that repeat one of another part, gather the quarantine and write the manifest. Return the counts.

    It may be cut off and run again: the rows to drop are noted before any file is rewritten.
    """
    files = Counter[str]()
    for summary in summaries:
        files[summary["file"]] += summary["made"]
    made = files.total()
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
                files[rows[0].origin.rpartition(":")[0]] -= 1
    good, ignored = sum(summary["good"] for summary in summaries) - refused["duplicate row"], Counter[str]()
    for summary in summaries:
        refused.update(summary["refused"])
        ignored.update(summary.get("ignored", {}))
    truncated = sum(summary.get("truncated", 0) for summary in summaries)
    counts = tables.counts_of(good, dict(refused.most_common()), ignored, truncated)
    examples = [example for summary in summaries for example in summary["examples"]][:EXAMPLES]
    if len(files) > 1:
        counts["files"] = dict(files)
    tables.write_manifest(out, schema, counts, files.total(), examples)
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


def check_job(job: Job) -> list[Report]:
    """Return a report of each file of a job's sections, whose rows are read and tokenized as the job does.

    Raises DataError for what cannot be read or recognised, and ModelError for a model that cannot be used.
    """
    init, reports = job.model.init, list[Report]()
    grid: dict[str, Any] = {"block_size": init.block_size} if init else {}
    if job.model.path:
        grid = grid_of(job.model.path)
    tokenizer = job_tokenizer(job)
    for section in (job.task, job.sft):
        if isinstance(section, Reader) and section.files:
            target, form = (
                Target(tokenizer, **_limits(section), **grid),
                format_of(section, needs_answers(job, section)),
            )
            files = groupby(import_parts(section), key=lambda part: part.file)
            reports += [_check_file(file, form(file), list(parts), section.type, target) for file, parts in files]
    return reports


def check_data(source: str, max_tokens: int | None = None, tokenizer: Path | None = None) -> list[Report]:
    """Return a report of a table, or one for each file. Raises DataError for what cannot be read or recognised.

    A table's rows must have at most `max_tokens`, and ids of the tokenizer in the directory `tokenizer`, where these
    are given. Files are read as the first type of task that knows their columns, and with a tokenizer also tokenized.
    """
    schema = None if "://" in source else tables.schema_of(Path(source))
    given = None if tokenizer is None else tokenizers.load_tokenizer(tokenizer)
    if schema is not None:
        digest = None if given is None else tokenizers.tokenizer_hash(given)
        return [tables.check_folder(Path(source), schema, Expected(digest, max_tokens))]
    longest = 1 << 30
    target = None if given is None else Target(given, 1, max_prompt_tokens=longest, max_response_tokens=longest)
    found = [(file, *_recognise(file)) for file in data_files(source)]
    return [_check_file(file, form, form.shards(file), kind, target) for file, kind, form in found]


def _recognise(file: str) -> tuple[str, Format[Any]]:
    """Return the first type of task that knows a file's columns, and its format. Raises DataError if none does."""
    unknown: list[DataError] = []
    for kind, how in KINDS.items():
        try:
            return kind, how.form(file, AS_NAMED)
        except DataError as error:
            unknown.append(error)
    raise unknown[0]


def _check_file(file: str, form: Format[Any], parts: list[Shard], kind: str, target: Target | None) -> Report:
    tally, odd = Tally(), 0
    for rows, bad in (batch for part in parts for batch in form.batches(part)):
        table, unfit = KINDS[kind].tokenize(rows, target) if target else (None, [])
        tally.refused += bad + unfit
        odd += sum(map(_outgrown, rows))
        if target:
            tally.add(rows, form.rows_each, table, target)
        else:
            tally.good += len(rows) * form.rows_each
            tally.ignored.update(name for row in rows for name in row.ignored)
    name = f"prompts, {form.name}" if kind == "prompts" else form.name
    says = f"in {odd} rows the two answers begin alike for longer than the prompt; is it the whole question?"
    warnings = (says,) if odd * 2 > tally.good > 0 else ()
    return Report(file, name, tally.counts(), tuple(tally.refused), tuple(tally.examples), warnings)


def _outgrown(row: Row) -> bool:
    """Return whether a pair's prompt is a text much shorter than the common beginning of its answers."""
    if not isinstance(row, PreferenceRow) or not isinstance(row.prompt, str):
        return False
    if not isinstance(row.chosen, str) or not isinstance(row.rejected, str):
        return False
    return common_length(row.chosen, row.rejected) > 20 + 3 * len(row.prompt)
