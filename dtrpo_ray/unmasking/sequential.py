"""Left to right, in a fixed number of denoising steps per block."""

from torch import Tensor

from dtrpo_ray.unmasking.base import Candidates


def select(candidates: Candidates, amount: Tensor) -> Tensor:
    """`amount` [R] is the denoising steps left: each takes ceil(masked in the block / steps left)."""
    count = -(-candidates.left // amount.long().clamp(min=1))
    return candidates.masked.cumsum(-1) <= count[:, None]
