"""Policy + reference + `Batch` -> `LossOutput`: one policy forward over both sides, one reference forward, no more.

Legend: B rows, S sides, N scored tokens.
"""

import torch
from torch import Tensor

from dtrpo_ray.attention import block_mask
from dtrpo_ray.batch import Batch
from dtrpo_ray.config import Objective
from dtrpo_ray.loss import LossOutput, preference_loss, sum_by_side
from dtrpo_ray.models.base import DiffusionLM


def scored_logps(model: DiffusionLM, batch: Batch) -> Tensor:
    """log mu of the scored tokens [N] from one forward pass over the packed rows."""
    mask = block_mask(batch.position, batch.side, batch.stream, model.block_size)
    logps: Tensor = model(batch.ids, batch.position, mask, batch.scored_row, batch.scored_col, batch.target)
    return logps


def training_step(policy: DiffusionLM, reference: DiffusionLM | None, batch: Batch, objective: Objective) -> LossOutput:
    """The loss of each row [B] and its metrics.

    `sft`: the block masked-diffusion bound in nats per response token. `dtrpo` and `elbo_dpo`: the preference loss
    on sum_N weight (log mu_theta - log mu_ref), at the same sampled states for both, plus `sft_weight` times the
    chosen side's masked-diffusion negative log-likelihood per token: all tokens hidden in the very same states, so
    no forward is added (an SFT term as in RPO, arXiv 2404.19733).
    """
    num_rows, num_sides = batch.tokens.shape
    logp_N = scored_logps(policy, batch)
    nll_BS = -sum_by_side(batch.nll_weight * logp_N, batch.slot, num_rows, num_sides) / batch.tokens
    scored_BS = sum_by_side((batch.weight > 0).float(), batch.slot, num_rows, num_sides)
    common = {"scored_tokens": scored_BS.sum(1), "scored_fraction": scored_BS.sum(1) / batch.tokens.sum(1)}
    if objective.type == "sft":
        return LossOutput(nll_BS[:, 0], {"nll": nll_BS[:, 0].detach(), **common})
    if reference is None:
        raise ValueError(f"objective {objective.type} needs a reference model")
    with torch.no_grad():
        ref_logp_N = scored_logps(reference, batch)
    log_ratio_BS = sum_by_side(batch.weight * (logp_N - ref_logp_N), batch.slot, num_rows, num_sides)
    out = preference_loss(log_ratio_BS, objective.beta, objective.loss_type, objective.label_smoothing)
    metrics = {"nll_chosen": nll_BS[:, 0].detach(), "nll_rejected": nll_BS[:, 1].detach(), **common}
    return LossOutput(out.loss_B + objective.sft_weight * nll_BS[:, 0], {**out.metrics, **metrics})
