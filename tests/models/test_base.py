"""base: the log-probability of each target, whatever the chunks."""

from collections.abc import Callable

import pytest
import torch

from dtrpo_ray.models import base
from dtrpo_ray.models.sdar import SDAR

MakeModel = Callable[..., SDAR]


def test_values_are_log_softmax_without_the_mask_token(tiny: SDAR) -> None:
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    target = torch.arange(9) * 2
    logits = hidden @ tiny.lm.lm_head.weight.T
    others = [v for v in range(tiny.vocab_size) if v != tiny.mask_id]
    expected = logits[torch.arange(9), target] - logits[:, others].logsumexp(-1)
    assert torch.allclose(base.token_logps(tiny.logits, hidden, target, tiny.vocab_size), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
def test_chunks_change_neither_values_nor_gradients(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    model = make_model(exact=True)
    hidden = torch.randn(13, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target = torch.arange(13)

    def values_and_gradients() -> tuple[torch.Tensor, ...]:
        logps = base.token_logps(model.logits, hidden, target, model.vocab_size)
        weighted = logps * torch.arange(1, 14)
        return (logps.detach(), *torch.autograd.grad(weighted.sum(), [hidden, model.lm.lm_head.weight]))

    whole = values_and_gradients()
    monkeypatch.setattr(base, "CHUNK_LOGITS", chunk * model.vocab_size)
    for a, b in zip(whole, values_and_gradients(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_no_chunk_is_longer_than_the_limit(tiny: SDAR, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        lengths.append(len(hidden))
        return tiny.logits(hidden)

    monkeypatch.setattr(base, "CHUNK_LOGITS", 5 * tiny.vocab_size)
    base.token_logps(logits, torch.zeros(13, 32), torch.zeros(13, dtype=torch.long), tiny.vocab_size)
    assert lengths == [5, 5, 3]


def test_gradients_are_those_of_log_softmax(make_model: MakeModel) -> None:
    """Against autograd's own log_softmax and gather, for the hidden states and the head."""
    model = make_model(exact=True)
    hidden = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    target, scale = torch.tensor([0, 3, 3, 8, 20, 1, 5]), torch.linspace(-2, 2, 7, dtype=torch.float64)
    parameters = [hidden, model.lm.lm_head.weight]
    ours = base.token_logps(model.logits, hidden, target, model.vocab_size)
    theirs = model.log_mu(hidden).gather(-1, target[:, None])[:, 0]
    assert torch.equal(ours, theirs)
    wanted = torch.autograd.grad((theirs * scale).sum(), parameters)
    for a, b in zip(torch.autograd.grad((ours * scale).sum(), parameters), wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_the_head_runs_again_in_the_backward_pass_of_chunks(tiny: SDAR, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        lengths.append(len(hidden))
        return tiny.logits(hidden)

    monkeypatch.setattr(base, "CHUNK_LOGITS", 5 * tiny.vocab_size)
    hidden = torch.randn(13, 32, requires_grad=True)
    base.token_logps(logits, hidden, torch.zeros(13, dtype=torch.long), tiny.vocab_size).sum().backward()
    assert sorted(lengths) == [3, 3, 5, 5, 5, 5]
