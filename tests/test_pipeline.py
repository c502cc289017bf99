"""A stage is named by what changes its weights, and by nothing else; what cannot work is refused before any is made."""

import json
from pathlib import Path

import pytest

from dtrpo_ray.config import Job, TrainConfig
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.pipeline import River, weight_fields
from dtrpo_ray.stages import Store


@pytest.mark.parametrize(
    "change",
    [{"save_every": 7}, {"log_every": 3}, {"keep_checkpoints": 9}, {"keep_best": "loss"}, {"on_nonfinite": "skip"}],
)
def test_knobs_that_change_no_weight_do_not_rename_a_stage(change: dict[str, object]) -> None:
    assert weight_fields(TrainConfig.model_validate(change)) == weight_fields(TrainConfig())


@pytest.mark.parametrize("change", [{"lr": 1.0}, {"zero_stage": 1}, {"micro_batch": 3}, {"offload": True}])
def test_knobs_that_change_weights_do(change: dict[str, object]) -> None:
    assert weight_fields(TrainConfig.model_validate(change)) != weight_fields(TrainConfig())


def test_stages_made_before_there_was_offload_keep_their_names() -> None:
    assert "offload" not in weight_fields(TrainConfig())


def test_adapters_that_a_model_does_not_take_are_refused_before_any_stage(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parent / "models" / "tiny_configs.json").read_text())["sdar_moe"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    sections = {"task": {"type": "preferences", "files": ["pairs.jsonl"]}, "model": {"path": tmp_path}}
    train = {"objective": {"schedule": "random"}, "lora": {"targets": "attention+mlp"}}
    job = Job.model_validate({"name": "moe", "storage": tmp_path / "runs", "train": train, **sections})
    with pytest.raises(ConfigError, match=r"lora\.targets = 'attention\+mlp': the MLPs of sdar_moe"):
        River(job, Store(job.storage)).policy(1)
    assert not job.storage.exists()
