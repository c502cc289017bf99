"""Prompts -> decoded responses as rows of trajectory/v1: the workers of a part, which hold the engine.

A response's seed comes from (seed, row id), so parts, batches and actors change nothing.
"""

import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dtrpo_ray.config.decode import POLICIES, STEPS, RolloutConfig
from dtrpo_ray.data.formats.base import split_batches
from dtrpo_ray.data.formats.prompts import PromptRow, prompts_table
from dtrpo_ray.data.formats.reading import BATCH_ROWS
from dtrpo_ray.data.formats.tokenize import apply_rules, tokenize_prompts
from dtrpo_ray.data.prepare import Importer, ImportJob, ImportPart
from dtrpo_ray.data.rows import how_decoded
from dtrpo_ray.data.rules import check_table
from dtrpo_ray.data.schemas import CONTRACT_VERSION, TRAJECTORY, TrajectoryRow
from dtrpo_ray.data.tables import Rejected, write_whole
from dtrpo_ray.decode.engine import Engine, block_size_error
from dtrpo_ray.decode.types import DECODER_NAME, Generation, SamplingParams, to_params
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.method.trajectory import row_generator
from dtrpo_ray.models.registry import skeleton_of
from dtrpo_ray.models.tokenizer import prompt_text, tokenizer_hash
from dtrpo_ray.session import cpu_threads

Asked = dict[str, Any]
"""A response to decode: row_id, prompt_id, prompt (text or messages), denoising_steps; and perhaps prompt_ids, answer,
origin and data_hash."""


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One pass over prompts: with which model, how, and who scores ("module:function") or nobody.

    Denoising steps are each row's own; rows of as many are decoded `batch_size` at a time.
    """

    model: Path
    model_hash: str
    params: SamplingParams
    batch_size: int
    seed: int
    scorer: str | None = None


def sampling_params(config: RolloutConfig) -> SamplingParams:
    """Return the decoder's parameters for a rollout, with the first of its numbers of denoising steps."""
    return to_params(config, max_new_tokens=config.max_new_tokens, denoising_steps=config.denoising_steps[0])


def require_fit(model: Path, config: RolloutConfig) -> None:
    """Raise ConfigError for a setting of [rollout] that the blocks of this model do not allow."""
    steps = max(config.denoising_steps) if POLICIES[config.policy] == STEPS else None
    if problem := block_size_error(skeleton_of(model), config, steps):
        raise ConfigError(f"rollout.{problem[1]}")


class Recorder:
    """Loads the engine once, then decodes and scores parts of prompts, each into a file of the part's name."""

    def __init__(self, job: DecodeJob, sharers: int) -> None:
        torch.set_num_threads(cpu_threads(sharers))
        self.job, self.engine = job, Engine.load(job.model)
        self.tokenizer_hash = tokenizer_hash(self.engine.tokenizer)
        self.score = pkgutil.resolve_name(job.scorer) if job.scorer else None

    def __call__(self, part: "PromptsPart", out: Path) -> dict[str, Any]:
        """Decode one part. Raises DataError if a row breaks a rule of its table."""
        table = check_table(self.decode(part.rows), str(part))
        write_whole(table, out / part.name)
        rewards = table["reward"].drop_null().to_pylist()
        return {"rows": len(table), "scored": len(rewards), "sum": sum(rewards)}

    def decode(self, asked: Sequence[Asked]) -> pa.Table:
        """A trajectory for each row, those of as many denoising steps together."""
        made: list[TrajectoryRow] = []
        for steps in sorted({row["denoising_steps"] for row in asked}):
            rows = [row for row in asked if row["denoising_steps"] == steps]
            params = self.job.params.model_copy(update={STEPS: steps})
            for start in range(0, len(rows), self.job.batch_size):
                made += self._decode(rows[start : start + self.job.batch_size], params)
        return pa.Table.from_pylist(made, schema=TRAJECTORY)

    def _decode(self, rows: Sequence[Asked], params: SamplingParams) -> list[TrajectoryRow]:
        prompts = [row.get("prompt_ids") or self.engine.encode(row["prompt"]) for row in rows]
        seeds = [int(row_generator(self.job.seed, row["row_id"], 0, "decode").integers(2**63)) for row in rows]
        done = self.engine.generate(prompts, params, seeds)
        whole = zip(rows, prompts, seeds, done, strict=True)
        return [self._trajectory(row, prompt, seed, params, generation) for row, prompt, seed, generation in whole]

    def _trajectory(
        self, row: Asked, prompt: list[int], seed: int, params: SamplingParams, generation: Generation
    ) -> TrajectoryRow:
        text = self.engine.decode(generation.text_ids)
        return {
            "contract_version": CONTRACT_VERSION,
            "row_id": row["row_id"],
            "prompt_id": row["prompt_id"],
            "origin": row.get("origin"),
            "answer": row.get("answer"),
            "data_hash": row.get("data_hash"),
            "prompt": prompt_text(row["prompt"], prompt, self.engine.tokenizer),
            "response": text,
            "prompt_ids": prompt,
            "response_ids": generation.ids,
            "steps": generation.steps,
            "logps": generation.logps,
            "num_forwards": generation.num_forwards,
            "reward": self.score(row["prompt"], text) if self.score else None,
            "reward_source": self.job.scorer,
            **how_decoded(self.engine.model, params, len(prompt), generation.steps),
            "seed": seed,
            "engine": DECODER_NAME,
            "model_hash": self.job.model_hash,
            "tokenizer_hash": self.tokenizer_hash,
        }


