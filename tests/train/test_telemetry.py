"""What is shown of a run: every gauge of the dashboard is one that training sets; trackers get every step once.

TensorBoard's files are read back, and a missing package is named before a run.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.train import LoraConfig, Objective, TrainConfig
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.metrics import METRICS, read_metrics
from dtrpo_ray.models.registry import build_model
from dtrpo_ray.train import telemetry
from dtrpo_ray.train.run import RunSpec, TrainStage
from dtrpo_ray.train.telemetry import Trackers, require_trackers
from tests.train.test_loop import config, rows, train


class FakeGauge:
    """Stands for ray.util.metrics.Gauge, which needs a running Ray to be read back."""

    made: dict[str, "FakeGauge"] = {}  # noqa: RUF012

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name)
        self.made[name] = self

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.value, self.tags = value, tags


def test_every_panel_shows_a_gauge_that_training_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Any
) -> None:
    _, log = train(make_model(), config(on_nonfinite="skip"), [rows(4)], make_model(seed=9))
    monkeypatch.setattr(telemetry, "Gauge", FakeGauge)
    monkeypatch.setattr(telemetry, "peak_flops", lambda device: 1e6)
    stage = TrainStage("train-1", tmp_path, tmp_path, tmp_path, 0)
    spec = RunSpec(stage, TrainConfig(), ClusterConfig(), (), 8, "a plan", 4)
    with telemetry.open_sinks(spec, 0, torch.device("cpu"), 80.0) as write:
        write({**log[0], "loss": 0.5, "tokens_per_second": 1000.0, "skipped": 1.0})
        assert FakeGauge.made["dtrpo_train_skipped"].value == 1
        write({**log[0], "loss": 0.5, "tokens_per_second": 1000.0})
    assert FakeGauge.made["dtrpo_train_skipped"].value == 0
    board = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    shown = {re.match(r"ray_(\w+)", panel["targets"][0]["expr"])[1] for panel in board["panels"]}  # type: ignore[index]
    assert shown <= FakeGauge.made.keys()
    assert FakeGauge.made["dtrpo_train_loss"].value == 0.5
    assert FakeGauge.made["dtrpo_train_loss"].tags == {"stage": "train-1"}
    # 1000 tokens a second of 80 flops each, on a device of a million
    assert FakeGauge.made["dtrpo_train_mfu"].value == pytest.approx(0.08)
    assert read_metrics(tmp_path / METRICS)[0]["memory_bytes"] > 1e7


def test_a_profile_of_a_few_steps_is_a_trace(tmp_path: Path) -> None:
    with telemetry.profiler(tmp_path, num_steps=2) as profiler:
        for _ in range(6):
            profiler.step()
            torch.ones(4).sum()
    trace = json.loads(next((tmp_path / "profile").glob("*.json")).read_text())
    assert any(event.get("name") == "aten::sum" for event in trace["traceEvents"])


@pytest.mark.parametrize(
    ("changes", "each"),
    [({}, 8), ({"reference": "cache"}, 6), ({"lora": LoraConfig()}, 6), ({"objective": Objective(type="sft")}, 6)],
)
def test_flops_are_those_of_the_weights_that_a_token_meets(changes: dict[str, Any], each: int) -> None:
    """Of a mixture, two experts of six; 2 a weight forward, backward once or twice, and in a reference."""
    tiny = json.loads((ROOT / "tests" / "models" / "tiny_configs.json").read_text())
    for name, share in (("sdar", 1), ("sdar_moe", 2 / 6)):
        model = build_model(tiny[name])
        weights = {n: p.numel() for n, p in model.lm.model.named_parameters() if p.dim() > 1}
        del weights["embed_tokens.weight"]
        met = sum(count * (share if ".experts." in n else 1) for n, count in weights.items())
        assert telemetry.step_flops(model, TrainConfig(**changes)) == pytest.approx(each * met)


STEPS = [{"step": 1, "loss": 0.7, "seconds": 1.0}, {"step": 2, "loss": 0.5, "seconds": 2.0}]


def start(name: str, folder: Path, said: list[str]) -> Trackers:
    return Trackers([name], "train-1-abc", folder, {"lr": 1e-3}, said.append)


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    trackers = start("tensorboard", tmp_path, [])
    for row in STEPS:
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
    trackers.write(STEPS[0])
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
    trackers.write(STEPS[1])
    trackers.close()
    assert calls["run_id"] == ("r1" if known else None)
    assert ("params" in calls) is not known
    assert (calls["step"], calls["numbers"]["loss"], calls["ended"]) == (2, 0.5, True)
    assert calls["uri"].startswith("file://")


def test_a_tracker_that_fails_is_dropped_and_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log(numbers: Any, step: int) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **_: SimpleNamespace(log=log, finish=pytest.fail))
    )
    said: list[str] = []
    trackers = start("wandb", tmp_path, said)
    for row in STEPS:
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
    trackers.write(STEPS[0])
    trackers.close()
    assert said == ["tracker wandb failed and is off from the start: no route"]
    run = SimpleNamespace(log=lambda numbers, step: None, finish=fails)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    trackers = start("wandb", tmp_path, said)
    trackers.write(STEPS[0])
    trackers.close()
    assert said[1:] == ["tracker wandb failed and is off at the end: no route"]


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(ConfigError, match=r"cluster\.trackers: mlflow is not installed; pip install mlflow"):
        require_trackers(["mlflow"])
