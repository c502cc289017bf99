"""LLaDA: full attention, no shift; a Llama trunk under the names of OLMo's layout.

Quirks of the release: `ff_proj` is the gate (its activation multiplies `up_proj`); `ff_out` is the down projection
within a block and the output head beside the blocks; `embedding_size`, not `vocab_size`, counts the embedding's rows.
"""

import re
from collections.abc import Iterator

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import DiffusionLM, FamilyFacts, TensorPiece
from dtrpo_ray.models.config_json import ConfigJson

LAYER_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "self_attn.o_proj": "attn_out"}
LAYER_NAMES |= {f"self_attn.{part}_proj": f"{part}_proj" for part in "qkv"}
LAYER_NAMES |= {"mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out"}
TOP_NAMES = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


class LLaDA(DiffusionLM):
    """Full-attention Llama. `config` holds the keys of a LLaDA `config.json`."""

    facts = FamilyFacts(
        model_type="llada",
        architectures=("LLaDAModelLM",),
        releases="LLaDA-8B-Base/Instruct, LLaDA-1.5",
        trunk="Llama",
        attention="full",
        block_origin="response",
        block_size=32,  # no key of the release, whose decoding takes any block length
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

    def vocabulary(self, config: ConfigJson) -> int:
        return int(config.get("embedding_size") or config["vocab_size"])

    def trunk_config(self, keys: ConfigJson) -> PreTrainedConfig:
        no, yes = (False,), (True,)
        keys.refuse(block_type=("llama",), layer_norm_type=("rms",), activation_type=("silu",))
        keys.refuse(alibi=no, attention_layer_norm=no, bias_for_layer_norm=no, include_bias=no)
        keys.refuse(include_qkv_bias=no, input_emb_norm=no, scale_logits=no, block_group_size=(1,))
        keys.refuse(layer_norm_with_affine=yes, clip_qkv=("null",))
        if not keys.get("rope"):  # absent means no rotary positions upstream
            raise ModelError("config.json: rope = False is not supported for llada; only True is")
        rope = keys.rope_parameters()
        ConfigJson(rope, "llada").refuse(rope_type=("default",), type=("default",))  # upstream has no scaling
        # upstream and transformers have a key each for a head that is the embedding
        tied, other = keys.get("weight_tying"), keys.get("tie_word_embeddings")
        if not isinstance(tied, bool):
            raise keys.error("weight_tying", "true or false", tied)
        if other not in (None, tied):
            raise ModelError(
                f"config.json: weight_tying = {tied} and tie_word_embeddings = {other} disagree; LLaDA reads the "
                "first: set the second to the same value, or remove it"
            )
        heads = keys["n_heads"]
        return LlamaConfig(  # type: ignore[call-arg]
            vocab_size=self.vocabulary(keys),
            hidden_size=keys["d_model"],
            num_hidden_layers=keys["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=keys.get("n_kv_heads") or (1 if keys.get("multi_query_attention") else heads),
            intermediate_size=keys.get("mlp_hidden_size") or keys.get("mlp_ratio", 4) * keys["d_model"],
            rms_norm_eps=keys.get("rms_norm_eps", 1e-5),
            rope_parameters=rope,
            max_position_embeddings=keys.get("max_sequence_length", 4096),
            initializer_range=keys.get("init_std", 0.02),
            tie_word_embeddings=tied,
            pad_token_id=None,
            attn_implementation=keys["attn_implementation"],
        )

    def upstream(self, name: str) -> Iterator[TensorPiece]:
        module, _, kind = name.rpartition(".")
        if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
            yield TensorPiece(f"model.transformer.blocks.{layer[1]}.{LAYER_NAMES[layer[2]]}.{kind}", f"lm.{name}")
        else:
            yield TensorPiece(f"model.transformer.{TOP_NAMES[module]}.{kind}", f"lm.{name}")
