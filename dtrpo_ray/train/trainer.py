"""Ray Train shell: a table, a base model and a TrainConfig -> a trained model directory that survives failures.

The driver lays out the data (`dataset.shard`), Ray Train runs `_worker` on every rank, and each rank drives the same
`loop.run` over a DeepSpeed engine. Every attempt starts from the newest checkpoint that verifies (`checkpoint.py`),
whoever wrote it: an earlier attempt, a driver that died, another number of workers. `events.jsonl` tells what happened.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from pyarrow.fs import FileType
from pydantic import ValidationError
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
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import CheckpointError, DtrpoError, TrainError, last_line
from dtrpo_ray.method.step import checkpoint_layers
from dtrpo_ray.metrics import ERRORS, EVENTS, METRICS, RUN, append_event, read_metrics
from dtrpo_ray.models.lora import BaseReference, add_adapters, merge_adapters, save_adapter
from dtrpo_ray.models.registry import copy_companions, load_model, save_model
from dtrpo_ray.progress import watch
from dtrpo_ray.session import CPU_WORKER_ENV, cpu_threads, shortfall, uses_gpu
from dtrpo_ray.stages import joined, whole_folder
from dtrpo_ray.train import checkpoint, dataset, loop, recovery, telemetry, trackers, validation
from dtrpo_ray.train.backend import DeepSpeedBackend, Zero3Sharding, uses_bf16
from dtrpo_ray.train.reference import ReferenceCache, load_reference, reference_key

RAY_RUN = "checkpoints"  # Ray Train's run folder inside the stage's
MODEL, ADAPTER = "model", "adapter"
NO_WEIGHTS = frozenset({"log_every", "save_every", "keep_checkpoints", "keep_best", "on_nonfinite", "validation"})
"""Fields of a training section that change no weight."""
MAY_CHANGE = NO_WEIGHTS | {"micro_batch", "micro_tokens"}  # in a resumed run; these change the order of sums


@dataclass(frozen=True, slots=True)
class TrainStage:
    """What a training stage reads and where it writes; every path is seen by the driver and all workers.

    `identity` are the hashes of base and table; `resume_from` is the folder of another run of the stage to go on from.
    """

    label: str
    base: Path
    table: Path
    out: Path
    seed: int
    identity: Mapping[str, Any] = field(default_factory=dict)
    resume_from: Path | None = None
    cache: tuple[Path, str] | None = None
    """Reference log-probs written beforehand and the reference's hash (`ref_logps`), if not computed."""
    workers: Mapping[str, Any] = field(default_factory=dict)
    """`cluster.num_workers` that names each training stage up to this one, for a run that goes on from it."""


