"""Ray Train shell: a table, a base model and a TrainConfig -> a trained model directory, with checkpoints and resume.

The driver lays out the data (`dataset.shard`), Ray Train runs `_worker` on every rank, and each rank drives the same
`loop.run` over a DeepSpeed engine. A stage that was cut off resumes from the last checkpoint in its folder.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from dtrpo_ray import dataset, loop
from dtrpo_ray.backend import DeepSpeedBackend, Zero3Sharding
from dtrpo_ray.config import ClusterConfig, TrainConfig
from dtrpo_ray.errors import TrainError
from dtrpo_ray.lora import BaseReference, add_adapters, merge_adapters, save_adapter
from dtrpo_ray.metrics import MetricsLog, read_metrics
from dtrpo_ray.models.registry import copy_companions, load_model, save_model
from dtrpo_ray.progress import watch
from dtrpo_ray.session import CPU_WORKER_ENV, cpu_threads, uses_gpu
from dtrpo_ray.stages import whole_folder

RAY_RUN = "checkpoints"  # Ray Train's run folder inside the stage's
METRICS, MODEL, ADAPTER = "metrics.jsonl", "model", "adapter"


@dataclass(frozen=True, slots=True)
class TrainStage:
    """What a training stage reads and where it writes; every path is seen by the driver and all workers."""

    label: str
    base: Path
    table: Path
    out: Path
    seed: int


def train(stage: TrainStage, config: TrainConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Run the stage to its end; returns its last metrics.

    Raises TrainError with the workers' own message when the run has failed more often than `max_failures`.
    """
    gpu = uses_gpu(cluster)
    shards, num_steps = dataset.shard(stage.table, config, stage.seed, cluster.num_workers)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "num_workers": cluster.num_workers,
            "num_steps": num_steps,
            "seed": stage.seed,
            "base": str(stage.base.resolve()),
            "out": str(stage.out.resolve()),
        },
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=RAY_RUN,
            storage_path=str(stage.out.resolve()),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            worker_runtime_env={"env_vars": {} if gpu else CPU_WORKER_ENV},  # type: ignore[call-arg]
        ),
        datasets={f"rank-{rank}": rows for rank, rows in enumerate(shards)},
        dataset_config=DataConfig(datasets_to_split=[]),  # each rank's rows are cut already
    )
    metrics = stage.out / METRICS
    with watch(metrics, stage.label, num_steps):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise TrainError(f"{stage.label}: training failed: {_root_message(error)}") from None
    return read_metrics(metrics)[-1]


def _root_message(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = str(next(iter(failures.values()))).strip().splitlines()
    return lines[-1] if lines else repr(error)


def _worker(settings: dict[str, Any]) -> None:
    """One rank: build the engine, resume if there is a checkpoint, run the loop, write the model at the end."""
    context = ray.train.get_context()
    config = TrainConfig.model_validate(settings["config"])
    rank, num_workers, num_steps = context.get_world_rank(), settings["num_workers"], settings["num_steps"]
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(context.get_local_world_size()))
    base, out = Path(settings["base"]), Path(settings["out"])
    sharding = Zero3Sharding(config, num_workers, device) if config.zero_stage == 3 else None
    policy = load_model(base, device=str(device), sharding=sharding)
    reference: Any = None
    if config.lora:
        add_adapters(policy, config.lora, settings["seed"])
    backend = DeepSpeedBackend(policy, config, num_steps, num_workers, device)
    if config.objective.type != "sft":
        lora = BaseReference(backend.policy, policy) if config.lora else None
        reference = lora or _frozen_reference(base, config, device)
    start_step = _resume(backend)
    log = MetricsLog(out / METRICS, start_step) if rank == 0 else None

    def save(step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            backend.save(Path(folder), {"step": step})
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}")

    rows = ray.train.get_dataset_shard(f"rank-{rank}")
    batches = dataset.rank_batches(rows, config, num_workers, start_step)
    to_batch = loop.collate(config, policy, settings["seed"])
    loop.run(config, backend, reference, batches, to_batch, start_step, num_steps, log.write if log else _ignore, save)
    _write_model(backend, config, base, out, rank)


def _frozen_reference(base: Path, config: TrainConfig, device: torch.device) -> Any:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    reference = load_model(base, torch.bfloat16 if bf16 else torch.float32, str(device))
    return reference.eval().requires_grad_(False)


def _resume(backend: DeepSpeedBackend) -> int:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return int(backend.load(Path(folder))["step"])


def _write_model(backend: DeepSpeedBackend, config: TrainConfig, base: Path, out: Path, rank: int) -> None:
    """The trained model beside its tokenizer, and a LoRA run's adapter, written by rank 0 under temporary names."""
    model = backend.full_model()
    if rank != 0:
        return
    if config.lora:
        with whole_folder(out / ADAPTER) as folder:
            save_adapter(model, config.lora, str(base), folder)
        merge_adapters(model)
    with whole_folder(out / MODEL) as folder:
        copy_companions(base, folder)
        save_model(model, folder)


def _ignore(row: dict[str, Any]) -> None:
    del row
