"""Backward, update, save, resume: plain torch, or DeepSpeed (its only import site).

Both use torch's AdamW and the schedules that transformers has, sum gradients over ranks (the caller has divided the
loss by the weight of the GLOBAL batch), clip, and answer the same calls, so the loop does not know which one it drives.
"""

import math
import os
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock
from torch import Tensor, nn

from dtrpo_ray import compat
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import CheckpointError, ConfigError
from dtrpo_ray.models.base import DiffusionLM

STATE_FILE = "plain.pt"
TAG = "deepspeed"  # the folder of its files in a checkpoint
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, by the makers' data sheets


def peak_flops(device: torch.device) -> float | None:
    """Of one device, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether weights and activations are bfloat16: "auto" is, on a GPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


class Backend(Protocol):
    """What the loop asks for. `policy` is the module to call; `device` where batches go."""

    policy: Any
    device: torch.device

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Gradients of one micro-batch; `last` of the optimizer step, on all ranks at once."""
        ...

    def step(self, skip: bool = False) -> tuple[float, float]:
        """Update after the last micro-batch of an optimizer step; returns (gradient norm, learning rate).

        `skip`, or a gradient that is not finite (the norm says so), leaves weights and moments as they are; the
        schedule goes on either way.
        """
        ...

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        ...

    def most(self, count: int) -> int:
        """The largest count of all ranks."""
        ...

    def save(self, path: Path, state: dict[str, Any]) -> None: ...
    def load(self, path: Path) -> dict[str, Any]: ...
    def full_model(self) -> DiffusionLM:
        """The model with whole parameters, to be called on every rank."""
        ...


class _AdamW(torch.optim.AdamW):
    """torch's AdamW that can sit out one step: DeepSpeed offers no way to drop a step whose gradients are finite."""

    skip = False
    check = False  # without ZeRO nothing in DeepSpeed looks at the gradients before they are used

    def step(self, closure: Any = None) -> Any:
        self.refused = self.skip or (self.check and not _finite_everywhere(self.param_groups))
        return None if self.refused else super().step(closure)


def _finite_everywhere(groups: list[dict[str, Any]]) -> bool:
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    bad = torch.stack([~g.isfinite().all() for g in grads]).any().to(torch.float32)
    if torch.distributed.is_initialized():  # all must agree, whatever their sums rounded to
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
    return not bool(bad)


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {"lr": config.lr, "weight_decay": config.weight_decay, "betas": (0.9, 0.95)}


def _optimizer(model: nn.Module, config: TrainConfig) -> _AdamW:
    return _AdamW([p for p in model.parameters() if p.requires_grad], **_settings(config))


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, num_steps: int) -> Any:
    """transformers' `get_scheduler`, to the bit, without its module, which imports peft: five seconds a process."""
    warmup, end = int(config.warmup_ratio * num_steps), num_steps + 1

    def share(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        if config.lr_schedule == "linear":
            return max(0.0, (end - step) / max(1, end - warmup))
        done = (step - warmup) / max(1, end - warmup)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * done))) if config.lr_schedule == "cosine" else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


class PlainBackend:
    """One process, no DeepSpeed: unit tests, the bare loop of benchmarks, a GPU machine without it."""

    def __init__(self, model: DiffusionLM, config: TrainConfig, num_steps: int, device: torch.device) -> None:
        self.policy = model.to(device)
        self.device, self.max_norm = device, config.max_grad_norm
        self.optimizer = _optimizer(model, config)
        self.schedule = _schedule(self.optimizer, config, num_steps)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        loss.backward()

    def step(self, skip: bool = False) -> tuple[float, float]:
        norm = float(nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_norm))
        lr = self.schedule.get_last_lr()[0]
        self.optimizer.skip = skip or not math.isfinite(norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, lr

    def reduce(self, values: Tensor) -> Tensor:
        return values

    def most(self, count: int) -> int:
        return count

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


def deepspeed_config(config: TrainConfig, num_workers: int, bf16: bool, universal: bool = False) -> dict[str, Any]:
    """The DeepSpeed config of a training stage, generated whole: DeepSpeed ignores top-level keys it does not know.

    Batches are packed rows of our own, so DeepSpeed's batch fields only carry the accumulation. `universal` loads a
    checkpoint that was written by another number of workers.
    """
    accumulation = config.accumulation(num_workers)
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * num_workers,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **({"checkpoint": {"load_universal": True}} if universal else {}),
    }


class Zero3Sharding:
    """How a model is built and filled under ZeRO-3: each rank holds its part alone, rank 0 reads the files.

    It is made in a process group, and used as `models.checkpoint.Sharding`.
    """

    def __init__(self, config: TrainConfig, num_workers: int, device: torch.device) -> None:
        self._deepspeed = _deepspeed(device)
        self._deepspeed.init_distributed(auto_mpi_discovery=False)  # finds the group that is there
        bf16 = uses_bf16(config.precision, device)
        self._config = deepspeed_config(config, num_workers, bf16)
        self.rank = torch.distributed.get_rank()

    def build(self) -> AbstractContextManager[Any]:
        # without `dtype`: 0.19.8 turns an explicit float32 into bfloat16 where the device has no float16 (the CPU)
        return self._deepspeed.zero.Init(config_dict_or_path=self._config)

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        return self._deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