@dataclass(frozen=True, slots=True)
class PromptsPart:
    """Some responses to decode, and the name of the file that they become."""

    name: str
    rows: list[Asked]

    def __str__(self) -> str:
        return f"prompts {self.rows[0]['row_id']} to {self.rows[-1]['row_id']}"


def prompts_parts(asked: Sequence[Asked], batch_size: int) -> list[PromptsPart]:
    """Rows in parts of about a batch for each number of denoising steps, which are decoded apart."""
    size = batch_size * len({row["denoising_steps"] for row in asked})
    chunks = [list(asked[start : start + size]) for start in range(0, len(asked), size)]
    return [PromptsPart(f"part-{number:05d}.parquet", rows) for number, rows in enumerate(chunks)]


class FileRecorder(Importer):
    """Decodes the prompts of a part of a file, several samples of each, in a round of a job."""

    def __init__(self, source: ImportJob, job: DecodeJob, config: RolloutConfig, number: int, sharers: int) -> None:
        super().__init__(source)
        self.recorder, self.config, self.number = Recorder(job, sharers), config, number
        engine = self.recorder.engine
        size = config.block_length or engine.model.block_size
        self.room = engine.context_tokens - -(-config.max_new_tokens // size) * size

    def _batches(self, part: ImportPart) -> Iterator[tuple[list[PromptRow], list[Rejected]]]:
        yield from split_batches(self.form(part.shard.file).read(part.shard), BATCH_ROWS)

    def _tokenize(self, rows: list[PromptRow]) -> tuple[pa.Table, list[Rejected]]:
        prompt_ids, ids, refusals = tokenize_prompts(prompts_table(rows), self.target)

        def detail(row: int) -> str:
            return f"{ids.lengths[row]} tokens; with rollout.max_new_tokens for the answer, {self.room} fit"

        refusals.refuse(ids.lengths > self.room, "prompt too long", detail)
        asked: list[Asked] = []
        for at in np.flatnonzero(refusals.good):
            row = rows[at]
            same = {"prompt_id": prompt_ids[int(at)].as_py(), "prompt": row.prompt, "answer": row.answer}
            same |= {"prompt_ids": ids.take(np.array([at])).flat.tolist()}
            asked += self._samples(same, row.origin)
        return apply_rules(self.recorder.decode(asked), refusals.to_rejected(lambda at: [rows[at].origin]))

    def _samples(self, same: Asked, origin: str) -> Iterator[Asked]:
        steps = self.config.denoising_steps
        for sample in range(self.config.num_samples):
            names = {"row_id": f"r{self.number}-{same['prompt_id']}-{sample:02d}", "origin": f"{origin}#{sample + 1}"}
            yield {**same, **names, "denoising_steps": steps[sample % len(steps)]}
