"""The token predictor at each masked position -> one candidate token, greedy or sampled.

Legend: N positions, V vocabulary, R rows, B tokens of a block, H hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dtrpo_ray.decode.types import Alternatives
from dtrpo_ray.models.base import DiffusionLM

MAX_LOGITS = 2**27  # elements of one [N, V]; more positions are split
MIN_TEMPERATURE = 1e-30  # practically greedy; below it, log mu / temperature overflows float32


class Draw(NamedTuple):
    """Sampling of N positions: `temperature` [N] (0 is greedy), `top_p` [N], `top_k` [N] (0 is all) and `uniform` [N]
    float64 in [0, 1), drawn from the generator of the position's request."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    uniform: Tensor

    def of(self, part: slice | Tensor) -> "Draw":
        return Draw(*(values[part] for values in self))


class Proposal(NamedTuple):
    """Candidate `tokens` with their log mu at temperature 1 `logps`, the `entropy` in nats of the prediction (0 if not
    requested), and the most probable ids with their log mu, `top_ids` and `top_logps` [..., k]. Shapes are [N], or
    [R, B] after `scatter`."""

    tokens: Tensor
    logps: Tensor
    entropy: Tensor
    top_ids: Tensor
    top_logps: Tensor

    def scatter(self, masked: Tensor) -> "Proposal":
        """Scatter the N masked positions to all [R, B]; elsewhere logps are -inf and entropies +inf."""
        planes = []
        for values, elsewhere in zip(self, (0, float("-inf"), float("inf"), 0, 0), strict=True):
            plane = values.new_full((*masked.shape, *values.shape[1:]), elsewhere)
            planes.append(plane.masked_scatter(masked[..., None] if plane.ndim == 3 else masked, values))
        return Proposal(*planes)

    def alternatives(self, at: int | tuple[int, int], count: int) -> Alternatives:
        """Return the `count` most probable ids of a position; fewer where no others have a probability."""
        best = zip(self.top_ids[at][:count].tolist(), self.top_logps[at][:count].tolist(), strict=True)
        return [(token, logp) for token, logp in best if logp > float("-inf")]


def propose(
    model: DiffusionLM, states: Tensor, draw: Draw | None, num_tokens: int, alternatives: int = 0, entropy: bool = False
) -> Proposal:
    """Propose a token for each hidden state [N, H]; `draw` None is greedy everywhere.

    Ids from `num_tokens` on pad the vocabulary and are never proposed; [MASK] has no probability in log mu.
    """
    size = max(1, MAX_LOGITS // model.vocab_size)
    parts = [slice(at, at + size) for at in range(0, max(len(states), 1), size)]
    proposals = [_part(model.log_mu(states[p]), draw and draw.of(p), num_tokens, alternatives, entropy) for p in parts]
    return proposals[0] if len(proposals) == 1 else Proposal(*map(torch.cat, zip(*proposals, strict=True)))


def _part(log_mu: Tensor, draw: Draw | None, num_tokens: int, alternatives: int, entropy: bool) -> Proposal:
    allowed = log_mu[:, :num_tokens]
    logps, tokens = allowed.max(-1)
    if draw is not None:
        random = draw.temperature > 0
        if bool(random.all()):
            tokens = _sample(allowed, draw)
        else:
            tokens = tokens.masked_scatter(random, _sample(allowed[random], draw.of(random)))
        logps = allowed.gather(-1, tokens[:, None])[:, 0]
    spread = -(log_mu.exp() * log_mu.clamp(min=-1e4)).sum(-1) if entropy else torch.zeros_like(logps)
    top_logps, top_ids = allowed.topk(min(alternatives, allowed.shape[-1]), dim=-1)
    return Proposal(tokens, logps, spread, top_ids, top_logps)


def _sample(log_mu: Tensor, draw: Draw) -> Tensor:
    """Sample by the inverse CDF with one uniform number per position, independent of its neighbours in the batch.

    Temperature comes before top-k and top-p, as in vLLM and transformers.
    """
    probs = torch.softmax(log_mu / draw.temperature.clamp(min=MIN_TEMPERATURE)[:, None], -1).double()
    if bool((draw.top_k > 0).any()) or bool((draw.top_p < 1).any()):
        probs = _nucleus(probs, draw)
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf, draw.uniform[:, None] * cdf[:, -1:], right=True)[:, 0]


def _nucleus(probs: Tensor, draw: Draw) -> Tensor:
    """Zero the probabilities outside the top k, and outside the smallest set that holds `top_p` of the rest."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    limit = torch.where(draw.top_k > 0, draw.top_k, probs.shape[-1])
    ordered = ordered.masked_fill(torch.arange(probs.shape[-1], device=probs.device) >= limit[:, None], 0)
    before = ordered.cumsum(-1) - ordered
    outside = before >= draw.top_p[:, None] * ordered.sum(-1, keepdim=True)
    outside[:, 0] = False  # the most probable token stays, however small top_p is
    ordered = ordered.masked_fill(outside, 0)
    return torch.zeros_like(probs).scatter_(-1, order, ordered)