class DeepSpeedBackend:
    """A DeepSpeed engine over the process group that Ray Train has set up."""

    def __init__(
        self,
        model: DiffusionLM,
        config: TrainConfig,
        num_steps: int,
        num_workers: int,
        device: torch.device,
        universal: bool = False,
    ) -> None:
        deepspeed = _deepspeed(device)
        self.device, self.num_workers = device, num_workers
        bf16 = uses_bf16(config.precision, device)
        self.optimizer = _offloaded(model, config) if config.offload else _optimizer(model, config)
        self.optimizer.check = config.zero_stage == 0
        # the schedule is ours alone: DeepSpeed would stop it at a step that it drops
        self.schedule = _schedule(self.optimizer, config, num_steps)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=deepspeed_config(config, num_workers, bf16, universal)
        )
        self.policy = self.engine
        self.gathered = config.zero_stage == 3

    def backward(self, loss: Tensor, last: bool = True) -> None:
        # DeepSpeed averages over ranks and divides by the accumulation; our loss wants the plain sum
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.num_workers, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def step(self, skip: bool = False) -> tuple[float, float]:
        lr = self.schedule.get_last_lr()[0]
        self.optimizer.skip, self.optimizer.refused = skip, False
        self.engine.step()
        with warnings.catch_warnings():  # a step that DeepSpeed drops never calls the optimizer
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()
        if self.optimizer.refused or not self.engine.was_step_applied():
            return math.nan, lr
        return float(self.engine.get_global_grad_norm() or 0.0), lr

    def reduce(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values

    def most(self, count: int) -> int:
        most = torch.tensor(count, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def save(self, path: Path, state: dict[str, Any]) -> None:
        # universal_checkpoint_info lets stages 1 and 2 be converted to another world size later
        extra = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
        extra["schedule"] = self.schedule.state_dict()
        self.engine.save_checkpoint(str(path), tag=TAG, client_state={**state, **extra})

    def load(self, path: Path) -> dict[str, Any]:
        loaded, state = self.engine.load_checkpoint(str(path), tag=TAG)
        if loaded is None:
            raise CheckpointError(f"{path}: DeepSpeed found no checkpoint here")
        self.schedule.load_state_dict(state["schedule"])
        return dict(state)

    def full_model(self) -> DiffusionLM:
        model = self.engine.module
        if self.gathered:
            import deepspeed

            whole = []
            for parameter in model.parameters():  # one at a time: no device holds more than its part and one parameter
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole.append(parameter.data.detach().cpu().clone())
            for parameter, value in zip(model.parameters(), whole, strict=True):
                parameter.data = value
        assert isinstance(model, DiffusionLM)
        return model


def _deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import
    try:
        import deepspeed
    except ImportError:
        raise ConfigError("DeepSpeed is missing; pip install --no-build-isolation 'dtrpo-ray[deepspeed]'") from None
    compat.disable_shm_all_reduce(deepspeed)
    return deepspeed


def _offloaded(model: nn.Module, config: TrainConfig) -> Any:
    """DeepSpeed's CPU Adam; it is compiled on first use (g++ and ninja), by one process at a time."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    class CPUAdam(DeepSpeedCPUAdam):
        skip = check = refused = False

        def step(self, closure: Any = None) -> Any:
            self.refused = self.skip
            return None if self.skip else super().step(closure)

    folder = compat.extension_folder("cpu_adam")
    with FileLock(folder.with_name(f"{folder.name}.held")):  # one that a dead process has let go
        (folder / "lock").unlink(missing_ok=True)  # torch's own outlives a killed build, and all would wait on it
        CPUAdamBuilder().load()
    return CPUAdam([p for p in model.parameters() if p.requires_grad], adamw_mode=True, **_settings(config))


def to_universal(checkpoint: Path, out: Path) -> None:
    """Convert a ZeRO checkpoint of any number of workers into one that any number can load (`universal=True`).

    Raises CheckpointError with DeepSpeed's own last line.
    """
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "2"]
    words += ["--num_merge_workers", "2", "--input_folder", str(checkpoint / TAG), "--output_folder", str(out / TAG)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise CheckpointError(f"{checkpoint}: not convertible: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    (out / "latest_universal").write_text(TAG)


def checkpoint_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The whole float32 parameters of a checkpoint by name, without an engine. It unpickles: only our own files."""
    _deepspeed(torch.device("cpu"))
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not list((checkpoint / TAG).glob("*optim_states.pt")):  # without ZeRO the module is whole in one file
        saved = torch.load(checkpoint / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: tensor.float() for name, tensor in saved["module"].items()}
    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    return {name: tensor.clone() for name, tensor in weights.items()}
