"""SDAR and TraDo: a Qwen3 trunk with block attention, mask token, no logit shift.

The trunk is transformers' own Qwen3; the config keys and tensor names on disk are SDAR's (`model_type: "sdar"`,
`block_size`, `mask_token_id`). The demo's tiny model is one too: the upstream layout with smaller numbers.
"""

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3ForCausalLM

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import QWEN_SIZES, DiffusionLM, FamilyFacts


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
    mask_by_layer_type = True
    sizes = (*QWEN_SIZES, "block_size")

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("block_size") is None:
            raise ModelError(
                'config.json: block_size = None; add "block_size": 4 for SDAR-Chat and TraDo, or the N of a release '
                "that ends in -bN"
            )
        super().__init__(config)
