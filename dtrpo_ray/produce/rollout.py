"""Decode responses to prompts and record them as rows of trajectory/v1; the workers here hold the engine.

A response's seed comes from (seed, row id), so its text does not depend on parts, batches or actors.
"""

import json
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import torch

from dtrpo_ray.config.decode import STEPS, RolloutConfig, Setting
from dtrpo_ray.data.formats.base import attempt, split_rejected
from dtrpo_ray.data.formats.parsing import Refusal
from dtrpo_ray.data.formats.prompts import PromptRow
from dtrpo_ray.data.formats.tokenize import Batch, apply_rules
from dtrpo_ray.data.prepare import Importer, ImportJob
from dtrpo_ray.data.rows import how_decoded
from dtrpo_ray.data.rules import check_table
from dtrpo_ray.data.schemas import TRAJECTORY, TrajectoryRow
from dtrpo_ray.data.tables import Rejected, write_whole
from dtrpo_ray.decode.engine import Engine, block_size_error
from dtrpo_ray.decode.types import SamplingParams, to_params
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.method.trajectory import row_generator
from dtrpo_ray.models.registry import skeleton_of
from dtrpo_ray.models.tokenizer import tokenizer_hash
from dtrpo_ray.session import cpu_threads


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """The model, sampling parameters and scorer ("module:function" or None) of one pass over requests.

    A request is the part of its trajectory's row that is known before: row_id, prompt_id, prompt and, if there are any,
    prompt_ids, answer, origin and data_hash. Its denoising_steps or its sampler's threshold replace those of `params`.
    Requests with the same ones are decoded `batch_size` at a time.
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
    if problem := block_size_error(skeleton_of(model), config, max(config.step_counts, default=None)):
        raise ConfigError(f"rollout.{problem[1]}")


class Recorder:
    """Load the engine once, then decode and score parts of requests, each into a file of the part's name."""

    def __init__(self, job: DecodeJob, sharers: int) -> None:
        torch.set_num_threads(cpu_threads(sharers))
        self.job, self.engine = job, Engine.load(job.model)
        self.tokenizer_hash = tokenizer_hash(self.engine.tokenizer)
        self.score = pkgutil.resolve_name(job.scorer) if job.scorer else None

    def __call__(self, part: "RequestPart", out: Path) -> dict[str, float]:
        """Decode one part and return its counts. Raises DataError if a row breaks a rule of its table."""
        table = check_table(self.decode(part.requests), str(part))
        write_whole(table, out / part.name)
        rewards = table["reward"].drop_null().to_pylist()
        return {"rows": len(table), "scored": len(rewards), "sum": sum(rewards)}

    def decode(self, requests: Sequence[TrajectoryRow]) -> pa.Table:
        """Decode a trajectory for each request, those with the same setting together."""
        rows: list[TrajectoryRow] = []
        for setting in dict.fromkeys(map(_setting, requests)):
            same = [request for request in requests if _setting(request) == setting]
            params = self.job.params.model_copy(update={setting.field: setting.value} if setting else {})
            for start in range(0, len(same), self.job.batch_size):
                rows += self._decode_batch(same[start : start + self.job.batch_size], params)
        return pa.Table.from_pylist(rows, schema=TRAJECTORY)

    def _decode_batch(self, batch: list[TrajectoryRow], params: SamplingParams) -> Iterator[TrajectoryRow]:
        prompts = [request.get("prompt_ids") or self.engine.encode(request["prompt"]) for request in batch]
        seeds = [int(row_generator(self.job.seed, r["row_id"], 0, "decode").integers(2**63)) for r in batch]
        generations = self.engine.generate(prompts, params, seeds)
        for request, prompt, seed, generation in zip(batch, prompts, seeds, generations, strict=True):
            text = self.engine.decode(generation.text_ids)
            yield {
                **request,
                **how_decoded(self.engine.model, params, prompt, generation, seed),
                "response": text,
                "reward": self.score(request["prompt"], text, request.get("answer")) if self.score else None,
                "reward_source": self.job.scorer,
                "model_hash": self.job.model_hash,
                "tokenizer_hash": self.tokenizer_hash,
            }


@dataclass(frozen=True, slots=True)
class RequestPart:
    """Some responses to decode, and the name of the file that they become."""

    name: str
    requests: list[TrajectoryRow]

    def __str__(self) -> str:
        return f"prompts {self.requests[0]['row_id']} to {self.requests[-1]['row_id']}"


def at_setting(request: TrajectoryRow, setting: Setting) -> TrajectoryRow:
    """Return a request with its own setting in place of the job's."""
    if setting.field == STEPS:
        return {**request, "denoising_steps": int(setting.value)}
    return {**request, "sampler": {"threshold": setting.value}}


def _setting(request: TrajectoryRow) -> Setting | None:
    """Return the setting that a request has of its own, if any."""
    if steps := request.get("denoising_steps"):
        return Setting(STEPS, steps)
    threshold = (request.get("sampler") or {}).get("threshold")
    return None if threshold is None else Setting("threshold", threshold)


def sample_requests(config: RolloutConfig, prompt: TrajectoryRow) -> Iterator[TrajectoryRow]:
    """Yield a request for each sample of a prompt, which takes its turn in the numbers of denoising steps, if any.

    The sample's number is added to the prompt's row_id (from 0) and to its origin (from 1), if it has one.
    """
    steps, origin = config.step_counts or (None,), prompt.get("origin")
    for sample in range(config.num_samples):
        yield {
            **prompt,
            "row_id": f"{prompt['row_id']}-{sample:02d}",
            "origin": origin and f"{origin}#{sample + 1}",
            "denoising_steps": steps[sample % len(steps)],
        }


def request_parts(requests: Sequence[TrajectoryRow], batch_size: int) -> list[RequestPart]:
    """Cut requests into parts of about one batch for each setting, since these decode apart."""
    size = batch_size * len(set(map(_setting, requests)))
    chunks = [list(requests[start : start + size]) for start in range(0, len(requests), size)]
    return [RequestPart(f"part-{number:05d}.parquet", chunk) for number, chunk in enumerate(chunks)]


class FileRecorder(Importer):
    """Decode several responses to each prompt of a part of a file, in one round of a job."""

    def __init__(self, source: ImportJob, job: DecodeJob, config: RolloutConfig, number: int, sharers: int) -> None:
        super().__init__(source)
        self.recorder, self.config, self.number = Recorder(job, sharers), config, number
        engine = self.recorder.engine
        size = config.block_length or engine.model.block_size
        self.room = engine.context_tokens - -(-config.max_new_tokens // size) * size

    def _tokenize(self, rows: list[PromptRow]) -> tuple[pa.Table, list[Rejected]]:
        batch = Batch(self.target, [row.prompt for row in rows])
        asked, refused = split_rejected(attempt(row.origin, self._requests, row, batch) for row in rows)
        return apply_rules(self.recorder.decode(list(chain.from_iterable(asked))), refused)

    def _requests(self, row: PromptRow, batch: Batch) -> Iterator[TrajectoryRow]:
        """Return the responses to decode to a prompt. Raises Refusal for one that cannot be asked."""
        prompt_id, ids = batch.prompt(row)
        if len(ids) > self.room:
            detail = f"{len(ids)} tokens; with rollout.max_new_tokens for the answer, {self.room} fit"
            raise Refusal("prompt too long", detail)
        return sample_requests(self.config, {
            "row_id": f"r{self.number}-{prompt_id}",
            "prompt_id": prompt_id,
            "prompt": row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt, ensure_ascii=False),
            "prompt_ids": ids,
            "answer": row.answer,
            "origin": row.origin,
        })  # fmt: skip
