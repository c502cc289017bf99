"""step: the loss of a packed batch is the loss computed block by block with separate forwards."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtrpo_ray.batch import Batch, build_batch
from dtrpo_ray.config import Objective
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.step import scored_logps, training_step

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


def build(rows: list[Json], objective: Objective, seed: int = 0) -> Batch:
    return build_batch(rows, objective, B, MASK, seed)


@pytest.fixture(scope="module")
def policy(make_model: MakeModel) -> SDAR:
    return make_model(seed=1, exact=True)


@pytest.fixture(scope="module")
def reference(make_model: MakeModel) -> SDAR:
    return make_model(seed=2, exact=True).requires_grad_(False)


def logps_alone(model: SDAR, rows: list[Json], batch: Batch) -> Tensor:
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
        assert out.loss_B.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-15)
        for metric in ("margin", "log_ratio_chosen", "log_ratio_rejected"):
            assert out.metrics[metric].tolist() == [0] * 4


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
        assert out.loss_B[b].item() == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-10)
    assert out.metrics["margin"].abs().min() > 1e-3


def test_sft_loss_is_the_weighted_nll_per_response_token(policy: SDAR) -> None:
    batch = build(ROWS, SFT)
    out = training_step(policy, None, batch, SFT)
    logps = logps_alone(policy, ROWS, batch).tolist()
    expected = [0.0] * 4
    for b, weight, logp in zip(batch.scored_row.tolist(), batch.weight.tolist(), logps, strict=True):
        expected[b] -= weight * logp / len(ROWS[b]["chosen_ids"])
    assert out.loss_B.tolist() == pytest.approx(expected, abs=1e-10)
    assert torch.equal(out.metrics["nll"], out.loss_B.detach())


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
def test_sft_weight_adds_the_nll_of_all_hidden_chosen_tokens(policy: SDAR, reference: SDAR, name: str) -> None:
    """B_b / |hidden in b| at every hidden token of the chosen side, per response token, in the very same states."""
    plain = PAIR_OBJECTIVES[name]
    mixed = plain.model_copy(update={"sft_weight": 0.25})
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
        assert (b.loss_B - a.loss_B)[r].item() == pytest.approx(0.25 * nll, abs=1e-6)  # float32 weights such as 4/3
        assert b.metrics["nll_chosen"][r].item() == pytest.approx(nll, abs=1e-6)


@pytest.mark.parametrize("name", [*PAIR_OBJECTIVES, "sft"])
def test_rows_together_are_rows_alone(policy: SDAR, reference: SDAR, name: str) -> None:
    objective = PAIR_OBJECTIVES.get(name, SFT)
    ref = None if name == "sft" else reference
    together = training_step(policy, ref, build(ROWS, objective), objective)
    for b, one in enumerate(ROWS):
        alone = training_step(policy, ref, build([one], objective), objective)
        assert alone.loss_B[0].item() == pytest.approx(together.loss_B[b].item(), abs=1e-12)
        for metric, values in alone.metrics.items():
            assert values[0].item() == pytest.approx(together.metrics[metric][b].item(), abs=1e-12)


def test_rows_together_are_rows_alone_in_float32(make_model: MakeModel) -> None:
    policy, reference, objective = make_model(seed=1), make_model(seed=2), PAIR_OBJECTIVES["steps"]
    with torch.no_grad():
        together = training_step(policy, reference, build(ROWS, objective), objective).loss_B
        for b, one in enumerate(ROWS):
            alone = training_step(policy, reference, build([one], objective), objective).loss_B
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
        single = training_step(make_model(seed=1), make_model(seed=2), batch, objective).loss_B
        assert torch.allclose(single.double(), training_step(policy, reference, batch, objective).loss_B, atol=1e-4)


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
    training_step(model, None if name == "sft" else reference, batch, objective).loss_B.sum().backward()
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
    out = training_step(policy, reference, build(ROWS, PAIR_OBJECTIVES["steps"]), PAIR_OBJECTIVES["steps"])
    assert calls == [(True, True), (False, False)]
    out.loss_B.sum().backward()
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
    (grad,) = torch.autograd.grad(out.loss_B.sum(), logps)
    sign = torch.where(batch.slot % 2 == 0, -1.0, 1.0).double()
    sigma = torch.sigmoid(-out.metrics["margin"])[batch.scored_row]
    assert torch.allclose(grad, sign * objective.beta * sigma * batch.weight, rtol=0, atol=1e-12)


def test_row_weight_is_the_callers_business(policy: SDAR, reference: SDAR) -> None:
    objective = PAIR_OBJECTIVES["steps"]
    plain = build(ROWS, objective)
    weighed = build([r | {"row_weight": w} for r, w in zip(ROWS, (0, 1, 0.5, 3), strict=True)], objective)
    a, b = (training_step(policy, reference, batch, objective).loss_B for batch in (plain, weighed))
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
