"""llada2: logits are those of the published layers written out: fused q/k/v, half-rotary heads, the grouped router."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.registry import load_model, save_model, skeleton

Json = dict[str, Any]
Upstream = Callable[..., tuple[Json, dict[str, Tensor]]]


def route(x: Tensor, w: dict[str, Tensor], at: str, c: Json) -> list[list[tuple[int, Tensor]]]:
    """(expert, weight) of each token: the bias steers the choice, the weights are the sigmoid scores without it."""
    scores = torch.sigmoid(x.float() @ w[f"{at}.gate.weight"].float().T)
    steered = scores + w[f"{at}.gate.expert_bias"]
    size = c["num_experts"] // c["n_group"]
    chosen = []
    for score, steer in zip(scores, steered, strict=True):
        best_two = [float(group.sort().values[-2:].sum()) for group in steer.split(size)]
        groups = sorted(range(c["n_group"]), key=lambda g: -best_two[g])[: c["topk_group"]]
        allowed = [e for g in groups for e in range(g * size, (g + 1) * size)]
        experts = sorted(allowed, key=lambda e: -float(steer[e]))[: c["num_experts_per_tok"]]
        total = score[experts].sum()
        chosen.append([(e, c["routed_scaling_factor"] * score[e] / total) for e in experts])
    return chosen


def logits(plain: SimpleNamespace, w: dict[str, Tensor], c: Json, ids: Tensor, at: Tensor, mask: Tensor) -> Tensor:
    eps, heads, kv_heads, size = c["rms_norm_eps"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    rotated = int(size * c["partial_rotary_factor"])
    x = w["model.word_embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = plain.rms_norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        fused = (h @ w[f"{layer}.attention.query_key_value.weight"].T).view(len(ids), heads + 2 * kv_heads, size)
        q, k, v = fused[:, :heads], fused[:, heads : heads + kv_heads], fused[:, heads + kv_heads :]
        q, k = (
            plain.rotate(
                plain.rms_norm(t, w[f"{layer}.attention.{n}_layernorm.weight"], eps), at, c["rope_theta"], rotated
            )
            for t, n in ((q, "query"), (k, "key"))
        )
        x = x + plain.attend(q, k, v, mask) @ w[f"{layer}.attention.dense.weight"].T
        h = plain.rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)

        def part(stem: str, h: Tensor, layer: str = layer) -> Tensor:
            return plain.swiglu(h, *(w[f"{layer}.mlp.{stem}{n}_proj.weight"] for n in ("gate", "up", "down")))

        if i < c["first_k_dense_replace"]:
            x = x + part("", h)
            continue
        routed = [
            torch.stack([share * part(f"experts.{e}.", token) for e, share in picks]).sum(0)
            for token, picks in zip(h, route(h, w, f"{layer}.mlp", c), strict=True)
        ]
        x = x + torch.stack(routed) + part("shared_experts.", h)
    return plain.rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_k_dense_replace": 2, "num_shared_experts": 2, "routed_scaling_factor": 1.0},
        {"n_group": 3, "topk_group": 1, "partial_rotary_factor": 1.0, "rotary_dim": 12, "num_key_value_heads": 3},
    ],
)
def test_logits_are_those_of_the_plain_forward(
    plain: SimpleNamespace,
    probe: tuple[Tensor, Tensor, Tensor],
    upstream: Upstream,
    write_upstream: Callable[..., Path],
    changes: Json,
) -> None:
    config, weights = upstream("llada2_moe", **changes)
    model = load_model(write_upstream("llada2_moe", **changes)).eval()
    ids, positions, mask = probe
    expected = logits(plain, weights, config, *probe)
    got = model.head(model.hidden(ids[None], positions[None], mask[None, None]))[0]
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


@torch.no_grad()
def test_the_bias_steers_the_router(
    probe: tuple[Tensor, Tensor, Tensor], upstream: Upstream, write_upstream: Callable[..., Path]
) -> None:
    """Without this the test above could pass with a bias that is never read."""
    ids, positions, mask = probe
    model = load_model(write_upstream("llada2_moe")).eval()
    before = model.hidden(ids[None], positions[None], mask[None, None])
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.neg_()
    after = model.hidden(ids[None], positions[None], mask[None, None])
    assert (before - after).abs().max() > 0.1


def test_the_facts_of_the_release(write_upstream: Callable[..., Path]) -> None:
    model = load_model(write_upstream("llada2_moe"))
    assert (model.shift, model.attention, model.block_origin, model.block_size) == (0, "block", "global", 32)
    assert (model.mask_id, model.eos_id) == (95, 91)
    assert (model.facts.mask_id, model.facts.eos_id) == (156895, 156892)


def test_the_routers_bias_stays_in_float32(write_upstream: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_upstream("llada2_moe")
    published = load_file(folder / "model.safetensors")
    model = load_model(folder, torch.bfloat16)
    for again in (model, load_model(folder).to(torch.bfloat16), load_model(folder).bfloat16()):
        save_model(again, tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        biases = [name for name in saved if name.endswith("expert_bias")]
        assert len(biases) == 2
        assert all(torch.equal(saved[name], published[name]) for name in biases)
        assert saved["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_bias", True),
        ("use_qk_norm", False),
        ("norm_topk_prob", False),
        ("score_function", "softmax"),
        ("moe_router_enable_expert_bias", False),
        ("use_sliding_window", True),
    ],
)
def test_a_variant_that_is_not_built_is_named(upstream: Upstream, key: str, value: object) -> None:
    config, _ = upstream("llada2_moe", **{key: value})
    with pytest.raises(ModelError, match=rf"config.json: {key} = ({value!r}|true)"):
        skeleton(config)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"n_group": 5}, "n_group = 5 does not divide num_experts = 12"),
        ({"topk_group": 5}, "topk_group = 5 exceeds n_group = 4"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok = 7 exceeds the experts of topk_group = 2 groups of 3"),
        (
            {"routed_scaling_factor": None},
            "routed_scaling_factor = None; a config of llada2_moe needs a number above 0",
        ),
        ({"partial_rotary_factor": None, "rotary_dim": None}, "partial_rotary_factor = None; a config of llada2_moe"),
        ({"rotary_dim": 4}, r"partial_rotary_factor = 0\.5 and rotary_dim = 4 with head_dim = 12; give one share"),
        ({"partial_rotary_factor": 1.5, "rotary_dim": 18}, ".* with head_dim = 12; give one share, of at most 1"),
    ],
)
def test_numbers_that_do_not_fit_are_named(upstream: Upstream, changes: Json, complaint: str) -> None:
    config, _ = upstream("llada2_moe")
    with pytest.raises(ModelError, match=rf"config\.json: {complaint}"):
        skeleton(config | changes)


@pytest.mark.parametrize("absent", ["partial_rotary_factor", "rotary_dim"])
def test_either_name_of_the_rotary_share_is_enough(upstream: Upstream, absent: str) -> None:
    config, _ = upstream("llada2_moe")
    for value in ({absent: None}, {}):
        model = skeleton({k: v for k, v in config.items() if k != absent} | value)
        assert model.lm.config.rope_parameters["partial_rotary_factor"] == 0.5


def test_a_single_expert_a_token_is_refused(write_upstream: Callable[..., Path]) -> None:
    """Upstream normalises the chosen weights only where there are several; the trunk always does."""
    path = write_upstream("llada2_moe")
    config = json.loads((path / "config.json").read_text()) | {"num_experts_per_tok": 1}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="num_experts_per_tok = 1 is not supported"):
        load_model(path)
