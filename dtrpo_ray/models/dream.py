"""Dream and DiffuCoder: a Qwen2.5 trunk with full attention and the autoregressive shift.

Neither trains on blocks. `block_size` only says how many tokens are decoded before the next ones, on a grid that starts
at the response: config.json may set it, the default 32 is ours, and it does not change the logits.
"""

from transformers import PreTrainedConfig, Qwen2ForCausalLM

from dtrpo_ray.models.base import DiffusionLM, FamilyFacts
from dtrpo_ray.models.config_json import ConfigJson


class Dream(DiffusionLM):
    """Full-attention Qwen2.5, tokens predicted from the state before them."""

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
    mask_by_layer_type = True

    def trunk_config(self, keys: ConfigJson) -> PreTrainedConfig:
        keys.refuse(use_mrope=(False,))
        return super().trunk_config(keys)
