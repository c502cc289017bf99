"""SDAR-MoE (SDAR-30B-A3B): SDAR on transformers' Qwen3-MoE trunk, whose experts are stacked in memory.

Quirks of the release: its config.json names neither block size nor mask token; 4 and 151669 come from its generation
script and tokenizer. A release with other blocks needs `block_size` in its config.json.
"""

from collections.abc import Iterator

from transformers import Qwen3MoeForCausalLM

from dtrpo_ray.models.base import QWEN_LORA, QWEN_SIZES, DiffusionLM, FamilyFacts, LoraTargets, TensorPiece


class SDARMoe(DiffusionLM):
    """Block-diffusion Qwen3-MoE. Adapters go on attention only: the routed experts are no linear modules."""

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
        if ".experts." not in name:
            return super().upstream(name)
        return self.split_experts(name)
