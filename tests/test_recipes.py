"""jobs/recipes: each parses, is planned at its real size, fits its GPUs, and trains a tiny model of its own family."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from paths import ROOT

from dtrpo_ray.config.job import Job
from dtrpo_ray.config.load import load_job
from dtrpo_ray.models.lora import BaseReference, add_adapters
from dtrpo_ray.models.registry import build_model
from dtrpo_ray.plan import Shape, row_bounds, training
from dtrpo_ray.train.backend import DeepSpeedBackend, _deepspeed
from dtrpo_ray.train.loop import collate, optimizer_step

RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.toml"))
TINY = json.loads((ROOT / "tests" / "models" / "tiny_configs.json").read_text())["Fast_dLLM_Qwen"]
SIZE_1_5B = {  # Qwen2.5-1.5B's config.json
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936,
}  # fmt: skip
PARAMETERS = {"fast_dllm_1_5b": 1_543_714_304, "fast_dllm_7b_full": 7_615_616_512, "fast_dllm_7b_lora": 7_615_616_512}
GPU_BYTES = 80 * 10**9


def load(recipe: Path, folder: Path, config: dict[str, Any]) -> Job:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pairs.parquet").touch()
    return load_job(recipe, [f"model.path={folder}", f"task.files=['{folder}/pairs.parquet']"])


def test_there_is_a_recipe_for_each_size() -> None:
    assert [recipe.stem for recipe in RECIPES] == sorted(PARAMETERS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_hyperparameter_says_whose_it_is(recipe: Path) -> None:
    section, unmarked = "", []
    for line in recipe.read_text().splitlines():
        section = line if line.startswith("[") else section
        if re.match(r"\w+ = ", line) and section not in ("", "[cluster]") and line != 'type = "preferences"':
            unmarked += [] if re.search(r"# (ours|paper)\b", line) else [line]
    assert unmarked == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_fits_its_gpus(recipe: Path, shared_data: Path, tmp_path: Path) -> None:
    config = json.loads((shared_data / "upstream_layouts" / "fast_dllm_v2_7b" / "config.json").read_text())
    job = load(recipe, tmp_path, {**config, **(SIZE_1_5B if "1_5b" in recipe.stem else {})})
    fewest = job.cluster.num_workers if isinstance(job.cluster.num_workers, int) else job.cluster.num_workers[0]
    bounds = (Shape.of(job), *row_bounds(job, job.train))
    made = training(job.train, fewest, PARAMETERS[recipe.stem], 60_000, bounds)
    assert made["precision"] == "bf16"
    assert made["memory_per_worker_bytes"] < 0.55 * GPU_BYTES  # the rest is left for what the plan does not count


def dry_run(rank: int, recipe: Path, folder: Path) -> None:
    """A few optimizer steps by DeepSpeed in the recipe's ZeRO stage and precision, in a process that is all ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    train = load(recipe, folder, TINY).train.model_copy(update={"lr": 1e-2, "warmup_ratio": 0.0, "micro_batch": 2})
    policy, reference = build_model(TINY, seed=0), build_model(TINY, seed=0).requires_grad_(False).eval()
    if train.lora:
        add_adapters(policy, train.lora, 0)
    rng = np.random.default_rng(0)
    sides = {"prompt_ids": 9, "chosen_ids": 23, "rejected_ids": 31}
    rows = [
        {name: rng.integers(0, 40, length).tolist() for name, length in sides.items()}
        | {"row_id": str(i), "epoch": 0, "batch_weight": 4.0}
        for i in range(4)
    ]
    backend = DeepSpeedBackend(policy, train, 4, torch.device("cpu"))
    of_base = BaseReference(backend.policy, policy) if train.lora else reference
    to_batch = collate(train, policy, 0, reference=of_base)
    losses = [optimizer_step(train, backend, of_base, rows, to_batch).metrics["loss"] for _ in range(4)]
    weight = next(p for p in policy.parameters() if p.requires_grad)
    seen = {"losses": losses, "dtype": str(weight.dtype), "zero_stage": backend.engine.zero_optimization_stage()}
    (folder / "seen.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_tiny_model_of_the_family_trains_by_it(recipe: Path, tmp_path: Path) -> None:
    """On the recipe's own objective the loss is finite and falls on the same rows."""
    _deepspeed(torch.device("cpu"))  # imported before the fork
    mp.start_processes(dry_run, (recipe, tmp_path), 1, start_method="fork")
    seen, train = json.loads((tmp_path / "seen.json").read_text()), load(recipe, tmp_path, TINY).train
    assert (seen["dtype"], seen["zero_stage"]) == ("torch.bfloat16", train.zero_stage)
    assert np.isfinite(seen["losses"]).all()
    assert seen["losses"][0] > seen["losses"][-1]
