"""batch: what is scored lies where it should, and a row's draws are its own."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrpo_ray.config.train import Objective
from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.method.attention import PAD
from dtrpo_ray.method.batch import PLANES, MicroBatch, ModelLayout, build_batch

B, MASK, SEED = 4, 22, 5

Json = dict[str, Any]


def row(number: int, prompt_len: int, chosen_len: int, rejected_len: int, **more: Any) -> Json:
    """Ids are all different within a row, so that a place is known by its id."""
    start = 100 * number
    lens = (prompt_len, chosen_len, rejected_len)
    ids = np.split(np.arange(start + 30, start + 30 + sum(lens)), np.cumsum(lens)[:-1])
    rng = np.random.default_rng(number)
    return {
        "row_id": f"row-{number}",
        "epoch": 0,
        "prompt_ids": ids[0].tolist(),
        "chosen_ids": ids[1].tolist(),
        "rejected_ids": ids[2].tolist(),
        "chosen_steps": rng.integers(0, 9, chosen_len).tolist(),
        "rejected_steps": rng.integers(0, 9, rejected_len).tolist(),
    } | more


ROWS = [row(0, 5, 7, 11), row(1, 0, 3, 4), row(2, 8, 8, 1), row(3, 3, 13, 2)]
OBJECTIVES = {
    "steps": Objective(type="dtrpo", weighting="steps"),
    "tokens": Objective(type="dtrpo", weighting="tokens"),
    "random": Objective(type="dtrpo", schedule="random", tokens_per_step=2),
    "elbo": Objective(type="elbo_dpo"),
    "mixed": Objective(rpo_alpha=0.5),
    "sft": Objective(type="sft"),
}


def build(rows: list[Json], objective: Objective, seed: int = SEED) -> MicroBatch:
    return build_batch(rows, objective, ModelLayout(B, MASK), seed)


def of_row(batch: MicroBatch, b: int) -> Json:
    """Everything the batch says of one row, free of where it stands and how wide the batch is."""
    mine, width, sides = batch.scored_row == b, int((batch.side[b] != PAD).sum()), batch.tokens.shape[1]
    planes = {name: getattr(batch, name)[b, :width].tolist() for name in ("ids", "position", "side", "stream")}
    scored = {name: getattr(batch, name)[mine].tolist() for name in ("scored_col", "target", "weight", "nll_weight")}
    rest = {"slot": (batch.slot[mine] - b * sides).tolist(), "tokens": batch.tokens[b].tolist()}
    return planes | scored | rest


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scored_places_hold_the_mask_of_their_target(name: str) -> None:
    batch = build(ROWS, OBJECTIVES[name])
    sides = ("chosen", "rejected")[: batch.tokens.shape[1]]
    assert batch.tokens.tolist() == [[len(r[f"{s}_ids"]) for s in sides] for r in ROWS]
    assert len(batch.target) > 0
    for b, col, target, slot, weight in zip(
        batch.scored_row.tolist(),
        batch.scored_col.tolist(),
        batch.target.tolist(),
        batch.slot.tolist(),
        batch.weight.tolist(),
        strict=True,
    ):
        side = slot - b * len(sides)
        index = ROWS[b][f"{sides[side]}_ids"].index(target)
        assert batch.ids[b, col] == MASK
        assert batch.position[b, col] == len(ROWS[b]["prompt_ids"]) + index
        assert (batch.side[b, col], batch.stream[b, col]) == (side, 1)
        assert weight > 0 or (name == "mixed" and side == 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_that_is_not_masked_is_the_text(name: str) -> None:
    """Prompt tokens are never masked, clean streams never; a noisy token is the mask or the token of its position."""
    batch = build(ROWS, OBJECTIVES[name])
    for b, row_ in enumerate(ROWS):
        prompt = row_["prompt_ids"]
        texts = {0: prompt + row_["chosen_ids"], 1: prompt + row_["rejected_ids"], -1: prompt}
        for token, position, side, stream in zip(
            *(p[b].tolist() for p in (batch.ids, batch.position, batch.side, batch.stream)), strict=True
        ):
            if side != PAD:
                hidden = token == MASK and stream > 0 and position >= len(prompt)
                assert hidden or token == texts[side][position]
            else:
                assert (token, position, stream) == (0, 0, 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_rows_draws_ignore_order_and_neighbours(name: str) -> None:
    objective = OBJECTIVES[name]
    crowd, shuffled = build(ROWS, objective), build([ROWS[i] for i in (2, 0, 3, 1)], objective)
    for b, row_ in enumerate(ROWS):
        alone = of_row(build([row_], objective), 0)
        assert of_row(crowd, b) == alone
        assert of_row(shuffled, (2, 0, 3, 1).index(b)) == alone


@pytest.mark.parametrize("name", OBJECTIVES)
def test_draws_change_with_seed_row_and_epoch_and_serve_both_sides(name: str) -> None:
    def hidden(row_: Json, seed: int = SEED) -> list[list[int]]:
        batch = build([row_], OBJECTIVES[name], seed)
        sides = range(batch.tokens.shape[1])
        places = [(batch.side[0] == s) & (batch.stream[0] > 0) & (batch.ids[0] == MASK) for s in sides]
        return [batch.position[0][place].tolist() for place in places]

    twins = row(7, 4, 32, 32, chosen_steps=list(range(32)), rejected_steps=list(range(32)))
    first = hidden(twins)
    assert hidden(twins | {"epoch": 1}) != first
    assert hidden(twins | {"row_id": "other"}) != first
    assert hidden(twins, seed=SEED + 1) != first
    assert hidden(dict(twins)) == first
    assert len(first) == 1 or first[0] == first[1]


def test_elbo_and_sft_hide_the_chosen_side_alike() -> None:
    """Same row, same draw: an SFT row is the chosen half of the control's pair."""
    pair, single = build([ROWS[0]], OBJECTIVES["elbo"]), build([ROWS[0]], OBJECTIVES["sft"])
    chosen = pair.slot == 0
    assert pair.target[chosen].tolist() == single.target.tolist()
    assert pair.weight[chosen].tolist() == single.weight.tolist()
    assert single.tokens.shape == (1, 1)
    assert set(single.side.flatten().tolist()) == {-1, 0}


