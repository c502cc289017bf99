"""Dream and DiffuCoder: a Qwen2.5 trunk with full attention and the autoregressive shift.

Neither trains on blocks: `block_size` here is the tokens decoded before the next ones, on a grid that starts at the
response. config.json may set it; 32 is ours, and any divisor of the canvas gives the same logits.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from dtrpo_ray.models.base import Facts
from dtrpo_ray.models.trunk import TrunkLM, refuse


class Dream(TrunkLM):
    """Full-attention Qwen2.5, tokens predicted from the state before them."""

    facts = Facts(
        model_type="Dream",
        architectures=("DreamModel",),
        releases="Dream-v0-Base/Instruct-7B, Dream-Coder-v0-7B, DiffuCoder-7B",
        trunk="Qwen2",
        attention="full",
        block_origin="response",
        shift=1,
        block_key="block_size",
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

    def trunk_config(self, keys: dict[str, Any]) -> PreTrainedConfig:
        refuse(keys, self.facts, use_mrope=(False,))
        return Qwen2Config(**keys)

    def trunk_mask(self, mask: Tensor) -> Any:
        return {"full_attention": mask}
