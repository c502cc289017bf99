"""Tiny checkpoints in the exact layout of each release, written without our loader, and the parts of plain forwards.

`tiny_configs.json` holds the keys of the published `config.json` files with smaller numbers; `mask_token_id` is added
where a release leaves it to its code. The names and shapes below were read from the published tensor indexes.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

Json = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

CONFIGS: dict[str, Json] = json.loads((Path(__file__).parent / "tiny_configs.json").read_text())


def dense_qwen(c: Json, bias: bool, norms: bool) -> Shapes:
    size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    hidden, wide = c["hidden_size"], c["intermediate_size"]
    rows = {"q": c["num_attention_heads"] * size, "k": c["num_key_value_heads"] * size}
    rows["v"] = rows["k"]
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name, count in rows.items():
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (count, hidden)
            if bias:
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (count,)
            if norms and name != "v":
                shapes[f"{at}.self_attn.{name}_norm.weight"] = (size,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, rows["q"])
        shapes |= {f"{at}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= mlp(f"{at}.mlp", hidden, wide)
    return shapes


def mlp(at: str, hidden: int, wide: int) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (wide, hidden),
        f"{at}.up_proj.weight": (wide, hidden),
        f"{at}.down_proj.weight": (hidden, wide),
    }


def sdar_moe(c: Json) -> Shapes:
    shapes = {n: s for n, s in dense_qwen(c, False, True).items() if ".mlp." not in n}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}.mlp"
        shapes[f"{at}.gate.weight"] = (c["num_experts"], c["hidden_size"])
        for e in range(c["num_experts"]):
            shapes |= mlp(f"{at}.experts.{e}", c["hidden_size"], c["moe_intermediate_size"])
    return shapes


def llada(c: Json) -> Shapes:
    d, rows = c["d_model"], c["embedding_size"]
    kv = c["d_model"] // c["n_heads"] * c["n_kv_heads"]
    shapes: Shapes = {"model.transformer.wte.weight": (rows, d), "model.transformer.ln_f.weight": (d,)}
    if not c["weight_tying"]:
        shapes["model.transformer.ff_out.weight"] = (rows, d)
    for i in range(c["n_layers"]):
        at = f"model.transformer.blocks.{i}"
        shapes |= {f"{at}.attn_norm.weight": (d,), f"{at}.ff_norm.weight": (d,)}
        shapes |= {f"{at}.q_proj.weight": (d, d), f"{at}.k_proj.weight": (kv, d), f"{at}.v_proj.weight": (kv, d)}
        shapes |= {f"{at}.attn_out.weight": (d, d), f"{at}.ff_out.weight": (d, c["mlp_hidden_size"])}
        shapes |= {f"{at}.{n}_proj.weight": (c["mlp_hidden_size"], d) for n in ("ff", "up")}
    return shapes


def llada2(c: Json) -> Shapes:
    hidden, size, experts = c["hidden_size"], c["head_dim"], c["num_experts"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    shapes: Shapes = {"model.word_embeddings.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}.attention.{n}_layernorm.weight": (size,) for n in ("query", "key")}
        shapes[f"{at}.attention.query_key_value.weight"] = ((heads + 2 * kv_heads) * size, hidden)
        shapes[f"{at}.attention.dense.weight"] = (hidden, heads * size)
        if i < c["first_k_dense_replace"]:
            shapes |= mlp(f"{at}.mlp", hidden, c["intermediate_size"])
            continue
        shapes |= {f"{at}.mlp.gate.weight": (experts, hidden), f"{at}.mlp.gate.expert_bias": (experts,)}
        shapes |= mlp(f"{at}.mlp.shared_experts", hidden, c["moe_intermediate_size"] * c["num_shared_experts"])
        for e in range(experts):
            shapes |= mlp(f"{at}.mlp.experts.{e}", hidden, c["moe_intermediate_size"])
    return shapes


SHAPES: dict[str, Callable[[Json], Shapes]] = {
    "sdar": lambda c: dense_qwen(c, False, True),
    "Fast_dLLM_Qwen": lambda c: dense_qwen(c, True, False),
    "Dream": lambda c: dense_qwen(c, True, False),
    "sdar_moe": sdar_moe,
    "llada": llada,
    "llada2_moe": llada2,
}


def weights(model_type: str, seed: int = 0, **changes: Any) -> tuple[Json, dict[str, Tensor]]:
    """A config of the family and random tensors under its published names; norms away from one, biases from zero."""
    config = json.loads(json.dumps(CONFIGS[model_type])) | changes
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in SHAPES[model_type](config).items():
        value = torch.randn(shape, generator=generator) * 0.25
        tensors[name] = 1 + value if "norm" in name or "ln_f" in name else value
    return config, tensors


@pytest.fixture(scope="session")
def upstream() -> Callable[..., tuple[Json, dict[str, Tensor]]]:
    return weights


@pytest.fixture(scope="session")
def upstream_shapes() -> Callable[[Json], Shapes]:
    return lambda config: SHAPES[config["model_type"]](config)


@pytest.fixture
def write_upstream(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny checkpoint of a family: folder of `config.json` and safetensors."""
    folders: Iterator[int] = iter(range(1000))

    def write(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        config, tensors = weights(model_type, seed, **changes)
        folder = tmp_path / f"{model_type}-{next(folders)}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors")
        return folder

    return write


