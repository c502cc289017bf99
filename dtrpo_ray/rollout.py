"""Ray Data shell: prompts -> decoded, scored responses by a pool of actors that hold the engine.

A prompt row has `row_id`, `prompt_id`, `prompt` and `denoising_steps`; what comes back is the table trajectory/v1.
A response's seed comes from (seed, row id), so batches and actors change nothing.
"""

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import torch

from dtrpo_ray.config import ClusterConfig
from dtrpo_ray.engine import Engine
from dtrpo_ray.generation import ENGINE_NAME, Generation, SamplingParams
from dtrpo_ray.records import CONTRACT_VERSION, TRAJECTORY
from dtrpo_ray.rows import how_decoded, tokenizer_hash
from dtrpo_ray.session import CPU_WORKER_ENV, cpu_threads, uses_gpu
from dtrpo_ray.stages import sha256_json
from dtrpo_ray.tables import write_manifest
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


class _Decoder:
    """An actor of the pool: loads the engine once, then decodes and scores batches of prompts."""

    def __init__(self, job: DecodeJob, data_hash: str, sharers: int) -> None:
        torch.set_num_threads(cpu_threads(sharers))
        self.job, self.engine = job, Engine.load(job.model)
        self.hashes = {"model_hash": job.model_hash, "tokenizer_hash": tokenizer_hash(self.engine.tokenizer)}
        self.hashes["data_hash"] = data_hash
        self.score = pkgutil.resolve_name(job.scorer)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        made: list[dict[str, Any]] = []
        for steps in sorted({row["denoising_steps"] for row in rows}):
            made += self._decode([row for row in rows if row["denoising_steps"] == steps], steps)
        return pa.Table.from_pylist(made, schema=TRAJECTORY)

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


def decode(
    prompts: Sequence[dict[str, Any]], job: DecodeJob, cluster: ClusterConfig, batch_size: int
) -> ray.data.Dataset:
    """A lazy dataset of trajectories, one for each prompt row."""
    gpu = uses_gpu(cluster)
    blocks = -(-len(prompts) // batch_size)
    data_hash = sha256_json([row["prompt"] for row in prompts])
    return (
        ray.data.from_arrow(pa.Table.from_pylist(list(prompts)))
        .repartition(blocks)
        .map_batches(
            _Decoder,
            fn_constructor_kwargs={"job": job, "data_hash": data_hash, "sharers": cluster.num_actors},
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=cluster.num_actors),
            num_cpus=1,
            num_gpus=1 if gpu else 0,
            runtime_env={"env_vars": {} if gpu else CPU_WORKER_ENV},
        )
    )


def decode_to_table(
    prompts: Sequence[dict[str, Any]], job: DecodeJob, cluster: ClusterConfig, batch_size: int
) -> pa.Table:
    """Decode and gather on the driver: for evaluations, whose size is bounded."""
    return pa.concat_tables(ray.get(decode(prompts, job, cluster, batch_size).to_arrow_refs()))


def decode_to_folder(
    prompts: Sequence[dict[str, Any]], job: DecodeJob, cluster: ClusterConfig, batch_size: int, out: Path
) -> None:
    """Decode and write Parquet files from the workers, named by their place alone: same rows, same files."""
    decode(prompts, job, cluster, batch_size).write_parquet(str(out.resolve()))
    for number, file in enumerate(sorted(out.glob("*.parquet"))):  # Ray's names are a random id, then the place
        file.rename(out / f"part-{number:05d}.parquet")
    write_manifest(out, TRAJECTORY)
