"""Rows -> one `Batch` of tensors: states sampled, rows packed, shapes checked here and nowhere else.

Legend: B rows, S sides, T tokens of a packed row, N scored tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrpo_ray.attention import PAD, Row, pack_row
from dtrpo_ray.config import Objective
from dtrpo_ray.errors import DataError
from dtrpo_ray.trajectory import (
    State,
    block_slices,
    dense_ranks,
    random_ranks,
    row_generator,
    sample_elbo_state,
    sample_step_state,
)

SIDES = ("chosen", "rejected")
SCORED = ("scored_row", "scored_col", "target", "slot", "weight", "nll_weight")


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. A pair is a row, so an unpaired side cannot be expressed.

    ids, position, side, stream: int64 [B, T], the packed rows (see `attention`).
    scored_row, scored_col, target, slot: int64 [N]; where a scored token lies, its id, and row * S + side.
    weight: float32 [N], the estimator's weight; 0 for a token that only the SFT term reads.
    nll_weight: float32 [N], the weight in the side's negative log-likelihood.
    tokens: float32 [B, S], response tokens per side.
    row_weight: float32 [B]; 0 marks rows that only fill the batch.
    """

    ids: Tensor
    position: Tensor
    side: Tensor
    stream: Tensor
    scored_row: Tensor
    scored_col: Tensor
    target: Tensor
    slot: Tensor
    weight: Tensor
    nll_weight: Tensor
    tokens: Tensor
    row_weight: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def build_batch(
    rows: Sequence[Mapping[str, Any]], objective: Objective, block_size: int, mask_id: int, seed: int
) -> Batch:
    """Sample one state per block for each side of each row and pack.

    A row has `row_id`, `epoch`, `prompt_ids`, `chosen_ids`, `chosen_steps` (or None) and, for pair objectives, the
    same of `rejected`; `row_weight` defaults to 1. The draws depend on (seed, row_id, epoch) alone, and both sides take
    the same ones: each side's estimate stays what it is, and what the sides share cancels in their difference.

    Raises DataError where an objective needs recorded steps and a row has none.
    """
    sides = SIDES[: 1 if objective.type == "sft" else 2]
    packed, states = [], []
    for row in rows:
        prompt = np.asarray(row["prompt_ids"], dtype=np.int64)
        responses = [np.asarray(row[f"{side}_ids"], dtype=np.int64) for side in sides]
        drawn = [
            _draw_state(row, side, len(prompt), len(r), objective, block_size, seed)
            for side, r in zip(sides, responses, strict=True)
        ]
        noisy = [(r, [np.where(s.hidden, mask_id, r)]) for r, s in zip(responses, drawn, strict=True)]
        packed.append(pack_row(prompt, noisy, block_size))
        states.append((len(prompt), responses, drawn))
    return _collate(rows, packed, states, len(sides), objective.type != "dtrpo" or objective.sft_weight > 0)


def _draw_state(
    row: Mapping[str, Any],
    side: str,
    prompt_len: int,
    response_len: int,
    objective: Objective,
    block_size: int,
    seed: int,
) -> State:
    rng = row_generator(seed, row["row_id"], row["epoch"], "state")
    blocks = block_slices(prompt_len, response_len, block_size)
    if objective.type != "dtrpo":
        return sample_elbo_state(response_len, blocks, rng)
    steps = row.get(f"{side}_steps")
    if objective.schedule == "recorded":
        if steps is None:
            raise DataError(
                f'row {row["row_id"]}: {side}_steps is missing, and train.objective.schedule = "recorded" needs it; '
                'record trajectories (dtrpo rollout) or set schedule = "random"'
            )
        ranks = dense_ranks(np.asarray(steps, dtype=np.int64), blocks)
    else:
        ranks = random_ranks(blocks, objective.tokens_per_step, rng)
    return sample_step_state(ranks, blocks, objective.weighting, rng)


def _collate(
    rows: Sequence[Mapping[str, Any]],
    packed: list[Row],
    states: list[tuple[int, list[np.ndarray], list[State]]],
    num_sides: int,
    whole_chosen: bool,
) -> Batch:
    """`whole_chosen` takes every hidden token of the chosen side along, for the SFT term; else the scored ones only."""
    width = max(len(p.ids) for p in packed)
    planes = {"ids": 0, "position": 0, "side": PAD, "stream": 0}
    grids = {name: np.full((len(packed), width), fill, dtype=np.int64) for name, fill in planes.items()}
    scored: dict[str, list[np.ndarray]] = {k: [] for k in SCORED}
    tokens = np.zeros((len(packed), num_sides), dtype=np.float32)
    for b, (row, (prompt_len, responses, drawn)) in enumerate(zip(packed, states, strict=True)):
        for name, grid in grids.items():
            grid[b, : len(row.ids)] = getattr(row, name)
        for s, (response, state) in enumerate(zip(responses, drawn, strict=True)):
            whole = whole_chosen and s == 0
            where = np.flatnonzero(state.coverage > 0 if whole else state.scored)
            scored["scored_row"].append(np.full(len(where), b))
            scored["scored_col"].append(row.noisy_at[s][0] + prompt_len - row.first_position + where)
            scored["target"].append(response[where])
            scored["slot"].append(np.full(len(where), b * num_sides + s))
            scored["weight"].append(state.weight[where])
            scored["nll_weight"].append((state.coverage if whole else state.weight)[where])
            tokens[b, s] = len(response)
    joined = {name: np.concatenate(parts) for name, parts in scored.items()}
    floats = {name: joined.pop(name).astype(np.float32) for name in ("weight", "nll_weight")}
    return Batch(
        **{name: torch.from_numpy(grid) for name, grid in grids.items()},
        **{name: torch.from_numpy(values.astype(np.int64)) for name, values in joined.items()},
        **{name: torch.from_numpy(values) for name, values in floats.items()},
        tokens=torch.from_numpy(tokens),
        row_weight=torch.tensor([float(row.get("row_weight", 1.0)) for row in rows]),
    )
