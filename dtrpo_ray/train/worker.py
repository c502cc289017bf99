"""Worker of Ray Train: one rank of one attempt, from a model and a checkpoint to the trained model.

`driver` starts `run_rank` on every rank; the steps themselves are `loop.run`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import DtrpoError
from dtrpo_ray.files import whole_folder
from dtrpo_ray.method.step import checkpoint_layers
from dtrpo_ray.metrics import ERRORS, EVENTS, append_event
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.lora import BaseReference, add_adapters, merge_adapters, save_adapter
from dtrpo_ray.models.registry import copy_companions, load_model, save_model
from dtrpo_ray.session import cpu_threads
from dtrpo_ray.train import dataset, loop, recovery, telemetry
from dtrpo_ray.train.backend import DeepSpeedBackend, Zero3Sharding, uses_bf16
from dtrpo_ray.train.reference import ReferenceCache, load_reference, reference_key
from dtrpo_ray.train.run import RunSpec

MODEL, ADAPTER = "model", "adapter"  # folders in the stage's


def run_rank(spec: RunSpec) -> None:
    """Run one rank of one attempt; does nothing where an earlier attempt met an error that no restart mends."""
    out, rank = spec.stage.out, ray.train.get_context().get_world_rank()
    if broadcast_from_rank_zero((out / ERRORS).exists()):
        return
    with _write_fatal_error(out, rank), recovery.watchdog(out, rank, spec.cluster.hang_seconds) as alive:
        _attempt(spec, rank, alive)


@contextmanager
def _write_fatal_error(out: Path, rank: int) -> Iterator[None]:
    """Write a user's error down, so that the restart that Ray makes of any error ends at once, and cleanly."""
    try:
        yield
    except DtrpoError as error:
        (out / ERRORS).mkdir(exist_ok=True)
        (out / ERRORS / f"rank-{rank}").write_text(str(error))
        raise


def _attempt(spec: RunSpec, rank: int, alive: Callable[[], None]) -> None:
    """Build the engine, resume if there is a checkpoint, run the loop, write the model at the end."""
    world, config, stage = ray.train.get_context().get_world_size(), spec.config, spec.stage
    device = _prepare_device()
    attempt = recovery.attempt_number(spec.roots[0])
    found = recovery.choose(spec.roots, stage.out, rank, world)
    if found:
        recovery.require_same(found, spec.plan_digest, uses_bf16(config.precision, device), stage)
    other_world = found is not None and config.zero_stage > 0 and found.facts["num_workers"] != world
    sharding = Zero3Sharding(config, device) if config.zero_stage == 3 else None
    policy = load_model(stage.base, device=str(device), sharding=sharding)
    flops_per_token = telemetry.step_flops(policy, config) / world  # before adapters are added
    if config.lora:
        add_adapters(policy, config.lora, stage.seed)
    if config.gradient_checkpointing:
        checkpoint_layers(policy)
    backend = DeepSpeedBackend(policy, config, spec.num_steps, device, universal=other_world)
    reference: Any = None
    fill = None
    if stage.cache:
        key = reference_key(stage.identity["base"], config.precision, device)
        fill = ReferenceCache.load(stage.cache, stage.seed, key).fill
    elif config.runs_reference:
        lora = BaseReference(backend.policy, policy) if config.lora else None
        reference = lora or load_reference(stage.base, config.precision, device)
    start = recovery.resume(backend, found, stage.out, other_world)
    if rank == 0:
        _log_start(spec, start, world, found)
    saver = recovery.Saver(backend, spec, attempt)
    elastic = not isinstance(spec.cluster.num_workers, int)
    rows = ray.train.get_dataset_shard("all" if elastic else f"rank-{rank}")
    batches = dataset.rank_batches(rows, config, world, start, share=(rank, world) if elastic else None)
    to_batch = loop.collate(config, policy, stage.seed, reference, fill=fill, device=device)
    held_out = _held_out(spec, backend, reference, policy, rank=rank, world=world)
    with _loop(spec, saver, start, flops_per_token, alive, held_out) as run:
        run(config, backend, reference, batches, to_batch, start_step=start, num_steps=spec.num_steps)
    saver.uploaded.wait()
    _write_model(backend, config, stage.base, stage.out, rank)


def _held_out(
    spec: RunSpec, backend: DeepSpeedBackend, reference: Any, policy: DiffusionLM, *, rank: int, world: int
) -> Callable[[], dict[str, float]]:
    """Return the hook that measures this rank's part of the rows held out."""
    config, seed = spec.config, spec.stage.seed
    if not config.held_out:
        return dict
    rows = dataset.held_out_rows(spec.stage.table, config.held_out, rank, world)
    measured = config.model_copy(update={"objective": config.held_out_objective})
    to_batch = loop.collate(measured, policy, seed, reference, device=backend.device)
    return partial(loop.held_out_metrics, measured, backend, reference, rows, to_batch)


def _prepare_device() -> torch.device:
    """Return this rank's device; on a CPU, its share of the machine's cores is set."""
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(ray.train.get_context().get_local_world_size()))
    else:
        torch.cuda.set_device(device)
    return device


@contextmanager
def _loop(
    spec: RunSpec,
    saver: recovery.Saver,
    start: int,
    flops_per_token: float,
    alive: Callable[[], None],
    held_out: Callable[[], dict[str, float]],
) -> Iterator[Callable[..., None]]:
    """Yield `loop.run` with its calls back to this rank: a metrics row, a checkpoint, and the hooks."""
    out, rank = spec.stage.out, saver.rank
    drain = recovery.DrainWatch(out / EVENTS, rank)

    def log_drop(step: int, row_ids: list[str]) -> None:
        if row_ids:
            message = f"step {step} dropped: loss or gradient not finite; rows {', '.join(row_ids[:8])}"
            append_event(out / EVENTS, "dropped step", message, step=step, rank=rank, row_ids=row_ids)

    def save(step: int) -> None:
        alive()
        saver.save(step, at_once=drain.now)
        alive()

    with ExitStack() as stack:
        sink = profiler = None
        if rank == 0:
            sink = stack.enter_context(telemetry.open_sinks(spec, start, saver.backend.device, flops_per_token))
            if spec.cluster.profile_steps:
                profiler = stack.enter_context(telemetry.profiler(out, spec.cluster.profile_steps))

        def begin(step: int) -> None:
            alive()
            loop.seed_step(spec.stage.seed, step, rank)
            if profiler:
                profiler.step()

        def log(row: dict[str, float]) -> None:
            saver.metrics = row
            if sink:
                sink(row)

        hooks = loop.Hooks(begin, log_drop, drain.due, drain.ask, held_out)
        yield partial(loop.run, log=log, save=save, hooks=hooks)


def _log_start(spec: RunSpec, start: int, world: int, found: recovery.Found | None) -> None:
    event, message = "start", f"step 0 of {spec.num_steps} on {world} worker(s)"
    if found is not None:
        was = found.facts["num_workers"]
        workers = f"{world} worker(s)" + (f", written by {was}" if was != world else "")
        event, message = "resume", f"resumed at step {start} of {spec.num_steps} on {workers} ({found.place.path})"
    append_event(spec.stage.out / EVENTS, event, message, step=start, num_steps=spec.num_steps, num_workers=world)


def _write_model(backend: DeepSpeedBackend, config: TrainConfig, base: Path, out: Path, rank: int) -> None:
    """Write, on rank 0, the trained model beside its tokenizer, and a LoRA run's adapter, under temporary names."""
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