def train(stage: TrainStage, config: TrainConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Run the stage to its end; returns its last metrics.

    Raises CheckpointError where `resume_from` is of another run, field by field, and TrainError with the workers' own
    message when the run has failed more often than `max_failures` or has an error that a restart cannot mend.
    """
    if config.reference == "cache" and stage.cache is None:
        raise TrainError(f'{stage.label}: train.reference = "cache", and the stage has none; run dtrpo ref-logps')
    trackers.require(cluster.trackers)
    gpu, elastic = uses_gpu(cluster), not isinstance(cluster.num_workers, int)
    folder, name = _place(stage.out, cluster)
    roots = [joined(folder, name), *_other_root(stage, config)]
    _describe(stage, config, roots[0])
    checkpoint.forget_ray_snapshot(roots[0])
    shards, plan = dataset.shard(stage.table, config, stage.seed, 1 if elastic else cluster.most_workers)
    names = ["all"] if elastic else [f"rank-{rank}" for rank in range(cluster.most_workers)]
    events = stage.out / EVENTS
    trainer = (_LocalTrainer if cluster.address == "local" else TorchTrainer)(
        _train_function(),
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "num_steps": plan.num_steps,
            "plan": {"digest": plan.digest, "rows": int(np.count_nonzero(plan.epoch[plan.weight > 0] == 0))},
            "seed": stage.seed,
            "label": stage.label,
            "base": str(stage.base.resolve()),
            "identity": dict(stage.identity),
            "out": str(stage.out.resolve()),
            "roots": roots,
            "hang_seconds": cluster.hang_seconds,
            "trackers": cluster.trackers,
            "profile_steps": cluster.profile_steps,
            "elastic": elastic,
            "cache": stage.cache and (str(stage.cache[0].resolve()), stage.cache[1]),
        },
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
            callbacks=[_failures(str(events.resolve()))],  # type: ignore[list-item]
        ),
        datasets=dict(zip(names, shards, strict=True)),
        dataset_config=DataConfig(datasets_to_split=[]),  # each rank's rows are cut already
        validation_config=_validation(stage, config, roots[0], gpu) if config.validation else None,
    )
    with watch(stage.out / METRICS, stage.label, plan.num_steps, events):
        if waits := shortfall(cluster, gpu):
            append_event(events, "waiting", waits)
        try:
            _fit(trainer)
        except TrainingFailedError as error:
            told = _told(stage.out) or f"training failed: {_root_message(error)}"
            raise TrainError(f"{stage.label}: {told}") from None
    if told := _told(stage.out):
        raise TrainError(f"{stage.label}: {told}")
    return read_metrics(stage.out / METRICS)[-1]


def _validation(stage: TrainStage, config: TrainConfig, root: str, gpu: bool) -> ValidationConfig:
    """Each checkpoint in a task of its own, beside the workers; one that fails is told, and training goes on.

    On GPUs it takes one: where the workers have them all it waits until they are done.
    """
    told = {"out": str(stage.out.resolve()), "root": checkpoint.open_storage(root)[1]}
    return ValidationConfig(
        validation.validate,  # type: ignore[arg-type]
        ValidationTaskConfig({**told, "config": config.model_dump(mode="json")}),
        {"num_cpus": 1, "num_gpus": 1 if gpu else 0, "runtime_env": {"env_vars": {} if gpu else CPU_WORKER_ENV}},
    )


def _place(out: Path, cluster: ClusterConfig) -> tuple[str, str]:
    """(folder, name) of a stage's checkpoints: in its own folder, or named like it in `cluster.checkpoints`."""
    if cluster.checkpoints is None:
        return str(out.resolve()), RAY_RUN
    where = cluster.checkpoints if "://" in cluster.checkpoints else str(Path(cluster.checkpoints).resolve())
    return where, out.name.removesuffix(".partial")


def forget_checkpoints(out: Path, cluster: ClusterConfig) -> None:
    """Delete the checkpoints of a stage that is made anew, wherever they lie."""
    filesystem, path = checkpoint.open_storage(joined(*_place(out, cluster)))
    if filesystem.get_file_info(path).type != FileType.NotFound:
        checkpoint.remove_folder(filesystem, path)


def _description(stage: TrainStage, config: TrainConfig) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json"), "seed": stage.seed, "identity": dict(stage.identity)}


def _describe(stage: TrainStage, config: TrainConfig, root: str) -> None:
    """run.json for `status` and for a later `--resume`; errors of an earlier driver are forgotten."""
    shutil.rmtree(stage.out / ERRORS, ignore_errors=True)
    record = {**_description(stage, config), "label": stage.label, "checkpoints": root, "workers": dict(stage.workers)}
    (stage.out / RUN).write_text(json.dumps(record, indent=2) + "\n")


def workers_of(run: Path) -> dict[str, Any]:
    """TrainStage.workers of the run whose folder this is; nothing where it is no such folder."""
    try:
        found = json.loads((run / RUN).read_text())["workers"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {name: tuple(workers) if isinstance(workers, list) else workers for name, workers in found}


def _other_root(stage: TrainStage, config: TrainConfig) -> list[str]:
    """The checkpoints of the run to go on from. Raises CheckpointError naming every field that must not change."""
    if stage.resume_from is None:
        return []
    file = stage.resume_from / RUN
    try:
        old = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        raise CheckpointError(
            f"--resume {stage.resume_from}: no readable {RUN}; name a training stage's folder"
        ) from None
    section = _section(stage.label)
    with suppress(ValidationError, KeyError):  # fields that have come since are at their defaults
        old["config"] = type(config).model_validate(old["config"]).model_dump(mode="json")
    changed = _changes(old, _description(stage, config), section)
    if changed:
        lines = "\n".join(f"  {name}: {was!r} then, {now!r} now" for name, was, now in changed)
        may = ", ".join(f"{section}.{name}" for name in sorted(MAY_CHANGE))
        raise CheckpointError(
            f"--resume {stage.resume_from}: this is another run:\n{lines}\n"
            f"set them back, or start anew without --resume. May change: {may}, and all of [cluster]"
        )
    root = checkpoint.root_of(stage.resume_from.resolve(), str(old["checkpoints"]))
    checkpoint.require_any(root)
    return [root]


def _section(label: str) -> str:
    """The section of the job that a stage's settings lie in."""
    return "sft" if label == "base" else "train"


def _changes(old: dict[str, Any], new: dict[str, Any], section: str) -> list[tuple[str, Any, Any]]:
    """(field, then, now) of each field of two runs that differs and must not; `section` is the job's."""
    found: list[tuple[str, Any, Any]] = []

    def walk(name: str, was: Any, now: Any) -> None:
        if name.removeprefix("config.") in MAY_CHANGE or (name == "config.precision" and "auto" in (was, now)):
            return  # what "auto" was is known by the checkpoint (`recovery.require_precision`)
        if isinstance(was, dict) and isinstance(now, dict):
            for key in sorted({*was, *now}):
                walk(f"{name}.{key}" if name else key, was.get(key), now.get(key))
        elif was != now:
            found.append((name.replace("config.", f"{section}.").replace("identity.", ""), was, now))

    walk("", {key: old.get(key) for key in new}, new)
    return found


class _LocalTrainer(TorchTrainer):
    """Without the actor that frees the workers' places if Ray Train's controller dies: here they go with the session.

    It asks the dashboard, which a session of our own does not have, and so holds up each stage's end by 12 seconds.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]


def _train_function() -> Callable[[dict[str, Any]], None]:
    """What Ray Train runs on each rank. Pickled by value: its controller need not spend ten seconds on our imports."""

    def start(settings: dict[str, Any]) -> None:
        from dtrpo_ray.train import trainer

        trainer._worker(settings)

    return start


def _failures(events: str) -> UserCallback:
    """In Ray Train's controller, and pickled by value as well: each failed attempt becomes an event."""

    class Failures(UserCallback):
        count = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            self.count += 1
            for rank, error in sorted(worker_exceptions.items()):
                message = f"worker {rank} failed: {last_line(error)}"
                append_event(Path(events), "failure", message, rank=rank, failure=self.count)

    return Failures()


def _fit(trainer: TorchTrainer) -> None:
    """`trainer.fit()`, in a thread: in the main one Ray puts a handler of its own on Ctrl-C, and leaves it there.

    Ctrl-C is then ours from the first step to the last stage; the run goes down with the Ray session.
    """
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    thread.join()
    for error in failures:
        raise error


def _root_message(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    return last_line(next(iter(failures.values())))


def _told(out: Path) -> str:
    """The message of an error that no restart can mend; of the ranks' messages the one that says most."""
    messages = [file.read_text() for file in sorted((out / ERRORS).glob("rank-*"))]
    return max(messages, key=lambda text: ("rows of this rank" in text, len(text)), default="")


@contextmanager
def _told_to_the_driver(out: Path, rank: int) -> Iterator[None]:
    """A user's error is written down, so that the restart that Ray makes of any error ends at once, and cleanly."""
    try:
        yield
    except DtrpoError as error:
        (out / ERRORS).mkdir(exist_ok=True)
        (out / ERRORS / f"rank-{rank}").write_text(str(error))
        raise


def _worker(settings: dict[str, Any]) -> None:
    """One rank of one attempt: nothing to do if an error was told to the driver, else `_attempt`."""
    out, rank = Path(settings["out"]), ray.train.get_context().get_world_rank()
    if broadcast_from_rank_zero((out / ERRORS).exists()):
        return
    with _told_to_the_driver(out, rank), recovery.watchdog(out, rank, settings["hang_seconds"]) as alive:
        _attempt(settings, rank, alive)


def _attempt(settings: dict[str, Any], rank: int, alive: Callable[[], None]) -> None:
    """Build the engine, resume if there is a checkpoint, run the loop, write the model at the end."""
    context = ray.train.get_context()
    world, config = context.get_world_size(), TrainConfig.model_validate(settings["config"])
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(context.get_local_world_size()))
    else:
        torch.cuda.set_device(device)
    base, out, num_steps = Path(settings["base"]), Path(settings["out"]), settings["num_steps"]
    attempt = recovery.attempt_number(settings["roots"][0])
    found = recovery.choose(settings["roots"], out, rank, world)
    recovery.require_plan(found, settings["plan"]["digest"])
    recovery.require_precision(found, uses_bf16(config.precision, device), out, _section(settings["label"]))
    other_world = found is not None and config.zero_stage > 0 and found.facts["num_workers"] != world
    sharding = Zero3Sharding(config, world, device) if config.zero_stage == 3 else None
    policy = load_model(base, device=str(device), sharding=sharding)
    reference: Any = None
    fill: Any = None
    flops = telemetry.step_flops(policy, config)  # before adapters are added
    if config.lora:
        add_adapters(policy, config.lora, settings["seed"])
    if config.gradient_checkpointing:
        checkpoint_layers(policy)
    backend = DeepSpeedBackend(policy, config, num_steps, world, device, universal=other_world)
    if config.reference == "cache":
        path, digest = settings["cache"]
        key = reference_key(digest, config.precision, device)
        fill = ReferenceCache.load(Path(path), settings["seed"], key).fill
    elif config.runs_reference:
        lora = BaseReference(backend.policy, policy) if config.lora else None
        reference = lora or load_reference(base, config.precision, device)
    start = recovery.resume(backend, found, out, other_world)
    if rank == 0:
        _announce(out / EVENTS, start, num_steps, world, found)
    saver = recovery.Saver(backend, config, out, settings, attempt)
    rows = ray.train.get_dataset_shard("all" if settings["elastic"] else f"rank-{rank}")
    share = (rank, world) if settings["elastic"] else None
    batches = dataset.rank_batches(rows, config, world, start, share)
    to_batch = loop.collate(config, policy, settings["seed"], reference, fill, device)
    with _callbacks(settings, config, rank, start, alive, saver, flops / world) as (write, save, hooks):
        loop.run(config, backend, reference, batches, to_batch, start, num_steps, write, save, hooks)
    saver.wait()
    _write_model(backend, config, base, out, rank)


@contextmanager
def _callbacks(
    settings: dict[str, Any],
    config: TrainConfig,
    rank: int,
    start: int,
    alive: Callable[[], None],
    saver: recovery.Saver,
    flops_per_token: float,
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[int], None], loop.Hooks]]:
    """What the loop calls: a metrics row, a checkpoint, and its hooks."""
    out, profiled = Path(settings["out"]), settings["profile_steps"]
    device = saver.backend.device
    sinks = telemetry.Sinks(out, settings, config, start, device, flops_per_token) if rank == 0 else None
    profiler = telemetry.profiler(out, profiled) if rank == 0 and profiled else None
    leaving = recovery.Leaving(out / EVENTS, rank)

    def begin(step: int) -> None:
        alive()
        loop.seed_step(settings["seed"], step, rank)
        if profiler:
            profiler.step()

    def skipped(step: int, row_ids: list[str]) -> None:
        if row_ids:
            message = f"step {step} dropped: loss or gradient not finite; rows {', '.join(row_ids[:8])}"
            append_event(out / EVENTS, "dropped step", message, step=step, rank=rank, row_ids=row_ids)

    def write(row: dict[str, Any]) -> None:
        saver.metrics = row
        if sinks:
            sinks.write(row)

    def save(step: int) -> None:
        alive()
        saver.save(step, at_once=leaving.now)
        alive()

    try:
        yield write, save, loop.Hooks(begin, skipped, leaving.due, leaving.asked)
    finally:
        if profiler:
            profiler.stop()
        if sinks:
            sinks.close()


def _announce(events: Path, start: int, num_steps: int, world: int, found: recovery.Found | None) -> None:
    if found is not None:
        was = found.facts["num_workers"]
        workers = f"{world} worker(s)" + (f", written by {was}" if was != world else "")
        message = f"resumed at step {start} of {num_steps} on {workers} ({found.place.path})"
        append_event(events, "resume", message, step=start, num_steps=num_steps, num_workers=world)
    else:
        message = f"step 0 of {num_steps} on {world} worker(s)"
        append_event(events, "start", message, step=0, num_steps=num_steps, num_workers=world)


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
