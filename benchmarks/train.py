"""Measure the cost of Ray Train, Ray Data and DeepSpeed against the bare loop, on the same batches and weights.

The bare loop is `loop.run` over `PlainBackend` in a separate process, with its rows in a list. The stack is
`driver.train` with one worker, then with two. All of them write metrics; the time of a step is the difference between
two rows, without the warm-up steps. Every process uses one torch thread, because with all cores in use Ray's own
processes would slow the loop.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.plain import PlainBackend
from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.train import Objective, TrainConfig
from dtrpo_ray.errors import TrainError
from dtrpo_ray.metrics import METRICS, MetricsLog, read_metrics
from dtrpo_ray.models.registry import build_model, load_model, save_model
from dtrpo_ray.session import CPU_WORKER_ENV, ray_session
from dtrpo_ray.train import dataset, driver, loop, worker
from dtrpo_ray.train.run import RunSpec, TrainStage

WARM_STEPS = 3
THREADS = "threads.txt"
MODEL = {
    "model_type": "sdar", "architectures": ["SDARForCausalLM"], "vocab_size": 4096, "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "block_size": 8, "mask_token_id": 4095, "eos_token_id": 4094, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "max_position_embeddings": 4096,
}  # fmt: skip
TOKENS = 64  # per prompt and per response


def config(num_steps: int, global_batch: int) -> TrainConfig:
    """Configure full steps of one epoch, with one checkpoint after the measured steps."""
    return TrainConfig(
        objective=Objective(beta=0.1),
        lr=1e-4,
        global_batch=global_batch,
        micro_batch=8,
        max_steps=num_steps,
        save_every=10_000,
        zero_stage=2,
    )


def prepare(folder: Path, num_steps: int, global_batch: int) -> None:
    """Write a base model and a table of random pairs."""
    (folder / "base").mkdir()
    (folder / "table").mkdir()
    save_model(build_model(MODEL), folder / "base")
    rng, steps = np.random.default_rng(0), list(np.tile(np.arange(8), TOKENS // 8).tolist())
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {"row_id": f"row-{i:06d}", **{side: rng.integers(0, 4000, TOKENS).tolist() for side in sides}}
        | {"chosen_steps": steps, "rejected_steps": steps}
        for i in range(num_steps * global_batch)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "table" / "part-0.parquet")


def bare(folder: Path, num_steps: int, global_batch: int) -> None:
    """Train with the bare loop in this process; write its metrics next to the stack's."""
    torch.set_num_threads(1)
    cfg, out = config(num_steps, global_batch), folder / "bare"
    out.mkdir()
    rows = pq.read_table(folder / "table").to_pylist()
    plan = dataset.make_plan([row["row_id"] for row in rows], cfg, 0)
    firsts = range(0, len(plan.row), global_batch)
    batches = [
        [{**rows[plan.row[o]], "epoch": 0, "batch_weight": float(global_batch)} for o in range(f, f + global_batch)]
        for f in firsts
    ]
    policy, reference = load_model(folder / "base"), load_model(folder / "base").eval().requires_grad_(False)
    backend = PlainBackend(policy, cfg, num_steps, torch.device("cpu"))
    log, to_batch = MetricsLog(out / METRICS), loop.collate(cfg, policy, 0)
    loop.run(cfg, backend, reference, batches, to_batch, 0, num_steps, log.write, lambda step: None)
    _note_threads(out)


def _run_rank(spec: RunSpec) -> None:
    """Run a worker of the stack with one torch thread and record that number; Ray starts it in its own process."""
    with mock.patch.object(worker, "cpu_threads", return_value=1):
        worker.run_rank(spec)
    _note_threads(spec.stage.out)


def _train_function(spec: RunSpec) -> Callable[[], None]:
    return partial(_run_rank, spec)


def _note_threads(out: Path) -> None:
    (out / THREADS).write_text(str(torch.get_num_threads()))


def stack(folder: Path, num_steps: int, global_batch: int, num_workers: int) -> None:
    """Train with the full stack and `num_workers` workers on this machine."""
    out = folder / f"stack-{num_workers}"
    out.mkdir()
    stage = TrainStage(f"stack-{num_workers}", folder / "base", folder / "table", out, 0)
    cluster = ClusterConfig(num_workers=num_workers, use_gpu="no", max_failures=0)
    with ray_session(cluster), mock.patch.object(driver, "_train_function", _train_function):
        driver.train(stage, config(num_steps, global_batch), cluster)


def step_seconds(out: Path) -> list[float]:
    """Return the time of each measured optimizer step."""
    times = [row["seconds"] for row in read_metrics(out / METRICS)]
    return [now - before for before, now in zip(times[WARM_STEPS - 1 :], times[WARM_STEPS:], strict=False)]


def run(num_steps: int = 15, global_batch: int = 16, rounds: int = 2) -> dict[str, Any]:
    """Run all variants in turn, `rounds` times; return median step times, and the median of the rounds' ratios."""
    times: dict[str, list[float]] = {"bare": [], "stack-1": [], "stack-2": []}
    ratios: list[float] = []  # per round: the speed of a machine changes less within a round than between rounds
    losses: dict[str, float] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, num_steps, global_batch)
            words = [sys.executable, "-m", "benchmarks.train", str(folder), str(num_steps), str(global_batch)]
            subprocess.run(words, check=True, env={**os.environ, **CPU_WORKER_ENV})
            for workers in (1, 2):
                stack(folder, num_steps, global_batch, workers)
            threads = {way: (folder / way / THREADS).read_text() for way in times}
            if set(threads.values()) != {"1"}:
                raise TrainError(f"bench train: variants differ in torch threads: {threads}; report a bug")
            steps = {way: step_seconds(folder / way) for way in times}
            for way, measured in times.items():
                measured += steps[way]
                losses[way] = read_metrics(folder / way / METRICS)[-1]["loss"]
            ratios.append(statistics.median(steps["stack-1"]) / statistics.median(steps["bare"]))
    median = {way: statistics.median(values) for way, values in times.items()}
    return {
        "machine": f"{os.cpu_count()} CPUs, {platform.processor() or platform.machine()}, torch {torch.__version__}",
        "steps_measured": len(times["bare"]),
        "step_seconds": median,
        "spread": {way: [min(values), max(values)] for way, values in times.items()},
        "last_loss": losses,
        "stack_over_bare": statistics.median(ratios),
        "stack_over_bare_rounds": ratios,
        "speedup_of_two_workers": median["stack-1"] / median["stack-2"],
    }


def text(value: dict[str, Any]) -> str:
    """Format the result as Markdown."""
    lines = [
        f"{value['machine']}; one thread per process, {value['steps_measured']} steps each, median [fastest, slowest]",
        "",
    ]
    lines += ["| variant | seconds per step | last loss |", "|---|---|---|"]
    for way, seconds in value["step_seconds"].items():
        low, high = value["spread"][way]
        lines.append(f"| {way} | {seconds:.3f} [{low:.3f}, {high:.3f}] | {value['last_loss'][way]:.6f} |")
    rounds = ", ".join(f"{ratio:.3f}" for ratio in value["stack_over_bare_rounds"])
    lines += ["", f"The stack takes {value['stack_over_bare']:.3f} times the bare loop's time (median of {rounds}). "]
    lines[-1] += f"Two workers are {value['speedup_of_two_workers']:.2f} times as fast as one."
    return "\n".join(lines)


if __name__ == "__main__":
    bare(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"done": True}), file=sys.stderr)
