"""The record of a run: what it says, and which other runs may go on from it."""

import json
from pathlib import Path

import pytest

from dtrpo_ray.config.train import Objective, TrainConfig, ValidationConfig
from dtrpo_ray.errors import CheckpointError
from dtrpo_ray.metrics import ERRORS, RUN
from dtrpo_ray.train import checkpoint
from dtrpo_ray.train.run import RunRecord, TrainStage, resume_root

CONFIG = TrainConfig(objective=Objective(beta=0.5), lr=1e-2)


def stage(folder: Path, resume_from: Path | None = None) -> TrainStage:
    identity = {"base": "b", "table": "t"}
    return TrainStage("train-1", folder, folder, folder / "new", 0, identity, resume_from, workers={"base": (1, 2)})


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of a run with one sealed checkpoint."""
    folder = tmp_path / "old"
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000002" / checkpoint.COMPLETE).touch()
    RunRecord.of(stage(tmp_path), CONFIG, str(folder / "checkpoints")).write(folder)
    return folder


def test_a_record_is_read_as_it_was_written_and_old_errors_go(old: Path) -> None:
    record = RunRecord.read(old)
    assert record is not None
    assert (record.label, record.seed, record.workers) == ("train-1", 0, {"base": (1, 2)})
    assert json.loads((old / RUN).read_text())["workers"] == {"base": [1, 2]}
    (old / ERRORS).mkdir()
    record.write(old)
    assert not (old / ERRORS).exists()
    assert RunRecord.read(old) == record
    (old / RUN).write_text('{"label": "train-1"}')
    assert RunRecord.read(old) is None
    assert RunRecord.read(old / "nowhere") is None


def test_a_run_from_before_a_field_came_counts_its_default(tmp_path: Path, old: Path) -> None:
    record = json.loads((old / RUN).read_text())
    del record["config"]["objective"]["nll_tokens"]
    (old / RUN).write_text(json.dumps(record))
    assert resume_root(stage(tmp_path, old), CONFIG) == str(old / "checkpoints")
    other = CONFIG.model_copy(update={"objective": CONFIG.objective.model_copy(update={"nll_tokens": "unmasked"})})
    with pytest.raises(CheckpointError, match=r"train\.objective\.nll_tokens: 'hidden' then, 'unmasked' now"):
        resume_root(stage(tmp_path, old), other)


def test_resuming_another_run_is_refused_field_by_field(tmp_path: Path, old: Path) -> None:
    assert resume_root(stage(tmp_path), CONFIG) is None
    changed = CONFIG.model_copy(update={"lr": 5e-3, "save_every": 7, "objective": Objective(beta=0.1)})
    with pytest.raises(CheckpointError) as caught:
        resume_root(stage(tmp_path, old), changed)
    text = str(caught.value)
    assert "train.lr: 0.01 then, 0.005 now" in text
    assert "train.objective.beta: 0.5 then, 0.1 now" in text
    assert "save_every:" not in text
    assert "These may differ: train.keep_best, train.keep_checkpoints, train.log_every, train.log_terms_every" in text
    may = CONFIG.model_copy(
        update={"save_every": 7, "validation": ValidationConfig(num_prompts=3), "precision": "fp32"}
    )
    assert resume_root(stage(tmp_path, old), may) == str(old / "checkpoints")
    finished = old.rename(old.with_name("old-finished"))  # its checkpoints have moved with it
    assert resume_root(stage(tmp_path, finished), may) == str(finished / "checkpoints")
    (finished / "checkpoints" / "step-00000002" / checkpoint.COMPLETE).unlink()
    with pytest.raises(CheckpointError, match="holds no whole checkpoint to go on from"):
        resume_root(stage(tmp_path, finished), may)
    with pytest.raises(CheckpointError, match="no readable run"):
        resume_root(stage(tmp_path, Path("/nowhere")), CONFIG)
