"""A stage is named by what changes its weights, and by nothing else."""

import pytest

from dtrpo_ray.config import TrainConfig
from dtrpo_ray.pipeline import weight_fields


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
