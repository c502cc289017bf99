"""SDAR: a Qwen3 trunk with block attention, mask token, no logit shift (JetAstra/SDAR). The demo's tiny model too.

The trunk is transformers' own Qwen3; the config keys and tensor names on disk are SDAR's (`model_type: "sdar"`,
`block_size`, `mask_token_id`), so a tiny checkpoint is the upstream layout with smaller numbers.
"""

from typing import Any

from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import DiffusionLM

MODEL_TYPE = "sdar"
ARCHITECTURE = "SDARForCausalLM"
SIZE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "block_size")
REQUIRED_KEYS = (*SIZE_KEYS, "mask_token_id", "eos_token_id")
# kept from the trunk; a pad token too: torch would freeze its embedding at zero, and most configs pad with the
# end-of-sequence token, which is text (our rows are padded by the attention mask)
NOT_OF_THE_TRUNK = ("architectures", "auto_map", "model_type", "pad_token_id")


class SDAR(DiffusionLM):
    """Block-diffusion Qwen3. `config` holds the keys of an SDAR `config.json`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        for key in REQUIRED_KEYS:
            if not isinstance(config.get(key), int):
                raise ModelError(f"config.json: {key} = {config.get(key)!r}; an SDAR config needs an integer here")
        for key in SIZE_KEYS:
            if config[key] < 1:
                raise ModelError(f"config.json: {key} = {config[key]}; an SDAR config needs at least 1 here")
        self.config = dict(config)
        self.mask_id = config["mask_token_id"]
        self.eos_id = config["eos_token_id"]
        self.block_size = config["block_size"]
        self.vocab_size = config["vocab_size"]
        if not 0 <= self.mask_id < self.vocab_size:
            raise ModelError(
                f"config.json: mask_token_id = {self.mask_id} lies outside the vocabulary of {self.vocab_size}; "
                "give the id of the mask token in the tokenizer"
            )
        trunk_keys = {key: value for key, value in config.items() if key not in NOT_OF_THE_TRUNK}
        trunk = Qwen3Config(**{**trunk_keys, "attn_implementation": "sdpa"})
        self.lm = Qwen3ForCausalLM(trunk)

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor, cache: object | None = None) -> Tensor:
        # a dict of masks bypasses the trunk's own causal mask
        return self.lm.model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask={"full_attention": mask},
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm.lm_head(hidden)
