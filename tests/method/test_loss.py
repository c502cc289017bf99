"""loss: known numbers, and the laws of the DPO family."""

import math

import pytest
import torch
from torch import Tensor

from dtrpo_ray.method.loss import preference_loss, sum_by_side


def ratios(*pairs: tuple[float, float]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.float64)


def margins() -> Tensor:
    chosen = torch.linspace(-9, 7, 33, dtype=torch.float64)
    return torch.stack([chosen, chosen.flip(0) / 3 + 0.25], 1)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equal_log_ratios_cost_ln_2(beta: float, smoothing: float) -> None:
    out = preference_loss(ratios((0, 0), (-3.5, -3.5)), beta, label_smoothing=smoothing)
    assert out.loss_B.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert out.metrics["margin"].tolist() == [0, 0]
    assert out.metrics["reward_accuracy"].tolist() == [0, 0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_swapping_sides_adds_the_margin(smoothing: float) -> None:
    """L(-m) = L(m) + (1 - 2 eps) m for m = beta (Delta_w - Delta_l)."""
    pairs = margins()
    out = preference_loss(pairs, 0.7, label_smoothing=smoothing)
    swapped = preference_loss(pairs.flip(1), 0.7, label_smoothing=smoothing)
    margin = 0.7 * (pairs[:, 0] - pairs[:, 1])
    assert torch.allclose(swapped.loss_B, out.loss_B + (1 - 2 * smoothing) * margin, rtol=0, atol=1e-12)
    assert torch.equal(swapped.metrics["margin"], -out.metrics["margin"])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradient_is_minus_beta_sigma_of_minus_the_margin(beta: float) -> None:
    pairs = margins().requires_grad_()
    (grad,) = torch.autograd.grad(preference_loss(pairs, beta).loss_B.sum(), pairs)
    expected = -beta * torch.sigmoid(-beta * (pairs[:, 0] - pairs[:, 1])).detach()
    assert torch.allclose(grad[:, 0], expected, rtol=0, atol=1e-12)
    assert torch.equal(grad[:, 1], -grad[:, 0])


def test_label_smoothing_is_the_mixture_of_both_labels() -> None:
    pairs, eps = margins(), 0.15
    right, wrong = preference_loss(pairs, 0.4).loss_B, preference_loss(pairs.flip(1), 0.4).loss_B
    smoothed = preference_loss(pairs, 0.4, label_smoothing=eps).loss_B
    assert torch.allclose(smoothed, (1 - eps) * right + eps * wrong, rtol=0, atol=1e-12)


def test_ipo_is_a_parabola_around_one_over_two_beta() -> None:
    beta = 0.2
    out = preference_loss(ratios((2.5, 0), (0, 0), (0, 2.5), (4.5, 1)), beta, loss_type="ipo")
    assert out.loss_B.tolist() == pytest.approx([0, 6.25, 25, 1])
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
    loss = preference_loss(pairs, beta).loss_B
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
    assert out.loss_B.requires_grad
    assert out.metrics["reward_accuracy"].tolist() == [1, 0, 0]
    assert out.metrics["log_ratio_chosen"].tolist() == [1, -1, 0.5]
    assert out.metrics["log_ratio_rejected"].tolist() == [0, 2, 0.5]
    assert all(v.shape == (3,) and not v.requires_grad for v in out.metrics.values())


def test_far_margins_stay_finite() -> None:
    pairs = ratios((1e4, -1e4), (-1e4, 1e4)).requires_grad_()
    loss = preference_loss(pairs, 1.0).loss_B
    (grad,) = torch.autograd.grad(loss.sum(), pairs)
    assert loss.tolist() == pytest.approx([0, 2e4])
    assert grad.tolist() == [[0, 0], [-1, 1]]


def test_sum_by_side_adds_tokens_to_their_row_and_side() -> None:
    values = torch.tensor([1.0, 2, 4, 8, 16])
    slots = torch.tensor([5, 0, 0, 3, 5])
    assert sum_by_side(values, slots, 3, 2).tolist() == [[6, 0], [0, 8], [0, 17]]
