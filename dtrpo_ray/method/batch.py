"""Rows -> one `Batch` of tensors: states sampled, rows packed, shapes checked here and nowhere else.

Legend: P pairs (single examples for sft), S sides, R packed rows of T tokens, N scored tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dtrpo_ray.config.train import Objective
from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.method.attention import CLEAN, LEFT_OUT, PAD, Planes, Row, grid_offset, pack_row, pack_whole
from dtrpo_ray.method.trajectory import (
    GIVEN,
    State,
    block_generators,
    block_slices,
    confidence_ranks,
    dense_ranks,
    left_to_right_ranks,
    random_ranks,
    sample_elbo_states,
    sample_step_states,
    sequential_ranks,
)

SIDES = ("chosen", "rejected")
PLANES = {"ids": 0, "position": 0, "block": 0, "side": PAD, "stream": 0, "pair": 0}  # name -> value of padding


@dataclass(frozen=True, slots=True)
class Layout:
    """What a batch depends on of the model: its block grid and where the hidden state of a token lies."""

    block_size: int
    mask_id: int
    attention: Literal["block", "full"] = "block"
    block_origin: Literal["global", "response"] = "global"
    shift: Literal[0, 1] = 0

    @classmethod
    def of(cls, model: Any) -> "Layout":
        """The layout of a `DiffusionLM`, or of an engine around one."""
        return cls(**{f.name: getattr(model, f.name) for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. A pair's sides lie in one row, so an unpaired side cannot be expressed.

    ids, position, block, side, stream, pair: int64 [R, T], the packed rows (see `attention`).
    scored_row, scored_col, target, slot: int64 [N]; where the hidden state of a scored token lies, its id, and
        pair * S + side. Tokens of a slot follow each other.
    draw: int64 [N], which of the m draws scores it.
    exact: bool [N], whether it is scored whatever the draws are: tokens of a block whose every step is taken, and
        those that no denoising step chose.
    weight: float32 [N], the estimator's weight; 0 for a token that only the SFT term reads.
    nll_weight: float32 [N], the weight in the side's negative log-likelihood.
    tokens: float32 [P, S], response tokens per side.
    scored: float32 [P, S], response tokens per side with a weight in some draw.
    row_weight: float32 [P]; 0 marks pairs that only fill the batch.
    ref_logp: float32 [N] or None, the reference's log mu where it was computed beforehand (`reference`).
    layout: of the model that it was built for.
    """

    ids: Tensor
    position: Tensor
    block: Tensor
    side: Tensor
    stream: Tensor
    pair: Tensor
    scored_row: Tensor
    scored_col: Tensor
    target: Tensor
    slot: Tensor
    draw: Tensor
    exact: Tensor
    weight: Tensor
    nll_weight: Tensor
    tokens: Tensor
    scored: Tensor
    row_weight: Tensor
    ref_logp: Tensor | None
    layout: Layout

    @property
    def planes(self) -> Planes:
        """What the attention mask is made of."""
        return Planes(self.block, self.side, self.stream, self.pair)

    def to(self, device: torch.device) -> "Batch":
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class _Scored:
    """The scored tokens of one side [n]: index in the response, and the stream and position of the state to read."""

    index: np.ndarray
    stream: np.ndarray
    position: np.ndarray
    draw: np.ndarray
    exact: np.ndarray
    weight: np.ndarray
    nll_weight: np.ndarray


