"""fast_dllm: logits are those of Qwen2 written out (arXiv 2407.10671: GQA, q/k/v biases, SwiGLU)."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.registry import load_model, skeleton

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
    config, weights = upstream("Fast_dLLM_Qwen", **changes)
    model = load_model(write_upstream("Fast_dLLM_Qwen", **changes)).eval()
    ids, positions, mask = probe
    expected = plain.qwen2_logits(weights, config, *probe)
    got = model.head(model.hidden(ids[None], positions[None], mask[None, None]))[0]
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


def test_the_facts_of_the_release(write_upstream: Callable[..., Path]) -> None:
    model = load_model(write_upstream("Fast_dLLM_Qwen"))
    assert (model.shift, model.attention, model.block_origin, model.block_size) == (1, "block", "global", 8)
    assert (model.mask_id, model.eos_id) == (92, 91)
    assert (model.facts.mask_id, model.facts.eos_id, model.facts.block_size) == (151665, 151645, 32)
    assert model.facts.small_block_size == 8


def test_sub_blocks_are_8_unless_the_config_says_otherwise(upstream: Callable[..., Any]) -> None:
    config = upstream("Fast_dLLM_Qwen")[0]
    for changes, expected in (
        ({"bd_size": 32}, 8),
        ({"bd_size": 32, "small_block_size": 4}, 4),
        ({"bd_size": 32, "small_block_size": 32}, 32),
        ({"bd_size": 4}, 4),
    ):
        assert skeleton(config | changes).small_block_size == expected
    for changes, said in (({"bd_size": 12}, "8 does not divide bd_size = 12"), ({"small_block_size": 0}, "0 does not")):
        with pytest.raises(ModelError, match=f"small_block_size = {said}"):
            skeleton(config | changes)
