"""step: the loss of a packed batch is the loss computed block by block with separate forwards."""

import hashlib
import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.forward import Shape
from dtrpo_ray.config.train import Objective
from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.method import step
from dtrpo_ray.method.attention import dense_mask, sparse_mask
from dtrpo_ray.method.batch import MicroBatch, ModelLayout, build_batch, chosen_alone
from dtrpo_ray.method.step import (
    checkpoint_layers,
    order_by_confidence,
    padded_inputs,
    preference_loss,
    scored_logps,
    sum_by_side,
    training_step,
)
from dtrpo_ray.models.sdar import SDAR

B, MASK = 4, 22
MakeModel = Callable[..., SDAR]
Json = dict[str, Any]


def row(number: int, prompt_len: int, chosen_len: int, rejected_len: int) -> Json:
    rng = np.random.default_rng(number)
    names = {"prompt": prompt_len, "chosen": chosen_len, "rejected": rejected_len}
    ids = {f"{name}_ids": rng.integers(0, 22, n).tolist() for name, n in names.items()}
    steps = {f"{side}_steps": rng.integers(0, 4, names[side]).tolist() for side in ("chosen", "rejected")}
    return {"row_id": f"row-{number}", "epoch": 0} | ids | steps


ROWS = [row(0, 5, 7, 11), row(1, 0, 3, 4), row(2, 8, 8, 1), row(3, 3, 13, 2)]
PAIR_OBJECTIVES = {
    "steps": Objective(weighting="steps", beta=0.3),
    "tokens": Objective(weighting="tokens", beta=0.3),
    "unit": Objective(weighting="unit", beta=0.3),
    "random": Objective(schedule="random", tokens_per_step=2, beta=0.3),
    "elbo": Objective(type="elbo_dpo", beta=0.3),
}
SFT = Objective(type="sft")


def build(rows: list[Json], objective: Objective, seed: int = 0) -> MicroBatch:
    return build_batch(rows, objective, ModelLayout(B, MASK), seed)


@pytest.fixture(scope="module")
def policy(make_model: MakeModel) -> SDAR:
    return make_model(seed=1, exact=True)


@pytest.fixture(scope="module")
def reference(make_model: MakeModel) -> SDAR:
    return make_model(seed=2, exact=True).requires_grad_(False)


def logps_alone(model: SDAR, rows: list[Json], batch: MicroBatch) -> Tensor:
    """log mu of each scored token from a forward of its own: [clean text before its block | its block, masked]."""
    sides = ("chosen", "rejected")
    out = []
    for b, col, slot, target in zip(
        batch.scored_row.tolist(), batch.scored_col.tolist(), batch.slot.tolist(), batch.target.tolist(), strict=True
    ):
        whole = rows[b]["prompt_ids"] + rows[b][f"{sides[slot - b * batch.tokens.shape[1]]}_ids"]
        position = int(batch.position[b, col])
        first = position // B * B
        here = (
            (batch.side[b] == batch.side[b, col]) & (batch.stream[b] == 1) & (batch.position[b] // B == position // B)
        )
        seen = torch.tensor([whole[:first] + batch.ids[b][here].tolist()])
        block = torch.arange(seen.shape[1]) // B
        mask = (block[None, :] <= block[:, None])[None, None]
        hidden = model.hidden(seen, torch.arange(seen.shape[1])[None], mask)[0, position]
        logits = model.lm.lm_head(hidden)
        logits[MASK] = float("-inf")
        out.append(logits[target] - logits.logsumexp(-1))
    return torch.stack(out)


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
def test_equal_models_cost_ln_2_for_any_draw(policy: SDAR, name: str) -> None:
    for seed in range(3):
        out = training_step(policy, policy, build(ROWS, PAIR_OBJECTIVES[name], seed), PAIR_OBJECTIVES[name])
        assert out.loss_P.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-15)
        for metric in ("margin", "log_ratio_chosen", "log_ratio_rejected"):
            assert out.metrics[metric].tolist() == [0] * 4


