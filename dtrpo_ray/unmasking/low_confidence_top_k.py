"""The k most confident tokens in every step, whatever the block holds."""

from torch import Tensor

from dtrpo_ray.unmasking.base import Candidates, rank


def select(candidates: Candidates, amount: Tensor) -> Tensor:
    """`amount` [R] is k."""
    return rank(-candidates.confidence) < amount[:, None]
