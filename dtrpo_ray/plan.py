"""A job -> what it would run: batches, forwards, memory, checkpoint size. Imports neither torch nor ray."""

import json
from typing import Any

from dtrpo_ray.config import Job, ModelInit, TrainConfig

BYTES_FP32, BYTES_BF16 = 4, 2


def parameters(init: ModelInit, vocab_size: int) -> int:
    """Parameters of an untied Qwen3 model of these sizes."""
    head = init.hidden_size // init.num_heads
    kv = (init.num_kv_heads or init.num_heads) * head
    attention = init.hidden_size * (2 * init.num_heads * head + 2 * kv) + 2 * head
    layer = attention + 3 * init.hidden_size * init.intermediate_size + 2 * init.hidden_size
    return init.num_layers * layer + 2 * vocab_size * init.hidden_size + init.hidden_size


def vocabulary(job: Job) -> int | None:
    """Vocabulary size, padded to a multiple of 8; None if only the model directory knows."""
    if job.model.path:
        return int(json.loads((job.model.path / "config.json").read_text())["vocab_size"])
    if job.model.tokenizer:
        for name in ("tokenizer.json", "vocab.json"):
            if (file := job.model.tokenizer / name).exists():
                record = json.loads(file.read_text())
                base = record["model"]["vocab"] if "model" in record else record
                added = job.model.tokenizer / "added_tokens.json"
                extra = json.loads(added.read_text()) if added.exists() else {}
                return -(-len({**base, **extra}) // 8) * 8
    return 8 * -(-(len("0123456789+-*/=,") + 2) // 8) if job.task.type == "countdown" else 8


def plan(job: Job) -> dict[str, Any]:
    """A JSON-able description of the run, stage by stage."""
    vocab, init = vocabulary(job), job.model.init
    if job.model.path:
        weights = sum(f.stat().st_size for f in job.model.path.glob("*.safetensors"))
        count = weights // BYTES_FP32
    else:
        assert init is not None
        assert vocab is not None
        count = parameters(init, vocab)
    stages: dict[str, Any] = {}
    if job.sft:
        stages["base"] = training(job.sft, job.cluster.num_workers, count, job.sft.num_examples)
    if job.rollout:
        made = job.rollout.num_prompts * job.rollout.num_samples
        stages["rollout"] = {"trajectories": made, "rounds": job.rounds, "actors": job.cluster.num_actors}
    rows = job.rollout.num_prompts * job.pair.max_pairs_per_prompt if job.rollout else None
    stages["train"] = {**training(job.train, job.cluster.num_workers, count, rows), "rounds": job.rounds}
    if rows is not None:
        stages["train"]["steps_are"] = "at most: prompts without both a good and a bad response make no pair"
    return {"job": job.name, "seed": job.seed, "parameters": count, "vocab_size": vocab, "stages": stages}


def training(config: TrainConfig, num_workers: int, count: int, rows: int | None) -> dict[str, Any]:
    """Derived numbers of one training stage; memory is of weights, gradients and optimizer, without activations."""
    frozen = config.objective.type != "sft" and config.reference == "frozen"
    accumulation = config.accumulation(num_workers)
    steps = None if rows is None else -(-rows * config.num_epochs // config.global_batch)
    if config.max_steps:
        steps = min(steps or config.max_steps, config.max_steps)
    shards = {0: (1, 1), 1: (1, num_workers), 2: (num_workers, num_workers), 3: (num_workers, num_workers)}
    gradient_shards, optimizer_shards = shards[config.zero_stage]
    weight_shards = num_workers if config.zero_stage == 3 else 1
    memory = count * BYTES_FP32 * (1 / weight_shards + 1 / gradient_shards + 2 / optimizer_shards + int(frozen))
    return {
        "objective": config.objective.type,
        "global_batch": config.global_batch,
        "rows_per_worker": config.rows_per_rank(num_workers),
        "micro_batch": min(config.micro_batch, config.rows_per_rank(num_workers)),
        "accumulation": accumulation,
        "forwards_per_optimizer_step": accumulation * num_workers * (2 if frozen else 1),
        "optimizer_steps": steps,
        "zero_stage": config.zero_stage,
        "memory_per_worker_bytes": int(memory),
        "checkpoint_bytes": count * BYTES_FP32 * 3,
    }
