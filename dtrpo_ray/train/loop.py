"""The training loop on one screen. Plain callables in: it runs under Ray, without Ray, and in a test."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dtrpo_ray.config.train import Objective, TrainConfig
from dtrpo_ray.errors import TrainError
from dtrpo_ray.method.batch import MicroBatch, ModelLayout, build_batch, chosen_alone, packed_tokens, padded_tokens
from dtrpo_ray.method.step import LossOutput, order_by_confidence, training_step
from dtrpo_ray.method.trajectory import row_generator
from dtrpo_ray.metrics import TERM_METRICS
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.train.backend import Backend

COUNT = "/count"  # ends the name of a sum by which another one is divided
MAX_DROPPED = 10  # dropped steps in a row that end the run, even with on_nonfinite = "skip"

Rows = Sequence[Mapping[str, Any]]
Collate = Callable[[Rows], MicroBatch]


def collate(
    config: TrainConfig,
    model: DiffusionLM,
    seed: int,
    reference: DiffusionLM | None = None,
    fill: Callable[[MicroBatch, Rows], MicroBatch] | None = None,
    device: torch.device | None = None,
) -> Collate:
    """Return the function that turns rows into the `MicroBatch` of this objective and model.

    `reference` orders rows for the schedule "confidence" and is on `device`; `fill` adds its log-probs from a cache.
    """
    layout, objective = ModelLayout.of(model), config.objective

    def to_batch(rows: Rows) -> MicroBatch:
        if objective.orders_by_reference:
            if reference is None:
                raise TrainError('train.objective.schedule = "confidence" orders by the reference, and there is none')
            rows = order_by_confidence(reference, rows, device or torch.device("cpu"), config.row_tokens)
        batch = build_batch(rows, objective, layout, seed, config.row_tokens)
        return fill(batch, rows) if fill else batch

    return to_batch


@dataclass(frozen=True, slots=True)
class Hooks:
    """Calls of the loop to its surroundings.

    `begin(step)` comes before each optimizer step. `skipped(step, row_ids)` names a dropped step and this rank's rows
    in it. If `due()` is true on any rank, all ranks call `leaving()` together after the step: it answers whether a node
    is about to go, so that a checkpoint must be written at once. `held_out()` measures the rows held out before a
    checkpoint is saved, on all ranks together, and returns metrics to log with the step; {} if there are none.
    """

    begin: Callable[[int], None] = lambda step: None
    skipped: Callable[[int, list[str]], None] = lambda step, row_ids: None
    due: Callable[[], bool] = lambda: False
    leaving: Callable[[], bool] = lambda: False
    held_out: Callable[[], dict[str, float]] = dict


NO_HOOKS = Hooks()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one optimizer step of one rank, so that a resumed run draws the same dropout."""
    torch.manual_seed(int(row_generator(seed, "step", step, f"rank-{rank}").integers(2**63)))


