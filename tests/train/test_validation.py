"""What a checkpoint answers while the training goes on, and what is told where that fails."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow import fs as pafs

from dtrpo_ray.config.train import TrainConfig, ValidationConfig
from dtrpo_ray.data.schemas import TrajectoryRow
from dtrpo_ray.metrics import EVENTS, VALIDATION, read_metrics
from dtrpo_ray.train import checkpoint, validation
from tests.train.test_checkpoint import write

LOCAL = pafs.LocalFileSystem()
CONFIG = TrainConfig(validation=ValidationConfig(num_examples=1), keep_checkpoints=1, keep_best="accuracy")


class FakeEngine:
    """Answers each prompt with its first id."""

    @classmethod
    def load(cls, folder: Path) -> "FakeEngine":
        return cls()

    def generate(self, prompts: list[list[int]], params: object, seeds: list[int]) -> list[SimpleNamespace]:
        return [SimpleNamespace(text_ids=ids[:1]) for ids in prompts]

    def decode(self, ids: list[int]) -> str:
        return str(ids[0])


def score(prompt: str, response: str, answer: str | None) -> float:
    return float(response == answer)


def saved_at(path: str) -> SimpleNamespace:
    """Stands for a ray.train.Checkpoint."""
    return SimpleNamespace(path=path, filesystem=LOCAL, as_directory=lambda: checkpoint.local_folder(path))


def test_the_scores_lie_beside_the_checkpoint_and_among_the_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "Engine", FakeEngine)
    monkeypatch.setattr(validation, "export_checkpoint", lambda *_, **__: {"step": 4})
    texts = ("7", "7", "8", "7")
    asked = [TrajectoryRow(prompt=text, prompt_ids=[int(text)], answer="7") for text in texts]
    validation.write_questions(asked, "tests.train.test_validation:score", tmp_path)
    root = str(tmp_path / "run")
    path = write(tmp_path, root, 4)
    here = lambda folder, out, config: validation.measure(folder, out, TrainConfig.model_validate(config))  # noqa: E731
    monkeypatch.setattr(validation, "_measure_in_child", here)
    metrics = validation.validate(saved_at(path), str(tmp_path), root, CONFIG.model_dump(mode="json"))
    assert metrics == {"accuracy": 0.75, "reward": 0.75, "answer_tokens": 1.0}
    assert json.loads((Path(path) / checkpoint.SCORES_FILE).read_text()) == metrics
    line = read_metrics(tmp_path / VALIDATION)[0]
    assert (line["step"], line["samples"]) == (4, [{"prompt": "7", "answer": "7"}])
    event = read_metrics(tmp_path / EVENTS)[0]
    assert (event["event"], event["accuracy"]) == ("validation", 0.75)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('RuntimeError: out of memory')", "TrainError: RuntimeError: out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "TrainError: its process ended with -9"),
        ("import time; time.sleep(60)", "timed out after 2 seconds"),
    ],
)
def test_a_validation_that_fails_dies_or_hangs_is_told_and_holds_back_no_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    """Its process runs `code` instead."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(validation, "TIMEOUT_SECONDS", 2)
    root = str(tmp_path / "run")
    write(tmp_path, root, 2)
    path = write(tmp_path, root, 4)
    assert validation.validate(saved_at(path), str(tmp_path), root, CONFIG.model_dump(mode="json")) == {}
    event = read_metrics(tmp_path / EVENTS)[0]
    assert event["event"] == "validation failed"
    assert event["message"].startswith(f"validation of {path} failed: ")
    assert message in event["message"]
    assert [place.step for place in checkpoint.places(LOCAL, root)] == [4]


def test_a_storage_that_fails_under_a_validation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_validation", fails)
    measured = {"step": 4, "metrics": {}, "num_prompts": 0, "samples": []}
    monkeypatch.setattr(validation, "_measure_in_child", lambda *_: measured)
    path = write(tmp_path, str(tmp_path / "run"), 4)
    validation.validate(saved_at(path), str(tmp_path), str(tmp_path / "run"), CONFIG.model_dump(mode="json"))
    assert "No space left on device" in read_metrics(tmp_path / EVENTS)[-1]["message"]
