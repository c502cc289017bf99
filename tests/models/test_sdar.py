"""sdar: the trunk is Qwen3 as its papers define it, the block mask rules it, the mask token is never predicted."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.registry import build_model
from dtrpo_ray.models.sdar import SDAR

MakeModel = Callable[..., SDAR]
Json = dict[str, Any]

# the keys of the published SDAR-4B-Chat config.json, sizes shrunken
UPSTREAM: Json = {
    "architectures": ["SDARForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "bos_token_id": 61,
    "debug": False,
    "eos_token_id": 61,
    "block_size": 4,
    "mask_token_id": 63,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 32768,
    "max_window_layers": 2,
    "micro_forward": False,
    "model_type": "sdar",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": 64,
}
SIZES = ("head_dim", "hidden_size", "intermediate_size", "max_window_layers", "num_attention_heads")
SIZES += ("num_hidden_layers", "num_key_value_heads", "vocab_size", "mask_token_id", "eos_token_id", "bos_token_id")


# --- Qwen3 written out: arXiv 2505.09388 (q/k norm, GQA, SwiGLU, RMSNorm before each part), rotary positions ---


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [T, heads, size]: the pair (j, j + size / 2) turns by position * theta^(-2j / size)."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * theta ** (-torch.arange(half).double() * 2 / x.shape[-1])
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def qwen3_logits(weights: dict[str, Tensor], config: Json, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    heads, kv_heads, size = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    eps, theta = config.get("rms_norm_eps", 1e-6), config["rope_theta"]
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):

        def w(name: str, layer: int = layer) -> Tensor:
            return weights[f"model.layers.{layer}.{name}.weight"]

        h = rms_norm(x, w("input_layernorm"), eps)
        q, k, v = (
            (h @ w(f"self_attn.{n}_proj").T).view(len(ids), count, size)
            for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q = rotate(rms_norm(q, w("self_attn.q_norm"), eps), positions, theta)
        k = rotate(rms_norm(k, w("self_attn.k_norm"), eps), positions, theta)
        mixed = []
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = q[:, head] @ k[:, shared].T / math.sqrt(size)
            mixed.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, shared])
        x = x + torch.cat(mixed, -1) @ w("self_attn.o_proj").T
        h = rms_norm(x, w("post_attention_layernorm"), eps)
        gate, up = h @ w("mlp.gate_proj").T, h @ w("mlp.up_proj").T
        x = x + (gate * torch.sigmoid(gate) * up) @ w("mlp.down_proj").T
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("theta", [10000.0, 500.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_are_qwen3_under_the_given_mask(make_model: MakeModel, kv_heads: int, theta: float) -> None:
    model = make_model(seed=5, num_key_value_heads=kv_heads, rope_theta=theta)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 22, (11,), generator=generator)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6])  # positions may repeat, as in a packed row
    mask = (torch.rand(11, 11, generator=generator) < 0.4) | torch.eye(11, dtype=torch.bool)
    weights = {name.removeprefix("lm."): value for name, value in model.state_dict().items()}
    expected = qwen3_logits(weights, model.config, ids, positions, mask)
    got = model.head(model.hidden(ids[None], positions[None], mask[None, None]))[0]
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


@torch.no_grad()
def test_float64_fixture_is_the_same_model(make_model: MakeModel) -> None:
    ids, mask = torch.arange(8)[None], torch.ones(1, 1, 8, 8, dtype=torch.bool)
    single, exact = (make_model(seed=5, exact=e).hidden(ids, ids, mask) for e in (False, True))
    assert torch.allclose(single.double(), exact, rtol=0, atol=1e-4)


def test_mask_token_gets_no_probability_and_no_gradient(make_model: MakeModel) -> None:
    model = make_model(seed=5)
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * 10
    log_mu = model.log_mu(hidden)
    assert (log_mu[:, model.mask_id] == float("-inf")).all()
    assert torch.allclose(log_mu.exp().sum(-1), torch.ones(6), atol=1e-6)
    log_mu[torch.arange(6), torch.arange(6)].sum().backward()
    grad = model.lm.lm_head.weight.grad
    assert grad is not None
    assert torch.isfinite(grad).all()
    assert grad[model.mask_id].abs().max() == 0


def test_log_mu_is_float32_at_the_temperature(tiny: SDAR) -> None:
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    others = [v for v in range(tiny.vocab_size) if v != tiny.mask_id]
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.log_softmax(tiny.head(hidden)[:, others] / temperature, -1)
        got = tiny.log_mu(hidden, temperature)
        assert got.dtype == torch.float32
        assert torch.allclose(got[:, others], expected, atol=1e-6)


def test_log_mu_of_a_bfloat16_model_is_normalised_in_float32(make_model: MakeModel) -> None:
    model = make_model(seed=5).to(torch.bfloat16)
    log_mu = model.log_mu(torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16))
    assert log_mu.dtype == torch.float32
    assert torch.allclose(log_mu.exp().sum(-1), torch.ones(50), atol=1e-5)


def test_forward_scores_the_named_places(tiny: SDAR) -> None:
    ids = torch.arange(16).view(2, 8)
    positions, mask = torch.arange(8)[None].expand(2, 8), torch.ones(2, 1, 8, 8, dtype=torch.bool)
    row, col, target = torch.tensor([0, 1, 1]), torch.tensor([7, 0, 3]), torch.tensor([2, 4, 6])
    log_mu = tiny.log_mu(tiny.hidden(ids, positions, mask))
    got = tiny(ids, positions, mask, row, col, target)
    assert torch.allclose(got, log_mu[row, col, target], atol=1e-6)


@pytest.mark.parametrize("pad", [None, 21, 0])
def test_every_embedding_learns_whatever_the_pad_token(make_model: MakeModel, pad: int | None) -> None:
    """End-of-sequence tokens fill a terminal block and are text: a config that pads with them must not freeze them."""
    model = make_model(pad_token_id=pad)
    ids, mask = torch.arange(22)[None], torch.ones(1, 1, 22, 22, dtype=torch.bool)
    model.hidden(ids, ids, mask).pow(2).sum().backward()
    embedding = model.lm.model.embed_tokens.weight
    assert embedding.grad is not None
    assert embedding[:22].abs().amax(1).min() > 0
    assert embedding.grad[:22].abs().amax(1).min() > 0


# --- config.json ---


def test_upstream_config_builds_and_its_numbers_count() -> None:
    model = build_model(UPSTREAM)
    assert isinstance(model, SDAR)
    assert (model.mask_id, model.eos_id, model.block_size, model.vocab_size) == (63, 61, 4, 64)
    assert model.config == UPSTREAM
    assert model.lm.config.rope_parameters["rope_theta"] == 1000000
    assert model.lm.config._attn_implementation == "sdpa"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    shapes = {n.removeprefix("lm."): tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (16, 32)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (8,)
    assert len(shapes) == 3 + 2 * 11


def test_published_config_builds_when_shrunken(shared_data: Path) -> None:
    file = shared_data / "tokenizer_qwen2_sdar" / "config.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    published = json.loads(file.read_text())
    assert published.keys() == UPSTREAM.keys() | published.keys()
    model = build_model(published | {key: UPSTREAM[key] for key in SIZES})
    assert model.lm.config.rope_parameters["rope_theta"] == published["rope_theta"]
    assert (model.block_size, model.mask_id) == (published["block_size"], 63)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "block_size", "mask_token_id", "eos_token_id"]
)
@pytest.mark.parametrize("value", ["absent", None, "4", ["4"], 4.0])
def test_a_key_that_is_no_integer_is_named(tiny_config: Json, key: str, value: object) -> None:
    config = {k: v for k, v in tiny_config.items() if k != key}
    if value != "absent":
        config[key] = value
    with pytest.raises(ModelError, match=rf"config.json: {key} = "):
        build_model(config)


@pytest.mark.parametrize("mask_id", [-1, 23, 151669])
def test_a_mask_id_outside_the_vocabulary_is_named(tiny_config: Json, mask_id: int) -> None:
    with pytest.raises(ModelError, match=rf"mask_token_id = {mask_id} lies outside the vocabulary of 23"):
        build_model(tiny_config | {"mask_token_id": mask_id})


@pytest.mark.parametrize("size", [0, -4])
def test_a_block_without_tokens_is_refused(tiny_config: Json, size: int) -> None:
    with pytest.raises(ModelError, match=rf"block_size = {size}"):
        build_model(tiny_config | {"block_size": size})
