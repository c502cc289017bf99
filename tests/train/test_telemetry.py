"""What is shown of a run: every gauge of the dashboard is one that training sets."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.train import LoraConfig, Objective, TrainConfig
from dtrpo_ray.metrics import METRICS, read_metrics
from dtrpo_ray.models.registry import build_model
from dtrpo_ray.train import telemetry
from dtrpo_ray.train.run import RunSpec, TrainStage
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
    sinks = telemetry.Sinks(spec, 0, torch.device("cpu"), 80.0)
    sinks.write({**log[0], "loss": 0.5, "tokens_per_second": 1000.0, "skipped": 1.0})
    assert FakeGauge.made["dtrpo_train_skipped"].value == 1
    sinks.write({**log[0], "loss": 0.5, "tokens_per_second": 1000.0})
    sinks.close()
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
    profiler = telemetry.profiler(tmp_path, num_steps=2)
    for _ in range(6):
        profiler.step()
        torch.ones(4).sum()
    profiler.stop()
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
