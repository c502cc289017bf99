"""Prompts -> decoded, scored responses: the worker of a part, which holds the engine.

A prompt row has `row_id`, `prompt_id`, `prompt` and `denoising_steps`; what comes back is the table trajectory/v1.
A response's seed comes from (seed, row id), so parts, batches and actors change nothing.
"""

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from dtrpo_ray.engine import Engine
from dtrpo_ray.generation import ENGINE_NAME, Generation, SamplingParams
from dtrpo_ray.records import CONTRACT_VERSION, TRAJECTORY
from dtrpo_ray.rows import how_decoded, tokenizer_hash
from dtrpo_ray.rules import check_table
from dtrpo_ray.session import cpu_threads
from dtrpo_ray.tables import write_whole
from dtrpo_ray.trajectory import row_generator


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One pass over prompts: with which model, how, and who scores; `scorer` is "module:function"."""

    model: Path
    model_hash: str
    max_new_tokens: int
    temperature: float
    scorer: str
    seed: int
    batch_size: int
    data_hash: str


@dataclass(frozen=True, slots=True)
class PromptsPart:
    """Some prompt rows, and the name of the file that their responses become."""

    name: str
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        return f"prompts {self.rows[0]['row_id']} to {self.rows[-1]['row_id']}"


def prompts_parts(prompts: Sequence[dict[str, Any]], batch_size: int) -> list[PromptsPart]:
    """Prompt rows in parts of about a batch for each number of denoising steps, which are decoded apart."""
    size = batch_size * len({row["denoising_steps"] for row in prompts})
    chunks = [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]
    return [PromptsPart(f"part-{number:05d}.parquet", rows) for number, rows in enumerate(chunks)]


class Recorder:
    """Loads the engine once, then decodes and scores parts of prompts, each into a file of the part's name."""

    def __init__(self, job: DecodeJob, sharers: int) -> None:
        torch.set_num_threads(cpu_threads(sharers))
        self.job, self.engine = job, Engine.load(job.model)
        self.hashes = {"model_hash": job.model_hash, "tokenizer_hash": tokenizer_hash(self.engine.tokenizer)}
        self.hashes["data_hash"] = job.data_hash
        self.score = pkgutil.resolve_name(job.scorer)

    def __call__(self, part: PromptsPart, out: Path) -> dict[str, Any]:
        """Decode one part. Raises DataError if a row breaks a rule of its table."""
        made: list[dict[str, Any]] = []
        for steps in sorted({row["denoising_steps"] for row in part.rows}):
            rows = [row for row in part.rows if row["denoising_steps"] == steps]
            for start in range(0, len(rows), self.job.batch_size):
                made += self._decode(rows[start : start + self.job.batch_size], steps)
        table = check_table(pa.Table.from_pylist(made, schema=TRAJECTORY), str(part))
        write_whole(table, out / part.name)
        return {"rows": len(made), "scored": len(made), "sum": sum(row["reward"] for row in made)}

    def _decode(self, rows: list[dict[str, Any]], denoising_steps: int) -> list[dict[str, Any]]:
        job = self.job
        params = SamplingParams(job.max_new_tokens, denoising_steps, job.temperature)
        prompts = [self.engine.encode(row["prompt"]) for row in rows]
        seeds = [int(row_generator(job.seed, row["row_id"], 0, "decode").integers(2**63)) for row in rows]
        done = self.engine.generate(prompts, params, seeds)
        whole = zip(rows, prompts, seeds, done, strict=True)
        return [self._trajectory(row, prompt, seed, params, generation) for row, prompt, seed, generation in whole]

    def _trajectory(
        self, row: dict[str, Any], prompt: list[int], seed: int, params: SamplingParams, generation: Generation
    ) -> dict[str, Any]:
        text = self.engine.decode(generation.text_ids)
        return {
            "contract_version": CONTRACT_VERSION,
            **{name: row[name] for name in ("row_id", "prompt_id", "prompt")},
            "response": text,
            "prompt_ids": prompt,
            "response_ids": generation.ids,
            "steps": generation.steps,
            "logps": generation.logps,
            "num_forwards": generation.num_forwards,
            "reward": self.score(row["prompt"], text),
            "reward_source": self.job.scorer,
            **how_decoded(self.engine.model, params, len(prompt), generation.steps),
            "seed": seed,
            "engine": ENGINE_NAME,
            **self.hashes,
        }
