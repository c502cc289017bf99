"""Unmasking policies: which proposed tokens a denoising step keeps.

A new policy is one function here and one line in `POLICIES` of config/decode.py.
Legend: R rows, B tokens of a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dtrpo_ray.config import decode as config


class Candidates(NamedTuple):
    """The proposals for the masked positions of R blocks (of the current sub-block where the model has sub-blocks).

    `masked` bool [R, B]; `confidence` [R, B] the log-probability of the proposed token, -inf where not masked;
    `entropy` [R, B] of the predicted distribution in nats, +inf where not masked or not asked for; `left` [R] the
    number of masked positions in the whole block.
    """

    masked: Tensor
    confidence: Tensor
    entropy: Tensor
    left: Tensor


Policy = Callable[[Candidates, Tensor], Tensor]


def ordinal(keys: Tensor) -> Tensor:
    """Return each key's place [R, B] in the ascending order of its row; of equal keys the left one comes first."""
    return keys.argsort(dim=-1, stable=True).argsort(dim=-1)


def apply_policy(policy: Policy, candidates: Candidates, amount: Tensor) -> Tensor:
    """Return the positions [R, B] that a step unmasks.

    Enforces the two rules that no policy may break: only masked positions, and at least one of them in each step.
    """
    best = ordinal(-candidates.confidence) == 0
    chosen = policy(candidates, amount) & candidates.masked
    return torch.where(chosen.any(-1, keepdim=True), chosen, best & candidates.masked)


def low_confidence_static(candidates: Candidates, amount: Tensor) -> Tensor:
    """Unmask the most confident tokens in a fixed number of denoising steps per block (LLaDA, arXiv 2502.09992; SDAR).

    `amount` [R] is the number of steps left; each step takes ceil(masked in the block / steps left).
    """
    return ordinal(-candidates.confidence) < _share(candidates, amount)[:, None]


def low_confidence_dynamic(candidates: Candidates, amount: Tensor) -> Tensor:
    """Unmask every token whose probability exceeds `amount` [R] strictly (Fast-dLLM, arXiv 2505.22618; SDAR)."""
    return candidates.confidence.exp() > amount[:, None].to(candidates.confidence.dtype)


def low_confidence_top_k(candidates: Candidates, amount: Tensor) -> Tensor:
    """Unmask the `amount` [R] most confident tokens, however many the block has left."""
    return ordinal(-candidates.confidence) < amount[:, None]


def entropy_bounded(candidates: Candidates, amount: Tensor) -> Tensor:
    """Unmask tokens from the lowest entropy up, within a bound of `amount` [R] nats (EB-Sampler, arXiv 2505.24857).

    A token joins while the entropies of those before it sum to at most the bound: that sum bounds the mutual
    information of the tokens taken together.
    """
    sorted_entropy = candidates.entropy.sort(dim=-1, stable=True).values
    before = sorted_entropy.cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    count = (before <= amount[:, None].to(before.dtype)).sum(-1)
    return ordinal(candidates.entropy) < count[:, None]


def sequential(candidates: Candidates, amount: Tensor) -> Tensor:
    """Unmask from left to right; `amount` [R] is the number of steps left, as in `low_confidence_static`."""
    return candidates.masked.cumsum(-1) <= _share(candidates, amount)[:, None]


def _share(candidates: Candidates, steps_left: Tensor) -> Tensor:
    return -(-candidates.left // steps_left.long().clamp(min=1))


POLICIES: dict[str, Policy] = {name: globals()[name] for name in config.POLICIES}
