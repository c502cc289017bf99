"""Live telemetry of rank 0: metric rows to every sink, and a profile of a few steps.

The JSON lines of `metrics` are always written. The packages of trackers are imported only here and only if named; a
tracker that fails is dropped with a warning, a run never is.
"""

import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ray.util.metrics import Gauge

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.metrics import EVENTS, METRICS, MetricsLog, append_event
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.train.backend import peak_flops
from dtrpo_ray.train.run import RunSpec

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}  # of trackers


def step_flops(policy: DiffusionLM, config: TrainConfig) -> float:
    """Count the floating-point operations of a training step for each token of the trunk, by its weight matrices.

    Each weight costs 2 forward, 2 for the gradient of its input, 2 for its own gradient where it is trained, and 2 in a
    reference's forward; of a mixture, only the experts that a token takes count. Attention scores, recomputed layers
    and the head, which reads the scored tokens alone, are left out, so that the MFU is never too high.
    """
    settings, count = policy.lm.config, 0.0
    experts = getattr(settings, "num_experts", None) or getattr(settings, "n_routed_experts", None) or 1
    share = getattr(settings, "num_experts_per_tok", 1) / experts
    for name, weight in policy.lm.model.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            count += getattr(weight, "ds_numel", weight.numel()) * (share if ".experts." in name else 1)
    return count * (2 + 2 + 2 * (config.lora is None) + 2 * config.runs_reference)


def memory_bytes(device: torch.device) -> int:
    """Return the most memory that this rank has held: on the device, or of the process where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Tracker(NamedTuple):
    """An open tracker: `write` takes an optimizer step and its numbers, `close` flushes."""

    write: Callable[[int, dict[str, float]], Any]
    close: Callable[[], Any]


def _tensorboard(run: str, folder: Path, config: dict[str, Any]) -> Tracker:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", str(config))

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(f"train/{name}", value, step)

    return Tracker(write, writer.close)


def _wandb(run: str, folder: Path, config: dict[str, Any]) -> Tracker:
    """Project and entity come from WANDB_PROJECT and WANDB_ENTITY; the same stage is the same run after a resume."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "dtrpo")
    opened = wandb.init(id=run, name=run, project=project, resume="allow", dir=str(folder), config=config)
    return Tracker(lambda step, numbers: opened.log(numbers, step=step), opened.finish)


def _mlflow(run: str, folder: Path, config: dict[str, Any]) -> Tracker:
    """The server comes from MLFLOW_TRACKING_URI, else a folder in the stage's; the run is found again by its name."""
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri((folder / "mlflow").resolve().as_uri())
    found = mlflow.search_runs(filter_string=f"attributes.run_name = '{run}'", output_format="list")
    mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=run)
    if not found:
        mlflow.log_params({name: str(value)[:500] for name, value in config.items()})
    return Tracker(lambda step, numbers: mlflow.log_metrics(numbers, step=step), mlflow.end_run)


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


class Trackers:
    """All trackers of a run; `warn` is called once for each that fails."""

    def __init__(
        self, names: Sequence[str], run: str, folder: Path, config: dict[str, Any], warn: Callable[[str], None]
    ) -> None:
        require_trackers(names)
        self.warn, self.open = warn, dict[str, Tracker]()
        for name in names:
            with self._drop_on_failure(name, "from the start"):
                self.open[name] = _OPEN[name](run, folder, config)

    def write(self, row: dict[str, float]) -> None:
        """Hand the numbers of a metrics row to every tracker."""
        step = int(row["step"])
        numbers = {name: float(value) for name, value in row.items() if name != "step"}
        for name, tracker in list(self.open.items()):
            with self._drop_on_failure(name, f"from step {step} on"):
                tracker.write(step, numbers)

    def close(self) -> None:
        """Flush every tracker."""
        for name, tracker in list(self.open.items()):
            with self._drop_on_failure(name, "at the end"):
                tracker.close()

    @contextmanager
    def _drop_on_failure(self, name: str, when: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.warn(f"tracker {name} failed and is off {when}: {error}")
            self.open.pop(name, None)


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError, before anything runs, for a tracker whose package is missing."""
    for name in names:
        if PACKAGES[name] not in sys.modules and find_spec(PACKAGES[name]) is None:
            raise ConfigError(f"cluster.trackers: {name} is not installed; pip install {PACKAGES[name]}")


@contextmanager
def open_sinks(
    spec: RunSpec, start: int, device: torch.device, flops_per_token: float
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield rank 0's writer of rows: to metrics.jsonl, the trackers, and gauges that Ray's agent gives Prometheus."""
    out, label, peak = spec.stage.out, spec.stage.label, peak_flops(device)
    run, config = out.name.removesuffix(".partial"), spec.config.model_dump(mode="json")
    log, gauges = MetricsLog(out / METRICS, start), dict[str, Gauge]()
    trackers = Trackers(spec.cluster.trackers, run, out, config, partial(append_event, out / EVENTS, "tracker"))

    def write(row: dict[str, float]) -> None:
        row = {**row, "memory_bytes": memory_bytes(device)}
        if peak:
            row["mfu"] = row["tokens_per_second"] * (flops_per_token / peak)
        log.write(row)
        trackers.write(row)
        for name, value in {"skipped": 0.0, **row}.items():  # a gauge stays at what it was set to
            if name not in gauges:
                gauges[name] = Gauge(f"dtrpo_train_{name}", f"{name} of training", tag_keys=("stage",))
            gauges[name].set(float(value), tags={"stage": label})

    try:
        yield write
    finally:
        log.close()
        trackers.close()


def profiler(out: Path, num_steps: int) -> torch.profiler.profile:
    """Return torch's profiler of `num_steps` optimizer steps after two to warm up; the trace goes to profile/."""
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=num_steps, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(out / "profile")),
        profile_memory=True,
    )