def test_the_sft_term_adds_hidden_chosen_tokens_of_weight_zero() -> None:
    """Same states; the ratio's tokens and weights stay; the rest of the chosen side's hidden tokens come along."""
    lean, mixed = build(ROWS, OBJECTIVES["steps"]), build(ROWS, OBJECTIVES["mixed"])
    assert torch.equal(lean.ids, mixed.ids)
    kept = mixed.weight > 0
    for name in ("scored_row", "scored_col", "target", "slot", "weight"):
        assert torch.equal(getattr(mixed, name)[kept], getattr(lean, name))
    for b, row_ in enumerate(ROWS):
        response = (mixed.side[b] == 0) & (mixed.stream[b] == 1) & (mixed.position[b] >= len(row_["prompt_ids"]))
        hidden = torch.nonzero(response & (mixed.ids[b] == MASK))[:, 0].tolist()
        chosen = mixed.slot == 2 * b
        assert mixed.scored_col[chosen].tolist() == hidden
        assert mixed.nll_weight[chosen].sum().item() == pytest.approx(len(row_["chosen_ids"]))


def test_recorded_steps_decide_what_is_scored() -> None:
    """One step for the whole block: all of it hidden, all scored, weight 1, whatever the seed."""
    steps = {"chosen_steps": [6] * 7, "rejected_steps": [0] * 11}
    for seed in range(5):
        batch = build([row(0, 5, 7, 11, **steps)], OBJECTIVES["steps"], seed)
        assert batch.target.tolist() == ROWS[0]["chosen_ids"] + ROWS[0]["rejected_ids"]
        assert batch.weight.tolist() == [1] * 18
        assert batch.slot.tolist() == [0] * 7 + [1] * 11


