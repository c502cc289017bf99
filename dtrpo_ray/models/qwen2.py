"""Dream, DiffuCoder, Fast-dLLM v2: Qwen2.5 with the autoregressive shift (the state before a token predicts it)."""

from transformers import PreTrainedConfig, Qwen2ForCausalLM

from dtrpo_ray.models.base import DiffusionLM, FamilyFacts
from dtrpo_ray.models.config_json import ConfigJson


class Dream(DiffusionLM):
    """Full attention, not trained on blocks.

    `block_size` only says how many tokens are decoded before the next ones, on a grid that starts at the response:
    config.json may set it, the default 32 is ours, and it does not change the logits.
    """

    facts = FamilyFacts(
        model_type="Dream",
        architectures=("DreamModel",),
        releases="Dream-v0-Base/Instruct-7B, Dream-Coder-v0-7B, DiffuCoder-7B",
        trunk="Qwen2",
        attention="full",
        block_origin="response",
        shift=1,
        block_size=32,
        mask_id=151666,
        eos_id=151643,
        sources=(
            "yjyddq/DARE: config.json, modeling_dream.py and tensor index of Dream-v0-Instruct-7B",
            "DreamLM/Dream: eval.py",
            "apple/ml-diffucoder",
        ),
    )
    trunk = Qwen2ForCausalLM

    def trunk_config(self, keys: ConfigJson) -> PreTrainedConfig:
        keys.refuse(use_mrope=(False,))
        return super().trunk_config(keys)


class FastDLLM(DiffusionLM):
    """Block attention.

    Quirks of the release: the mask token is spelled `|<MASK>|` and config.json does not name its id; the block size is
    called `bd_size`; config.json and generation_config.json name different padding tokens.
    """

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
