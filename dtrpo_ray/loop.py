"""The training loop on one screen. Plain callables in: it runs under Ray, without Ray, and in a test."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from dtrpo_ray.backend import Backend
from dtrpo_ray.batch import Batch, Layout, build_batch
from dtrpo_ray.config import TrainConfig
from dtrpo_ray.errors import TrainError
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.step import order_by_confidence, training_step

Rows = Sequence[Mapping[str, Any]]
Collate = Callable[[Rows], Batch]


def collate(
    config: TrainConfig,
    model: DiffusionLM,
    seed: int,
    reference: DiffusionLM | None = None,
    fill: Callable[[Batch, Rows], Batch] | None = None,
    device: torch.device | None = None,
) -> Collate:
    """The function that turns rows into the `Batch` of this objective and model.

    `reference` orders rows for the schedule "confidence" and lies on `device`; `fill` adds its log-probs from a cache.
    """
    layout, objective = asdict(Layout.of(model)), config.objective

    def to_batch(rows: Rows) -> Batch:
        if objective.schedule == "confidence" and objective.type == "dtrpo":
            if reference is None:
                raise TrainError('train.objective.schedule = "confidence" orders by the reference: it must be at hand')
            rows = order_by_confidence(reference, rows, device or torch.device("cpu"), config.row_tokens)
        batch = build_batch(rows, objective, seed=seed, row_tokens=config.row_tokens, **layout)
        return fill(batch, rows) if fill else batch

    return to_batch


def run(
    config: TrainConfig,
    backend: Backend,
    reference: DiffusionLM | None,
    batches: Iterable[Rows],
    to_batch: Collate,
    start_step: int,
    num_steps: int,
    log: Callable[[dict[str, Any]], None],
    save: Callable[[int], None],
) -> None:
    """Train from `start_step` to `num_steps`; `batches` yields this rank's rows of each optimizer step from there on.

    Every rank makes the same number of steps and calls `save` at the same ones.
    """
    backend.policy.train()
    started = time.perf_counter()
    for step, rows in zip(range(start_step + 1, num_steps + 1), batches, strict=False):
        metrics = optimizer_step(config, backend, reference, rows, to_batch)
        if step % config.log_every == 0 or step == num_steps:
            seconds = time.perf_counter() - started
            log({"step": step, **metrics, "seconds": seconds})
        if step % config.save_every == 0 or step == num_steps:
            save(step)


def optimizer_step(
    config: TrainConfig, backend: Backend, reference: DiffusionLM | None, rows: Rows, to_batch: Collate
) -> dict[str, float]:
    """Micro-batches forward and backward, one update; returns the global batch's weighted mean of each metric."""
    began = time.perf_counter()
    global_weight = rows[0]["batch_weight"]
    totals: dict[str, torch.Tensor] = {}
    for first in range(0, len(rows), config.micro_batch):
        batch = to_batch(rows[first : first + config.micro_batch]).to(backend.device)
        out = training_step(backend.policy, reference, batch, config.objective)
        share = batch.row_weight / global_weight
        backend.backward((out.loss_B * share).sum())
        for name, values in {"loss": out.loss_B.detach(), **out.metrics}.items():
            totals[name] = totals.get(name, 0.0) + (values * share).sum()
        totals["trunk_tokens"] = totals.get("trunk_tokens", 0.0) + torch.tensor(float((batch.side != -2).sum()))
    names = sorted(totals)
    means = backend.reduce(torch.stack([totals[n].cpu().double() for n in names]))
    metrics = dict(zip(names, means.tolist(), strict=True))
    if not means.isfinite().all():
        ids = ", ".join(str(row["row_id"]) for row in rows[:8])
        raise TrainError(f"loss is not finite ({metrics['loss']}); rows of this rank begin with {ids}; lower train.lr")
    metrics["grad_norm"], metrics["lr"] = backend.step()
    tokens = metrics.pop("trunk_tokens")
    return {**metrics, "tokens_per_second": tokens / (time.perf_counter() - began)}
