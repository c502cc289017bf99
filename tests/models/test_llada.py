"""llada: logits are those of the published block written out; a variant of the layout that is not built is refused."""

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
Upstream = Callable[..., tuple[Json, dict[str, Tensor]]]


def llada_logits(
    plain: SimpleNamespace, w: dict[str, Tensor], c: Json, ids: Tensor, at: Tensor, mask: Tensor
) -> Tensor:
    """Pre-norm blocks; the activation is on `ff_proj`, which multiplies `up_proj`."""
    eps, theta = c["rms_norm_eps"], c["rope_theta"]
    x = w["model.transformer.wte.weight"][ids]
    for i in range(c["n_layers"]):

        def part(name: str, i: int = i) -> Tensor:
            return w[f"model.transformer.blocks.{i}.{name}.weight"]

        h = plain.rms_norm(x, part("attn_norm"), eps)
        q, k, v = (
            (h @ part(f"{n}_proj").T).view(len(ids), count, -1)
            for n, count in (("q", c["n_heads"]), ("k", c["n_kv_heads"]), ("v", c["n_kv_heads"]))
        )
        mixed = plain.attend(plain.rotate(q, at, theta), plain.rotate(k, at, theta), v, mask)
        x = x + mixed @ part("attn_out").T
        h = plain.rms_norm(x, part("ff_norm"), eps)
        x = x + plain.swiglu(h, part("ff_proj"), part("up_proj"), part("ff_out"))
    head = w.get("model.transformer.ff_out.weight", w["model.transformer.wte.weight"])
    return plain.rms_norm(x, w["model.transformer.ln_f.weight"], eps) @ head.T


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"weight_tying": True}, {"n_kv_heads": 6, "rope_theta": 10000.0}])
def test_logits_are_those_of_the_plain_forward(
    plain: SimpleNamespace,
    probe: tuple[Tensor, Tensor, Tensor],
    upstream: Upstream,
    write_upstream: Callable[..., Path],
    changes: Json,
) -> None:
    config, weights = upstream("llada", **changes)
    model = load_model(write_upstream("llada", **changes)).eval()
    ids, positions, mask = probe
    expected = llada_logits(plain, weights, config, *probe)
    got = model.head(model.hidden(ids[None], positions[None], mask[None, None]))[0]
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


def test_the_facts_of_the_release(write_upstream: Callable[..., Path]) -> None:
    model = load_model(write_upstream("llada"))
    assert (model.shift, model.attention, model.block_origin, model.block_size) == (0, "full", "response", 32)
    assert (model.mask_id, model.eos_id) == (92, 90)
    assert model.vocab_size == 96  # the rows of the embedding, of which the vocabulary uses 95
    assert (model.facts.mask_id, model.facts.eos_id) == (126336, 126081)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_type", "sequential"),
        ("layer_norm_type", "default"),
        ("activation_type", "swiglu"),
        ("alibi", True),
        ("rope", False),
        ("clip_qkv", 8.0),
        ("attention_layer_norm", True),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("block_group_size", 2),
    ],
)
def test_a_variant_that_is_not_built_is_named(upstream: Upstream, key: str, value: object) -> None:
    config, _ = upstream("llada", **{key: value})
    with pytest.raises(ModelError, match=rf"config.json: {key} = {value!r} is not supported for llada"):
        skeleton(config)


def test_rotary_positions_must_be_asked_for(upstream: Upstream) -> None:
    """Upstream's own default is none."""
    config, _ = upstream("llada")
    for absent in ({"rope": None}, {}):
        with pytest.raises(ModelError, match="rope = False is not supported for llada; only True is"):
            skeleton({k: v for k, v in config.items() if k != "rope"} | absent)


def test_positions_are_never_scaled(upstream: Upstream) -> None:
    """Upstream reads no rope_scaling: its own code would load such a checkpoint and turn unscaled."""
    config, _ = upstream("llada")
    for key, where in (("rope_type", "rope_scaling"), ("type", "rope_scaling"), ("rope_type", "rope_parameters")):
        with pytest.raises(ModelError, match=f"{key} = 'linear' is not supported for llada; only 'default' is"):
            skeleton(config | {where: {key: "linear", "factor": 2.0}})
        skeleton(config | {where: {key: "default"}})


def test_the_tying_of_the_head_is_said_once(upstream: Upstream) -> None:
    config, _ = upstream("llada")
    for tied in (True, False):
        assert bool(skeleton(config | {"weight_tying": tied}).tied_tensors()) == tied
        assert bool(skeleton(config | {"weight_tying": tied, "tie_word_embeddings": tied}).tied_tensors()) == tied
        with pytest.raises(ModelError, match=f"weight_tying = {tied} and tie_word_embeddings = {not tied} disagree"):
            skeleton(config | {"weight_tying": tied, "tie_word_embeddings": not tied})
    with pytest.raises(ModelError, match="weight_tying = None; a config of llada needs true or false"):
        skeleton(config | {"weight_tying": None})


def test_absent_sizes_follow_the_published_defaults(upstream: Upstream) -> None:
    config = upstream("llada")[0] | {"n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None}
    shapes = {n: tuple(p.shape) for n, p in skeleton(config).named_parameters()}
    assert shapes["lm.model.layers.0.self_attn.k_proj.weight"] == (48, 48)
    assert shapes["lm.model.layers.0.mlp.gate_proj.weight"] == (192, 48)
    assert shapes["lm.model.embed_tokens.weight"] == (95, 48)
    multi_query = skeleton(config | {"multi_query_attention": True})
    assert multi_query.lm.model.layers[0].self_attn.k_proj.weight.shape == (8, 48)
