"""A job's task -> the tables and tokenizer its stages read: examples, prompts, or preference pairs."""

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.config import Job, PreferencesTask
from dtrpo_ray.errors import DataError
from dtrpo_ray.importers import read_preferences, tokenize_preferences, write_quarantine
from dtrpo_ray.records import CONTRACT_VERSION, EXAMPLE
from dtrpo_ray.tokenizer import character_tokenizer, encode_prompt, encode_response, eos_token_id, load_tokenizer

PUZZLES = {"sudoku": "dtrpo_ray.tasks.sudoku", "countdown": "dtrpo_ray.tasks.countdown"}
SHARD_ROWS = 20_000  # rows of one Parquet file, so that Ray Data has files to spread


def puzzle(job: Job) -> ModuleType:
    """The module of the job's puzzle: generate, score, read_public."""
    return importlib.import_module(PUZZLES[job.task.type])


def generate_puzzles(job: Job, count: int, split: str, seed: int) -> list[dict[str, str]]:
    """`count` puzzles {prompt, answer} of "train" or "test" with the job's difficulty."""
    options = job.task.model_dump(exclude={"type", "public_tests"})
    rows: list[dict[str, str]] = puzzle(job).generate(count, split, seed=seed, **options)
    return rows


def job_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """The tokenizer of the model directory, of `model.tokenizer`, or the puzzle's characters."""
    source = job.model.path or job.model.tokenizer
    return load_tokenizer(source) if source else character_tokenizer(puzzle(job).ALPHABET)


def write_examples(job: Job, tokenizer: PreTrainedTokenizerBase, out: Path) -> dict[str, Any]:
    """Generated SFT examples as Parquet (the table example/v1)."""
    assert job.sft is not None
    assert job.model.init is not None
    rows = generate_puzzles(job, job.sft.num_examples, "train", job.seed)
    end = None if puzzle(job).FIXED_LENGTH else eos_token_id(tokenizer)
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


def write_preferences(
    job: Job, tokenizer: PreTrainedTokenizerBase, block_size: int, block_origin: str, out: Path
) -> dict[str, Any]:
    """Preference files -> the table preference/v1, with what was refused in quarantine.jsonl.

    The counts add up: pairs, quarantined and left out by `task.max_rows` are the rows of the files.
    """
    assert isinstance(job.task, PreferencesTask)
    rows, rejected = [], []
    for file in job.task.files:
        good, bad = read_preferences(file)
        rows += good
        rejected += bad
    task = job.task
    num_read, rows = len(rows), rows[: task.max_rows]
    table, too_long = tokenize_preferences(
        rows, tokenizer, block_size, task.max_prompt_tokens, task.max_response_tokens, block_origin
    )
    rejected += too_long
    write_quarantine(rejected, out / "quarantine.jsonl")
    if not len(table):
        raise DataError(
            f"{task.files[0]}: no row is left of {len(rows)}; see the reasons in {out / 'quarantine.jsonl'}"
        )
    write_shards(table, out)
    return {"pairs": len(table), "quarantined": len(rejected), "left_out": num_read - len(rows)}


def write_shards(table: pa.Table, out: Path) -> None:
    """Write a table as part-00000.parquet, part-00001.parquet ... of at most SHARD_ROWS rows."""
    for number, start in enumerate(range(0, len(table), SHARD_ROWS)):
        pq.write_table(table.slice(start, SHARD_ROWS), out / f"part-{number:05d}.parquet")