def test_a_block_hides_what_its_scored_step_and_later_ones_unmasked() -> None:
    """By recorded step and global block: of the scored step all is scored; of it and later all hidden, earlier none."""
    for seed in range(8):
        batch = build(ROWS, OBJECTIVES["steps"], seed)
        scored = set(zip(batch.scored_row.tolist(), batch.scored_col.tolist(), strict=True))
        for b, row_ in enumerate(ROWS):
            for s, side in enumerate(("chosen", "rejected")):
                blocks: dict[int, list[tuple[int, bool, bool]]] = {}
                for col in torch.nonzero((batch.side[b] == s) & (batch.stream[b] == 1))[:, 0].tolist():
                    position, masked = int(batch.position[b, col]), bool(batch.ids[b, col] == MASK)
                    index = position - len(row_["prompt_ids"])
                    if index >= 0:
                        step = row_[f"{side}_steps"][index]
                        blocks.setdefault(position // B, []).append((step, masked, (b, col) in scored))
                for block in blocks.values():
                    (t,) = {step for step, _, is_scored in block if is_scored}
                    assert [(masked, is_scored) for _, masked, is_scored in block] == [
                        (r >= t, r == t) for r, _, _ in block
                    ]


@pytest.mark.parametrize("missing", ["chosen_steps", "rejected_steps"])
def test_missing_steps_name_the_row_and_the_remedy(missing: str) -> None:
    broken = ROWS[0] | {missing: None}
    with pytest.raises(DataError, match=rf"row row-0: {missing} is missing.*random"):
        build([ROWS[1], broken], OBJECTIVES["steps"])
    for name in ("random", "elbo", "sft"):
        build([broken], OBJECTIVES[name])


def test_row_weight_is_carried_and_defaults_to_one() -> None:
    batch = build([ROWS[0], ROWS[1] | {"row_weight": 0}, ROWS[2] | {"row_weight": 0.5}], OBJECTIVES["steps"])
    assert batch.row_weight.tolist() == [1, 0, 0.5]


def test_types_and_shapes_are_as_documented() -> None:
    batch = build(ROWS, OBJECTIVES["steps"])
    moved = batch.to(torch.device("cpu"))
    floats = {"weight", "nll_weight", "tokens", "scored", "row_weight"}
    assert batch.ref_logp is None
    assert batch.layout == moved.layout == ModelLayout(B, MASK)
    for field in fields(MicroBatch)[:-2]:
        value = getattr(batch, field.name)
        assert value.dtype == {"exact": torch.bool}.get(
            field.name, torch.float32 if field.name in floats else torch.int64
        )
        assert torch.equal(value, getattr(moved, field.name))
    scored = ("scored_row", "scored_col", "slot", "draw", "exact", "weight", "nll_weight")
    assert {getattr(batch, name).shape for name in scored} == {batch.target.shape}
    assert len({getattr(batch, name).shape for name in PLANES}) == 1


@given(prompt=st.integers(0, 9), chosen=st.integers(1, 9), rejected=st.integers(1, 9), seed=st.integers(0, 9))
def test_weights_of_a_side_add_up_to_its_tokens(prompt: int, chosen: int, rejected: int, seed: int) -> None:
    """The weights of a block add up to its tokens, and so the weights of a side to its length."""
    for name in ("tokens", "elbo"):
        batch = build([row(0, prompt, chosen, rejected)], OBJECTIVES[name], seed)
        total = torch.zeros(2).index_add(0, batch.slot, batch.weight)
        assert total.tolist() == pytest.approx([chosen, rejected])


@given(lens=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=8), room=st.integers(8, 90))
def test_no_row_is_longer_than_the_budget_but_for_a_pair_that_is(lens: list[tuple[int, int]], room: int) -> None:
    rows = [row(i, prompt, response, 10 - response) for i, (prompt, response) in enumerate(lens)]
    alone = [build([one], OBJECTIVES["steps"]).ids.shape[1] for one in rows]
    batch = build_batch(rows, OBJECTIVES["steps"], ModelLayout(B, MASK), 0, row_tokens=room)
    used = (batch.side != PAD).sum(1).tolist()
    assert sum(used) == sum(alone)
    assert sorted(u for u in used if u > room) == sorted(a for a in alone if a > room)
    assert len(used) == 1 or min(a + b for i, a in enumerate(used) for b in used[:i]) > room  # no two rows fit in one


def test_a_token_is_counted_once_whatever_draws_score_it() -> None:
    for objective in (Objective(type="elbo_dpo", num_draws=8), Objective(weighting="tokens", num_draws=3)):
        batch = build(ROWS, objective)
        sides = zip(batch.slot.tolist(), batch.position[batch.scored_row, batch.scored_col].tolist(), strict=True)
        assert batch.scored.sum() == len(set(sides))
        assert objective.follows_steps or batch.scored.sum() < len(batch.target)
        assert (batch.scored <= batch.tokens).all()


