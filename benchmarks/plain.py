"""A backend of the training loop in plain torch, without DeepSpeed; `benchmarks.train` compares the stack with it."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.train.backend import make_optimizer, make_schedule

STATE_FILE = "plain.pt"


class PlainBackend:
    """A `Backend` for one process, used by unit tests and by the bare loop of `benchmarks.train`."""

    def __init__(self, model: DiffusionLM, config: TrainConfig, num_steps: int, device: torch.device) -> None:
        self.policy = model.to(device)
        self.device, self.max_norm = device, config.max_grad_norm
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(self.optimizer, config, num_steps)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        loss.backward()

    def step(self, skip: bool = False) -> tuple[float, float]:
        norm = float(nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_norm))
        lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.skip = skip or not math.isfinite(norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, lr

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def reduce(self, values: Tensor) -> Tensor:
        return values

    def most(self, count: int) -> int:
        return count

    def save(self, path: Path, step: int) -> None:
        parts: dict[str, Any] = {"model": self.policy, "optimizer": self.optimizer, "schedule": self.schedule}
        torch.save({**{k: v.state_dict() for k, v in parts.items()}, "step": step}, path / STATE_FILE)

    def load(self, path: Path) -> int:
        saved = torch.load(path / STATE_FILE, weights_only=True)
        for name, part in (("model", self.policy), ("optimizer", self.optimizer), ("schedule", self.schedule)):
            part.load_state_dict(saved[name])
        return int(saved["step"])

    def full_model(self) -> DiffusionLM:
        assert isinstance(self.policy, DiffusionLM)
        return self.policy