def build_batch(
    rows: Sequence[Mapping[str, Any]],
    objective: Objective,
    block_size: int,
    mask_id: int,
    seed: int,
    *,
    attention: Literal["block", "full"] = "block",
    block_origin: Literal["global", "response"] = "global",
    shift: Literal[0, 1] = 0,
    row_tokens: int | None = None,
) -> Batch:
    """Sample the states of each side of each row and pack. The model's facts are those of `models.base.DiffusionLM`.

    A row has `row_id`, `epoch`, `prompt_ids`, `chosen_ids`, `chosen_steps` (or None) and, for pair objectives, the
    same of `rejected`; `row_weight` defaults to 1. The draws depend on (seed, row_id, epoch) alone, and both sides take
    the same ones: each side's estimate stays what it is, and what the sides share cancels in their difference. Pairs
    share packed rows of up to `row_tokens` tokens; None gives each a row of its own.

    Raises DataError where an objective needs recorded steps and a row has none, or a shifted model a prompt;
    ConfigError where the objective does not fit the model.
    """
    layout = Layout(block_size, mask_id, attention, block_origin, shift)
    if objective.given_tokens == "clean" and (shift == 0 or attention == "full"):
        raise ConfigError(
            'train.objective.given_tokens = "clean" reads the state before a block; this model has no such state '
            f"(shift = {shift}, attention = {attention!r}): leave it at 'exclude'"
        )
    if objective.first_token == "noisy" and (shift == 0 or attention == "full"):
        raise ConfigError(
            'train.objective.first_token = "noisy" is about models that read a token from the one before it, block by '
            f"block; this one does not (shift = {shift}, attention = {attention!r}): leave it at 'clean'"
        )
    sides = SIDES[: 2 if objective.is_preference else 1]
    packed, scored = [], []
    for row in rows:
        drawn = [_draw(row, side, objective, layout, seed, whole=_reads_all(objective, side)) for side in sides]
        prompt, noisy = np.asarray(row["prompt_ids"], dtype=np.int64), [(ids, versions) for ids, versions, _ in drawn]
        packed.append(
            pack_whole(prompt, noisy) if attention == "full" else pack_row(prompt, noisy, block_size, block_origin)
        )
        scored.append([(ids, tokens) for ids, _, tokens in drawn])
    return _collate(rows, packed, scored, layout, row_tokens)


def _reads_all(objective: Objective, side: str) -> bool:
    """Whether every hidden token of the side is scored, for a likelihood; else the newly unmasked ones only."""
    return side == "chosen" and (not objective.follows_steps or objective.rpo_alpha > 0)


def _draw(
    row: Mapping[str, Any], side: str, objective: Objective, layout: Layout, seed: int, whole: bool
) -> tuple[np.ndarray, list[np.ndarray], _Scored]:
    """Response ids, its noisy versions and its scored tokens, of one side."""
    prompt_len, response = len(row["prompt_ids"]), np.asarray(row[f"{side}_ids"], dtype=np.int64)
    first = opens_block(prompt_len, len(response), layout)
    states, given = _states(row, side, objective, layout, seed, first)
    scored = _scored(states, given & first, first, prompt_len, objective, layout, whole)
    if (scored.position < 0).any():
        raise DataError(
            f"row {row['row_id']}: prompt_ids is empty, and this model predicts a token from the one before it "
            "(shift = 1): begin prompts with a token, such as the tokenizer's first"
        )
    offset = grid_offset(prompt_len, layout.block_size, layout.block_origin)
    block = (prompt_len + np.arange(len(response)) + offset) // layout.block_size
    noisy = []
    for draw, state in enumerate(states, start=1):
        version = np.where(state.hidden, layout.mask_id, response)
        if layout.attention == "block":
            read = (scored.position[scored.stream == draw] + offset) // layout.block_size
            version = np.where(np.isin(block, read), version, LEFT_OUT)
        noisy.append(version)
    return response, noisy, scored


def opens_block(prompt_len: int, response_len: int, layout: Layout) -> np.ndarray:
    """Which response tokens are the first of their block (bool [n])."""
    offset = grid_offset(prompt_len, layout.block_size, layout.block_origin)
    first: np.ndarray = (prompt_len + np.arange(response_len) + offset) % layout.block_size == 0
    return first


