"""The plan's numbers, against a model that was really built."""

from pathlib import Path

import pytest

from dtrpo_ray.config import ModelInit, TrainConfig, load_job
from dtrpo_ray.models.registry import build_model
from dtrpo_ray.plan import parameters, plan, training, vocabulary

DEMO = Path(__file__).parents[1] / "jobs" / "demo.toml"


@pytest.mark.parametrize(("hidden", "layers", "heads", "kv"), [(32, 1, 2, None), (64, 3, 4, 2)])
def test_the_parameter_count_is_the_models(hidden: int, layers: int, heads: int, kv: int | None) -> None:
    init = ModelInit(hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv, intermediate_size=48)
    config = {
        "model_type": "sdar", "vocab_size": 16, "hidden_size": hidden, "intermediate_size": 48,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv or heads,
        "head_dim": hidden // heads, "block_size": 4, "mask_token_id": 6, "eos_token_id": 5,
        "tie_word_embeddings": False,
    }  # fmt: skip
    assert parameters(init, 16) == sum(p.numel() for p in build_model(config).parameters())


def test_steps_forwards_and_memory() -> None:
    config = TrainConfig(global_batch=64, micro_batch=16, num_epochs=2)
    made = training(config, num_workers=2, count=1000, rows=100)
    assert (made["accumulation"], made["forwards_per_optimizer_step"], made["optimizer_steps"]) == (2, 8, 4)
    # weights and reference whole, gradients and two Adam moments in halves: (1 + 1 + 1/2 + 2/2) * 4 bytes
    assert made["memory_per_worker_bytes"] == 14_000
    assert made["checkpoint_bytes"] == 12_000


def test_the_demo_has_the_models_size() -> None:
    assert plan(load_job(DEMO))["parameters"] < 2_000_000


def test_the_vocabulary_is_that_of_the_tokenizer_files(shared_data: Path) -> None:
    settings = [f"model.tokenizer={shared_data / 'tokenizer_qwen2_sdar'}", "task.files=['jobs/text.toml']"]
    job = load_job(Path(__file__).parents[1] / "jobs" / "text.toml", settings)
    assert vocabulary(job) == 151_672  # 151,669 tokens and the mask, to a multiple of 8
