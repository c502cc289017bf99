"""Backward, update, save, resume on a DeepSpeed engine (the only file that imports DeepSpeed).

The loop drives any `Backend`; `benchmarks.plain` has one of plain torch, for comparison and for tests. A backend uses
torch's AdamW and the schedules of transformers, sums gradients over ranks (the caller has divided the loss by the
weight of the GLOBAL batch) and clips them.
"""

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dtrpo_ray import compat
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import CheckpointError, ConfigError
from dtrpo_ray.models.base import DiffusionLM

TAG = "deepspeed"  # the folder of its files in a checkpoint
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, by the makers' data sheets


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device, None where unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Return whether weights and activations are bfloat16: with "auto", on a GPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


class Backend(Protocol):
    """The loop's view of an engine: `policy` is the module to call, `device` the place of batches."""

    policy: Any
    device: torch.device

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of one micro-batch; `last` marks an optimizer step's last one, on all ranks at once."""

    def step(self, skip: bool = False) -> tuple[float, float]:
        """Update after the last micro-batch of an optimizer step; returns (gradient norm, learning rate).

        `skip`, or a gradient that is not finite (the norm says so), leaves weights and moments as they are; the
        schedule goes on either way.
        """

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return a trained parameter's whole gradient, summed over ranks, between the last `backward` and `step`.

        Every rank must call it. Not under ZeRO 3, which never holds whole gradients.
        """

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""

    def most(self, count: int) -> int:
        """Return the largest count of all ranks."""

    def save(self, path: Path, step: int) -> None:
        """Write weights, optimizer and schedule after an optimizer step."""

    def load(self, path: Path) -> int:
        """Load a checkpoint of `save`; returns its step."""

    def full_model(self) -> DiffusionLM:
        """Return the model with whole parameters; every rank must call it."""


class Skippable(torch.optim.Optimizer):
    """An optimizer that can skip one step: DeepSpeed offers no way to drop a step whose gradients are finite."""

    skip = refused = False
    check = False  # without ZeRO nothing in DeepSpeed looks at the gradients before they are used

    def step(self, closure: Any = None) -> Any:
        self.refused = self.skip or (self.check and not _finite_everywhere(self.param_groups))
        return None if self.refused else super().step(closure)


class SkippableAdamW(Skippable, torch.optim.AdamW):
    """torch's AdamW."""


def _finite_everywhere(groups: list[dict[str, Any]]) -> bool:
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    bad = torch.stack([~g.isfinite().all() for g in grads]).any().to(torch.float32)
    if torch.distributed.is_initialized():  # all must agree, whatever their sums rounded to
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
    return not bool(bad)


