"""As many tokens as may be taken for independent: the EB-Sampler (arXiv 2505.24857).

From the lowest entropy up, a token joins while the entropies of those before it sum to at most the bound: the sum less
its largest term bounds the mutual information of the tokens taken together.
"""

from torch import Tensor

from dtrpo_ray.unmasking.base import Candidates, rank


def select(candidates: Candidates, amount: Tensor) -> Tensor:
    """`amount` [R] is the bound, in nats."""
    order = candidates.entropy.argsort(dim=-1, stable=True)
    before = candidates.entropy.gather(-1, order).cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    count = (before <= amount[:, None].to(before.dtype)).sum(-1)
    return rank(candidates.entropy) < count[:, None]
