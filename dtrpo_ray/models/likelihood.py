"""Compute log-probabilities from the hidden states at scored positions, without a [tokens, vocabulary] tensor.

Legend: B rows, T tokens of a row, N scored tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**26  # 256 MiB of float32


class _LogSoftmaxAt(torch.autograd.Function):
    """`log_softmax(logits)[target]` [N] that keeps one [N, V] tensor for the backward pass, and makes no other there.

    For the logits z of a token: d log p(target) / d z_v = [v = target] - p_v.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        log_p_NV, target_N1 = torch.log_softmax(logits_NV, -1), target_N[:, None]
        ctx.save_for_backward(log_p_NV, target_N1)
        return log_p_NV.gather(-1, target_N1)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        log_p_NV, target_N1 = ctx.saved_tensors
        grad_N1 = grads[0][:, None]
        # in place: nobody else holds the tensor, and autograd refuses a second backward pass
        grad_NV = log_p_NV.exp_().mul_(-grad_N1).scatter_add_(-1, target_N1, grad_N1)
        return grad_NV, None


def token_logps(logits: Callable[[Tensor], Tensor], hidden_NH: Tensor, target_N: Tensor, vocab_size: int) -> Tensor:
    """Return log mu(target) [N] of a model's `logits`.

    Above CHUNK_LOGITS the head runs in chunks, which are computed again in the backward pass.
    """

    def logps(hidden: Tensor, target: Tensor) -> Tensor:
        return _LogSoftmaxAt.apply(logits(hidden), target)  # type: ignore[no-untyped-call]

    chunk = max(1, CHUNK_LOGITS // vocab_size)
    if len(target_N) <= chunk:
        return logps(hidden_NH, target_N)
    chunks = zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True)
    return torch.cat([checkpoint(logps, h, t, use_reentrant=False) for h, t in chunks])