def make_optimizer(model: nn.Module, config: TrainConfig) -> Skippable:
    """Return AdamW over the trained parameters; with `offload` DeepSpeed's, whose state is in CPU memory."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = partial(_cpu_adam(), adamw_mode=True) if config.offload else SkippableAdamW
    return optimizer(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95))


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, num_steps: int) -> LambdaLR:
    """Return the schedule of transformers' `get_scheduler`, equal to the bit.

    Importing that function loads peft and accelerate: 2 s of CPU and 130 MiB in every worker (docs/decisions.md).
    """
    warmup, end = int(config.warmup_ratio * num_steps), num_steps + 1

    def share(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        if config.lr_schedule == "linear":
            return max(0.0, (end - step) / max(1, end - warmup))
        done = (step - warmup) / max(1, end - warmup)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * done))) if config.lr_schedule == "cosine" else 1.0

    return LambdaLR(optimizer, share)


def deepspeed_config(config: TrainConfig, num_workers: int, bf16: bool, universal: bool = False) -> dict[str, Any]:
    """Generate the whole DeepSpeed config of a training stage: DeepSpeed ignores top-level keys it does not know.

    We pack batches ourselves, so DeepSpeed's batch fields only carry the accumulation. `universal` loads a checkpoint
    that another number of workers wrote.
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
    """Builds and fills a model under ZeRO-3: each rank holds only its part, rank 0 reads the files.

    To be created in a process group; implements `models.weights.Sharding`.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._deepspeed = _deepspeed(device)
        self._deepspeed.init_distributed(auto_mpi_discovery=False)  # finds the group that is there
        self.rank, num_workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._config = deepspeed_config(config, num_workers, uses_bf16(config.precision, device))

    def build(self) -> AbstractContextManager[Any]:
        # without `dtype`: 0.19.8 turns an explicit float32 into bfloat16 where the device has no float16 (the CPU)
        return self._deepspeed.zero.Init(config_dict_or_path=self._config)

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        return self._deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


class DeepSpeedBackend:
    """A DeepSpeed engine over the process group that Ray Train has set up."""

    def __init__(
        self, model: DiffusionLM, config: TrainConfig, num_steps: int, device: torch.device, universal: bool = False
    ) -> None:
        deepspeed = _deepspeed(device)
        self.device, self.num_workers = device, torch.distributed.get_world_size()
        bf16 = uses_bf16(config.precision, device)
        self.optimizer = make_optimizer(model, config)
        self.optimizer.check = config.zero_stage == 0
        self.tells_no_norm = config.zero_stage == 0 and not bf16  # DeepSpeed then clips by it and keeps it to itself
        # the schedule is ours alone: DeepSpeed would stop it at a step that it drops
        self.schedule = make_schedule(self.optimizer, config, num_steps)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=deepspeed_config(config, self.num_workers, bf16, universal)
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
        lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.skip, self.optimizer.refused = skip, False
        norm = self._float32_norm() if self.tells_no_norm else None
        self.engine.step()
        with warnings.catch_warnings():  # a step that DeepSpeed drops never calls the optimizer
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()
        if self.optimizer.refused or not self.engine.was_step_applied():
            return math.nan, lr
        return float(self.engine.get_global_grad_norm() or 0.0) if norm is None else norm, lr

    def _float32_norm(self) -> float:
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return float(nn.utils.get_total_norm(grads))

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        return cast(Tensor, safe_get_full_grad(parameter))

    def reduce(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values

    def most(self, count: int) -> int:
        most = torch.tensor(count, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def save(self, path: Path, step: int) -> None:
        # universal_checkpoint_info lets stages 1 and 2 be converted to another world size later
        universal = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
        state = {"step": step, **universal, "schedule": self.schedule.state_dict()}
        self.engine.save_checkpoint(str(path), tag=TAG, client_state=state)

    def load(self, path: Path) -> int:
        loaded, state = self.engine.load_checkpoint(str(path), tag=TAG)
        if loaded is None:
            raise CheckpointError(f"{path}: DeepSpeed found no checkpoint here")
        self.schedule.load_state_dict(state["schedule"])
        return int(state["step"])

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


def _cpu_adam() -> Callable[..., Skippable]:
    """Return DeepSpeed's CPU Adam; it is compiled on first use (g++ and ninja), by one process at a time."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    class CPUAdam(Skippable, DeepSpeedCPUAdam):
        """DeepSpeed's Adam."""

    folder = compat.extension_folder("cpu_adam")
    with FileLock(folder.with_name(f"{folder.name}.held")):  # a dead process lets go of this lock
        (folder / "lock").unlink(missing_ok=True)  # torch's own outlives a killed build
        CPUAdamBuilder().load()
    return CPUAdam


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
    """Read the whole float32 parameters of a checkpoint by name, without an engine. Unpickles: only our own files."""
    _deepspeed(torch.device("cpu"))
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not list((checkpoint / TAG).glob("*optim_states.pt")):  # without ZeRO the module is whole in one file
        saved = torch.load(checkpoint / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: tensor.float() for name, tensor in saved["module"].items()}
    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    return {name: tensor.clone() for name, tensor in weights.items()}
