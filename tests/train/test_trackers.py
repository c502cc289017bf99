"""Trackers get every step once, TensorBoard's files are read back, a missing package is named before a run."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrpo_ray.errors import ConfigError
from dtrpo_ray.train.trackers import Trackers, require

ROWS = [{"step": 1, "loss": 0.7, "seconds": 1.0}, {"step": 2, "loss": 0.5, "seconds": 2.0}]


def start(name: str, folder: Path, said: list[str]) -> Trackers:
    return Trackers([name], "train-1-abc", folder, {"lr": 1e-3}, said.append)


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    trackers = start("tensorboard", tmp_path, [])
    for row in ROWS:
        trackers.write(row)
    trackers.close()
    content, read = next((tmp_path / "tensorboard").iterdir()).read_bytes(), {}
    while content:  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        read |= {(v.tag, event.step): round(v.simple_value, 6) for v in event.summary.value}
        content = content[16 + size :]
    assert read[("train/loss", 1)] == 0.7
    assert read[("train/loss", 2)] == 0.5


def test_weights_and_biases_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    run = SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: logged.append("end"))

    def init(**given: Any) -> Any:
        logged.append(given)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    trackers = start("wandb", tmp_path, [])
    trackers.write(ROWS[0])
    trackers.close()
    assert (logged[0]["id"], logged[0]["resume"], logged[0]["project"]) == ("train-1-abc", "allow", "mine")
    assert logged[1:] == [(1, {"loss": 0.7, "seconds": 1.0}), "end"]


@pytest.mark.parametrize("known", [True, False])
def test_mlflow_finds_its_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    calls: dict[str, Any] = {}
    there = [SimpleNamespace(info=SimpleNamespace(run_id="r1"))] if known else []
    fake = SimpleNamespace(
        set_tracking_uri=lambda uri: calls.update(uri=uri),
        search_runs=lambda **given: there,
        start_run=lambda **given: calls.update(given),
        log_params=lambda params: calls.update(params=params),
        log_metrics=lambda numbers, step: calls.update(step=step, numbers=numbers),
        end_run=lambda: calls.update(ended=True),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trackers = start("mlflow", tmp_path, [])
    trackers.write(ROWS[1])
    trackers.close()
    assert calls["run_id"] == ("r1" if known else None)
    assert ("params" in calls) is not known
    assert (calls["step"], calls["numbers"]["loss"], calls["ended"]) == (2, 0.5, True)
    assert calls["uri"].startswith("file://")


def test_a_tracker_that_fails_is_dropped_and_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log(numbers: Any, step: int) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: SimpleNamespace(log=log)))
    said: list[str] = []
    trackers = start("wandb", tmp_path, said)
    for row in ROWS:
        trackers.write(row)
    trackers.close()
    assert said == ["tracker wandb failed and is off from step 1 on: no route"]


def test_a_tracker_that_cannot_begin_or_end_is_told_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**_: Any) -> None:
        raise ConnectionError("no route")

    said: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fails))
    trackers = start("wandb", tmp_path, said)
    trackers.write(ROWS[0])
    trackers.close()
    assert said == ["tracker wandb failed and is off from the start: no route"]
    run = SimpleNamespace(log=lambda numbers, step: None, finish=fails)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    trackers = start("wandb", tmp_path, said)
    trackers.write(ROWS[0])
    trackers.close()
    assert said[1:] == ["tracker wandb failed and is off at the end: no route"]


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(ConfigError, match=r"cluster\.trackers: mlflow is not installed; pip install mlflow"):
        require(["mlflow"])
