"""Backward, update, save, resume: plain torch, or DeepSpeed (its only import site).

Both use torch's AdamW and transformers' schedules, sum gradients over ranks (the caller has divided the loss by the
weight of the GLOBAL batch), clip, and answer the same calls, so the loop does not know which one it drives.
"""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from dtrpo_ray.config import TrainConfig
from dtrpo_ray.errors import CheckpointError, ConfigError
from dtrpo_ray.models.base import DiffusionLM

STATE_FILE = "plain.pt"


class Backend(Protocol):
    """What the loop asks for. `policy` is the module to call; `device` where batches go."""

    policy: Any
    device: torch.device

    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> tuple[float, float]:
        """Update after the last micro-batch of an optimizer step; returns (gradient norm, learning rate)."""
        ...

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        ...

    def save(self, path: Path, state: dict[str, Any]) -> None: ...
    def load(self, path: Path) -> dict[str, Any]: ...
    def full_model(self) -> DiffusionLM:
        """The model with whole parameters, to be called on every rank."""
        ...


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95))


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, num_steps: int) -> Any:
    warmup = int(config.warmup_ratio * num_steps)
    name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps + 1)


class PlainBackend:
    """One process, no DeepSpeed: unit tests, the bare loop of benchmarks, a GPU machine without it."""

    def __init__(self, model: DiffusionLM, config: TrainConfig, num_steps: int, device: torch.device) -> None:
        self.policy = model.to(device)
        self.device, self.max_norm = device, config.max_grad_norm
        self.optimizer = _optimizer(model, config)
        self.schedule = _schedule(self.optimizer, config, num_steps)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> tuple[float, float]:
        norm = float(nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_norm))
        lr = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, lr

    def reduce(self, values: Tensor) -> Tensor:
        return values

    def save(self, path: Path, state: dict[str, Any]) -> None:
        parts = {"model": self.policy, "optimizer": self.optimizer, "schedule": self.schedule}
        torch.save({**{k: v.state_dict() for k, v in parts.items()}, "state": state}, path / STATE_FILE)

    def load(self, path: Path) -> dict[str, Any]:
        saved = torch.load(path / STATE_FILE, weights_only=True)
        for name, part in (("model", self.policy), ("optimizer", self.optimizer), ("schedule", self.schedule)):
            part.load_state_dict(saved[name])
        state: dict[str, Any] = saved["state"]
        return state

    def full_model(self) -> DiffusionLM:
        assert isinstance(self.policy, DiffusionLM)
        return self.policy


def deepspeed_config(config: TrainConfig, num_workers: int, bf16: bool) -> dict[str, Any]:
    """The DeepSpeed config of a training stage, generated whole: DeepSpeed ignores top-level keys it does not know.

    Batches are packed rows of our own, so DeepSpeed's batch fields only carry the accumulation.
    """
    accumulation = config.accumulation(num_workers)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * num_workers,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class Zero3Sharding:
    """How a model is built and filled under ZeRO-3: each rank holds its part alone, rank 0 reads the files.

    It is made in a process group, and used as `models.checkpoint.Sharding`.
    """

    def __init__(self, config: TrainConfig, num_workers: int, device: torch.device) -> None:
        self._deepspeed = _import_deepspeed(device)
        self._deepspeed.init_distributed(auto_mpi_discovery=False)  # finds the group that is there
        bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        self._config = deepspeed_config(config, num_workers, bf16)
        self.rank = torch.distributed.get_rank()

    def build(self) -> AbstractContextManager[Any]:
        # without `dtype`: 0.19.8 turns an explicit float32 into bfloat16 where the device has no float16 (the CPU)
        return self._deepspeed.zero.Init(config_dict_or_path=self._config)

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        return self._deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import
    try:
        import deepspeed
    except ImportError:
        raise ConfigError("DeepSpeed is missing; pip install --no-build-isolation 'dtrpo-ray[deepspeed]'") from None
    return deepspeed


class DeepSpeedBackend:
    """A DeepSpeed engine over the process group that Ray Train has set up."""

    def __init__(
        self, model: DiffusionLM, config: TrainConfig, num_steps: int, num_workers: int, device: torch.device
    ) -> None:
        deepspeed = _import_deepspeed(device)
        self.device, self.num_workers = device, num_workers
        bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        optimizer = _optimizer(model, config)
        self.engine, _, _, self.schedule = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda wrapped: _schedule(wrapped, config, num_steps),
            config=deepspeed_config(config, num_workers, bf16),
        )
        self.policy = self.engine
        self.gathered = config.zero_stage == 3

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks and divides by the accumulation; our loss wants the plain sum
        self.engine.backward(loss * self.num_workers, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self) -> tuple[float, float]:
        lr = self.schedule.get_last_lr()[0]
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0), lr

    def reduce(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values

    def save(self, path: Path, state: dict[str, Any]) -> None:
        # universal_checkpoint_info lets stages 1 and 2 be converted to another world size later
        info = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
        self.engine.save_checkpoint(str(path), tag="deepspeed", client_state={**state, **info})

    def load(self, path: Path) -> dict[str, Any]:
        loaded, state = self.engine.load_checkpoint(str(path), tag="deepspeed")
        if loaded is None:
            raise CheckpointError(f"{path}: DeepSpeed found no checkpoint here")
        return dict(state)

    def full_model(self) -> DiffusionLM:
        model = self.engine.module
        if self.gathered:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                for parameter in model.parameters():
                    parameter.full = parameter.data.detach().cpu().clone()
            for parameter in model.parameters():
                parameter.data = parameter.full
        assert isinstance(model, DiffusionLM)
        return model