# --- parts of a plain forward ---


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, positions: Tensor, theta: float, rotated: int | None = None) -> Tensor:
    """x [T, heads, size]: of its first `rotated` dimensions j and j + half turn by position * theta^(-j/half)."""
    rotated = rotated or x.shape[-1]
    half = rotated // 2
    angle = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half:rotated], x[..., rotated:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [T, heads, size], k and v [T, kv heads, size] -> [T, heads * size]; a kv head serves neighbouring heads."""
    heads, kv_heads = q.shape[1], k.shape[1]
    mixed = []
    for head in range(heads):
        shared = head * kv_heads // heads
        scores = q[:, head] @ k[:, shared].T / math.sqrt(q.shape[-1])
        mixed.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, shared])
    return torch.cat(mixed, -1)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = x @ gate.T
    return (gated * torch.sigmoid(gated) * (x @ up.T)) @ down.T


def qwen2_logits(w: dict[str, Tensor], c: Json, ids: Tensor, at: Tensor, mask: Tensor) -> Tensor:
    """Qwen2 (arXiv 2407.10671: GQA, q/k/v biases, SwiGLU) of ids [T] at positions `at` [T] under a mask [T, T]."""
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    eps, theta = c["rms_norm_eps"], c["rope_theta"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = rms_norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = (
            (h @ w[f"{layer}.self_attn.{n}_proj.weight"].T + w[f"{layer}.self_attn.{n}_proj.bias"]).view(
                len(ids), m, -1
            )
            for n, m in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        mixed = attend(rotate(q, at, theta), rotate(k, at, theta), v, mask)
        x = x + mixed @ w[f"{layer}.self_attn.o_proj.weight"].T
        h = rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        x = x + swiglu(h, *(w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")))
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


@pytest.fixture(scope="session")
def plain() -> SimpleNamespace:
    return SimpleNamespace(rms_norm=rms_norm, rotate=rotate, attend=attend, swiglu=swiglu, qwen2_logits=qwen2_logits)


@pytest.fixture(scope="session")
def probe() -> tuple[Tensor, Tensor, Tensor]:
    """(ids [19], positions [19] with repeats as in a packed row, a random boolean mask [19, 19])."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 90, (19,), generator=generator)
    positions = torch.tensor([*range(15), 8, 9, 10, 11])
    return ids, positions, (torch.rand(19, 19, generator=generator) < 0.4) | torch.eye(19, dtype=torch.bool)