@pytest.mark.parametrize("given_tokens", ["exclude", "clean"])
def test_of_a_shifted_model_the_control_estimates_what_dtrpo_does(given_tokens: str) -> None:
    """The first token of a block is autoregressive in both: never hidden, and scored once from clean text or not."""
    with_prompts = [one for one in ROWS if one["prompt_ids"]]
    for objective in (Objective(schedule="random"), Objective(type="elbo_dpo")):
        asked = objective.model_copy(update={"given_tokens": given_tokens})
        batch = build_batch(with_prompts, asked, ModelLayout(B, MASK, shift=1), 0)
        first = (batch.position % B == 0) & (batch.position > 0)
        assert not ((batch.ids == MASK) & first).any()
        at = batch.position[batch.scored_row, batch.scored_col] + 1
        opens = at % B == 0
        assert opens.any() == (given_tokens == "clean")
        assert (batch.weight[opens] == 1).all()
        assert (batch.stream[batch.scored_row, batch.scored_col][opens] == 0).all()
    batch = build_batch(with_prompts, Objective(type="sft"), ModelLayout(B, MASK, shift=1), 0)
    assert ((batch.ids == MASK) & (batch.position % B == 0)).any()  # sft learns them


def test_a_noisy_first_token_is_for_shifted_block_models() -> None:
    with pytest.raises(ConfigError, match=r"first_token = \"noisy\" is for models that predict a token from"):
        build(ROWS, Objective(first_token="noisy"))


def test_a_side_with_nothing_to_read_takes_no_column_of_its_row() -> None:
    """A response within the prompt's block of which no step unmasked a token: nothing is scored, and nothing breaks."""
    empty = row(9, 3, 1, 1) | {"chosen_steps": [-1], "rejected_steps": [-1]}
    for objective in (OBJECTIVES["steps"], Objective(type="imitation")):
        batch = build([empty, ROWS[0]], objective)
        assert not (batch.scored_row == 0).any()
        assert of_row(batch, 1) == of_row(build([ROWS[0], empty], objective), 0)


@pytest.mark.parametrize("attention", ["block", "full"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("num_draws", [1, 2])
def test_complementary_masks_score_each_token_once_a_pair_with_its_half_of_the_block_shown(
    attention: Any, shift: Any, num_draws: int
) -> None:
    """Of the two noisy streams one holds the mask at a token's place and scores it, the other holds the token."""
    objective = Objective(type="sft", complementary_masks=True, num_draws=num_draws)
    rows = [ROWS[0], ROWS[2], ROWS[3]]  # prompts that leave the first block whole, and part of it
    batch = build_batch(rows, objective, ModelLayout(B, MASK, attention, shift=shift), SEED)
    for b, row_ in enumerate(rows):
        text, before = row_["chosen_ids"], len(row_["prompt_ids"])
        mine = batch.slot == b
        assert sorted(batch.target[mine].tolist()) == sorted(text * num_draws)
        assert batch.weight[mine].tolist() == batch.nll_weight[mine].tolist() == [1 / num_draws] * len(text) * num_draws
        assert batch.place[mine].tolist() == [(before + text.index(token)) % B for token in batch.target[mine].tolist()]
        assert (batch.tokens[b].item(), batch.scored[b].item()) == (len(text), len(text))
        for index, token in enumerate(text):
            held = (batch.position[b] == before + index) & (batch.stream[b] > 0)
            found = list(zip(batch.stream[b][held].tolist(), batch.ids[b][held].tolist(), strict=True))
            scoring = {int(d) + 1 for d in batch.draw[mine][batch.target[mine] == token]}
            for first in range(1, 2 * num_draws, 2):
                assert len(scoring & {first, first + 1}) == 1
                shown = {stream: held_id for stream, held_id in found if stream in (first, first + 1)}
                assert all(held_id == (MASK if stream in scoring else token) for stream, held_id in shown.items())
                assert shown.keys() >= scoring & {first, first + 1} or shift  # what scores a token need not hold it
