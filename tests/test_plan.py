"""The plan's numbers, against a model that was really built."""

import json
import os
from pathlib import Path

import pytest
import torch
from paths import ROOT

from dtrpo_ray import plan as plan_module
from dtrpo_ray.config.job import ModelInit
from dtrpo_ray.config.load import load_job
from dtrpo_ray.config.train import LoraConfig, Objective, TrainConfig
from dtrpo_ray.method.step import checkpoint_layers
from dtrpo_ray.models.base import CHUNK_LOGITS, DiffusionLM
from dtrpo_ray.models.lora import add_adapters
from dtrpo_ray.models.registry import build_model, save_model
from dtrpo_ray.plan import (
    Shape,
    activation_bytes,
    adapter_parameters,
    packed_rows,
    parameters,
    plan,
    stored_parameters,
    training,
    vocabulary,
)

DEMO = ROOT / "jobs" / "sudoku.toml"


@pytest.mark.parametrize(("hidden", "layers", "heads"), [(32, 1, 2), (64, 3, 4)])
def test_the_parameter_count_is_the_models(hidden: int, layers: int, heads: int) -> None:
    init = ModelInit(hidden_size=hidden, num_layers=layers, num_heads=heads, intermediate_size=48)
    config = {
        "model_type": "sdar", "vocab_size": 16, "hidden_size": hidden, "intermediate_size": 48,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": hidden // heads, "block_size": 4, "mask_token_id": 6, "eos_token_id": 5,
        "tie_word_embeddings": False, "rope_theta": 10000.0,
    }  # fmt: skip
    assert parameters(init, 16) == sum(p.numel() for p in build_model(config).parameters())


def test_steps_forwards_and_memory() -> None:
    config = TrainConfig(global_batch=64, micro_batch=16, num_epochs=2, precision="fp32")
    made = training(config, num_workers=2, count=1000, rows=100)
    assert (made["accumulation"], made["forwards_per_optimizer_step"], made["optimizer_steps"]) == (2, 8, 4)
    # ZeRO 2: weights and reference whole; gradients, float32 weights and two moments in halves
    states = {"weights": 4000, "gradients": 2000, "optimizer": 6000, "reference": 4000, "buffers": 0}
    assert made["memory_bytes"] == states
    assert made["memory_per_worker_bytes"] == 16_000
    assert made["checkpoint_bytes"] == 16_000
    offloaded = training(config.model_copy(update={"offload": True}), num_workers=2, count=1000, rows=100)
    assert (offloaded["memory_per_worker_bytes"], offloaded["cpu_memory_per_worker_bytes"]) == (10_000, 6000)


def test_measuring_the_loss_terms_takes_a_float32_gradient_and_that_of_one_pass() -> None:
    mixed = TrainConfig(objective=Objective(rpo_alpha=1.0), precision="bf16")
    assert training(mixed, 8, 1000, 100)["memory_bytes"]["term_gradients"] == 6000
    for off in (
        TrainConfig(),
        mixed.model_copy(update={"log_terms_every": 0}),
        mixed.model_copy(update={"zero_stage": 3}),
    ):
        assert "term_gradients" not in training(off, 8, 1000, 100)["memory_bytes"]


def test_an_order_by_confidence_is_a_forward_of_the_reference() -> None:
    for schedule, forwards in (("recorded", 2), ("confidence", 3)):
        config = TrainConfig(objective=Objective(schedule=schedule), global_batch=8, micro_batch=8)
        assert training(config, 1, 1000, 64)["forwards_per_optimizer_step"] == forwards


@pytest.mark.parametrize(
    ("micro_tokens", "row_tokens", "micro", "accumulation"),
    [(None, None, 16, 2), (1000, None, 10, 4), (1000, 400, 8, 4), (50, None, 1, 32)],
)
def test_a_token_budget_bounds_a_forward_of_the_longest_pairs(
    micro_tokens: int | None, row_tokens: int | None, micro: int, accumulation: int
) -> None:
    """Pairs of 100 tokens, 32 a worker."""
    config = TrainConfig(global_batch=64, micro_batch=16, micro_tokens=micro_tokens, row_tokens=row_tokens)
    made = training(config, 2, 1000, 64, (Shape(128, 256, 4, 128, 64, 512), 100, 40))
    assert (made["micro_batch"], made["accumulation"]) == (micro, accumulation)


def test_an_elastic_job_is_planned_for_its_fewest_workers() -> None:
    job = load_job(DEMO, ["cluster.num_workers=[2, 8]"])
    assert plan(job)["stages"]["train"]["num_workers"] == 2


def test_a_7b_checkpoint_is_14_bytes_a_parameter() -> None:
    assert training(TrainConfig(zero_stage=2), 8, 7 * 10**9, None)["checkpoint_bytes"] == 98 * 10**9
    assert training(TrainConfig(zero_stage=3), 8, 7 * 10**9, None)["memory_bytes"]["weights"] == 7 * 10**9 // 4