def _states(
    row: Mapping[str, Any], side: str, objective: Objective, layout: Layout, seed: int, first: np.ndarray
) -> tuple[list[State], np.ndarray]:
    """The sampled states of one side, and which tokens no denoising step chose (bool [n])."""
    rng = block_generators(seed, row["row_id"], row["epoch"], "state")
    length = len(first)
    blocks = block_slices(len(row["prompt_ids"]), length, layout.block_size, layout.block_origin)
    whole = [slice(0, length)]  # one state shows the whole response to a full-attention model: its only block
    full = layout.attention == "full"
    # as its decoder does; sft must learn the first tokens too
    given = first if layout.shift and not full and objective.is_preference else None
    if not objective.follows_steps:
        assert objective.num_draws != "all"
        states = sample_elbo_states(length, whole if full else blocks, rng, objective.num_draws, given)
        return states, np.zeros(length, dtype=bool) if given is None else given
    if objective.schedule == "recorded":
        ranks = dense_ranks(_column(row, f"{side}_steps", "recorded"), whole if full else blocks)
    else:
        if objective.schedule == "random":
            order = block_generators(seed, row["row_id"], row["epoch"], "order")
            ranks = random_ranks(blocks, objective.tokens_per_step, order, given)
        elif objective.schedule == "left_to_right":
            ranks = left_to_right_ranks(blocks, objective.tokens_per_step, given)
        else:
            confidence = _column(row, f"{side}_confidence", "confidence")
            ranks = confidence_ranks(confidence, blocks, objective.tokens_per_step, given)
        ranks = sequential_ranks(ranks, blocks) if full else ranks
    states = sample_step_states(ranks, whole if full else blocks, objective.weighting, rng, objective.num_draws)
    return states, ranks == GIVEN


def _column(row: Mapping[str, Any], name: str, schedule: str) -> np.ndarray:
    values = row.get(name)
    if values is None:
        remedy = (
            "record trajectories (dtrpo rollout)" if schedule == "recorded" else "run step.order_by_confidence first"
        )
        raise DataError(
            f'row {row["row_id"]}: {name} is missing, and train.objective.schedule = "{schedule}" needs it; '
            f'{remedy} or set schedule = "random"'
        )
    return np.asarray(values, dtype=np.int64 if schedule == "recorded" else np.float64)


def _scored(
    states: list[State],
    given: np.ndarray,
    first: np.ndarray,
    prompt_len: int,
    objective: Objective,
    layout: Layout,
    whole: bool,
) -> _Scored:
    """Which tokens are scored, with what weight, and where their hidden states lie.

    A shifted model reads the state before the token. Before the first token of a block that is the clean block before
    it, as in its decoder, or with `first_token` = "noisy" that block in the token's own stream, as in its training.
    """
    parts = []
    for draw, state in enumerate(states):
        index = np.flatnonzero(state.coverage > 0 if whole else state.scored)
        stream = np.full(len(index), draw + 1)
        if layout.shift and layout.attention == "block" and objective.first_token == "clean":
            stream[first[index]] = CLEAN
        weight, nll_weight = state.weight[index], (state.coverage if whole else state.weight)[index]
        # read in the noisy block before it, a first token depends on that block's draw
        exact = state.exact[index] & ~(first[index] & (objective.first_token == "noisy"))
        parts.append((index, stream, np.full(len(index), draw), exact, weight, nll_weight))
    if objective.given_tokens == "clean":
        index = np.flatnonzero(given)
        once = np.ones(len(index))
        nothing = np.zeros(len(index), dtype=np.int64)
        parts.append((index, nothing + CLEAN, nothing, once > 0, once, once))
    index, stream, draw_of, exact, weight, nll_weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Scored(index, stream, prompt_len + index - layout.shift, draw_of, exact, weight, nll_weight)


def _distinct(tokens: _Scored) -> int:
    return len(np.unique(tokens.index[tokens.weight > 0]))


