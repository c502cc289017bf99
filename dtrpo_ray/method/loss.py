"""Compute the preference loss and its metrics from log-ratios, without model, config or cluster.

Legend: B pairs (or single examples), S = 2 sides: 0 chosen, 1 rejected. Every loss is per row, [B]; the caller
weighs rows over the GLOBAL batch, so that the number does not depend on how a batch is split.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The loss with its gradient, and detached per-row metrics [B] to be averaged like the loss."""

    loss_B: Tensor
    metrics: dict[str, Tensor]


def preference_loss(
    log_ratio_BS: Tensor, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0
) -> LossOutput:
    """Return the DPO-family loss of estimated trajectory log-ratios (arXiv 2305.18290 eq. 7; IPO 2310.12036 eq. 17).

    log_ratio_BS holds Delta(x, y), the estimate of log pi_theta(tau|x) / pi_ref(tau|x) for each side, in nats and
    summed over the response (not averaged). sigmoid: -log sigma(beta (Delta_w - Delta_l)), cDPO-smoothed;
    ipo: (Delta_w - Delta_l - 1 / (2 beta))^2.
    """
    difference = log_ratio_BS[:, 0] - log_ratio_BS[:, 1]
    margin = beta * difference
    if loss_type == "ipo":
        loss = (difference - 1 / (2 * beta)) ** 2
    else:
        loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    metrics = {
        "margin": margin,
        "reward_accuracy": (margin > 0).float(),
        "log_ratio_chosen": log_ratio_BS[:, 0],
        "log_ratio_rejected": log_ratio_BS[:, 1],
    }
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def sum_by_side(values_N: Tensor, slot_N: Tensor, num_rows: int, num_sides: int) -> Tensor:
    """Sum token values [N] into [B, S]; slot = row * S + side."""
    flat = torch.zeros(num_rows * num_sides, dtype=values_N.dtype, device=values_N.device)
    return flat.index_add(0, slot_N, values_N).view(num_rows, num_sides)
