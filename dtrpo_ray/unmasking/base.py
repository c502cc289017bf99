"""What every policy is given, and the two rules none can break: only masked tokens, at least one a step.

Legend: R rows, B tokens of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """A proposal for each masked position of R blocks, of their current sub-blocks alone where they have such.

    `masked` bool [R, B]; `confidence` [R, B] the log-probability of the proposed token, -inf where not masked;
    `entropy` [R, B] of the token predictor in nats, +inf where not masked or not asked for; `left` [R] the masked
    positions of the whole block.
    """

    masked: Tensor
    confidence: Tensor
    entropy: Tensor
    left: Tensor

    def of(self, rows: list[int]) -> "Candidates":
        """Those of some rows."""
        return Candidates(self.masked[rows], self.confidence[rows], self.entropy[rows], self.left[rows])


Policy = Callable[[Candidates, Tensor], Tensor]


def rank(keys: Tensor) -> Tensor:
    """The place of each key [R, B] in its row's ascending order; of equal ones the left first."""
    return keys.argsort(dim=-1, stable=True).argsort(dim=-1)


def apply(policy: Policy, candidates: Candidates, amount: Tensor) -> Tensor:
    """Which positions [R, B] a step unmasks: the policy's, none that is not masked, and always one where one is."""
    best = rank(-candidates.confidence) == 0
    chosen = policy(candidates, amount) & candidates.masked
    return torch.where(chosen.any(-1, keepdim=True), chosen, best & candidates.masked)
