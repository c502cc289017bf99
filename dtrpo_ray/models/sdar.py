"""SDAR and TraDo: a Qwen3 trunk, dense or with experts, with block attention, mask token, no logit shift.

The trunk is transformers' own Qwen3; the config keys and tensor names on disk are SDAR's (`block_size`,
`mask_token_id`). The demo's tiny model is one too: the upstream layout with smaller numbers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import QWEN_LORA, QWEN_SIZES, DiffusionLM, FamilyFacts, LoraTargets, TensorPiece


class SDAR(DiffusionLM):
    """Block-diffusion Qwen3. `config` holds the keys of an SDAR `config.json`."""

    facts = FamilyFacts(
        model_type="sdar",
        architectures=("SDARForCausalLM",),
        releases="SDAR-1.7B/4B/8B-Chat, TraDo-4B/8B-Instruct",
        trunk="Qwen3",
        block_size=None,  # 4, 8, 16, 32 or 64 by release: a guess would decode noise
        mask_id=151669,
        eos_id=None,
        sources=("JetAstra/SDAR: config.json and modeling_sdar.py of SDAR-4B-Chat", "Gen-Verse/dLLM-RL: generate.py"),
    )
    trunk = Qwen3ForCausalLM

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("block_size") is None:
            raise ModelError(
                'config.json: block_size = None; add "block_size": 4 for SDAR-Chat and TraDo, or the N of a release '
                "that ends in -bN"
            )
        super().__init__(config)


class SDARMoe(DiffusionLM):
    """Block-diffusion Qwen3-MoE. Adapters go on attention only: the routed experts are no linear modules.

    The release's config.json names neither block size nor mask token; 4 and 151669 come from its generation script and
    tokenizer. A release with other blocks needs `block_size` in its config.json.
    """

    facts = FamilyFacts(
        model_type="sdar_moe",
        architectures=("SDARMoeForCausalLM",),
        releases="SDAR-30B-A3B-Chat",
        trunk="Qwen3-MoE",
        block_size=4,
        mask_id=151669,
        eos_id=151643,
        sources=(
            "JetAstra/SDAR: config.json, tokenizer and tensor index of SDAR-30B-A3B-Chat",
            "transformers: modeling_qwen3_moe.py",
        ),
    )
    trunk = Qwen3MoeForCausalLM
    sizes = (*QWEN_SIZES, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    lora = LoraTargets(QWEN_LORA.attention, ())

    def upstream(self, name: str) -> Iterator[TensorPiece]:
        return self.split_experts(name) if ".experts." in name else super().upstream(name)
