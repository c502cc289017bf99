"""Every token whose probability exceeds a threshold (Fast-dLLM, arXiv 2505.22618; SDAR)."""

from torch import Tensor

from dtrpo_ray.unmasking.base import Candidates


def select(candidates: Candidates, amount: Tensor) -> Tensor:
    """`amount` [R] is the threshold, exceeded strictly."""
    return candidates.confidence.exp() > amount[:, None].to(candidates.confidence.dtype)
