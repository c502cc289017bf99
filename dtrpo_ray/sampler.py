"""Prompts -> responses by block-wise denoising with an exact KV cache, and the order in which tokens were unmasked.

Block-causal models make the cache exact: a committed block never changes what it saw. Each row has its own place in
the cache, so prompts of different lengths decode side by side and no row's result depends on its neighbours.
Legend: R rows, B tokens of a block, V vocabulary, L cache positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.trajectory import NEVER


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to decode. `denoising_steps` per block (fixed schedule, most confident first) or, if `threshold` is set,
    every token whose probability exceeds it and always the most confident one. `temperature` 0 is greedy."""

    max_new_tokens: int
    denoising_steps: int
    temperature: float = 0.0
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One response. `ids` and `steps` end on the block grid (the terminal block whole); `steps` counts denoising
    forwards from 0 within the response, NEVER where no step unmasked; `logps` are the sampled tokens' log mu at
    temperature 1; `num_forwards` counts denoising forwards; `text_ids` stops before the end-of-sequence token."""

    ids: list[int]
    steps: list[int]
    logps: list[float]
    num_forwards: int
    text_ids: list[int]


class BlockCache:
    """Keys and values [R, heads, L, head size] per layer; a forward writes at its tokens' own positions.

    A denoising pass overwrites what the previous pass of the same block wrote, and the pass over the finished block
    leaves the final values: committing needs no copy.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows: Tensor | None = None
        self.positions: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Called by the trunk's attention: store [R, heads, B, size] at (rows, positions), return the whole cache."""
        assert self.rows is not None
        assert self.positions is not None
        if layer not in self.layers:
            shape = (int(self.rows.max()) + 1, key.shape[1], self.length, key.shape[3])
            self.layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.layers[layer]
        keys[self.rows[:, None], :, self.positions] = key.transpose(1, 2)
        values[self.rows[:, None], :, self.positions] = value.transpose(1, 2)
        if len(self.rows) == keys.shape[0]:
            return keys, values
        return keys[self.rows], values[self.rows]

    def get_seq_length(self, *_: object) -> int:
        return self.length


OnStep = Callable[[int, Tensor, Tensor], None]


@torch.inference_mode()
def generate(
    model: DiffusionLM, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
) -> list[Generation]:
    """Decode every prompt [list of ids] to a `Generation`; `seeds` has one integer per prompt.

    Rows of unequal length stand in one batch; a row that has finished leaves it.
    """
    return _Decoder(model, prompts, params, seeds).run()


