"""Fast-dLLM v2: a Qwen2.5 trunk with block attention and the autoregressive shift.

Quirks of the release: the mask token is spelled `|<MASK>|` and config.json does not name its id; the block size is
called `bd_size`; config.json and generation_config.json name different padding tokens.
"""

from transformers import Qwen2ForCausalLM

from dtrpo_ray.models.base import DiffusionLM, FamilyFacts


class FastDLLM(DiffusionLM):
    """Block-diffusion Qwen2.5, tokens predicted from the state before them."""

    facts = FamilyFacts(
        model_type="Fast_dLLM_Qwen",
        architectures=("Fast_dLLM_QwenForCausalLM",),
        releases="Fast_dLLM_v2_1.5B, Fast_dLLM_v2_7B",
        trunk="Qwen2",
        shift=1,
        block_key="bd_size",
        block_size=32,
        mask_id=151665,
        eos_id=151645,
        sources=(
            "Satgoy152/DualDiffusion: config.json, modeling.py, tokenizer and tensor index of Fast_dLLM_v2_7B",
            "arXiv 2509.26328",
        ),
        small_block_size=8,  # the default of its `generate`; config.json may name another
    )
    trunk = Qwen2ForCausalLM
    mask_by_layer_type = True