def packed_tokens(row: Mapping[str, Any], objective: Objective, attention: str) -> int:
    """Tokens that a pair takes of a packed row, at most (see `attention.pack_row` and `attention.pack_whole`)."""
    prompt, tokens = len(row["prompt_ids"]), 0
    for side in SIDES[: 2 if objective.is_preference else 1]:
        response, draws = len(row[f"{side}_ids"]), objective.num_draws
        if draws == "all":  # a version for each step of the block that has most
            recorded = row.get(f"{side}_steps") if objective.schedule == "recorded" else None
            draws = response if recorded is None else 1 + max(recorded, default=0)
        tokens += draws * (prompt + response) if attention == "full" else (1 + draws) * response
    return tokens if attention == "full" else prompt + tokens


def padded_tokens(lengths: list[int], row_tokens: int | None) -> int:
    """Tokens of the packed rows of pairs of these lengths, padding counted (see `build_batch`)."""
    places = _share_rows(lengths, row_tokens)
    ends = [first + length for (_, first), length in zip(places, lengths, strict=True)]
    return (1 + max(row for row, _ in places)) * max(ends)


def _share_rows(lengths: list[int], row_tokens: int | None) -> list[tuple[int, int]]:
    """(row, first column) of each pair: longest first, into the first row that has room. A longer pair stands alone."""
    if row_tokens is None:
        return [(b, 0) for b in range(len(lengths))]
    filled: list[int] = []
    places = [(0, 0)] * len(lengths)
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        row = next((r for r, used in enumerate(filled) if used + lengths[b] <= row_tokens), len(filled))
        if row == len(filled):
            filled.append(0)
        places[b] = (row, filled[row])
        filled[row] += lengths[b]
    return places


def _collate(
    rows: Sequence[Mapping[str, Any]],
    packed: list[Row],
    scored: list[list[tuple[np.ndarray, _Scored]]],
    layout: Layout,
    row_tokens: int | None,
) -> Batch:
    lengths, num_sides = [len(p.ids) for p in packed], len(scored[0])
    places = _share_rows(lengths, row_tokens)
    shape = (1 + max(r for r, _ in places), max(first + n for (_, first), n in zip(places, lengths, strict=True)))
    grids = {name: np.full(shape, fill, dtype=np.int64) for name, fill in PLANES.items()}
    parts: list[tuple[np.ndarray, ...]] = []
    for b, (row, (r, first), sides) in enumerate(zip(packed, places, scored, strict=True)):
        for name, grid in grids.items():
            values = getattr(row, name) if name != "pair" else sum(r == other for other, _ in places[:b])
            grid[r, first : first + len(row.ids)] = values
        for s, (response, tokens) in enumerate(sides):
            column = np.zeros(len(tokens.index), dtype=np.int64)
            for stream in np.unique(tokens.stream).tolist():
                here = tokens.stream == stream
                column[here] = first + row.columns(s, stream, tokens.position[here])
            slot = np.full(len(column), b * num_sides + s)
            where = (np.full(len(column), r), column, response[tokens.index], slot, tokens.draw)
            parts.append((*where, tokens.exact, tokens.weight, tokens.nll_weight))
    names = ("scored_row", "scored_col", "target", "slot", "draw", "exact", "weight", "nll_weight")
    joined = dict(zip(names, (np.concatenate(column) for column in zip(*parts, strict=True)), strict=True))
    types = {"exact": np.bool_, "weight": np.float32, "nll_weight": np.float32}
    return Batch(
        **{name: torch.from_numpy(grid) for name, grid in grids.items()},
        **{name: torch.from_numpy(values.astype(types.get(name, np.int64))) for name, values in joined.items()},
        tokens=torch.tensor([[len(ids) for ids, _ in sides] for sides in scored], dtype=torch.float32),
        scored=torch.tensor([[_distinct(part) for _, part in sides] for sides in scored], dtype=torch.float32),
        row_weight=torch.tensor([float(row.get("row_weight", 1.0)) for row in rows]),
        ref_logp=None,
        layout=layout,
    )
