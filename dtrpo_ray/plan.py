"""A job -> a plan of its run: batches, forwards, memory, checkpoint size, and the time of a step in an earlier run.

Imports neither torch nor ray.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dtrpo_ray.config.job import Job, ModelInit
from dtrpo_ray.config.task import Files, FilesTask
from dtrpo_ray.config.train import LoraConfig, Objective, SFTConfig, TrainConfig
from dtrpo_ray.data.tasks.puzzles import puzzle_module
from dtrpo_ray.errors import ConfigError, ModelError
from dtrpo_ray.metrics import EVENTS, METRICS, RUN, read_events, read_metrics

BYTES_FP32, BYTES_BF16 = 4, 2
REDUCE_BUCKET = 5 * 10**8  # gradients that DeepSpeed's ZeRO 3 makes room for at the start, by default
CHUNK_LOGITS = 2**26  # as in `models.base`, which imports torch: logits that exist together


def parameters(init: ModelInit, vocab_size: int) -> int:
    """Count the parameters of an untied Qwen3 model of these sizes."""
    attention = 4 * init.hidden_size**2 + 2 * (init.hidden_size // init.num_heads)
    layer = attention + 3 * init.hidden_size * init.intermediate_size + 2 * init.hidden_size
    return init.num_layers * layer + 2 * vocab_size * init.hidden_size + init.hidden_size


def stored_parameters(folder: Path) -> int:
    """Count the parameters of a model directory from the headers of its safetensors files."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def vocabulary(job: Job) -> int:
    """Return the vocabulary size of a model.init, padded to a multiple of 8."""
    if job.model.tokenizer:
        for name in ("tokenizer.json", "vocab.json"):
            if (file := job.model.tokenizer / name).exists():
                record = json.loads(file.read_text())
                base = record["model"]["vocab"] if name == "tokenizer.json" else record
                added = job.model.tokenizer / "added_tokens.json"
                extra = json.loads(added.read_text()) if added.exists() else {}
                return -(-len({**base, **extra}) // 8) * 8
        raise ConfigError(f"{job.model.tokenizer}: no tokenizer.json or vocab.json, so its vocabulary is not known")
    assert job.puzzle is not None
    return 8 * -(-(len(puzzle_module(job.puzzle).ALPHABET) + 2) // 8)


def _sizes(folder: Path) -> dict[str, int]:
    """Read the numbers of a model directory's config.json. Raises ModelError if it is unreadable or lacks a size."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error})") from None
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(config, dict) or not isinstance(config.get(key), int):
            raise ModelError(f"{file}: {key} is missing or no whole number")
    return {key: value for key, value in config.items() if isinstance(value, int)}


def plan(job: Job) -> dict[str, Any]:
    """Describe the run stage by stage, as JSON."""
    shape = Shape.of(job)
    if job.model.path:
        count = stored_parameters(job.model.path)
    else:
        assert job.model.init is not None
        count = parameters(job.model.init, shape.vocab)
    stages: dict[str, Any] = {}

    def add_training(name: str, folder: str, config: TrainConfig, rows: int | None, **facts: int) -> None:
        bounds = (shape, *row_bounds(job, config))
        made = training(config, job.cluster.fewest_workers, count, rows, bounds)  # each holds the most then
        stages[name] = made | facts | previous_steps(job.storage, folder, config, made["optimizer_steps"])

    if job.sft:
        add_training("base", "base", job.sft, job.sft.max_rows if job.sft.files else job.sft.num_examples)
    if job.only_sft:
        return {"job": job.name, "seed": job.seed, "parameters": count, "vocab_size": shape.vocab, "stages": stages}
    prompts = job.task.max_rows if isinstance(job.task, FilesTask) else job.rollout and job.rollout.num_prompts
    rows = None
    if job.rollout:
        made = prompts and prompts * job.rollout.num_samples
        stages["rollout"] = {"trajectories": made, "rounds": job.rounds, "actors": job.cluster.num_actors}
        if prompts:  # pairs are made within a setting
            rows = prompts * max(1, len(set(job.rollout.step_counts))) * job.pair.max_pairs_per_prompt
    add_training("train", "train-1", job.train, rows, rounds=job.rounds)
    if rows is not None:
        stages["train"]["steps_are"] = "at most: prompts without both a good and a bad response make no pair"
    return {"job": job.name, "seed": job.seed, "parameters": count, "vocab_size": shape.vocab, "stages": stages}


def previous_steps(storage: Path, stage: str, config: TrainConfig, num_steps: int | None) -> dict[str, Any]:
    """Return the time of an optimizer step in the newest run of a stage on this storage; {} if there was none.

    `differs` names that run's other settings, except the number of workers.
    """
    runs = [(file.stat().st_mtime, file) for file in storage.glob(f"stages/{stage}-*/{METRICS}")]
    rows = read_metrics(max(runs)[1])[1:] if runs else []  # the first step warms up
    if not rows:
        return {}
    folder = max(runs)[1].parent
    then, now = json.loads((folder / RUN).read_text())["config"], config.model_dump(mode="json")
    starts = [event for event in read_events(folder / EVENTS) if "num_workers" in event]
    seconds = statistics.median(row["step_seconds"] for row in rows)
    facts = {"run": str(folder), "step_seconds": seconds, "num_workers": starts[-1]["num_workers"] if starts else None}
    facts["differs"] = sorted(name for name in then.keys() & now.keys() if then[name] != now[name])
    return {"measured": {**facts, "seconds": seconds * num_steps if num_steps else None}}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that memory depends on, for a Qwen-like trunk; every family here is close to one."""

    hidden: int
    intermediate: int
    layers: int
    queries: int
    keys: int
    vocab: int

    @classmethod
    def of(cls, job: Job) -> "Shape":
        """Read the sizes from the model directory's config.json or from model.init."""
        if job.model.path:
            config = _sizes(job.model.path)
        else:
            assert job.model.init is not None
            config = {"vocab_size": vocabulary(job), **job.model.init.sizes()}
        hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
        size = config.get("head_dim") or hidden // heads
        keys = size * (config.get("num_key_value_heads") or heads)
        return cls(hidden, config["intermediate_size"], layers, heads * size, keys=keys, vocab=config["vocab_size"])


def adapter_parameters(shape: Shape, lora: LoraConfig) -> int:
    """Parameters of LoRA adapters on these targets: rank * (inputs + outputs) of each linear module."""
    h, q, k, i = shape.hidden, shape.queries, shape.keys, shape.intermediate
    layer = {"attention": [(h, q), (h, k), (h, k), (q, h)], "mlp": [(h, i), (h, i), (i, h)]}
    parts = (lora.targets or "attention+mlp").split("+")
    modules = [m for part in parts for m in layer.get(part, []) * shape.layers]
    modules += [(h, shape.vocab)] if "output" in parts else []
    return lora.rank * sum(a + b for a, b in modules)


def activation_bytes(
    shape: Shape, rows: int, row_tokens: int, scored: int, bf16: bool, recomputed: bool = False
) -> dict[str, int]:
    """Return the bytes that a micro-batch keeps for its backward pass: the trunk's, and the head's at scored tokens.

    Counted from the tensors that transformers' Qwen3 saves in a layer: two norms (input, normalised, scaled), queries
    and keys with their norms, what attention reads and writes, four of the MLP; the norms upcast to float32. All layers
    share the mask. The head keeps the float32 log-softmax; the logits it is made of live for a moment. Where layers
    are `recomputed`, each keeps its input, and one of them all.
    """
    h, q, k, i, tokens = shape.hidden, shape.queries, shape.keys, shape.intermediate, rows * row_tokens
    width = BYTES_BF16 if bf16 else BYTES_FP32
    if bf16:
        layer, final = 16 * h + 14 * q + 6 * k + 8 * i, 8 * h + 2 * row_tokens
    else:
        layer, final = 4 * (6 * h + 6 * q + 2 * k + 4 * i), 4 * (2 * h + row_tokens)
    head = BYTES_FP32 * shape.vocab + width * h
    chunk = min(scored, max(1, CHUNK_LOGITS // shape.vocab))
    momentary = BYTES_FP32 + (BYTES_BF16 if bf16 else 0)
    layers = layer + shape.layers * h * width if recomputed else shape.layers * layer
    return {"activations": tokens * (layers + final), "scored_logits": chunk * (head + momentary * shape.vocab)}


def state_bytes(config: TrainConfig, num_workers: int, count: int, trained: int, bf16: bool) -> dict[str, int]:
    """Bytes of one worker for `count` parameters, `trained` of them: weights, gradients, optimizer, reference, buffers.

    The optimizer's are Adam's two moments, and under ZeRO or bf16 its own float32 weights. With `offload` they lie in
    CPU memory.
    """
    width, stage = BYTES_BF16 if bf16 else BYTES_FP32, config.zero_stage
    return {
        "weights": count * width // (num_workers if stage == 3 else 1),
        "gradients": trained * width // (num_workers if stage >= 2 else 1),
        "optimizer": trained * BYTES_FP32 * (2 + (stage > 0 or bf16)) // (num_workers if stage > 0 else 1),
        "reference": count * width if config.runs_reference and config.lora is None else 0,
        "buffers": REDUCE_BUCKET * width if stage == 3 else 0,
    }


def checkpoint_bytes(config: TrainConfig, count: int, trained: int, bf16: bool) -> int:
    """Bytes of one whole checkpoint, of all workers: weights (under ZeRO 3 the frozen ones alone) and optimizer."""
    whole = state_bytes(config, 1, count, trained, bf16)
    return whole["weights"] - (whole["gradients"] if config.zero_stage == 3 else 0) + whole["optimizer"]


def row_bounds(job: Job, config: TrainConfig) -> tuple[int, int]:
    """(packed tokens, scored tokens) that a row has at most: its prompt, and each response clean and in its states.

    Where every step is scored, their number is not known, and one is counted.
    """
    source = config if isinstance(config, SFTConfig) and config.files else job.task
    if isinstance(source, Files):
        prompt, response = source.max_prompt_tokens, source.max_response_tokens
    else:
        prompt = response = job.rollout.max_new_tokens if job.rollout else 16
    sides, states, draws = (2 if config.objective.is_preference else 1), *_states(config.objective)
    return prompt + (1 + states) * sides * response, draws * sides * response


def _states(objective: Objective) -> tuple[int, int]:
    """Return how many states a response is seen in, and how often at most a token of it is scored."""
    states, draws = objective.num_states, objective.num_draws
    return (1, 1) if states == "all" or draws == "all" else (states, draws)


def packed_rows(pairs: int, tokens: int, row_tokens: int | None) -> tuple[int, int]:
    """(rows, tokens of a row) of a micro-batch of pairs that are as long as they may be (see `batch.build_batch`)."""
    together = max(1, (row_tokens or tokens) // tokens)
    return -(-pairs // together), tokens * min(together, pairs)


def training(
    config: TrainConfig, num_workers: int, count: int, rows: int | None, bounds: tuple[Shape, int, int] | None = None
) -> dict[str, Any]:
    """Derived numbers of one training stage; `bounds` are (shape, tokens, scored tokens) of a row.

    Memory is of one worker, in bytes, with bf16 as on a GPU if the precision is "auto".
    """
    bf16 = config.precision != "fp32"
    forwards = 1 + config.runs_reference + config.objective.orders_by_reference
    micro = min(config.micro_batch, config.rows_per_rank(num_workers))
    if bounds and config.micro_tokens:  # of the longest pairs
        sizes = {n: math.prod(packed_rows(n, bounds[1], config.row_tokens)) for n in range(1, micro + 1)}
        micro = max((n for n, size in sizes.items() if size <= config.micro_tokens), default=1)
    accumulation = -(-config.rows_per_rank(num_workers) // micro)
    steps = None if rows is None else -(-rows * config.num_epochs // config.global_batch)
    if config.max_steps:
        steps = min(steps or config.max_steps, config.max_steps)
    trained = count
    if config.lora and bounds:
        trained = adapter_parameters(bounds[0], config.lora)
        count += trained
    memory = state_bytes(config, num_workers, count, trained, bf16)
    if config.has_terms:  # a float32 copy of the gradient, and what a backward pass adds to it
        memory["term_gradients"] = trained * (BYTES_FP32 + (BYTES_BF16 if bf16 else BYTES_FP32))
    in_cpu = memory.pop("optimizer") if config.offload else 0
    if bounds:
        shape, tokens, scored = bounds
        packed = packed_rows(micro, tokens, config.row_tokens)
        memory |= activation_bytes(shape, *packed, micro * scored, bf16, recomputed=config.gradient_checkpointing)
    return {
        "objective": config.objective.type,
        "global_batch": config.global_batch,
        "rows_per_worker": config.rows_per_rank(num_workers),
        "micro_batch": micro,
        "accumulation": accumulation,
        "num_workers": num_workers,
        "forwards_per_optimizer_step": accumulation * num_workers * forwards,
        "optimizer_steps": steps,
        "zero_stage": config.zero_stage,
        "precision": "bf16" if bf16 else "fp32",
        **({"precision_is": "auto, as on a GPU; fp32 without one"} if config.precision == "auto" else {}),
        "trained_parameters": trained,
        "memory_bytes": memory,
        "memory_per_worker_bytes": sum(memory.values()),
        "cpu_memory_per_worker_bytes": in_cpu,
        "checkpoint_bytes": checkpoint_bytes(config, count, trained, bf16),
    }
