"""LLaDA2.x: block attention, no shift, a mixture of experts with a sigmoid router limited to groups of experts.

The architecture is that of transformers' GLM-4-MoE (partial rotary positions, q/k norms, shared experts, first layers
dense, a bias that changes the choice of experts and not their weights). Quirks of the published layout: q, k and v are
one tensor, each expert has tensors of its own, and the router's bias is float32 whatever dtype the weights have (as in
LLaDA2.1-mini's file).
"""

from collections.abc import Iterator

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedConfig

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import QWEN_SIZES, DiffusionLM, FamilyFacts, TensorPiece
from dtrpo_ray.models.config_json import ConfigJson

RENAMED = {
    "embed_tokens.": "word_embeddings.",
    "self_attn.o_proj.": "attention.dense.",
    "self_attn.q_norm.": "attention.query_layernorm.",
    "self_attn.k_norm.": "attention.key_layernorm.",
    "e_score_correction_bias": "expert_bias",
}


class LLaDA2(DiffusionLM):
    """Block-diffusion mixture of experts. Adapters go on attention, dense and shared MLPs, not on routed experts."""

    facts = FamilyFacts(
        model_type="llada2_moe",
        architectures=("LLaDA2MoeModelLM",),
        releases="LLaDA2.0-mini/flash, LLaDA2.1-mini",
        trunk="GLM-4-MoE",
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

    def end_tokens(self, config: ConfigJson) -> list[int]:
        # the published config names its end-of-text token only as padding
        return config.integers("eos_token_id", config.get("pad_token_id") or self.facts.eos_id)

    def trunk_config(self, keys: ConfigJson) -> PreTrainedConfig:
        no, yes = (False,), (True,)
        keys.refuse(use_bias=no, use_rmsnorm=yes, use_qk_norm=yes, norm_topk_prob=yes, norm_head=no)
        keys.refuse(score_function=("sigmoid",), moe_router_enable_expert_bias=yes, router_dtype=("fp32",))
        if keys["num_experts_per_tok"] == 1:  # upstream leaves a single expert's weight as it is; the trunk does not
            keys.refuse(num_experts_per_tok=("2 and more",))
        experts, groups, kept, chosen = (
            keys[key] for key in ("num_experts", "n_group", "topk_group", "num_experts_per_tok")
        )
        share = experts // groups
        room = f"topk_group = {kept} groups of {share}"
        for wrong, problem in (
            (experts % groups, f"n_group = {groups} does not divide num_experts = {experts}"),
            (kept > groups, f"topk_group = {kept} exceeds n_group = {groups}"),
            (chosen > kept * share, f"num_experts_per_tok = {chosen} exceeds the experts of {room}"),
        ):
            if wrong:
                raise ModelError(f"config.json: {problem}")
        copied = [*self.sizes, "intermediate_size", "first_k_dense_replace", "rms_norm_eps"]
        copied += ["hidden_act", "max_position_embeddings", "initializer_range", "tie_word_embeddings"]
        copied += ["attn_implementation"]
        renamed = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
        return Glm4MoeConfig(
            **{renamed.get(key, key): keys[key] for key in copied if keys.get(key) is not None},
            rope_parameters={**keys.rope_parameters(), "partial_rotary_factor": self._rotary_factor(keys)},
            routed_scaling_factor=keys.number("routed_scaling_factor"),
            attention_bias=bool(keys.get("use_qkv_bias", False)),
            use_qk_norm=True,
            norm_topk_prob=True,
            num_mtp_layers=0,
            pad_token_id=None,
        )

    def _rotary_factor(self, keys: ConfigJson) -> float:
        """Return the share of a head's dimensions that are rotated.

        The published config says it twice, as a share and as a count; transformers 5 saves it within rope_parameters.
        """
        whole = {"partial_rotary_factor": 1, "rotary_dim": keys["head_dim"]}
        own = {key: value for key, value in keys.items() if value is not None}
        keys = ConfigJson({**(keys.get("rope_parameters") or {}), **own}, keys.family)
        given = [key for key in whole if keys.get(key) is not None] or ["partial_rotary_factor"]
        shares = [keys.number(key) / whole[key] for key in given]
        if min(shares) != max(shares) or shares[0] > 1:
            said = " and ".join(f"{key} = {keys[key]}" for key in given)
            raise ModelError(f"config.json: {said} with head_dim = {keys['head_dim']}; give one share, of at most 1")
        return shares[0]

    def upstream(self, name: str) -> Iterator[TensorPiece]:
        if ".experts." in name:
            yield from self.split_experts(name)
        elif any(f".{part}_proj." in name for part in "qkv") and "self_attn" in name:
            yield self._qkv_piece(name)
        else:
            theirs = name
            for ours, published in RENAMED.items():
                theirs = theirs.replace(ours, published)
            yield TensorPiece(theirs, f"lm.{name}")

    def _qkv_piece(self, name: str) -> TensorPiece:
        """Locate q, k or v in the fused tensor: rows in this order, all heads of each together."""
        size, kv_heads = self.config["head_dim"], self.config["num_key_value_heads"]
        stops = [heads * size for heads in (self.config["num_attention_heads"], kv_heads, kv_heads)]
        stem, _, leaf = name.rpartition("self_attn.")
        which, kind = "qkv".index(leaf[0]), leaf.rpartition(".")[2]
        start = sum(stops[:which])
        return TensorPiece(f"{stem}attention.query_key_value.{kind}", f"lm.{name}", start, start + stops[which])
