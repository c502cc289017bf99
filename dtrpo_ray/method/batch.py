"""Build one `MicroBatch` of tensors from rows: sample states, pack rows, check shapes.

Legend: P pairs (single examples for sft), S sides, R packed rows of T tokens, N scored tokens, n tokens of a response.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dtrpo_ray.config.train import Objective
from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.method.attention import (
    CLEAN,
    LEFT_OUT,
    ONE_BLOCK,
    PAD,
    PROMPT,
    PackedRow,
    Planes,
    grid_offset,
    pack_row,
)
from dtrpo_ray.method.trajectory import (
    GIVEN,
    Origin,
    State,
    block_generators,
    block_slices,
    dense_steps,
    ordered_steps,
    sample_complementary_states,
    sample_elbo_states,
    sample_step_states,
    sequential_steps,
)

Row = Mapping[str, Any]
Rows = Sequence[Row]
SIDES = ("chosen", "rejected")
PLANES = {"ids": 0, "position": 0, "block": 0, "side": PAD, "stream": 0, "pair": 0}  # name -> value of padding
# a scored token of a response: its index there, the stream and position of the state to read; columns of `MicroBatch`
SCORED = np.dtype(
    [
        (name, np.int64)
        for name in ("index", "stream", "position", "scored_row", "scored_col", "target", "slot", "draw", "place")
    ]
    + [("exact", np.bool_), ("weight", np.float32), ("nll_weight", np.float32)]
)


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """The facts of a model that shape a batch: its block grid, and where a token's hidden state lies."""

    block_size: int
    mask_id: int
    attention: Literal["block", "full"] = "block"
    block_origin: Origin = "global"
    shift: Literal[0, 1] = 0

    @classmethod
    def of(cls, model: Any) -> "ModelLayout":
        """Read the layout of a `DiffusionLM`, or of an engine around one."""
        return cls(**{f.name: getattr(model, f.name) for f in fields(cls)})

    @property
    def state_grid(self) -> tuple[int, Origin]:
        """Size and origin of the blocks that a state hides apart: full attention sees the whole response as one."""
        return (ONE_BLOCK, "global") if self.attention == "full" else (self.block_size, self.block_origin)

    @property
    def reads_back(self) -> bool:
        """True if a block's first token is predicted from the block before it."""
        return self.shift == 1 and self.attention == "block"

    def on_grid(self, prompt_len: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the blocks of positions in a row with this prompt, and their places within the block."""
        offset = grid_offset(prompt_len, self.block_size, self.block_origin)
        return np.divmod(position + offset, self.block_size)

    def opens_block(self, prompt_len: int, response_len: int) -> np.ndarray:
        """Mark the response tokens that are the first of their block (bool [n])."""
        return self.on_grid(prompt_len, prompt_len + np.arange(response_len))[1] == 0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The packed rows and scored tokens of some pairs. A pair's sides always lie in the same row.

    ids, position, block, side, stream, pair: int64 [R, T], the packed rows (see `attention`).
    scored_row, scored_col, target, slot: int64 [N]: where the hidden state of a scored token lies, its id, and
        pair * S + side. Tokens of a slot follow each other.
    draw: int64 [N], which of the m draws scores the token.
    place: int64 [N], the token's place in its block of the grid, from 0.
    exact: bool [N], True for tokens that are scored whatever the draws are: those of a block whose every step is
        taken, and those that no denoising step chose.
    weight: float32 [N], the estimator's weight; 0 for a token that only the SFT term reads.
    nll_weight: float32 [N], the weight in the side's negative log-likelihood.
    tokens: float32 [P, S], response tokens per side.
    scored: float32 [P, S], response tokens per side with a weight in some draw.
    row_weight: float32 [P]; 0 marks pairs that only fill the batch.
    ref_logp: float32 [N] or None, the reference's log mu where it was computed beforehand (`reference`).
    layout: that of the model the batch was built for.
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
    place: Tensor
    exact: Tensor
    weight: Tensor
    nll_weight: Tensor
    tokens: Tensor
    scored: Tensor
    row_weight: Tensor
    ref_logp: Tensor | None
    layout: ModelLayout

    @property
    def planes(self) -> Planes:
        """The inputs of the attention mask."""
        return Planes(self.block, self.side, self.stream, self.pair)

    def to(self, device: torch.device) -> "MicroBatch":
        """Move the tensors to a device."""
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        moved: Any = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def build_batch(
    rows: Rows, objective: Objective, layout: ModelLayout, seed: int, row_tokens: int | None = None
) -> MicroBatch:
    """Sample the states of each side of each row, and pack them.

    A row has `row_id`, `epoch`, `prompt_ids`, `chosen_ids`, `chosen_steps` (or None) and, for pair objectives, the
    same of `rejected`; `row_weight` defaults to 1. The draws depend on (seed, row_id, epoch) alone, and both sides take
    the same ones: each side's estimate keeps its distribution, and what the sides share cancels in their difference.
    Pairs share packed rows of up to `row_tokens` tokens; None gives each a row of its own.

    Raises DataError if a row lacks recorded steps that the objective needs, or a prompt that a shifted model needs;
    ConfigError if the objective does not fit the model.
    """
    _require_fit(objective, layout)
    packed, scored, sides = [], [], _sides_of(objective)
    for b, row in enumerate(rows):
        sampled = [_sample_side(row, side, objective, layout, seed) for side in sides]
        noisy = [(response, versions) for response, versions, _ in sampled]
        packed.append(pack_row(np.asarray(row["prompt_ids"], dtype=np.int64), noisy, *layout.state_grid))
        scored.append([tokens for _, _, tokens in sampled])
        for s, tokens in enumerate(scored[-1]):
            tokens["slot"] = b * len(sides) + s
            tokens["scored_col"] = packed[-1].columns(s, tokens["stream"], tokens["position"])
    return _collate(rows, packed, scored, layout, row_tokens)


def chosen_alone(batch: MicroBatch) -> MicroBatch:
    """Leave out the rejected sides: the chosen ones keep their states, in shorter rows. Row weights stay."""
    kept = (batch.side == PROMPT) | (batch.side == 0)
    order = (~kept).int().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
    filled = kept.gather(1, order)
    grids = {name: getattr(batch, name).gather(1, order).where(filled, fill) for name, fill in PLANES.items()}
    mine = batch.slot % batch.tokens.shape[1] == 0
    columns = {name: getattr(batch, name)[mine] for name in (SCORED.names or ())[3:]}
    columns["scored_col"] = kept.cumsum(1)[columns["scored_row"], columns["scored_col"]] - 1
    columns["slot"] = columns["slot"] // batch.tokens.shape[1]
    ref_logp = None if batch.ref_logp is None else batch.ref_logp[mine]
    changed: Any = grids | columns | {"tokens": batch.tokens[:, :1], "scored": batch.scored[:, :1]}
    return replace(batch, **changed, ref_logp=ref_logp)


def _require_fit(objective: Objective, layout: ModelLayout) -> None:
    model = f"(shift = {layout.shift}, attention = {layout.attention!r})"
    if objective.given_tokens == "clean" and not layout.reads_back:
        raise ConfigError(
            'train.objective.given_tokens = "clean" reads the state before a block; this model has no such state '
            f"{model}: leave it at 'exclude'"
        )
    if objective.first_token == "noisy" and not layout.reads_back:
        raise ConfigError(
            'train.objective.first_token = "noisy" is for models that predict a token from the one before it, block by '
            f"block; this one does not {model}: leave it at 'clean'"
        )


def _sides_of(objective: Objective) -> tuple[str, ...]:
    return SIDES[: 2 if objective.is_preference else 1]


def _sample_side(
    row: Row, side: str, objective: Objective, layout: ModelLayout, seed: int
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Return one response, its noisy versions (one per draw), and its scored tokens as records of SCORED.

    A shifted model reads the state before the token. Before the first token of a block that is the clean block before
    it, as in its decoder, or with `first_token` = "noisy" that block in the token's own stream, as in its training.
    """
    prompt_len, response = len(row["prompt_ids"]), np.asarray(row[f"{side}_ids"], dtype=np.int64)
    block, place = layout.on_grid(prompt_len, prompt_len + np.arange(len(response)))
    first, noisy = place == 0, []
    states, given = _states(row, side, objective, layout, seed)
    # a likelihood (sft, the SFT term, elbo) reads every hidden token, dtrpo the newly unmasked ones only
    all_hidden = side == "chosen" and objective.reads_all_hidden
    parts = []
    for draw, state in enumerate(states):
        index = np.flatnonzero(state.coverage > 0 if all_hidden else state.scored)
        part = np.zeros(len(index), SCORED)
        part["index"], part["stream"], part["draw"] = index, draw + 1, draw
        if layout.reads_back and objective.first_token == "clean":
            part["stream"][first[index]] = CLEAN
        # a first token that is read in the noisy block before it depends on that block's draw
        part["exact"] = state.exact[index] & ~(first[index] & (objective.first_token == "noisy"))
        part["weight"] = state.weight[index]
        part["nll_weight"] = (state.coverage if all_hidden else state.weight)[index]
        parts.append(part)
    if objective.given_tokens == "clean":
        once = np.zeros(np.count_nonzero(given & first), SCORED)
        once["index"], once["stream"] = np.flatnonzero(given & first), CLEAN
        once["exact"] = once["weight"] = once["nll_weight"] = 1
        parts.append(once)
    tokens = np.concatenate(parts)
    tokens["target"], tokens["position"] = response[tokens["index"]], prompt_len + tokens["index"] - layout.shift
    tokens["place"] = place[tokens["index"]]
    if (tokens["position"] < 0).any():
        raise DataError(
            f"row {row['row_id']}: prompt_ids is empty, and this model predicts a token from the one before it "
            "(shift = 1): begin prompts with a token, such as the tokenizer's first"
        )
    for draw, state in enumerate(states, start=1):
        version = np.where(state.hidden, layout.mask_id, response)
        if layout.attention == "block":
            read, _ = layout.on_grid(prompt_len, tokens["position"][tokens["stream"] == draw])
            version = np.where(np.isin(block, read), version, LEFT_OUT)
        noisy.append(version)
    return response, noisy, tokens


def _states(
    row: Row, side: str, objective: Objective, layout: ModelLayout, seed: int
) -> tuple[list[State], np.ndarray]:
    """Sample the states of one side, and mark the tokens that no denoising step chose (bool [n])."""
    rng = block_generators(seed, row["row_id"], row["epoch"], "state")
    prompt_len, length = len(row["prompt_ids"]), len(row[f"{side}_ids"])
    blocks = block_slices(prompt_len, length, layout.block_size, layout.block_origin)
    state_blocks = block_slices(prompt_len, length, *layout.state_grid)
    # a shifted model's decoder takes a block's first token autoregressively; sft must learn these tokens too
    given = layout.opens_block(prompt_len, length) & (layout.reads_back and objective.type != "sft")
    if not objective.follows_steps:
        assert objective.num_draws != "all"
        sample = sample_complementary_states if objective.complementary_masks else sample_elbo_states
        return sample(state_blocks, rng, objective.num_draws, given), given
    if objective.schedule == "recorded":
        steps = dense_steps(_column(row, f"{side}_steps", "recorded"), state_blocks)
    else:
        order = block_generators(seed, row["row_id"], row["epoch"], "order")
        by_confidence = objective.schedule == "confidence"  # without any, left to right
        rank = -_column(row, f"{side}_confidence", "confidence") if by_confidence else np.arange(length)

        def key(block: int, free: np.ndarray) -> np.ndarray:
            return order(block).permutation(len(free)) if objective.schedule == "random" else rank[free]

        steps = ordered_steps(blocks, objective.tokens_per_step, given, key)
        steps = sequential_steps(steps, blocks) if layout.attention == "full" else steps
    states = sample_step_states(steps, state_blocks, objective.weighting, rng, objective.num_draws)
    return states, steps == GIVEN


def _column(row: Row, name: str, schedule: str) -> np.ndarray:
    values = row.get(name)
    if values is None:
        remedy = {"recorded": "record trajectories (dtrpo rollout)"}.get(schedule, "run step.order_by_confidence first")
        raise DataError(
            f'row {row["row_id"]}: {name} is missing, and train.objective.schedule = "{schedule}" needs it; '
            f'{remedy} or set schedule = "random"'
        )
    return np.asarray(values, dtype=np.int64 if schedule == "recorded" else np.float64)


def packed_tokens(row: Row, objective: Objective, attention: str) -> int:
    """Bound the tokens that a pair takes of a packed row (see `attention.pack_row`)."""
    prompt, tokens = len(row["prompt_ids"]), 0
    for side in _sides_of(objective):
        response, draws = len(row[f"{side}_ids"]), objective.num_states
        if draws == "all":  # one version for each step of the block with the most steps
            recorded = row.get(f"{side}_steps") if objective.schedule == "recorded" else None
            draws = response if recorded is None else 1 + max(recorded, default=0)
        tokens += draws * (prompt + response) if attention == "full" else (1 + draws) * response
    return tokens if attention == "full" else prompt + tokens


def padded_tokens(lengths: list[int], row_tokens: int | None) -> int:
    """Count the tokens of the packed rows of pairs of these lengths, padding included (see `build_batch`)."""
    filled = _share_rows(lengths, row_tokens)[1]
    return len(filled) * max(filled)


def _share_rows(lengths: list[int], row_tokens: int | None) -> tuple[list[tuple[int, int]], list[int]]:
    """Place each pair at (row, first column): longest first, into the first row with room, or alone in a new one.

    Returns the places, and how far each row is filled. Without `row_tokens` each pair has a row of its own, in order.
    """
    filled: list[int] = []
    places, pairs = [(0, 0)] * len(lengths), range(len(lengths))
    for b in pairs if row_tokens is None else sorted(pairs, key=lambda b: -lengths[b]):
        row = next((r for r, used in enumerate(filled) if used + lengths[b] <= (row_tokens or 0)), len(filled))
        if row == len(filled):
            filled.append(0)
        places[b] = (row, filled[row])
        filled[row] += lengths[b]
    return places, filled


def _collate(
    rows: Rows, packed: list[PackedRow], scored: list[list[np.ndarray]], layout: ModelLayout, row_tokens: int | None
) -> MicroBatch:
    places, filled = _share_rows([len(p.ids) for p in packed], row_tokens)
    grids = {name: np.full((len(filled), max(filled)), fill, dtype=np.int64) for name, fill in PLANES.items()}
    for b, (row, (r, first), sides) in enumerate(zip(packed, places, scored, strict=True)):
        for name, grid in grids.items():
            values = getattr(row, name) if name != "pair" else sum(r == other for other, _ in places[:b])
            grid[r, first : first + len(row.ids)] = values
        for tokens in sides:
            tokens["scored_row"], tokens["scored_col"] = r, first + tokens["scored_col"]
    columns = np.concatenate([tokens for sides in scored for tokens in sides])
    counts = [[len(np.unique(tokens["index"][tokens["weight"] > 0])) for tokens in sides] for sides in scored]
    responses = [[len(row[f"{side}_ids"]) for side in SIDES[: len(scored[0])]] for row in rows]
    return MicroBatch(
        **{name: torch.from_numpy(grid) for name, grid in grids.items()},
        **{name: torch.from_numpy(columns[name].copy()) for name in (columns.dtype.names or ())[3:]},
        tokens=torch.tensor(responses, dtype=torch.float32),
        scored=torch.tensor(counts, dtype=torch.float32),
        row_weight=torch.tensor([float(row.get("row_weight", 1.0)) for row in rows]),
        ref_logp=None,
        layout=layout,
    )
