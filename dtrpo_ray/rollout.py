"""Ray Data shell: prompts -> decoded, scored responses by a pool of actors that hold the engine.

`rollout` writes whole trajectories (the table trajectory/v1); `decode` returns rows for evaluation.
A response's seed comes from (seed, prompt, sample), so batches and actors change nothing.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import torch

from dtrpo_ray.config import ClusterConfig
from dtrpo_ray.engine import Engine
from dtrpo_ray.records import CONTRACT_VERSION, TRAJECTORY
from dtrpo_ray.sampler import SamplingParams
from dtrpo_ray.session import CPU_WORKER_ENV, cpu_threads, uses_gpu
from dtrpo_ray.trajectory import row_generator

ENGINE_NAME = "dtrpo_ray.sampler/1"  # raise the number when decoding changes what a seed gives


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One pass over prompts: with which model, how, and who scores. `scorer` is "module:function" or empty."""

    model: Path
    model_hash: str
    params: SamplingParams
    scorer: str
    seed: int


class _Decoder:
    """An actor of the pool: loads the engine once, then decodes and scores batches of prompts."""

    def __init__(self, job: DecodeJob, sharers: int) -> None:
        torch.set_num_threads(cpu_threads(sharers))
        self.job, self.engine = job, Engine.load(job.model)
        module, _, function = job.scorer.partition(":")
        self.score = getattr(importlib.import_module(module), function) if module else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        job, engine = self.job, self.engine
        rows = batch.to_pylist()
        prompts = [engine.encode(row["prompt"]) for row in rows]
        seeds = [int(row_generator(job.seed, row["row_id"], 0, "decode").integers(2**63)) for row in rows]
        generations = engine.generate(prompts, job.params, seeds)
        texts = [engine.decode(g.text_ids) for g in generations]
        rewards = [self.score(r["prompt"], t) if self.score else None for r, t in zip(rows, texts, strict=True)]
        facts = {
            "contract_version": CONTRACT_VERSION,
            "reward_source": job.scorer,
            "block_size": engine.model.block_size,
            "block_origin": "global",
            "mask_id": engine.model.mask_id,
            "temperature": job.params.temperature,
            "denoising_steps": job.params.denoising_steps,
            "engine": ENGINE_NAME,
            "model_hash": job.model_hash,
        }
        made = [
            {
                **facts,
                "row_id": row["row_id"],
                "prompt_id": row["prompt_id"],
                "prompt": row["prompt"],
                "response": text,
                "prompt_ids": prompt,
                "response_ids": g.ids,
                "steps": g.steps,
                "logps": g.logps,
                "num_forwards": g.num_forwards,
                "reward": reward,
                "seed": seed,
            }
            for row, prompt, g, text, reward, seed in zip(rows, prompts, generations, texts, rewards, seeds, strict=True)
        ]
        return pa.Table.from_pylist(made, schema=TRAJECTORY)


def decode(prompts: Sequence[dict[str, str]], job: DecodeJob, cluster: ClusterConfig, batch_size: int) -> ray.data.Dataset:
    """A lazy dataset of trajectories, one for each prompt row {row_id, prompt_id, prompt}."""
    gpu = uses_gpu(cluster)
    blocks = -(-len(prompts) // batch_size)
    return (
        ray.data.from_arrow(pa.Table.from_pylist(list(prompts)))
        .repartition(blocks)
        .map_batches(
            _Decoder,
            fn_constructor_kwargs={"job": job, "sharers": cluster.num_actors},
            batch_size=batch_size,
            batch_format="pyarrow",
            concurrency=cluster.num_actors,
            num_cpus=1,
            num_gpus=1 if gpu else 0,
            runtime_env={"env_vars": {} if gpu else CPU_WORKER_ENV},
        )
    )


