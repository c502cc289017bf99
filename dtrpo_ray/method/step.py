"""Compute the loss of a `MicroBatch`: one policy forward over both sides, one reference forward, no more.

Legend: P pairs (or single examples), S = 2 sides: 0 chosen, 1 rejected; N scored tokens. Every loss is per pair, [P];
the caller weighs pairs over the GLOBAL batch, so that the number does not depend on how a batch is split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dtrpo_ray.config.train import Objective
from dtrpo_ray.method.attention import FLEX_BUCKET, Planes, dense_mask, sparse_mask
from dtrpo_ray.method.batch import SIDES, MicroBatch, ModelLayout, build_batch
from dtrpo_ray.method.trajectory import GIVEN
from dtrpo_ray.models.base import DiffusionLM

Inputs = tuple[Tensor, Tensor, Tensor | BlockMask]


def packed_inputs(batch: MicroBatch) -> Inputs:
    """Return ids and positions [R, T] and the attention mask of the packed rows, for policy and reference alike.

    On a GPU the mask is block-sparse and rows are padded to a multiple of `FLEX_BUCKET`; on a CPU it is dense.
    """
    if batch.ids.device.type != "cuda":
        return batch.ids, batch.position, dense_mask(batch.planes)
    ids, position, planes = padded_inputs(batch)
    return ids, position, sparse_mask(planes)


def padded_inputs(batch: MicroBatch) -> tuple[Tensor, Tensor, Planes]:
    """Pad ids, positions and mask planes on the right, so that few row lengths are compiled."""
    length = -(-batch.ids.shape[1] // FLEX_BUCKET) * FLEX_BUCKET
    extra = (0, length - batch.ids.shape[1])
    return F.pad(batch.ids, extra), F.pad(batch.position, extra), batch.planes.pad(length)


def scored_logps(model: DiffusionLM, batch: MicroBatch, inputs: Inputs | None = None) -> Tensor:
    """Return log mu of the scored tokens [N] from one forward pass over the packed rows.

    Raises ValueError for a batch built for another block grid, kind of attention or shift than the model's.
    """
    if ModelLayout.of(model) != batch.layout:
        raise ValueError(f"the batch was built for {batch.layout}, and the model is {ModelLayout.of(model)}")
    inputs = inputs or packed_inputs(batch)
    if isinstance(inputs[2], BlockMask) and model.lm.config._attn_implementation != "flex_attention":
        model.lm.set_attn_implementation("flex_attention")
    return model(*inputs, batch.scored_row, batch.scored_col, batch.target)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The loss with its gradient, and detached metrics [P] to be averaged like the loss.

    A metric of `ratios` is the sum of its first values [P] over the sum of its second ones.
    """

    loss_P: Tensor
    metrics: dict[str, Tensor]
    ratios: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def preference_loss(
    log_ratio_PS: Tensor, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0
) -> LossOutput:
    """Return the DPO-family loss of estimated trajectory log-ratios (arXiv 2305.18290 eq. 7; IPO 2310.12036 eq. 17).

    log_ratio_PS holds Delta(x, y), the estimate of log pi_theta(tau|x) / pi_ref(tau|x) for each side, in nats and
    summed over the response (not averaged). sigmoid: -log sigma(beta (Delta_w - Delta_l)), cDPO-smoothed;
    ipo: (Delta_w - Delta_l - 1 / (2 beta))^2.
    """
    difference = log_ratio_PS[:, 0] - log_ratio_PS[:, 1]
    margin = beta * difference
    if loss_type == "ipo":
        loss = (difference - 1 / (2 * beta)) ** 2
    else:
        loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    metrics = {
        "margin": margin,
        "reward_accuracy": (margin > 0).float(),
        "log_ratio_chosen": log_ratio_PS[:, 0],
        "log_ratio_rejected": log_ratio_PS[:, 1],
    }
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def sum_by_side(values_N: Tensor, slot_N: Tensor, num_pairs: int, num_sides: int) -> Tensor:
    """Sum token values [N] into [P, S]; slot = pair * S + side."""
    flat = torch.zeros(num_pairs * num_sides, dtype=values_N.dtype, device=values_N.device)
    return flat.index_add(0, slot_N, values_N).view(num_pairs, num_sides)


