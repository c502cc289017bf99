"""Ray Train shell: a table, a base model and a TrainConfig -> a trained model directory, with checkpoints and resume.

The driver lays out the data (`dataset.shard`), Ray Train runs `_worker` on every rank, and each rank drives the same
`loop.run` over a DeepSpeed engine. A stage that was cut off resumes from the last checkpoint in its folder.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray.train
import torch
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from dtrpo_ray import dataset, loop
from dtrpo_ray.backend import DeepSpeedBackend
from dtrpo_ray.config import ClusterConfig, TrainConfig
from dtrpo_ray.errors import TrainError
from dtrpo_ray.metrics import MetricsLog, read_metrics
from dtrpo_ray.models.registry import load_model, save_model
from dtrpo_ray.progress import watch
from dtrpo_ray.reference import ReferenceCache, write_reference
from dtrpo_ray.session import CPU_WORKER_ENV, cpu_threads, uses_gpu
from dtrpo_ray.step import checkpoint_layers

RAY_RUN = "checkpoints"  # Ray Train's run folder inside the stage's
METRICS, MODEL = "metrics.jsonl", "model"


@dataclass(frozen=True, slots=True)
class TrainStage:
    """What a training stage reads and where it writes; every path is seen by the driver and all workers."""

    label: str
    base: Path
    table: Path
    out: Path
    seed: int
    cache: tuple[Path, str] | None = None
    """Reference log-probs written beforehand and the reference's hash (`write_reference_logps`), if not computed."""


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
            "cache": stage.cache and (str(stage.cache[0].resolve()), stage.cache[1]),
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
    policy, reference, fill = load_model(base), None, None
    if settings["cache"]:
        fill = ReferenceCache.load(Path(settings["cache"][0]), settings["seed"], settings["cache"][1]).fill
    elif config.objective.type != "sft":
        reference = _frozen_reference(base, config, device)
    if config.gradient_checkpointing:
        checkpoint_layers(policy)
    backend = DeepSpeedBackend(policy, config, num_steps, num_workers, device)
    start_step = _resume(backend)
    log = MetricsLog(out / METRICS, start_step) if rank == 0 else None

    def save(step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            backend.save(Path(folder), {"step": step})
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}")

    rows = ray.train.get_dataset_shard(f"rank-{rank}")
    batches = dataset.rank_batches(rows, config, num_workers, start_step)
    to_batch = loop.collate(config, policy, settings["seed"], reference, fill, device)
    loop.run(config, backend, reference, batches, to_batch, start_step, num_steps, log.write if log else _ignore, save)
    _write_model(backend, base, out / MODEL, rank)


def _frozen_reference(base: Path, config: TrainConfig, device: torch.device) -> Any:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    reference = load_model(base, torch.bfloat16 if bf16 else torch.float32, str(device))
    return reference.eval().requires_grad_(False)


def write_reference_logps(stage: TrainStage, config: TrainConfig, reference_hash: str) -> int:
    """Write the log-probs of the stage's base at every state its training will draw into the file `stage.out`.

    Returns the number of (row, side, epoch) values. One process computes them, on a GPU if it sees one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = _frozen_reference(stage.base, config, device)
    files = sorted(str(p) for p in stage.table.glob("*.parquet"))
    table = pq.read_table(files).to_pylist()
    plan = dataset.make_plan([row["row_id"] for row in table], config, stage.seed)
    drawn = sorted(set(zip(plan.epoch.tolist(), plan.row.tolist(), strict=True)))
    rows = [{**table[row], "epoch": epoch} for epoch, row in drawn]
    micro_batches = (rows[first : first + config.micro_batch] for first in range(0, len(rows), config.micro_batch))
    to_batch = loop.collate(config, reference, stage.seed, reference, device=device)
    return write_reference(stage.out, reference, micro_batches, to_batch, stage.seed, reference_hash, device)


def _resume(backend: DeepSpeedBackend) -> int:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return int(backend.load(Path(folder))["step"])


def _write_model(backend: DeepSpeedBackend, base: Path, out: Path, rank: int) -> None:
    """The trained model beside its tokenizer, written by rank 0 under a temporary name."""
    model = backend.full_model()
    if rank == 0:
        partial = out.with_name(out.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        for file in base.iterdir():
            if file.name not in ("model.safetensors", "config.json"):
                (partial / file.name).write_bytes(file.read_bytes())
        save_model(model, partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.replace(out)


def _ignore(row: dict[str, Any]) -> None:
    del row
