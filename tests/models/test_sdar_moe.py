"""sdar_moe: logits are those of Qwen3-MoE written out (arXiv 2505.09388): softmax router, top k, renormalised."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrpo_ray.models.registry import load_model

Json = dict[str, Any]


def moe(plain: SimpleNamespace, x: Tensor, w: dict[str, Tensor], at: str, c: Json) -> Tensor:
    probabilities = (x @ w[f"{at}.gate.weight"].T).softmax(-1)
    rows = []
    for token, p in zip(x, probabilities, strict=True):
        chosen = p.argsort(descending=True)[: c["num_experts_per_tok"]]
        total = p[chosen].sum() if c["norm_topk_prob"] else 1.0
        parts = [
            p[e]
            / total
            * plain.swiglu(token, *(w[f"{at}.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")))
            for e in chosen
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def logits(plain: SimpleNamespace, w: dict[str, Tensor], c: Json, ids: Tensor, at: Tensor, mask: Tensor) -> Tensor:
    eps, theta = c["rms_norm_eps"], c["rope_theta"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        h = plain.rms_norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = ((h @ w[f"{attention}.{n}_proj.weight"].T).view(len(ids), -1, c["head_dim"]) for n in ("q", "k", "v"))
        q, k = (
            plain.rotate(plain.rms_norm(t, w[f"{attention}.{n}_norm.weight"], eps), at, theta)
            for t, n in ((q, "q"), (k, "k"))
        )
        x = x + plain.attend(q, k, v, mask) @ w[f"{attention}.o_proj.weight"].T
        x = x + moe(plain, plain.rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps), w, f"{layer}.mlp", c)
    return plain.rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False, "num_experts_per_tok": 3}])
def test_logits_are_those_of_the_plain_forward(
    plain: SimpleNamespace,
    probe: tuple[Tensor, Tensor, Tensor],
    upstream: Callable[..., Any],
    write_upstream: Callable[..., Path],
    changes: Json,
) -> None:
    config, weights = upstream("sdar_moe", **changes)
    model = load_model(write_upstream("sdar_moe", **changes)).eval()
    ids, positions, mask = probe
    expected = logits(plain, weights, config, *probe)
    got = model.head(model.hidden(ids[None], positions[None], mask[None, None]))[0]
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


def test_the_facts_of_the_release(write_upstream: Callable[..., Path]) -> None:
    model = load_model(write_upstream("sdar_moe"))
    assert (model.shift, model.attention, model.block_origin, model.block_size) == (0, "block", "global", 4)
    assert (model.mask_id, model.eos_id, model.facts.mask_id) == (94, 90, 151669)
    assert load_model(write_upstream("sdar_moe", block_size=16)).block_size == 16
