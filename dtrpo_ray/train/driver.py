"""Driver of Ray Train: a table, a base model and a TrainConfig -> a trained model directory that survives failures.

The driver lays out the data (`dataset.shard`), Ray Train runs `worker.run_rank` on every rank, and each rank drives the
same `loop.run` over a DeepSpeed engine. Every attempt starts from the newest checkpoint that verifies
(`checkpoint.py`), whoever wrote it: an earlier attempt, a driver that died, another number of workers. `events.jsonl`
holds the history of a run.
"""

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ray.train import (
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    ValidationConfig,
    ValidationTaskConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer

from dtrpo_ray import compat
from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import TrainError, last_line
from dtrpo_ray.files import join_path
from dtrpo_ray.metrics import ERRORS, EVENTS, METRICS, append_event, read_metrics
from dtrpo_ray.progress import watch
from dtrpo_ray.session import CPU_WORKER_ENV, shortfall, uses_gpu
from dtrpo_ray.train import checkpoint, dataset, validation
from dtrpo_ray.train.run import RunRecord, RunSpec, TrainStage, resume_root
from dtrpo_ray.train.telemetry import require_trackers

RAY_RUN = "checkpoints"  # Ray Train's run folder inside the stage's


def train(stage: TrainStage, config: TrainConfig, cluster: ClusterConfig) -> dict[str, float]:
    """Run the stage to its end; returns its last metrics.

    Raises CheckpointError, field by field, where `resume_from` is another run, and TrainError with the workers' own
    message when the run failed more often than `max_failures` or met an error that no restart mends.
    """
    if config.reference == "cache" and stage.cache is None:
        raise TrainError(f'{stage.label}: train.reference = "cache" finds no log-probs; run dtrpo ref-logps')
    require_trackers(cluster.trackers)
    cache = stage.cache and stage.cache.resolve()
    folders = {name: getattr(stage, name).resolve() for name in ("base", "table", "out")}  # workers run elsewhere
    stage = replace(stage, **folders, cache=cache)
    gpu, elastic = uses_gpu(cluster), not isinstance(cluster.num_workers, int)
    folder, name = _place(stage.out, cluster)
    root, other = join_path(folder, name), resume_root(stage, config)
    RunRecord.of(stage, config, root).write(stage.out)
    _forget_ray_list(root)
    shards, plan = dataset.shard(stage.table, config, stage.seed, 1 if elastic else cluster.most_workers)
    names = ["all"] if elastic else [f"rank-{rank}" for rank in range(cluster.most_workers)]
    spec = RunSpec(
        stage=stage,
        config=config,
        cluster=cluster,
        roots=(root, other) if other else (root,),
        num_steps=plan.num_steps,
        plan_digest=plan.digest,
        epoch_rows=int(np.count_nonzero(plan.epoch[plan.weight > 0] == 0)),
    )
    trainer = TorchTrainer(
        _train_function(spec),
        # the watchdog of each worker comes first: it dumps stacks
        torch_config=TorchConfig(timeout_s=cluster.hang_seconds + 60),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,  # type: ignore[arg-type]
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": {} if gpu else CPU_WORKER_ENV},  # type: ignore[call-arg]
            callbacks=[_failure_events(str(stage.out / EVENTS))],  # type: ignore[list-item]
        ),
        datasets=dict(zip(names, shards, strict=True)),
        dataset_config=DataConfig(datasets_to_split=[]),  # each rank's rows are cut already
        validation_config=_validation(spec, gpu) if config.validation else None,
    )
    if cluster.address == "local":
        compat.drop_placement_group_cleaner(trainer)
    _run(trainer, spec, gpu)
    last: dict[str, float] = read_metrics(stage.out / METRICS)[-1]
    return last


def _run(trainer: TorchTrainer, spec: RunSpec, gpu: bool) -> None:
    """Run the trainer under a progress bar. Raises TrainError with the most informative message of the workers."""
    out, label, failed = spec.stage.out, spec.stage.label, ""
    with watch(out / METRICS, label, spec.num_steps, out / EVENTS):
        if shortage := shortfall(spec.cluster, gpu):
            append_event(out / EVENTS, "waiting", shortage)
        try:
            _fit(trainer)
        except TrainingFailedError as error:
            first = next(iter((getattr(error, "worker_failures", None) or {0: error}).values()))
            failed = f"training failed: {last_line(first)}"
    fatal = [file.read_text() for file in sorted((out / ERRORS).glob("rank-*"))]  # that no restart mends
    if fatal:
        failed = max(fatal, key=lambda text: ("rows of this rank" in text, len(text)))
    if failed:
        raise TrainError(f"{label}: {failed}")


def _validation(spec: RunSpec, gpu: bool) -> ValidationConfig:
    """Validate each checkpoint in its own task beside the workers; a failure is logged and training goes on.

    On GPUs the task takes one; where the workers have them all, it waits until they are done.
    """
    settings = {
        "out": str(spec.stage.out),
        "root": checkpoint.open_storage(spec.roots[0])[1],
        "config": spec.config.model_dump(mode="json"),
    }
    return ValidationConfig(
        validation.validate,  # type: ignore[arg-type]
        ValidationTaskConfig(settings),
        {"num_cpus": 1, "num_gpus": 1 if gpu else 0, "runtime_env": {"env_vars": {} if gpu else CPU_WORKER_ENV}},
    )


def _place(out: Path, cluster: ClusterConfig) -> tuple[str, str]:
    """Return (folder, name) of a stage's checkpoints: in its own folder, or named like it in `cluster.checkpoints`."""
    if cluster.checkpoints is None:
        return str(out.resolve()), RAY_RUN
    where = cluster.checkpoints if "://" in cluster.checkpoints else str(Path(cluster.checkpoints).resolve())
    return where, out.name.removesuffix(".partial")


def forget_checkpoints(out: Path, cluster: ClusterConfig) -> None:
    """Delete the checkpoints of a stage that starts anew, wherever they are stored."""
    checkpoint.remove_folder(*checkpoint.open_storage(join_path(*_place(out, cluster))))


def _forget_ray_list(root: str) -> None:
    filesystem, path = checkpoint.open_storage(root)
    with suppress(FileNotFoundError):
        filesystem.delete_file(f"{path}/{compat.RAY_TRAIN_SNAPSHOT}")


def _train_function(spec: RunSpec) -> Callable[[], None]:
    """Return what Ray Train runs on each rank.

    It is pickled by value, and holds the spec, so that Ray Train's controller does not spend ten seconds on our
    imports.
    """

    def start() -> None:
        from dtrpo_ray.train import worker

        worker.run_rank(spec)

    return start


def _failure_events(events: str) -> UserCallback:
    """Return a callback of Ray Train's controller that logs each failed attempt; pickled by value as well."""

    class Failures(UserCallback):
        count = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            self.count += 1
            for rank, error in sorted(worker_exceptions.items()):
                message = f"worker {rank} failed: {last_line(error)}"
                append_event(Path(events), "failure", message, rank=rank, failure=self.count)

    return Failures()


def _fit(trainer: TorchTrainer) -> None:
    """Call `trainer.fit()`; Ctrl-C aborts the run as Ray Train does it, and then raises KeyboardInterrupt.

    Ray Train's handler of SIGINT waits until the run's controller is gone and raises SystemExit. The Ray session may
    only end after that: ended while a call still waits in it, the process dies of a segmentation fault. Ray Train
    leaves its handler in place, so the earlier one is restored here. Outside the main thread there is no handler.
    """
    earlier = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, earlier)
