"""A job's task -> the tables and the tokenizer that its stages read: examples, prompts, or imported files."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.config.job import Job
from dtrpo_ray.config.task import FilesTask
from dtrpo_ray.data.formats.base import Format
from dtrpo_ray.data.formats.files import Shard, data_files, plan_shards
from dtrpo_ray.data.formats.preferences import preference_format
from dtrpo_ray.data.formats.prompts import prompt_format
from dtrpo_ray.data.formats.reading import first_rows
from dtrpo_ray.data.formats.responses import response_format
from dtrpo_ray.data.formats.tokenize import Target, split_origins, tokenize_preferences, tokenize_responses
from dtrpo_ray.data.schemas import CONTRACT_VERSION, EXAMPLE
from dtrpo_ray.data.tables import (
    QUARANTINE,
    Counts,
    Rejected,
    id_shares,
    quarantine_lines,
    repeated_rows,
    with_columns,
    write_manifest,
    write_quarantine,
    write_shards,
    write_whole,
)
from dtrpo_ray.data.tasks.puzzles import generate_puzzles, puzzle_module
from dtrpo_ray.errors import DataError
from dtrpo_ray.files import read_json, whole_file, write_json
from dtrpo_ray.models.tokenizer import character_tokenizer, encode_prompt, encode_response, eos_token_id, load_tokenizer

# type of a task -> how the format of its files is recognised
FORMAT_OF: dict[str, Callable[[str], Format[Any]]] = {
    "preferences": preference_format,
    "trajectories": response_format,
    "prompts": prompt_format,
}


def job_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model directory, of `model.tokenizer`, or of the puzzle's characters."""
    if source := job.model.path or job.model.tokenizer:
        return load_tokenizer(source)
    assert job.puzzle is not None
    return character_tokenizer(puzzle_module(job.puzzle).ALPHABET)