def training_step(
    policy: DiffusionLM, reference: DiffusionLM | None, batch: MicroBatch, objective: Objective
) -> LossOutput:
    """Return the loss of each pair [P] and its metrics.

    `sft` is the block masked-diffusion bound in nats per response token, `imitation` the chosen side's negative
    log-likelihood per token in the states that `dtrpo` samples. `dtrpo` and `elbo_dpo` are the preference loss on
    sum_N weight (log mu_theta - log mu_ref), both models at the same sampled states, plus `rpo_alpha` times the chosen
    side's masked-diffusion negative log-likelihood per token (an SFT term as in RPO, arXiv 2404.19733). That term reads
    tokens of the same states, so it adds no forward. The reference's log-probabilities are `batch.ref_logp`, or else
    come from `reference`: a frozen model, or the policy with its adapters off.

    The metric `kl` estimates KL(reference || policy) in nats per scored token of both sides: the mean of
    exp(r) - 1 - r with r = log mu_theta - log mu_ref, without bias where the reference wrote the responses and never
    negative (Schulman, "Approximating KL divergence", 2020, k3).
    """
    num_pairs, num_sides = batch.tokens.shape
    by_side = partial(sum_by_side, slot_N=batch.slot, num_pairs=num_pairs, num_sides=num_sides)
    inputs = packed_inputs(batch)
    logp_N = scored_logps(policy, batch, inputs)
    nll_PS = -by_side(batch.nll_weight * logp_N) / batch.tokens
    common = {"scored_tokens": batch.scored.sum(1), "scored_fraction": batch.scored.sum(1) / batch.tokens.sum(1)}
    if not objective.is_preference:
        metrics = {"nll": nll_PS[:, 0].detach(), **common}
        return LossOutput(nll_PS[:, 0], metrics, nll_by_place(logp_N.detach(), batch))
    ref_logp_N = batch.ref_logp
    if ref_logp_N is None:
        if reference is None:
            raise ValueError(f"objective {objective.type} needs a reference model")
        with torch.no_grad():
            ref_logp_N = scored_logps(reference, batch, inputs)
    ratio_N = batch.weight * (logp_N - ref_logp_N)
    change_N = ((logp_N.detach() - ref_logp_N) * (batch.weight > 0)).clamp(max=20)  # exp of more may not be finite
    common["kl"] = by_side(change_N.exp() - 1 - change_N).sum(1) / by_side((batch.weight > 0).float()).sum(1).clamp(
        min=1
    )
    out = preference_loss(by_side(ratio_N), objective.beta, objective.loss_type, objective.label_smoothing)
    logp_PS = by_side(batch.weight * logp_N.detach())
    for side, name in enumerate(SIDES):
        common |= {f"nll_{name}": nll_PS[:, side].detach(), f"logp_{name}": logp_PS[:, side]}
    if objective.num_draws != "all" and objective.num_draws > 1:
        common["spread"] = _spread(ratio_N.detach(), batch, objective.num_draws)
    return LossOutput(out.loss_P + objective.rpo_alpha * nll_PS[:, 0], {**out.metrics, **common})


def nll_by_place(logp_N: Tensor, batch: MicroBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Return sum [P] and number [P] of -log mu in nats for each place of a block: nll_place_1 is the first.

    Every hidden token of single examples counts once, whatever its weight in the loss. At first a model that was
    autoregressive knows the token that follows shown text alone: the places after it show how far it has adapted.
    """
    size, (num_rows, _) = batch.layout.block_size, batch.tokens.shape
    read = (batch.nll_weight > 0).to(logp_N.dtype)
    where = batch.slot * size + batch.place
    sums, counts = (sum_by_side(values, where, num_rows, size) for values in (-logp_N * read, read))
    return {f"nll_place_{place + 1}": (sums[:, place], counts[:, place]) for place in range(size)}


def checkpoint_layers(policy: DiffusionLM) -> None:
    """Recompute each layer of the trunk in the backward pass (gradient checkpointing), in training mode."""
    policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _spread(ratio_N: Tensor, batch: MicroBatch, num_draws: int) -> Tensor:
    """Estimate the standard error [P] of Delta(y_w) - Delta(y_l) in nats from how the m draws differ.

    Each draw adds up to c_j, and the estimate is their sum: sqrt(m / (m - 1) sum_j (c_j - mean c)^2). For independent
    draws its square is unbiased; strata that differ among themselves make it too large, never too small on average.
    Tokens that every draw scores alike (`exact`) are left out.
    """
    (num_pairs, num_sides), drawn = batch.tokens.shape, ~batch.exact
    sign = torch.where(batch.slot % num_sides == 0, 1.0, -1.0).to(ratio_N.dtype)
    place = torch.div(batch.slot, num_sides, rounding_mode="floor") * num_draws + batch.draw
    parts = sum_by_side((sign * ratio_N)[drawn], place[drawn], num_pairs, num_draws)
    return (num_draws * parts.var(1, unbiased=True)).sqrt()


@torch.no_grad()
def order_by_confidence(
    reference: DiffusionLM, rows: Sequence[Mapping[str, Any]], device: torch.device, row_tokens: int | None = None
) -> list[dict[str, Any]]:
    """Add `chosen_confidence` and `rejected_confidence` [n], by which the schedule "confidence" sorts, to rows.

    This costs one forward of the reference over both sides: each block wholly hidden (except tokens that its decoder
    takes autoregressively), earlier blocks clean; a token's confidence is its log mu there. It approximates the
    decoder's own order, which is recomputed after each step.
    """
    layout = ModelLayout.of(reference)
    hidden_rows = [dict(row) for row in rows]
    for row in hidden_rows:
        for side in SIDES:
            first = layout.opens_block(len(row["prompt_ids"]), len(row[f"{side}_ids"]))
            row[f"{side}_steps"] = np.where(first & layout.reads_back, GIVEN, 0)
    batch = build_batch(hidden_rows, Objective(), layout, seed=0, row_tokens=row_tokens)
    logps = scored_logps(reference, batch.to(device)).float().cpu().numpy()
    slots, out = batch.slot.numpy(), [dict(row) for row in rows]
    for b, row in enumerate(hidden_rows):
        for s, side in enumerate(SIDES):
            out[b][f"{side}_confidence"] = values = np.zeros(len(row[f"{side}_steps"]))
            values[row[f"{side}_steps"] != GIVEN] = logps[slots == b * len(SIDES) + s]
    return out
