"""dream: logits are those of Qwen2 written out (arXiv 2407.10671: GQA, q/k/v biases, SwiGLU), under the given mask."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrpo_ray.models.registry import load_model

Json = dict[str, Any]


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 6, "rope_theta": 500.0}]
)
def test_logits_are_those_of_the_plain_forward(
    plain: SimpleNamespace,
    probe: tuple[Tensor, Tensor, Tensor],
    upstream: Callable[..., Any],
    write_upstream: Callable[..., Path],
    changes: Json,
) -> None:
    config, weights = upstream("Dream", **changes)
    model = load_model(write_upstream("Dream", **changes)).eval()
    ids, positions, mask = probe
    expected = plain.qwen2_logits(weights, config, *probe)
    got = model.head(model.hidden(ids[None], positions[None], mask[None, None]))[0]
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


def test_the_facts_of_the_release(write_upstream: Callable[..., Path]) -> None:
    model = load_model(write_upstream("Dream"))
    assert (model.shift, model.attention, model.block_origin, model.block_size) == (1, "full", "response", 32)
    assert (model.mask_id, model.eos_id) == (93, 90)
    assert model.facts.mask_id == 151666
    assert load_model(write_upstream("Dream", block_size=16)).block_size == 16