def run(
    config: TrainConfig,
    backend: Backend,
    reference: DiffusionLM | None,
    batches: Iterable[Rows],
    to_batch: Collate,
    start_step: int,
    num_steps: int,
    log: Callable[[dict[str, float]], None],
    save: Callable[[int], None],
    hooks: Hooks = NO_HOOKS,
) -> None:
    """Train from `start_step` to `num_steps`; `batches` yields this rank's rows of each optimizer step from there on.

    Every rank makes the same number of steps and calls `save` at the same ones. Raises TrainError where `batches` end
    before `num_steps`.
    """
    backend.policy.train()
    started = ended = time.perf_counter()
    dropped, step = 0, start_step
    for step, rows in zip(range(start_step + 1, num_steps + 1), batches, strict=False):
        hooks.begin(step)
        waited = time.perf_counter() - ended
        done = optimizer_step(config, backend, reference, rows, to_batch, hooks.due(), config.measures_terms(step))
        dropped = dropped + 1 if done.dropped else 0
        if done.dropped:
            if config.on_nonfinite == "stop" or dropped == MAX_DROPPED:
                raise TrainError(_not_finite(step, done.bad_rows, dropped))
            hooks.skipped(step, done.bad_rows)
        now = time.perf_counter()
        saving = step % config.save_every == 0 or step == num_steps
        held_out = hooks.held_out() if saving else {}
        if step % config.log_every == 0 or step == num_steps or held_out:
            times = {"data_seconds": waited, "step_seconds": now - ended, "seconds": now - started}
            log({"step": step, **done.metrics, **held_out, **times})
        if saving or (done.due and hooks.leaving()):
            save(step)
        ended = time.perf_counter()
    if step < num_steps:
        raise TrainError(f"the rows ended after optimizer step {step} of {num_steps}: the table's shards lack rows")


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step: the global batch's weighted mean of each metric, whether any rank was `due`.

    `dropped` means that a loss or gradient was not finite and no weight changed; `bad_rows` are then this rank's rows
    with such a loss, or all of its rows if only a gradient was.
    """

    metrics: dict[str, float]
    due: bool
    dropped: bool
    bad_rows: list[str]


def micro_batches(rows: Rows, config: TrainConfig, attention: str, most: Callable[[int], int]) -> list[Rows]:
    """Split a rank's rows of an optimizer step into the rows of each forward, equally many forwards on every rank.

    A forward takes at most `micro_batch` rows. With `micro_tokens`, rows of similar length go together while their
    packed rows, padded, hold no more tokens; `most` then returns the largest count of all ranks, and the others add
    forwards of weight 0. `attention` is the model's, "block" or "full".
    """
    if config.micro_tokens is None:
        return [rows[first : first + config.micro_batch] for first in range(0, len(rows), config.micro_batch)]
    parts: list[list[Mapping[str, Any]]] = []
    lengths: list[int] = []
    sized = [(packed_tokens(row, config.objective, attention), row) for row in rows]
    for length, row in sorted(sized, key=lambda item: -item[0]):
        lengths.append(length)
        full = not parts or len(lengths) > config.micro_batch
        if full or padded_tokens(lengths, config.row_tokens) > config.micro_tokens:
            parts.append([])
            lengths = lengths[-1:]
        parts[-1].append(row)
    filler = [{**parts[-1][0], "row_weight": 0.0}]
    return [*parts, *([filler] * (most(len(parts)) - len(parts)))]


class TermGradients:
    """The gradients of an optimizer step's two terms apart: preference, and `rpo_alpha` times the NLL.

    The NLL's comes from a forward and backward pass of its own over the chosen sides; the preference term's is the
    whole gradient without it, so it is known to the rounding of the larger of the two. No graph outlives its pass, and
    nothing of the training's is touched. Holds one float32 copy of the trained parameters.
    """

    def __init__(self, backend: Backend, objective: Objective) -> None:
        self.backend, self.model = backend, backend.full_model()
        self.weight, self.likelihood = objective.rpo_alpha, objective.model_copy(update={"type": "imitation"})
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.nll = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]

    def add(self, batch: MicroBatch, global_weight: float) -> None:
        """Add the NLL's gradient of a micro-batch."""
        chosen = chosen_alone(batch).to(self.backend.device)
        with torch.random.fork_rng([chosen.ids.device] if chosen.ids.is_cuda else []):  # dropout draws from it
            loss_P = training_step(self.model, None, chosen, self.likelihood).loss_P
        loss = self.weight * (loss_P * chosen.row_weight / global_weight).sum()
        for total, grad in zip(self.nll, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
            if grad is not None:
                total += grad

    def metrics(self) -> dict[str, float]:
        """Return both norms and the cosine of the global batch, after the last `backward` and before `step`."""
        products = torch.zeros(3, dtype=torch.float64)
        for parameter, mine in zip(self.parameters, self.nll, strict=True):
            nll = self.backend.reduce(mine)
            rest = self.backend.gradient(parameter).float() - nll
            found = [(a * b).sum(dtype=torch.float64) for a, b in ((rest, rest), (nll, nll), (rest, nll))]
            products += torch.stack(found).cpu()
        (preference, nll_norm), product = products[:2].sqrt().tolist(), float(products[2])
        cosine = product / (preference * nll_norm) if preference * nll_norm else 0.0
        return dict(zip(TERM_METRICS, (preference, nll_norm, cosine), strict=True))


def optimizer_step(
    config: TrainConfig,
    backend: Backend,
    reference: DiffusionLM | None,
    rows: Rows,
    to_batch: Collate,
    due: bool = False,
    measure_terms: bool = False,
) -> StepResult:
    """Run the micro-batches forward and backward, then update once; `measure_terms` changes no bit of the update."""
    began = time.perf_counter()
    terms = TermGradients(backend, config.objective) if measure_terms else None
    global_weight = rows[0]["batch_weight"]
    totals: dict[str, torch.Tensor] = {"due": torch.tensor(float(due))}
    losses: list[torch.Tensor] = []
    parts = micro_batches(rows, config, backend.policy.attention, backend.most)
    for number, part in enumerate(parts, start=1):
        made = to_batch(part)
        if terms:
            terms.add(made, global_weight)
        batch = made.to(backend.device)
        out = training_step(backend.policy, reference, batch, config.objective)
        share = batch.row_weight / global_weight
        shares = out.loss_P * share
        backend.backward(shares.sum(), last=number == len(parts))
        losses.append(shares.detach())
        _add(totals, out, share)
        totals["trunk_tokens"] = totals.get("trunk_tokens", 0.0) + torch.tensor(float((batch.side != -2).sum()))
    names = sorted(totals)
    means = backend.reduce(torch.stack([totals[n].cpu().double() for n in names]))
    metrics = _divide(dict(zip(names, means.tolist(), strict=True)))
    drain_due, tokens = metrics.pop("due") > 0, metrics.pop("trunk_tokens")
    lossless = not means.isfinite().all()
    if terms:
        metrics |= terms.metrics()
    metrics["grad_norm"], metrics["lr"] = backend.step(skip=lossless)
    metrics["clipped"] = float(metrics["grad_norm"] > config.max_grad_norm)
    metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
    if not lossless and math.isfinite(metrics["grad_norm"]):
        return StepResult(metrics, drain_due, False, [])
    finite = torch.cat(losses).isfinite().tolist()
    ids = [str(row["row_id"]) for part in parts for row in part]
    bad = [row_id for row_id, good in zip(ids, finite, strict=True) if not (good and lossless)]
    known = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return StepResult({**known, "skipped": 1.0}, drain_due, True, bad)


@torch.no_grad()
def held_out_metrics(
    config: TrainConfig, backend: Backend, reference: DiffusionLM | None, rows: Rows, to_batch: Collate
) -> dict[str, float]:
    """Return the mean of each metric over the rows held out, named held_out_...; every rank calls it with its part.

    `to_batch` samples the states of `TrainConfig.held_out_objective`.
    """
    backend.policy.eval()
    totals: dict[str, torch.Tensor] = {}
    for part in micro_batches(rows, config, backend.policy.attention, backend.most):
        batch = to_batch(part).to(backend.device)
        out = training_step(backend.policy, reference, batch, config.objective)
        _add(totals, out, batch.row_weight / rows[0]["batch_weight"])
    backend.policy.train()
    names = sorted(totals)
    means = backend.reduce(torch.stack([totals[name].cpu().double() for name in names])).tolist()
    return {f"held_out_{name}": value for name, value in _divide(dict(zip(names, means, strict=True))).items()}


def _add(totals: dict[str, torch.Tensor], out: LossOutput, share: torch.Tensor) -> None:
    """Add a micro-batch to the sums of each metric, its rows weighted by `share` [P]; a ratio also has a count."""
    ratios = {name: above for name, (above, _) in out.ratios.items()}
    counts = {name + COUNT: below for name, (_, below) in out.ratios.items()}
    for name, values in {"loss": out.loss_P.detach(), **out.metrics, **ratios, **counts}.items():
        totals[name] = totals.get(name, 0.0) + (values * share).sum()


def _divide(sums: dict[str, float]) -> dict[str, float]:
    """Return the metrics of reduced sums; a ratio of which nothing was counted is left out."""
    counts = {name.removesuffix(COUNT): value for name, value in sums.items() if name.endswith(COUNT)}
    empty = {name for name, count in counts.items() if not count}
    shown = {name: value for name, value in sums.items() if name not in empty and not name.endswith(COUNT)}
    return {name: value / counts.get(name, 1.0) for name, value in shown.items()}


def _not_finite(step: int, bad_rows: list[str], dropped: int) -> str:
    ids = ", ".join(bad_rows[:8]) + (f" and {len(bad_rows) - 8} more" if len(bad_rows) > 8 else "")
    where = f"rows of this rank: {ids}" if ids else "its rows are on another rank"
    times = f"{dropped} times in a row" if dropped > 1 else f"at optimizer step {step}"
    remedy = "lower train.lr, look at these rows, or set train.on_nonfinite = 'skip'"
    return f"the loss or gradient is not finite {times}; {where}; {remedy if dropped == 1 else 'lower train.lr'}"