class _Decoder:
    """The state of one call of `generate`: token canvas, steps and log-probs [R, L], and each row's current block."""

    def __init__(
        self, model: DiffusionLM, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> None:
        self.model, self.params = model, params
        self.device = next(model.parameters()).device
        size = model.block_size
        self.prompt_lens = [len(p) for p in prompts]
        ends = [-(-(n + params.max_new_tokens) // size) * size for n in self.prompt_lens]
        self.length = max(ends)
        self.canvas = torch.full((len(prompts), self.length), model.mask_id, device=self.device)
        for row, prompt in enumerate(prompts):
            self.canvas[row, : len(prompt)] = torch.tensor(list(prompt), device=self.device)
        self.steps = torch.full_like(self.canvas, NEVER)
        self.logps = torch.zeros(self.canvas.shape, device=self.device)
        self.end = torch.tensor(ends, device=self.device)
        self.start = torch.tensor([n // size * size for n in self.prompt_lens], device=self.device)
        self.prompt_end = torch.tensor(self.prompt_lens, device=self.device)
        self.forwards = torch.zeros(len(prompts), dtype=torch.long, device=self.device)
        self.rngs = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        self.cache = BlockCache(self.length)

    def run(self) -> list[Generation]:
        active = torch.arange(len(self.canvas), device=self.device)
        self._prefill(active)
        while len(active):
            self._denoise_block(active)
            self.start[active] += self.model.block_size
            active = active[~self._finished(active)]
            if len(active):
                self._forward(active, self.start[active] - self.model.block_size)  # commit the finished block
        return [self._generation(row) for row in range(len(self.canvas))]

    def _prefill(self, rows: Tensor) -> None:
        """One pass over every whole prompt block; what a shorter row has past them, its later blocks overwrite."""
        width = int(self.start.max())
        if width:
            self._forward(rows, torch.zeros_like(rows), width)

    def _forward(self, rows: Tensor, starts: Tensor, width: int | None = None) -> Tensor:
        """Run tokens [start, start + width) of each row against the cache; returns hidden states [R, width, H]."""
        width = width or self.model.block_size
        positions = starts[:, None] + torch.arange(width, device=self.device)
        block_end = (positions // self.model.block_size + 1) * self.model.block_size
        mask = torch.arange(self.length, device=self.device) < block_end[..., None]
        self.cache.rows, self.cache.positions = rows, positions
        ids = self.canvas[rows[:, None], positions]
        return self.model.hidden(ids, positions, mask[:, None], self.cache)

    def _denoise_block(self, rows: Tensor) -> None:
        size = self.model.block_size
        limit = size if self.params.threshold is not None else self.params.denoising_steps
        for step in range(limit):
            positions = self.start[rows][:, None] + torch.arange(size, device=self.device)
            masked = self.canvas[rows[:, None], positions] == self.model.mask_id
            masked &= positions >= self.prompt_end[rows, None]  # a prompt is read as it is, never filled in
            busy = masked.any(1)
            if not busy.any():
                break
            rows, positions, masked = rows[busy], positions[busy], masked[busy]
            tokens, logp = self._propose(self._forward(rows, self.start[rows]), rows)
            take = self._select(masked, logp, limit - step)
            at = (rows[:, None].expand_as(positions)[take], positions[take])
            self.canvas[at], self.logps[at] = tokens[take], logp[take]
            self.steps[at] = self.forwards[rows][:, None].expand_as(positions)[take]
            self.forwards[rows] += 1

    def _propose(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A candidate token for each position [R, B] and its log mu at temperature 1 (its confidence)."""
        log_mu = self.model.log_mu(hidden)
        if self.params.temperature == 0:
            logp, tokens = log_mu.max(-1)
            return tokens, logp
        # inverse-CDF sampling: one uniform per position from the row's own generator, whoever its neighbours are
        draws = np.stack([self.rngs[row].random(hidden.shape[1]) for row in rows.tolist()])
        cdf = torch.softmax(log_mu / self.params.temperature, -1).double().cumsum(-1)
        uniform = torch.from_numpy(draws).to(self.device)[..., None] * cdf[..., -1:]
        tokens = torch.searchsorted(cdf, uniform, right=True)
        return tokens[..., 0], log_mu.gather(-1, tokens)[..., 0]

    def _select(self, masked: Tensor, logp: Tensor, steps_left: int) -> Tensor:
        """Which masked positions [R, B] this step unmasks; always at least one per row."""
        confidence = logp.masked_fill(~masked, float("-inf"))
        order = confidence.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        if self.params.threshold is not None:
            return masked & ((confidence.exp() > self.params.threshold) | (order == 0))
        count = -(-masked.sum(-1, keepdim=True) // steps_left)
        return masked & (order < count)

    def _finished(self, rows: Tensor) -> Tensor:
        eos = torch.stack(
            [(self.canvas[r, self.prompt_lens[r] : self.start[r]] == self.model.eos_id).any() for r in rows.tolist()]
        )
        return eos | (self.start[rows] >= self.end[rows])

    def _generation(self, row: int) -> Generation:
        span = slice(self.prompt_lens[row], int(self.start[row]))
        ids = self.canvas[row, span].tolist()
        text = ids[: self.params.max_new_tokens]
        text = text[: text.index(self.model.eos_id)] if self.model.eos_id in text else text
        num_forwards = int(self.forwards[row])
        return Generation(ids, self.steps[row, span].tolist(), self.logps[row, span].tolist(), num_forwards, text)
