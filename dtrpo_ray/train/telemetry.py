"""Live telemetry of rank 0: metric rows to every sink, and a profile of a few steps."""

import resource
from pathlib import Path
from typing import Any

import torch
from ray.util.metrics import Gauge

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.metrics import EVENTS, METRICS, MetricsLog, append_event
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.train import trackers
from dtrpo_ray.train.backend import peak_flops
from dtrpo_ray.train.run import RunSpec


def step_flops(policy: DiffusionLM, config: TrainConfig) -> float:
    """Count the floating-point operations of a training step for each token of the trunk, by its weight matrices.

    Each weight costs 2 forward, 2 for the gradient of its input, 2 for its own gradient where it is trained, and 2 in a
    reference's forward; of a mixture, only the experts that a token takes count. Attention scores, recomputed layers
    and the head, which reads the scored tokens alone, are left out, so that the MFU is never too high.
    """
    settings, count = policy.lm.config, 0.0
    share = getattr(settings, "num_experts_per_tok", 1) / _num_experts(settings)
    for name, weight in policy.lm.model.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            count += getattr(weight, "ds_numel", weight.numel()) * (share if ".experts." in name else 1)
    return count * (2 + 2 + 2 * (config.lora is None) + 2 * config.runs_reference)


def _num_experts(settings: Any) -> int:
    return int(getattr(settings, "num_experts", None) or getattr(settings, "n_routed_experts", None) or 1)


def memory_bytes(device: torch.device) -> int:
    """Return the most memory that this rank has held: on the device, or of the process where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Sinks:
    """Rank 0's metrics rows -> metrics.jsonl, the trackers, and gauges that Ray's agent serves to Prometheus."""

    def __init__(self, spec: RunSpec, start: int, device: torch.device, flops_per_token: float) -> None:
        out = spec.stage.out

        def warn(message: str) -> None:
            append_event(out / EVENTS, "tracker", message)

        run, config = out.name.removesuffix(".partial"), spec.config.model_dump(mode="json")
        self.log = MetricsLog(out / METRICS, start)
        self.trackers = trackers.Trackers(spec.cluster.trackers, run, out, config, warn)
        self.gauges: dict[str, Gauge] = {}
        self.label, self.device = spec.stage.label, device
        peak = peak_flops(device)
        self.mfu_per_token = flops_per_token / peak if peak else None

    def write(self, row: dict[str, float]) -> None:
        row = {**row, "memory_bytes": memory_bytes(self.device)}
        if self.mfu_per_token:
            row["mfu"] = row["tokens_per_second"] * self.mfu_per_token
        self.log.write(row)
        self.trackers.write(row)
        for name, value in {"skipped": 0.0, **row}.items():  # a gauge stays at what it was set to
            if name not in self.gauges:
                self.gauges[name] = Gauge(f"dtrpo_train_{name}", f"{name} of training", tag_keys=("stage",))
            self.gauges[name].set(float(value), tags={"stage": self.label})

    def close(self) -> None:
        self.log.close()
        self.trackers.close()


def profiler(out: Path, num_steps: int) -> Any:
    """Start torch's profiler over `num_steps` optimizer steps after two to warm up; the trace goes to profile/."""
    profile = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=num_steps, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(out / "profile")),
        profile_memory=True,
    )
    profile.start()
    return profile
