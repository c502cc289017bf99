"""Hidden states at the scored positions -> their log-probabilities, without a [tokens, vocabulary] tensor.

Legend: B rows, T tokens of a row, N scored tokens, H hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024


def token_logps(log_mu: Callable[[Tensor], Tensor], hidden_NH: Tensor, target_N: Tensor) -> Tensor:
    """log mu(target) [N] in float32. Above CHUNK_TOKENS rows the head runs in chunks that are recomputed backward."""

    def logps(hidden: Tensor, target: Tensor) -> Tensor:
        return log_mu(hidden).gather(-1, target[:, None])[:, 0]

    if len(target_N) <= CHUNK_TOKENS:
        return logps(hidden_NH, target_N)
    chunks = zip(hidden_NH.split(CHUNK_TOKENS), target_N.split(CHUNK_TOKENS), strict=True)
    return torch.cat([checkpoint(logps, h, t, use_reentrant=False) for h, t in chunks])
