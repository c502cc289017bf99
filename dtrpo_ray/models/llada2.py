"""LLaDA2.x: block attention, no shift, a mixture of experts with a sigmoid router limited to groups of experts.

The architecture is that of transformers' GLM-4-MoE (partial rotary positions, q/k norms, shared experts, first layers
dense, a bias that steers the choice of experts and not their weights); the published layout fuses q, k and v and stores
each expert by itself. The router's bias stays in float32 whatever the weights are, as in LLaDA2.1-mini's own file.
"""

from collections.abc import Iterator
from typing import Any

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedConfig

from dtrpo_ray.models.base import Facts, LoraTargets, Piece
from dtrpo_ray.models.trunk import QWEN_LORA, QWEN_SIZES, TrunkLM, integer, refuse, split_experts

RENAMED = {
    "embed_tokens.": "word_embeddings.",
    "self_attn.o_proj.": "attention.dense.",
    "self_attn.q_norm.": "attention.query_layernorm.",
    "self_attn.k_norm.": "attention.key_layernorm.",
    "e_score_correction_bias": "expert_bias",
}


class LLaDA2(TrunkLM):
    """Block-diffusion mixture of experts. Adapters reach attention, dense and shared MLPs, not the routed experts."""

    facts = Facts(
        model_type="llada2_moe",
        architectures=("LLaDA2MoeModelLM",),
        releases="LLaDA2.0-mini/flash, LLaDA2.1-mini",
        trunk="GLM-4-MoE",
        attention="block",
        block_origin="global",
        shift=0,
        block_key="block_size",
        block_size=32,
        mask_id=156895,
        eos_id=156892,
        sources=(
            "yjyddq/DARE: config.json, tokenizer and tensor index of LLaDA2.0-mini and LLaDA2.1-mini",
            "modeling_llada2_moe.py as kept in public ports of it",
        ),
    )
    trunk = Glm4MoeForCausalLM
    sizes = (
        *QWEN_SIZES,
        *("num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "n_group", "topk_group", "num_shared_experts"),
    )
    lora = LoraTargets(QWEN_LORA.attention, QWEN_LORA.mlp)

    def end_token(self, config: dict[str, Any]) -> int:
        # the published config names its end-of-text token as padding alone
        return integer(config, "eos_token_id", config.get("pad_token_id") or self.facts.eos_id, self.facts)

    def trunk_config(self, keys: dict[str, Any]) -> PreTrainedConfig:
        no, yes = (False,), (True,)
        refuse(keys, self.facts, use_bias=no, use_rmsnorm=yes, use_qk_norm=yes, norm_topk_prob=yes, norm_head=no)
        refuse(keys, self.facts, score_function=("sigmoid",), moe_router_enable_expert_bias=yes, router_dtype=("fp32",))
        if keys["num_experts_per_tok"] == 1:  # upstream leaves a single expert's weight as it is; the trunk does not
            refuse(keys, self.facts, num_experts_per_tok=("2 and more",))
        copied = [*self.sizes, "intermediate_size", "routed_scaling_factor", "first_k_dense_replace", "rms_norm_eps"]
        copied += ["hidden_act", "max_position_embeddings", "initializer_range", "tie_word_embeddings"]
        copied += ["attn_implementation"]
        renamed = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
        rotary = keys.get("partial_rotary_factor", keys.get("rotary_dim", keys["head_dim"]) / keys["head_dim"])
        scaling = keys.get("rope_scaling") or {"rope_type": "default"}
        return Glm4MoeConfig(
            **{renamed.get(key, key): keys[key] for key in copied if keys.get(key) is not None},
            rope_parameters={**scaling, "rope_theta": keys.get("rope_theta", 6e5), "partial_rotary_factor": rotary},
            attention_bias=bool(keys.get("use_qkv_bias", False)),
            use_qk_norm=True,
            norm_topk_prob=True,
            num_mtp_layers=0,
            pad_token_id=None,
        )

    def upstream(self, name: str) -> Iterator[Piece]:
        if ".experts." in name:
            yield from split_experts(name, self.config["moe_intermediate_size"], self.config["num_experts"])
        elif any(f".{part}_proj." in name for part in "qkv") and "self_attn" in name:
            yield self._fused(name)
        else:
            theirs = name
            for ours, published in RENAMED.items():
                theirs = theirs.replace(ours, published)
            yield Piece(theirs, f"lm.{name}")

    def _fused(self, name: str) -> Piece:
        """q, k and v are rows of one tensor, all heads of q first."""
        size, kv_heads = self.config["head_dim"], self.config["num_key_value_heads"]
        stops = [heads * size for heads in (self.config["num_attention_heads"], kv_heads, kv_heads)]
        stem, _, leaf = name.rpartition("self_attn.")
        which = "qkv".index(leaf[0])
        start = sum(stops[:which])
        kind = leaf.rpartition(".")[2]
        return Piece(f"{stem}attention.query_key_value.{kind}", f"lm.{name}", start, start + stops[which])