def write_examples(job: Job, tokenizer: PreTrainedTokenizerBase, out: Path) -> dict[str, int]:
    """Write generated SFT examples as Parquet (the table example/v1). Return how many there are."""
    assert job.sft is not None
    assert job.model.init is not None
    assert job.puzzle is not None
    rows = generate_puzzles(job.puzzle, job.sft.num_examples, "train", job.seed)
    end = None if puzzle_module(job.puzzle).FIXED_LENGTH else eos_token_id(tokenizer)
    size = job.model.init.block_size
    # puzzles share their answers: a few hundred texts of a hundred thousand
    prompt_ids = cache(lambda text: encode_prompt(tokenizer, text))
    answer_ids = cache(lambda text, prompt_len: encode_response(tokenizer, text, prompt_len, size, end))
    prompts = [prompt_ids(row["prompt"]) for row in rows]
    answers = [answer_ids(row["answer"], len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
    table = pa.table(
        {
            "contract_version": np.full(len(rows), CONTRACT_VERSION, dtype=np.int32),
            "row_id": [f"example-{i:08d}" for i in range(len(rows))],
            "prompt_ids": prompts,
            "chosen_ids": answers,
        },
        schema=EXAMPLE,
    )
    write_shards(table, out)
    return {"examples": len(rows)}


class PartSummary(TypedDict):
    """The counts of one part of a file; `made` are rows of the table, `good` the rows of the file in them."""

    rows: int
    good: int
    made: int
    refused: dict[str, int]


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
        task, grid = source.task, source.grid
        self.task, self.hashes = task, source.data_hashes
        limits = (task.max_prompt_tokens, task.max_response_tokens)
        self.target = Target(
            load_tokenizer(source.tokenizer), grid["block_size"], *limits, grid["block_origin"], grid["shift"]
        )
        self.form: Callable[[str], Format[Any]] = cache(FORMAT_OF[task.type])

    def __call__(self, part: "ImportPart", out: Path) -> PartSummary:
        """Import one part. Raises DataError for a file that cannot be read, and with `task.strict` for a bad row."""
        form, data_hash = self.form(part.shard.file), self.hashes[part.shard.file]
        summary: PartSummary = {"rows": 0, "good": 0, "made": 0, "refused": {}}
        refused: list[Rejected] = []
        for batch, (rows, bad) in enumerate(self._batches(part)):
            table, unfit = self._tokenize(rows)
            table = with_columns(table, {"data_hash": [data_hash] * len(table)})
            refused += (bad := bad + unfit)
            if bad and self.task.strict:
                raise DataError(f"{bad[0].origin}: {bad[0].reason}: {bad[0].detail} (strict)")
            summary["good"] += len(table) * form.rows_each
            summary["made"] += len(table)
            write_buckets(table, out, f"part-{part.name}-{batch:04d}")
        summary["refused"] = Counter(row.reason for row in refused)
        summary["rows"] = summary["good"] + len(refused)
        write_quarantine(refused, out / f"refused-{part.name}.jsonl")
        return summary

    def _batches(self, part: "ImportPart") -> Iterator[tuple[Any, list[Rejected]]]:
        """Yield rows to tokenize together, and the rows refused before that."""
        yield from self.form(part.shard.file).tables(part.shard)

    def _tokenize(self, rows: Any) -> tuple[pa.Table, list[Rejected]]:
        tokenize = tokenize_preferences if self.task.brings_pairs else tokenize_responses
        return tokenize(rows, self.target)


@dataclass(frozen=True, slots=True)
class ImportPart:
    """A part of a file, with a name that is unique in the job."""

    name: str
    shard: Shard

    def __str__(self) -> str:
        return str(self.shard)


def import_parts(task: FilesTask, rows: int | None = None) -> list[ImportPart]:
    """Return the parts of a task's files in their order, up to `max_rows` rows.

    A part has `rows` rows, or PART_ROWS if they are not given.
    """
    parts: list[ImportPart] = []
    left = task.max_rows
    for number, file in enumerate(file for where in task.files for file in data_files(where)):
        paired = task.brings_pairs
        shards = preference_format(file).shards(file, rows) if paired else plan_shards(file, rows)
        if left is not None:
            shards, taken = first_rows(shards, left)
            left -= taken
        parts += [ImportPart(f"{number:04d}-{i:05d}", shard) for i, shard in enumerate(shards)]
    return parts


def finish_import(summaries: Sequence[PartSummary], schema: pa.Schema, out: Path) -> Counts:
    """Refuse rows that repeat one of another part, gather the quarantine and write the manifest. Return the counts.

    It may be cut off and run again: the rows to drop are noted before any file is rewritten.
    """
    made = sum(summary["made"] for summary in summaries)
    shares = id_shares(made)
    refused = Counter[str]()
    with whole_file(out / QUARANTINE) as partial, partial.open("w") as quarantine:
        for file in sorted(out.glob("refused-*.jsonl")):
            quarantine.write(file.read_text())
        for share in range(shares):
            doomed = _duplicates(out, share, shares)
            _drop(doomed, out)
            for _, origin, first in (repeat for entry in doomed.values() for repeat in entry["refused"]):
                rows = [Rejected(where, "duplicate row", f"the same as {first}") for where in split_origins(origin)]
                quarantine.writelines(quarantine_lines(rows))
                refused["duplicate row"] += len(rows)
                made -= 1
    good = sum(summary["good"] for summary in summaries) - refused["duplicate row"]
    for summary in summaries:
        refused.update(summary["refused"])
    by_reason = {reason: count for reason, count in refused.most_common() if count}
    counts: Counts = {"rows": sum(summary["rows"] for summary in summaries), "good": good, "refused": by_reason}
    write_manifest(out, schema, counts, made)
    return counts


def _duplicates(out: Path, share: int, shares: int) -> dict[str, _RowsToDrop]:
    """Return the rows that repeat a row_id, by file name; they are found once and then noted in a file.

    Only one share of the ids is looked at, and only the origins of repeated rows are held.
    """
    note = out / f"duplicates-{share:05d}.json"
    if note.exists():
        return dict(read_json(note))
    found = repeated_rows(sorted(out.glob("part-*.parquet")), share, shares)
    firsts: dict[Path, set[int]] = {}
    for repeats in found.values():
        for file, row in repeats.values():
            firsts.setdefault(file, set()).add(row)
    origins: dict[tuple[Path, int], str] = {}
    for file in {*found, *firsts}:
        rows = sorted({*found.get(file, ()), *firsts.get(file, ())})
        column = pq.read_table(file, columns=["origin"])["origin"].take(pa.array(rows))
        origins |= {(file, row): origin for row, origin in zip(rows, column.to_pylist(), strict=True)}
    doomed: dict[str, _RowsToDrop] = {
        file.name: {
            "rows": pq.read_metadata(file).num_rows,
            "refused": [(row, origins[file, row], origins[first]) for row, first in repeats.items()],
        }
        for file, repeats in found.items()
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
            write_whole(table.filter(pa.array(keep)), out / name)


def write_buckets(table: pa.Table, out: Path, name: str) -> None:
    """Write rows of like length together: `NAME-00512.parquet` holds those of 257 to 512 tokens."""
    sides = [s for s in ("response_ids", "chosen_ids", "rejected_ids") if s in table.schema.names]
    lengths = [pc.list_value_length(table[s]).to_numpy() for s in sides]
    tokens = pc.list_value_length(table["prompt_ids"]).to_numpy() + np.max(lengths, axis=0, initial=0)
    bucket = 2 ** np.ceil(np.log2(np.maximum(tokens, 1))).astype(np.int64)
    for size in np.unique(bucket):
        write_whole(table.filter(pa.array(bucket == size)), out / f"{name}-{size:05d}.parquet")
