"""LLaDA: full attention, no shift, in a layout of its own (OLMo's) that is a Llama trunk by other names.

`ff_proj` is the gate (its activation multiplies `up_proj`), a block's `ff_out` the down projection, and the `ff_out`
beside the blocks the output head. `embedding_size`, not `vocab_size`, counts the rows of the embedding.
"""

import re
from collections.abc import Iterator
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import Facts, Piece
from dtrpo_ray.models.trunk import TrunkLM, refuse, rope_parameters

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
TOP_NAMES = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


class LLaDA(TrunkLM):
    """Full-attention Llama. `config` holds the keys of a LLaDA `config.json`."""

    facts = Facts(
        model_type="llada",
        architectures=("LLaDAModelLM",),
        releases="LLaDA-8B-Base/Instruct, LLaDA-1.5",
        trunk="Llama",
        attention="full",
        block_origin="response",
        shift=0,
        block_key="block_size",  # no key of the release, whose decoding takes any block length
        block_size=32,
        mask_id=126336,
        eos_id=126081,
        sources=(
            "yjyddq/DARE: config.json and tensor index of LLaDA-8B-Instruct",
            "ML-GSAI/LLaDA: generate.py",
            "modeling_llada.py as kept in public ports of it",
        ),
    )
    trunk = LlamaForCausalLM
    sizes = ("vocab_size", "d_model", "n_heads", "n_layers")

    def vocabulary(self, config: dict[str, Any]) -> int:
        return int(config.get("embedding_size") or config["vocab_size"])

    def trunk_config(self, keys: dict[str, Any]) -> PreTrainedConfig:
        no, yes = (False,), (True,)
        refuse(keys, self.facts, block_type=("llama",), layer_norm_type=("rms",), activation_type=("silu",))
        refuse(keys, self.facts, alibi=no, attention_layer_norm=no, bias_for_layer_norm=no, include_bias=no)
        refuse(keys, self.facts, include_qkv_bias=no, input_emb_norm=no, scale_logits=no, block_group_size=(1,))
        refuse(keys, self.facts, layer_norm_with_affine=yes, clip_qkv=("null",))
        refuse({"rope": bool(keys.get("rope"))}, self.facts, rope=yes)  # absent, upstream has no rotary positions
        rope = rope_parameters(keys, self.facts)
        refuse(rope, self.facts, rope_type=("default",), type=("default",))  # upstream reads no scaling, and has none
        heads = keys["n_heads"]
        renamed = {
            "vocab_size": self.vocabulary(keys),
            "hidden_size": keys["d_model"],
            "num_hidden_layers": keys["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": keys.get("n_kv_heads") or (1 if keys.get("multi_query_attention") else heads),
            "intermediate_size": keys.get("mlp_hidden_size") or keys.get("mlp_ratio", 4) * keys["d_model"],
            "rms_norm_eps": keys.get("rms_norm_eps", 1e-5),
            "rope_parameters": rope,
            "max_position_embeddings": keys.get("max_sequence_length", 4096),
            "initializer_range": keys.get("init_std", 0.02),
            "tie_word_embeddings": self._tying(keys),
            "pad_token_id": None,
            "attn_implementation": keys["attn_implementation"],
        }
        return LlamaConfig(**renamed)

    def _tying(self, keys: dict[str, Any]) -> bool:
        """Whether the head is the embedding, which upstream and transformers call by two names."""
        tied, other = keys.get("weight_tying"), keys.get("tie_word_embeddings")
        if not isinstance(tied, bool):
            raise ModelError(f"config.json: weight_tying = {tied!r}; a config of llada needs true or false here")
        if other not in (None, tied):
            raise ModelError(
                f"config.json: weight_tying = {tied} and tie_word_embeddings = {other} disagree; the first is LLaDA's "
                "key: set the second to it, or remove it"
            )
        return tied

    def upstream(self, name: str) -> Iterator[Piece]:
        module, _, kind = name.rpartition(".")
        if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
            yield Piece(f"model.transformer.blocks.{layer[1]}.{LAYER_NAMES[layer[2]]}.{kind}", f"lm.{name}")
        else:
            yield Piece(f"model.transformer.{TOP_NAMES[module]}.{kind}", f"lm.{name}")