def test_ipo_and_label_smoothing_reach_the_loss(policy: SDAR, reference: SDAR) -> None:
    batch = build(ROWS, Objective())
    plain = training_step(policy, reference, batch, Objective(beta=0.3)).metrics
    delta = plain["log_ratio_chosen"] - plain["log_ratio_rejected"]
    ipo = training_step(policy, reference, batch, Objective(beta=0.3, loss_type="ipo")).loss_P
    assert torch.allclose(ipo, (delta - 1 / 0.6) ** 2, rtol=0, atol=1e-10)
    smooth = training_step(policy, reference, batch, Objective(beta=0.3, label_smoothing=0.2)).loss_P
    expected = -0.8 * F.logsigmoid(0.3 * delta) - 0.2 * F.logsigmoid(-0.3 * delta)
    assert torch.allclose(smooth, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_gpus_padded_rows_have_the_same_states(policy: SDAR) -> None:
    """What a GPU is given, read through the dense mask of a CPU."""
    batch = build_for(policy, TEXTS, Objective(num_draws=2), row_tokens=100)
    ids, position, planes = padded_inputs(batch)
    assert ids.shape == position.shape == planes.side.shape
    assert ids.shape[1] % 256 == 0
    padded = scored_logps(policy, batch, (ids, position, dense_mask(planes)))
    assert torch.allclose(padded, scored_logps(policy, batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
def test_loss_is_dpo_on_separate_forwards(policy: SDAR, reference: SDAR, name: str) -> None:
    objective = PAIR_OBJECTIVES[name]
    batch = build(ROWS, objective)
    with torch.no_grad():
        out = training_step(policy, reference, batch, objective)
        differences = (logps_alone(policy, ROWS, batch) - logps_alone(reference, ROWS, batch)).tolist()
    estimate: dict[int, float] = defaultdict(float)
    for slot, weight, difference in zip(batch.slot.tolist(), batch.weight.tolist(), differences, strict=True):
        estimate[slot] += weight * difference
    for b in range(4):
        margin = objective.beta * (estimate[2 * b] - estimate[2 * b + 1])
        assert out.metrics["log_ratio_chosen"][b].item() == pytest.approx(estimate[2 * b], abs=1e-10)
        assert out.metrics["log_ratio_rejected"][b].item() == pytest.approx(estimate[2 * b + 1], abs=1e-10)
        assert out.loss_P[b].item() == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-10)
    assert out.metrics["margin"].abs().min() > 1e-3


def test_sft_loss_is_the_weighted_nll_per_response_token(policy: SDAR) -> None:
    batch = build(ROWS, SFT)
    out = training_step(policy, None, batch, SFT)
    logps = logps_alone(policy, ROWS, batch).tolist()
    expected = [0.0] * 4
    for b, weight, logp in zip(batch.scored_row.tolist(), batch.weight.tolist(), logps, strict=True):
        expected[b] -= weight * logp / len(ROWS[b]["chosen_ids"])
    assert out.loss_P.tolist() == pytest.approx(expected, abs=1e-10)
    assert torch.equal(out.metrics["nll"], out.loss_P.detach())


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
def test_rpo_alpha_adds_the_nll_of_all_hidden_chosen_tokens(policy: SDAR, reference: SDAR, name: str) -> None:
    """B_b / |hidden in b| at every hidden token of the chosen side, per response token, in the very same states."""
    plain = PAIR_OBJECTIVES[name]
    mixed = plain.model_copy(update={"rpo_alpha": 0.25})
    lean, batch = build(ROWS, plain), build(ROWS, mixed)
    assert torch.equal(lean.ids, batch.ids)
    a, b = training_step(policy, reference, lean, plain), training_step(policy, reference, batch, mixed)
    for metric in ("margin", "log_ratio_chosen", "log_ratio_rejected", "scored_tokens"):
        assert torch.allclose(a.metrics[metric], b.metrics[metric], rtol=0, atol=1e-12)
    logps = dict(
        zip(
            zip(batch.scored_row.tolist(), batch.scored_col.tolist(), strict=True),
            logps_alone(policy, ROWS, batch),
            strict=True,
        )
    )
    for r, one in enumerate(ROWS):
        places, response_start = (
            torch.nonzero((batch.side[r] == 0) & (batch.stream[r] == 1))[:, 0],
            len(one["prompt_ids"]),
        )
        blocks: dict[int, list[tuple[int, bool]]] = defaultdict(list)
        for col in places.tolist():
            position = int(batch.position[r, col])
            if position >= response_start:
                blocks[position // B].append((col, bool(batch.ids[r, col] == MASK)))
        nll = 0.0
        for block in blocks.values():
            hidden = [col for col, masked in block if masked]
            nll -= len(block) / len(hidden) * sum(logps[r, col].item() for col in hidden)
        nll /= len(one["chosen_ids"])
        assert (b.loss_P - a.loss_P)[r].item() == pytest.approx(0.25 * nll, abs=1e-6)  # float32 weights such as 4/3
        assert b.metrics["nll_chosen"][r].item() == pytest.approx(nll, abs=1e-6)


@pytest.mark.parametrize("tokens", ["hidden", "unmasked"])
def test_imitation_is_the_chosen_likelihood_in_the_states_of_dtrpo(
    policy: SDAR, reference: SDAR, make_model: MakeModel, tokens: Any
) -> None:
    """The same states and numbers as dtrpo's; and dtrpo without a preference has its gradient, to the last weight."""
    alone, both = (
        Objective(type=kind, beta=1e-12, rpo_alpha=1.0, nll_tokens=tokens) for kind in ("imitation", "dtrpo")
    )
    out = training_step(policy, None, build(ROWS, alone), alone)
    pairs = training_step(policy, reference, build(ROWS, both), both)
    torch.testing.assert_close(out.loss_P, pairs.metrics["nll_chosen"], rtol=0, atol=1e-12)
    if tokens == "unmasked":
        lengths = torch.tensor([len(r["chosen_ids"]) for r in ROWS])
        torch.testing.assert_close(out.loss_P, -pairs.metrics["logp_chosen"] / lengths, rtol=0, atol=1e-12)
    weights = list(policy.parameters())
    one, other = (torch.autograd.grad(loss.sum(), weights) for loss in (out.loss_P, pairs.loss_P))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_estimate_of_kl_is_of_the_scored_tokens_alone(policy: SDAR, reference: SDAR) -> None:
    objective = Objective(beta=0.3, rpo_alpha=1.0)  # the SFT term reads tokens that no step scored
    batch = build(ROWS, objective)
    out = training_step(policy, reference, batch, objective)
    change = (scored_logps(policy, batch) - scored_logps(reference, batch)).detach()
    for b in range(len(ROWS)):
        mine = (batch.scored_row == b) & (batch.weight > 0)
        wanted = (change[mine].exp() - 1 - change[mine]).mean()
        assert out.metrics["kl"][b].item() == pytest.approx(wanted.item(), abs=1e-12)
    same = training_step(reference, reference, batch, objective)
    assert same.metrics["kl"].abs().max() == 0


@pytest.mark.parametrize("name", [*PAIR_OBJECTIVES, "sft"])
def test_rows_together_are_rows_alone(policy: SDAR, reference: SDAR, name: str) -> None:
    objective = PAIR_OBJECTIVES.get(name, SFT)
    ref = None if name == "sft" else reference
    together = training_step(policy, ref, build(ROWS, objective), objective)
    for b, one in enumerate(ROWS):
        alone = training_step(policy, ref, build([one], objective), objective)
        assert alone.loss_P[0].item() == pytest.approx(together.loss_P[b].item(), abs=1e-12)
        for metric, values in alone.metrics.items():
            assert values[0].item() == pytest.approx(together.metrics[metric][b].item(), abs=1e-12)


def test_rows_together_are_rows_alone_in_float32(make_model: MakeModel) -> None:
    policy, reference, objective = make_model(seed=1), make_model(seed=2), PAIR_OBJECTIVES["steps"]
    with torch.no_grad():
        together = training_step(policy, reference, build(ROWS, objective), objective).loss_P
        for b, one in enumerate(ROWS):
            alone = training_step(policy, reference, build([one], objective), objective).loss_P
            assert alone[0].item() == pytest.approx(together[b].item(), rel=1e-5)


@pytest.mark.parametrize("name", ["steps", "tokens", "unit", "random", "elbo"])
def test_what_the_sides_share_cancels_at_every_draw(policy: SDAR, reference: SDAR, name: str) -> None:
    """Sides that were unmasked alike differ in nothing, so no draw may tell them apart."""
    twins = {**ROWS[0], "rejected_ids": ROWS[0]["chosen_ids"], "rejected_steps": ROWS[0]["chosen_steps"]}
    rows = [{**twins, "epoch": epoch} for epoch in range(8)]
    with torch.no_grad():
        out = training_step(policy, reference, build(rows, PAIR_OBJECTIVES[name]), PAIR_OBJECTIVES[name])
    assert out.metrics["margin"].abs().max() < 1e-12
    assert out.metrics["log_ratio_chosen"].abs().min() > 1e-3


def test_the_float32_loss_is_the_exact_loss(make_model: MakeModel, policy: SDAR, reference: SDAR) -> None:
    objective = PAIR_OBJECTIVES["steps"]
    batch = build(ROWS, objective)
    with torch.no_grad():
        single = training_step(make_model(seed=1), make_model(seed=2), batch, objective).loss_P
        assert torch.allclose(single.double(), training_step(policy, reference, batch, objective).loss_P, atol=1e-4)


@pytest.mark.parametrize("name", [*PAIR_OBJECTIVES, "sft"])
def test_gradient_reaches_scored_positions_only(
    make_model: MakeModel, reference: SDAR, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    objective = PAIR_OBJECTIVES.get(name, SFT)
    model, kept, inner = make_model(seed=1, exact=True), list[Tensor](), SDAR.hidden

    def hidden(self: SDAR, *args: Any) -> Tensor:
        states = inner(self, *args)
        if self is model:
            states.retain_grad()
            kept.append(states)
        return states

    monkeypatch.setattr(SDAR, "hidden", hidden)
    batch = build(ROWS, objective)
    training_step(model, None if name == "sft" else reference, batch, objective).loss_P.sum().backward()
    (states,) = kept  # one policy forward over all rows and both sides
    assert states.grad is not None
    scored = torch.zeros(states.shape[:2], dtype=torch.bool)
    scored[batch.scored_row, batch.scored_col] = True
    assert states.grad[~scored].abs().max() == 0
    assert states.grad[scored].abs().amax(-1).min() > 0
    assert all(p.grad is None for p in reference.parameters())


def test_one_forward_each_and_no_gradient_for_the_reference(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reference, calls = make_model(seed=1), make_model(seed=2), list[tuple[bool, bool]]()
    inner = SDAR.forward

    def forward(self: SDAR, *args: Any) -> Tensor:
        calls.append((self is policy, torch.is_grad_enabled()))
        return inner(self, *args)

    monkeypatch.setattr(SDAR, "forward", forward)
    masks: list[Tensor] = []
    monkeypatch.setattr(step, "dense_mask", lambda planes: masks.append(dense_mask(planes)) or masks[-1])
    out = training_step(policy, reference, build(ROWS, PAIR_OBJECTIVES["steps"]), PAIR_OBJECTIVES["steps"])
    assert calls == [(True, True), (False, False)]
    assert len(masks) == 1  # policy and reference read the same
    out.loss_P.sum().backward()
    assert all(p.grad is None for p in reference.parameters())
    assert all(not v.requires_grad for v in out.metrics.values())


def test_gradient_is_the_dpo_gradient_times_the_weights(policy: SDAR, reference: SDAR) -> None:
    """dL/dlogp = -+ beta sigma(-m) w for chosen and rejected tokens: one finite chain, checked at its last link."""
    objective = PAIR_OBJECTIVES["tokens"]
    batch = build(ROWS, objective)
    logps = scored_logps(policy, batch).detach().requires_grad_()

    class Fixed(torch.nn.Module):
        block_size, mask_id, attention, block_origin, shift = B, MASK, "block", "global", 0

        def forward(self, *_: Tensor) -> Tensor:
            return logps

    out = training_step(Fixed(), reference, batch, objective)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(out.loss_P.sum(), logps)
    sign = torch.where(batch.slot % 2 == 0, -1.0, 1.0).double()
    sigma = torch.sigmoid(-out.metrics["margin"])[batch.scored_row]
    assert torch.allclose(grad, sign * objective.beta * sigma * batch.weight, rtol=0, atol=1e-12)


def test_row_weight_is_the_callers_business(policy: SDAR, reference: SDAR) -> None:
    objective = PAIR_OBJECTIVES["steps"]
    plain = build(ROWS, objective)
    weighed = build([r | {"row_weight": w} for r, w in zip(ROWS, (0, 1, 0.5, 3), strict=True)], objective)
    a, b = (training_step(policy, reference, batch, objective).loss_P for batch in (plain, weighed))
    assert torch.equal(a, b)
    assert weighed.row_weight.tolist() == [0, 1, 0.5, 3]


def test_scored_counts_are_reported(policy: SDAR, reference: SDAR) -> None:
    objective = PAIR_OBJECTIVES["steps"]
    batch = build(ROWS, objective)
    metrics = training_step(policy, reference, batch, objective).metrics
    counts = [(batch.scored_row == b).sum().item() for b in range(4)]
    assert metrics["scored_tokens"].tolist() == counts
    fractions = [c / (len(r["chosen_ids"]) + len(r["rejected_ids"])) for c, r in zip(counts, ROWS, strict=True)]
    assert metrics["scored_fraction"].tolist() == pytest.approx(fractions)


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
def test_a_pair_objective_without_reference_is_refused(tiny: SDAR, name: str) -> None:
    with pytest.raises(ValueError, match="needs a reference"):
        training_step(tiny, None, build(ROWS[:1], PAIR_OBJECTIVES[name]), PAIR_OBJECTIVES[name])


# --- the default stays what it was: draws to the bit, the loss to rounding ---

PINNED = {  # SHA-256 over every tensor of the batch, seed 11, since each block has a generator of its own
    "steps": "4ca932505f7525a7",
    "tokens": "b467f287f8dd333f",
    "unit": "6cf2a0b22ee7323b",
    "random": "386c5010e18122c8",
    "elbo": "e92ebcc73b52db86",
    "sft": "539b96842c2bfc20",
    "mixed": "427fb865e0a66140",
}
MIXED = Objective(beta=0.05, rpo_alpha=4.0)
PINNED_FIELDS = (
    "ids", "position", "side", "stream", "scored_row", "scored_col", "target", "slot", "weight", "nll_weight",
    "tokens", "row_weight",
)  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_default_draws_are_bit_for_bit_what_they_were(name: str) -> None:
    batch = build(ROWS, {**PAIR_OBJECTIVES, "sft": SFT, "mixed": MIXED}[name], seed=11)
    digest = hashlib.sha256()
    for field in PINNED_FIELDS:
        array = getattr(batch, field).numpy()
        digest.update(field.encode() + str(array.shape).encode() + array.tobytes())
    assert digest.hexdigest()[:16] == PINNED[name]


def test_the_default_loss_is_what_it_was(tiny_config: Json) -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(SDAR(dict(tiny_config)).eval())
    with torch.no_grad():
        loss = training_step(*models, build(ROWS, MIXED, 11), MIXED).loss_P
    assert loss.tolist() == pytest.approx(
        [21.264110565185547, 10.190515518188477, 19.51698112487793, 19.40593147277832]
    )


# --- any model, any packing, any number of draws: the oracle reads each state from a forward of its own ---

TEXTS = [row(10, 5, 7, 11), row(11, 1, 3, 4), row(12, 8, 8, 1), row(13, 3, 13, 2), row(14, 4, 9, 12)]


def alone(model: SDAR, rows: list[Json], batch: MicroBatch, first_token: str = "clean") -> Tensor:
    """log mu of each scored token from a plain forward of [clean text before its block | its block in its draw].

    With a shift, the state at the token before it; before a block's first token that is the end of the clean text, or
    with `first_token` "noisy" the block before in its draw.
    """
    size, shift, full = model.block_size, model.shift, model.attention == "full"
    out = []
    for r, col, target, slot, draw in zip(
        *(getattr(batch, n).tolist() for n in ("scored_row", "scored_col", "target", "slot", "draw")), strict=True
    ):
        pair, side = divmod(slot, 2)
        prompt = rows[pair]["prompt_ids"]
        whole = prompt + rows[pair][f"{('chosen', 'rejected')[side]}_ids"]
        offset = -len(prompt) % size if model.block_origin == "response" else 0
        position = int(batch.position[r, col]) + shift
        assert whole[position] == target
        noisy_before = shift and first_token == "noisy" and position > len(prompt)
        block = 0 if full else (position - noisy_before + offset) // size
        first = 0 if full else max(block * size - offset, 0)
        own = (batch.side[r] == side) & (batch.stream[r] == draw + 1) & (batch.block[r] == block)
        own &= batch.pair[r] == batch.pair[r, col]
        seen = whole[:first] if shift and position == first else whole[:first] + batch.ids[r][own].tolist()
        grid = torch.zeros(len(seen)) if full else (torch.arange(len(seen)) + offset) // size
        mask = (grid[None, :] <= grid[:, None])[None, None]
        hidden = model.hidden(torch.tensor([seen]), torch.arange(len(seen))[None], mask)[0, position - shift]
        out.append(model.log_mu(hidden)[target])
    return torch.stack(out)


def like(make_model: MakeModel, seed: int = 1, **facts: Any) -> SDAR:
    """An exact model with other facts than SDAR's: the trunk is the same, what it means is not."""
    block_size = facts.pop("block_size", B)
    model = make_model(seed=seed, exact=True, block_size=block_size).requires_grad_(False)
    for name, value in facts.items():
        setattr(model, name, value)
    return model


def build_for(model: SDAR, rows: list[Json], objective: Objective, seed: int = 0, **more: Any) -> MicroBatch:
    return build_batch(rows, objective, ModelLayout.of(model), seed=seed, **more)


@pytest.mark.parametrize("row_tokens", [None, 400])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(num_draws=2, weighting="tokens"),
        Objective(num_draws="all"),
        Objective(schedule="random", tokens_per_step=2, rpo_alpha=1.0),
        Objective(schedule="left_to_right", tokens_per_step=3, num_draws=2),
        Objective(type="elbo_dpo", num_draws=3),
    ],
    ids=lambda o: f"{o.type}-{o.schedule}-{o.num_draws}",
)
@pytest.mark.parametrize(
    "facts",
    [{}, {"shift": 1}, {"block_origin": "response"}, {"shift": 1, "block_origin": "response"}, {"attention": "full"}],
    ids=str,
)
@torch.no_grad()
def test_every_scored_token_is_read_in_its_own_state(
    make_model: MakeModel, facts: Json, objective: Objective, row_tokens: int | None
) -> None:
    model = like(make_model, **facts)
    batch = build_for(model, TEXTS, objective, row_tokens=row_tokens)
    assert (len(batch.ids) < len(TEXTS)) == (row_tokens is not None)
    logps = scored_logps(model, batch)
    assert torch.allclose(logps, alone(model, TEXTS, batch), rtol=0, atol=1e-10)
    chosen, mine = chosen_alone(batch), batch.slot % 2 == 0
    assert torch.allclose(scored_logps(model, chosen), logps[mine], rtol=0, atol=1e-10)
    assert torch.equal(chosen.slot, batch.slot[mine] // 2)
    assert torch.equal(chosen.nll_weight, batch.nll_weight[mine])
    assert chosen.ids.shape[1] < batch.ids.shape[1]


def test_packing_pairs_into_rows_changes_no_loss_and_no_gradient(policy: SDAR, reference: SDAR) -> None:
    objective = Objective(beta=0.3, num_draws=2)
    parameters = list(policy.parameters())
    apart = training_step(policy, reference, build(TEXTS, objective), objective)
    gradients = torch.autograd.grad(apart.loss_P.sum(), parameters)
    for row_tokens in (60, 120, 1000):
        batch = build_for(policy, TEXTS, objective, row_tokens=row_tokens)
        assert len(batch.ids) < len(TEXTS)
        together = training_step(policy, reference, batch, objective)
        assert torch.allclose(apart.loss_P, together.loss_P, rtol=0, atol=1e-12)
        assert apart.metrics.keys() == together.metrics.keys()
        for one, other in zip(gradients, torch.autograd.grad(together.loss_P.sum(), parameters), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-10)


SFT_OBJECTIVES = [SFT, Objective(type="sft", complementary_masks=True), Objective(type="sft", num_draws=2)]


@pytest.mark.parametrize("attention", ["block", "full"])
@pytest.mark.parametrize("objective", SFT_OBJECTIVES, ids=["elbo", "complementary", "two draws"])
def test_packing_examples_into_rows_changes_no_loss_and_no_gradient(
    make_model: MakeModel, objective: Objective, attention: str
) -> None:
    model = like(make_model, attention=attention).requires_grad_(True)
    examples = [{k: v for k, v in text.items() if "rejected" not in k} for text in TEXTS]
    apart = training_step(model, None, build_for(model, examples, objective), objective)
    gradients = torch.autograd.grad(apart.loss_P.sum(), list(model.parameters()))
    for row_tokens in (60, 120, 1000):
        batch = build_for(model, examples, objective, row_tokens=row_tokens)
        assert len(batch.ids) < len(examples)
        together = training_step(model, None, batch, objective)
        assert torch.allclose(apart.loss_P, together.loss_P, rtol=0, atol=1e-12)
        for name, values in apart.ratios.items():
            assert torch.allclose(torch.stack(values), torch.stack(together.ratios[name]), rtol=0, atol=1e-10)
        again = torch.autograd.grad(together.loss_P.sum(), list(model.parameters()))
        for one, other in zip(gradients, again, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_complementary_masks_cost_each_token_its_nll_once(policy: SDAR) -> None:
    """The loss of a row is the plain mean of -log mu over its response, each token in the state that hides it."""
    objective = Objective(type="sft", complementary_masks=True)
    batch = build(ROWS, objective)
    logps = scored_logps(policy, batch)
    out = training_step(policy, None, batch, objective)
    for b, row_ in enumerate(ROWS):
        mine = logps[batch.slot == b]
        assert len(mine) == len(row_["chosen_ids"])
        assert out.loss_P[b].item() == pytest.approx(-mine.mean().item(), abs=1e-10)


@pytest.mark.parametrize("objective", SFT_OBJECTIVES, ids=["elbo", "complementary", "two draws"])
def test_nll_by_place_sums_the_hidden_tokens_of_each_place(policy: SDAR, objective: Objective) -> None:
    batch = build(ROWS, objective)
    logps = scored_logps(policy, batch).tolist()
    out = training_step(policy, None, batch, objective)
    assert list(out.ratios) == [f"nll_place_{place}" for place in range(1, B + 1)]
    sums = np.zeros((2, len(ROWS), B))
    for b, col, logp in zip(batch.scored_row.tolist(), batch.scored_col.tolist(), logps, strict=True):
        sums[:, b, int(batch.position[b, col]) % B] += (-logp, 1)
    made = torch.stack([torch.stack(pair) for pair in out.ratios.values()]).numpy()
    np.testing.assert_allclose(made.transpose(1, 2, 0), sums, rtol=0, atol=1e-10)
    assert sums[1].sum() == len(logps)


@pytest.mark.parametrize("origin", ["global", "response"])
@torch.no_grad()
def test_a_first_token_in_the_noisy_stream_is_read_in_the_block_before_it(make_model: MakeModel, origin: str) -> None:
    """And that block stands there in the very draw that hides the token's own, not in its clean text."""
    model = like(make_model, shift=1, block_origin=origin)
    differ = 0
    for num_draws in (1, 2):
        made = {f: Objective(first_token=f, num_draws=num_draws) for f in ("clean", "noisy")}  # type: ignore[arg-type]
        clean, noisy = (build_for(model, TEXTS, objective) for objective in made.values())
        assert torch.equal(clean.target, noisy.target)
        values = scored_logps(model, noisy)
        assert torch.allclose(values, alone(model, TEXTS, noisy, "noisy"), rtol=0, atol=1e-10)
        differ += int(((values - scored_logps(model, clean)).abs() > 1e-6).sum())
    assert differ > 5


@pytest.mark.parametrize("first_token", ["clean", "noisy"])
@torch.no_grad()
def test_a_blocks_first_token_is_read_where_it_is_said(make_model: MakeModel, first_token: str) -> None:
    """Shift: the position before a block's first token lies in the clean block before it, or in its own stream."""
    model = like(make_model, shift=1)
    objective = Objective(schedule="recorded", first_token=first_token)  # type: ignore[arg-type]
    steps = {"chosen_steps": [0] * 11, "rejected_steps": [0] * 7}
    one = row(20, 4, 11, 7) | steps
    batch = build_for(model, [one], objective)
    where = {
        (int(s), int(batch.position[0, c]) + 1): int(batch.stream[0, c])
        for s, c in zip(batch.slot, batch.scored_col, strict=True)
    }
    for (_, position), stream in where.items():
        shared = position == 4  # before it lies the prompt, in both
        expected = 0 if shared or (position % B == 0 and first_token == "clean") else 1
        assert stream == expected
    assert len(where) == 18


@pytest.mark.parametrize(
    "objective",
    [Objective(beta=0.2), Objective(beta=0.2, schedule="random", given_tokens="clean")],
    ids=["recorded", "given"],
)
def test_blocks_of_one_token_with_a_shift_are_ordinary_causal_dpo(make_model: MakeModel, objective: Objective) -> None:
    """Loss and gradients of transformers' own causal forward over prompt + response, each side by itself."""
    models = [like(make_model, seed, shift=1, block_size=1).requires_grad_(seed == 1) for seed in (1, 2)]
    rows = [
        r | {"chosen_steps": [0] * len(r["chosen_ids"]), "rejected_steps": [0] * len(r["rejected_ids"])} for r in TEXTS
    ]
    ours = training_step(*models, build_for(models[0], rows, objective), objective).loss_P

    def causal_logp(model: SDAR, prompt: list[int], response: list[int]) -> Tensor:
        logits = model.lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits = logits.index_fill(-1, torch.tensor(MASK), float("-inf"))  # a finished token is never [MASK]
        return torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)].sum()

    losses = []
    for r in rows:
        ratios = []
        for side in ("chosen", "rejected"):
            theta, ref = (causal_logp(m, r["prompt_ids"], r[f"{side}_ids"]) for m in models)
            ratios.append(theta - ref)
        losses.append(-torch.nn.functional.logsigmoid(objective.beta * (ratios[0] - ratios[1])))
    theirs = torch.stack(losses)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    parameters = list(models[0].parameters())
    for a, b in zip(*(torch.autograd.grad(x.sum(), parameters) for x in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)


def whole_sum(model: SDAR, one: Json, side: str) -> float:
    """log mu of every token of a side, each in the state before its own step: the whole trajectory, step by step."""
    prompt, ids, steps = one["prompt_ids"], one[f"{side}_ids"], one[f"{side}_steps"]
    total, whole = 0.0, prompt + ids
    for i, at in enumerate(steps):
        block = (len(prompt) + i) // B
        first, last = (0, len(whole)) if model.attention == "full" else (block * B, min(block * B + B, len(whole)))
        seen = whole[:first] + [
            MASK if p >= len(prompt) and steps[p - len(prompt)] >= at else whole[p] for p in range(first, last)
        ]
        grid = torch.zeros(len(seen)) if model.attention == "full" else torch.arange(len(seen)) // B
        mask = (grid[None, :] <= grid[:, None])[None, None]
        hidden = model.hidden(torch.tensor([seen]), torch.arange(len(seen))[None], mask)[0, len(prompt) + i]
        total += model.log_mu(hidden)[ids[i]].item()
    return total


@pytest.mark.parametrize("attention", ["block", "full"])
@torch.no_grad()
def test_all_steps_give_the_log_ratio_of_the_whole_trajectory(make_model: MakeModel, attention: str) -> None:
    """Exact, whatever the seed; and under full attention the steps are those of the response, not of its blocks."""
    models = [like(make_model, seed, attention=attention) for seed in (1, 2)]
    objective = Objective(num_draws="all")
    for seed in (0, 1):
        out = training_step(*models, build_for(models[0], TEXTS[:3], objective, seed), objective)
        for b, one in enumerate(TEXTS[:3]):
            for side in ("chosen", "rejected"):
                exact = whole_sum(models[0], one, side) - whole_sum(models[1], one, side)
                assert out.metrics[f"log_ratio_{side}"][b].item() == pytest.approx(exact, abs=1e-9)
                logp = whole_sum(models[0], one, side)
                assert out.metrics[f"logp_{side}"][b].item() == pytest.approx(logp, abs=1e-9)


def test_a_full_attention_model_has_one_state_a_forward_and_says_so(make_model: MakeModel) -> None:
    """One step of the whole response, weight its number of steps; a batch of the block formula is refused."""
    model = like(make_model, attention="full")
    batch = build_for(model, TEXTS, Objective())
    for slot in range(2 * len(TEXTS)):
        one, side = TEXTS[slot // 2], ("chosen", "rejected")[slot % 2]
        steps = one[f"{side}_steps"]
        (weight,) = set(batch.weight[batch.slot == slot].tolist())
        assert weight == len(set(steps))
        scored = int((batch.slot == slot).sum())
        assert scored in {steps.count(t) for t in steps}
    blocks = build(TEXTS, Objective())
    with pytest.raises(ValueError, match="built for"):
        scored_logps(model, blocks)
    made_up = build_for(model, TEXTS[:1], Objective(schedule="left_to_right", tokens_per_step=B))
    assert set(made_up.weight.tolist()) == {2.0, 3.0}  # two and three blocks, each in one step


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
def test_swapping_sides_negates_the_margin(policy: SDAR, reference: SDAR, name: str) -> None:
    """The rows are swapped, and the batch built anew: packing, draws and weights know no side."""
    objective = PAIR_OBJECTIVES[name]
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = [
        {"_".join(other.get(word, word) for word in key.split("_")): value for key, value in one.items()}
        for one in ROWS
    ]
    with torch.no_grad():
        a, b = (training_step(policy, reference, build(x, objective), objective) for x in (ROWS, swapped))
    assert torch.allclose(a.metrics["margin"], -b.metrics["margin"], rtol=0, atol=1e-12)
    assert torch.allclose(a.metrics["log_ratio_chosen"], b.metrics["log_ratio_rejected"], rtol=0, atol=1e-12)
    assert (a.metrics["margin"] != 0).all()


@torch.no_grad()
def test_spread_is_the_standard_error_of_the_draws(policy: SDAR, reference: SDAR) -> None:
    objective = Objective(beta=0.3, num_draws=3)
    steps = {"chosen_steps": list(range(16)), "rejected_steps": list(range(12))}
    rows = [row(i, 4, 16, 12) | steps for i in range(3)]
    batch = build(rows, objective)
    out = training_step(policy, reference, batch, objective)
    ratio = batch.weight * (scored_logps(policy, batch) - scored_logps(reference, batch))
    for b in range(3):
        parts = []
        for draw in range(3):
            at = batch.draw == draw
            chosen, rejected = (ratio[at & (batch.slot == 2 * b + s)].sum().item() for s in (0, 1))
            parts.append(chosen - rejected)
        assert sum(parts) == pytest.approx(
            (out.metrics["log_ratio_chosen"] - out.metrics["log_ratio_rejected"])[b].item()
        )
        # three independent estimates 3 c_j of the margin: the standard error of their mean
        assert out.metrics["spread"][b].item() == pytest.approx(np.std(3 * np.array(parts), ddof=1) / math.sqrt(3))
    assert training_step(policy, policy, batch, objective).metrics["spread"].tolist() == [0, 0, 0]
    assert "spread" not in training_step(policy, reference, build(rows, Objective()), Objective()).metrics


@torch.no_grad()
def test_blocks_whose_every_step_is_taken_add_nothing_to_the_spread(policy: SDAR, reference: SDAR) -> None:
    """Two of four blocks have no more steps than draws: they are exact, and only the others' draws differ."""
    objective = Objective(beta=0.3, num_draws=2)
    steps = [0, 0, 1, 1, *range(4), 0, 1, 1, 0, *range(4)]
    one = row(40, 4, 16, 16) | {"chosen_steps": steps, "rejected_steps": steps}
    batch = build([one], objective)
    block = batch.block[0, batch.scored_col]
    assert torch.equal(batch.exact, (block == 1) | (block == 3))
    out = training_step(policy, reference, batch, objective)
    ratio = batch.weight * (scored_logps(policy, batch) - scored_logps(reference, batch))
    sign = torch.where(batch.slot == 0, 1.0, -1.0)
    parts = [(sign * ratio)[(batch.draw == draw) & ~batch.exact].sum().item() for draw in (0, 1)]
    assert out.metrics["spread"].item() == pytest.approx(np.std(2 * np.array(parts), ddof=1) / math.sqrt(2))
    short = row(41, 4, 4, 4) | {"chosen_steps": [0, 0, 1, 1], "rejected_steps": [0, 1, 1, 0]}
    assert training_step(policy, reference, build([short], objective), objective).metrics["spread"].tolist() == [0]


@torch.no_grad()
def test_confidence_order_is_the_references_at_the_hidden_blocks(make_model: MakeModel) -> None:
    for facts in ({}, {"shift": 1}, {"attention": "full"}):
        model = like(make_model, 2, **facts)
        ordered = order_by_confidence(model, TEXTS, torch.device("cpu"))
        objective = Objective(schedule="confidence", num_draws="all")
        batch = build_for(model, ordered, objective)
        blank = [r | {f"{s}_steps": [0] * len(r[f"{s}_ids"]) for s in ("chosen", "rejected")} for r in TEXTS]
        for one, hidden in zip(ordered, blank, strict=True):
            for side in ("chosen", "rejected"):
                confidence, size = one[f"{side}_confidence"], len(one[f"{side}_ids"])
                assert len(confidence) == size
                given = [bool(facts.get("shift")) and (len(one["prompt_ids"]) + i) % B == 0 for i in range(size)]
                assert [c == 0 for c in confidence] == given
                steps = np.where(given, -2, 0).tolist()
                batch_of_one = build_for(model, [hidden | {f"{side}_steps": steps}], Objective())
                slot = ("chosen", "rejected").index(side)
                expected = alone(model, [hidden], batch_of_one)[batch_of_one.slot == slot]
                assert confidence[~np.array(given)].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert torch.isfinite(scored_logps(model, batch)).all()
    with pytest.raises(DataError, match="chosen_confidence is missing"):
        build(TEXTS, Objective(schedule="confidence"))


def test_given_tokens_are_scored_from_the_clean_stream_if_asked(make_model: MakeModel) -> None:
    """Fast-dLLM v2's autoregressive firsts: excluded by default; by option weight 1, read before their block."""
    model = like(make_model, shift=1)
    steps = [3, 1, 2, -2, 5, 5, 4, -2, 7, 6, 6]  # prompt 5: positions 8 and 12 open blocks
    one = row(30, 5, 11, 11) | {"chosen_steps": steps, "rejected_steps": steps}
    plain, with_given = (build_for(model, [one], Objective(given_tokens=g)) for g in ("exclude", "clean"))  # type: ignore[arg-type]
    extra = with_given.exact
    assert torch.equal(with_given.target[~extra], plain.target)
    assert with_given.target[extra].tolist() == [one[f"{s}_ids"][i] for s in ("chosen", "rejected") for i in (3, 7)]
    assert with_given.weight[extra].tolist() == with_given.nll_weight[extra].tolist() == [1] * 4
    assert with_given.stream[0, with_given.scored_col[extra]].tolist() == [0] * 4
    with torch.no_grad():
        assert torch.allclose(scored_logps(model, with_given), alone(model, [one], with_given), rtol=0, atol=1e-10)
    with pytest.raises(ConfigError, match="given_tokens"):
        build(ROWS, Objective(given_tokens="clean"))
    with pytest.raises(DataError, match="prompt_ids is empty"):
        build_for(model, [row(1, 0, 3, 4)], Objective())


# --- memory and precision ---


def test_recomputing_layers_changes_no_gradient(make_model: MakeModel, reference: SDAR) -> None:
    objective, found = Objective(beta=0.3), []
    for recompute in (False, True):
        model = make_model(seed=1, exact=True).train()
        calls = []
        model.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if recompute:
            checkpoint_layers(model)
        training_step(model, reference, build(ROWS, objective), objective).loss_P.sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert len(calls) == 1 + recompute  # once more in the backward pass
    assert torch.allclose(*found, rtol=0, atol=1e-12)


@torch.no_grad()
def test_bf16_models_have_float32_log_probabilities(make_model: MakeModel) -> None:
    batch = build(ROWS, Objective())
    single, half = make_model(seed=1), make_model(seed=1).bfloat16()
    logps = scored_logps(half, batch)
    assert logps.dtype == torch.float32
    assert (logps - scored_logps(single, batch)).abs().max() < 0.3
    assert (logps != logps.bfloat16().float()).any()  # more digits than bf16 holds: the softmax was not in bf16


def test_the_confidence_schedule_unmasks_the_surest_first() -> None:
    row = {
        "row_id": "c",
        "epoch": 0,
        "prompt_ids": [1, 2, 3, 4],
        "chosen_ids": [5, 6, 7, 8],
        "rejected_ids": [9, 10, 11, 12],
    }
    row |= {"chosen_confidence": [-3.0, -1.0, -2.0, -0.5], "rejected_confidence": [-0.5, -1.0, -2.0, -3.0]}
    batch = build([row], Objective(schedule="confidence", num_draws="all"))

    def order(side: int) -> list[int]:
        mine = batch.slot == side
        return [token for _, token in sorted(zip(batch.draw[mine].tolist(), batch.target[mine].tolist(), strict=True))]

    assert order(0) == [8, 6, 7, 5]
    assert order(1) == [9, 10, 11, 12]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ for the CPU's kernel")
@torch.no_grad()
def test_compiled_flex_attention_is_exact_and_compiled_for_few_lengths() -> None:
    """As on a GPU, with the kernel that inductor writes for this CPU, forward only (it has no backward there).

    Rows of one bucket share a kernel, in training mode or not; a second bucket's kernel serves all other lengths.
    """
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    model = Shape(block=16, width=64, layers=1, vocab=64).model(0)
    kernels = []
    for response, training in ((48, False), (32, True), (48, False), (160, False), (320, True), (420, False)):
        rows = Shape(prompt=32, response=response, block=16, vocab=64).rows()
        batch = build_batch(rows, Objective(), ModelLayout.of(model), seed=0)
        ids, position, planes = padded_inputs(batch)
        model.lm.set_attn_implementation("sdpa")
        dense = scored_logps(model, batch, (batch.ids, batch.position, dense_mask(batch.planes)))
        sparse = scored_logps(model.train(training), batch, (ids, position, sparse_mask(planes)))
        assert torch.allclose(dense, sparse, rtol=0, atol=1e-5)
        kernels.append((ids.shape[1], counted["unique_graphs"]))
    assert kernels == [(256, 1), (256, 1), (256, 1), (768, 2), (1280, 2), (1792, 2)]


# --- the loss of log-ratios ---


def ratios(*pairs: tuple[float, float]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.float64)


def margins() -> Tensor:
    chosen = torch.linspace(-9, 7, 33, dtype=torch.float64)
    return torch.stack([chosen, chosen.flip(0) / 3 + 0.25], 1)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equal_log_ratios_cost_ln_2(beta: float, smoothing: float) -> None:
    out = preference_loss(ratios((0, 0), (-3.5, -3.5)), beta, label_smoothing=smoothing)
    assert out.loss_P.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert out.metrics["margin"].tolist() == [0, 0]
    assert out.metrics["reward_accuracy"].tolist() == [0, 0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_swapping_sides_adds_the_margin(smoothing: float) -> None:
    """L(-m) = L(m) + (1 - 2 eps) m for m = beta (Delta_w - Delta_l)."""
    pairs = margins()
    out = preference_loss(pairs, 0.7, label_smoothing=smoothing)
    swapped = preference_loss(pairs.flip(1), 0.7, label_smoothing=smoothing)
    margin = 0.7 * (pairs[:, 0] - pairs[:, 1])
    assert torch.allclose(swapped.loss_P, out.loss_P + (1 - 2 * smoothing) * margin, rtol=0, atol=1e-12)
    assert torch.equal(swapped.metrics["margin"], -out.metrics["margin"])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradient_is_minus_beta_sigma_of_minus_the_margin(beta: float) -> None:
    pairs = margins().requires_grad_()
    (grad,) = torch.autograd.grad(preference_loss(pairs, beta).loss_P.sum(), pairs)
    expected = -beta * torch.sigmoid(-beta * (pairs[:, 0] - pairs[:, 1])).detach()
    assert torch.allclose(grad[:, 0], expected, rtol=0, atol=1e-12)
    assert torch.equal(grad[:, 1], -grad[:, 0])


def test_label_smoothing_is_the_mixture_of_both_labels() -> None:
    pairs, eps = margins(), 0.15
    right, wrong = preference_loss(pairs, 0.4).loss_P, preference_loss(pairs.flip(1), 0.4).loss_P
    smoothed = preference_loss(pairs, 0.4, label_smoothing=eps).loss_P
    assert torch.allclose(smoothed, (1 - eps) * right + eps * wrong, rtol=0, atol=1e-12)


def test_ipo_is_a_parabola_around_one_over_two_beta() -> None:
    beta = 0.2
    out = preference_loss(ratios((2.5, 0), (0, 0), (0, 2.5), (4.5, 1)), beta, loss_type="ipo")
    assert out.loss_P.tolist() == pytest.approx([0, 6.25, 25, 1])
    assert out.metrics["margin"].tolist() == pytest.approx([0.5, 0, -0.5, 0.7])


@pytest.mark.parametrize(
    ("beta", "exact", "per_draw", "gap", "grad"),
    [
        (0.1, 0.658495897, [0.678259676, 0.612382745, 0.707010167, 0.639142585], 7.029e-4, -0.048237068),
        (1.0, 0.401375968, None, 0.060915, -0.330601659),
    ],
)
def test_loss_of_the_four_draws_number_by_number(
    beta: float, exact: float, per_draw: list[float] | None, gap: float, grad: float
) -> None:
    """The exact Delta_w is their mean, ln 1.5; the loss is convex, so noise costs at most beta^2 Var / 8."""
    estimates = [0.0, 2 * math.log(2), 2 * math.log(0.75), 2 * math.log(1.5)]
    pairs = ratios((math.log(1.5), -0.3), *((e, -0.3) for e in estimates)).requires_grad_()
    loss = preference_loss(pairs, beta).loss_P
    (grads,) = torch.autograd.grad(loss.sum(), pairs)
    draws = loss[1:].detach()
    assert loss[0].item() == pytest.approx(exact, abs=1e-9)
    assert per_draw is None or draws.tolist() == pytest.approx(per_draw, abs=1e-9)
    assert (draws.mean() - exact).item() == pytest.approx(gap, abs=1e-6)
    assert 0 < gap <= beta**2 * 0.563214 / 8
    assert grads[0].tolist() == pytest.approx([grad, -grad], abs=1e-9)


def test_metrics_carry_no_gradient_and_one_value_a_row() -> None:
    pairs = ratios((1, 0), (-1, 2), (0.5, 0.5)).requires_grad_()
    out = preference_loss(pairs, 0.1)
    assert out.loss_P.requires_grad
    assert out.metrics["reward_accuracy"].tolist() == [1, 0, 0]
    assert out.metrics["log_ratio_chosen"].tolist() == [1, -1, 0.5]
    assert out.metrics["log_ratio_rejected"].tolist() == [0, 2, 0.5]
    assert all(v.shape == (3,) and not v.requires_grad for v in out.metrics.values())


def test_far_margins_stay_finite() -> None:
    pairs = ratios((1e4, -1e4), (-1e4, 1e4)).requires_grad_()
    loss = preference_loss(pairs, 1.0).loss_P
    (grad,) = torch.autograd.grad(loss.sum(), pairs)
    assert loss.tolist() == pytest.approx([0, 2e4])
    assert grad.tolist() == [[0, 0], [-1, 1]]


def test_sum_by_side_adds_tokens_to_their_row_and_side() -> None:
    values = torch.tensor([1.0, 2, 4, 8, 16])
    slots = torch.tensor([5, 0, 0, 3, 5])
    assert sum_by_side(values, slots, 3, 2).tolist() == [[6, 0], [0, 8], [0, 17]]
