"""A fixed number of denoising steps per block, the most confident tokens first (LLaDA, arXiv 2502.09992; SDAR)."""

from torch import Tensor

from dtrpo_ray.unmasking.base import Candidates, rank


def select(candidates: Candidates, amount: Tensor) -> Tensor:
    """`amount` [R] is the denoising steps left: each takes ceil(masked in the block / steps left)."""
    count = -(-candidates.left // amount.long().clamp(min=1))
    return rank(-candidates.confidence) < count[:, None]