def saved_bytes(model: DiffusionLM, rows: int, tokens: int, scored: int) -> int:
    """Bytes of the tensors that autograd saves in one forward, by their storage, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (where := tensor.untyped_storage().data_ptr()) not in weights:
            saved[where] = tensor
        return tensor

    ids, positions = torch.zeros(rows, tokens, dtype=torch.int64), torch.arange(tokens).expand(rows, tokens)
    picks = [torch.zeros(scored, dtype=torch.int64), torch.arange(scored), torch.ones(scored, dtype=torch.int64)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, positions, torch.ones(rows, 1, tokens, tokens, dtype=torch.bool), *picks)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("change", [{}, {"num_hidden_layers": 3}, {"intermediate_size": 512}, {"vocab_size": 4096}])
def test_activations_are_what_a_forward_really_keeps(change: dict[str, int], bf16: bool) -> None:
    """Every tensor that autograd saves in one forward, counted by its storage, within 5 % of the prediction."""
    config = {
        "model_type": "sdar", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "block_size": 4, "mask_token_id": 6, "eos_token_id": 5, "tie_word_embeddings": False, "rope_theta": 1e4,
        **change,
    }  # fmt: skip
    rows, tokens, scored = 2, 96, 40
    model = build_model(config).to(torch.bfloat16 if bf16 else torch.float32)
    real = saved_bytes(model, rows, tokens, scored)
    shape = Shape(128, config["intermediate_size"], config["num_hidden_layers"], 128, 64, config["vocab_size"])
    made = activation_bytes(shape, rows, tokens, scored, bf16)
    momentary = scored * (6 if bf16 else 4) * config["vocab_size"]
    assert made["activations"] + made["scored_logits"] - momentary == pytest.approx(real, rel=0.05)


def test_the_chunk_of_the_head_is_the_models() -> None:
    assert plan_module.CHUNK_LOGITS == CHUNK_LOGITS


def test_the_demo_has_the_models_size() -> None:
    assert plan(load_job(DEMO))["parameters"] < 2_000_000


def test_the_vocabulary_is_that_of_the_tokenizer_files(shared_data: Path) -> None:
    settings = [f"model.tokenizer={shared_data / 'tokenizer_qwen2_sdar'}", "task.files=['jobs/text.toml']"]
    job = load_job(ROOT / "jobs" / "text.toml", settings)
    assert vocabulary(job) == 151_672  # 151,669 tokens and the mask, to a multiple of 8


TINY = {
    "model_type": "sdar", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "block_size": 4, "mask_token_id": 6,
    "eos_token_id": 5, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.mark.parametrize("targets", ["attention", "mlp", "attention+mlp", "mlp+output"])
def test_adapters_are_counted_as_they_are_made(targets: str) -> None:
    model, lora = build_model(TINY), LoraConfig(rank=3, targets=targets)
    add_adapters(model, lora, 0)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(Shape(128, 256, 4, 128, 64, 512), lora) == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_directory_is_counted_by_its_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build_model(TINY).to(dtype)
    save_model(model, tmp_path)
    assert stored_parameters(tmp_path) == sum(p.numel() for p in model.parameters())


def test_adapters_keep_no_gradients_and_no_moments_of_the_base() -> None:
    config, bounds = TrainConfig(lora=LoraConfig(rank=4), precision="fp32"), (Shape(128, 256, 4, 128, 64, 512), 96, 64)
    made = training(config, num_workers=1, count=10**6, rows=100, bounds=bounds)
    extra = adapter_parameters(bounds[0], LoraConfig(rank=4))
    assert made["trained_parameters"] == extra
    memory = {name: made["memory_bytes"][name] for name in ("weights", "gradients", "optimizer", "reference")}
    assert memory == {"weights": 4 * (10**6 + extra), "gradients": 4 * extra, "optimizer": 12 * extra, "reference": 0}


def test_recomputed_layers_keep_their_inputs() -> None:
    """What autograd saves in one forward with `checkpoint_layers`; the plan adds the one layer that is then made."""
    rows, tokens, scored, shape = 2, 96, 40, Shape(128, 256, 4, 128, 64, 512)
    model = build_model(TINY)
    checkpoint_layers(model)
    model.train()
    final = saved_bytes(model, rows, tokens, scored)  # the last norm, the head, and what no layer owns
    inputs = shape.layers * rows * tokens * shape.hidden * 4
    whole, recomputed = (
        activation_bytes(shape, rows, tokens, scored, False, flag)["activations"] for flag in (False, True)
    )
    once = (2 * 4 * 128 + 4 * tokens) * rows * tokens  # the last norm, and the mask that all layers share
    assert recomputed == (whole - once) // shape.layers + inputs + once
    assert final < whole / 2


@pytest.mark.parametrize(
    ("pairs", "row_tokens", "expected"),
    [(4, None, (4, 100)), (4, 250, (2, 200)), (3, 90, (3, 100)), (2, 900, (1, 200))],
)
def test_long_pairs_share_rows_where_they_fit(pairs: int, row_tokens: int | None, expected: tuple[int, int]) -> None:
    assert packed_rows(pairs, 100, row_tokens) == expected


def test_a_step_takes_what_the_newest_run_on_this_storage_took(tmp_path: Path) -> None:
    job = load_job(DEMO, [f"storage={tmp_path}", "train.max_steps=50"])
    assert "measured" not in plan(job)["stages"]["train"]
    for name, age, took in (("train-1-aaaa", 9, 7.0), ("train-1-bbbb.partial", 0, 2.0), ("train-2-cccc", 0, 5.0)):
        folder = tmp_path / "stages" / name
        folder.mkdir(parents=True)
        steps = [9.0, took, took + 1, took - 1]  # the first warms up
        rows = [{"step": i + 1, "step_seconds": seconds} for i, seconds in enumerate(steps)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = job.train.model_copy(update={"lr": 1.0, "micro_batch": 3})
        (folder / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
        (folder / "events.jsonl").write_text(json.dumps({"event": "start", "num_workers": 2}) + "\n")
        os.utime(folder / "metrics.jsonl", (10**9 - age, 10**9 - age))
    made = plan(job)["stages"]["train"]["measured"]
    assert made.pop("run").endswith("train-1-bbbb.partial")
    assert made == {"step_seconds": 2.0, "num_workers": 2, "differs": ["lr", "micro_batch"], "seconds": 100.0}
