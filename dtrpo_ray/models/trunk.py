"""Run a causal language model of transformers, the trunk of every family, with explicit positions and masks.

A family names its trunk class, converts its config keys (`trunk_config`) and, if names or shapes differ, maps its
tensors (`upstream`). The trunk's own causal mask, its training forward and remote code are never used.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import DiffusionLM, LoraTargets, TensorPiece
from dtrpo_ray.models.config_json import ConfigJson

QWEN_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# keys that the trunk must not see. pad_token_id among them: torch would freeze its embedding at zero, and most configs
# pad with the end-of-sequence token, which is text (our rows are padded by the attention mask)
HIDDEN_KEYS = (
    "architectures", "attn_implementation", "auto_map", "dtype", "model_type", "pad_token_id", "torch_dtype",
    "transformers_version", "_name_or_path",
)  # fmt: skip
QWEN_LORA = LoraTargets(("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))


class TrunkLM(DiffusionLM):
    """A family on a trunk of transformers: `lm.model` computes hidden states, `lm.lm_head` logits."""

    trunk: type[PreTrainedModel]
    mask_by_layer_type = False  # True: the trunk takes a finished mask only in a dict, by kind of layer
    sizes: tuple[str, ...] = QWEN_SIZES
    lora = QWEN_LORA

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        facts = self.facts
        self.config = config = ConfigJson(config, facts.model_type)
        config.require_sizes(self.sizes)
        self.vocab_size = self.vocabulary(config)
        self.mask_id = config.integer("mask_token_id", facts.mask_id)
        self.eos_id, *others = self.end_tokens(config)
        self.other_ends = frozenset(others)
        self.block_size = config.integer(facts.block_key, facts.block_size)
        self.attention, self.block_origin, self.shift = facts.attention, facts.block_origin, facts.shift
        if self.block_size < 1:
            raise config.error(facts.block_key, "at least 1", self.block_size)
        whole = min(facts.small_block_size or self.block_size, self.block_size)
        self.small_block_size = config.integer("small_block_size", whole)
        self._require_supported()
        self.lm = self.trunk(self._trunk_config())
        # transformers renames the argument within version 5
        named = signature(self.lm.model.forward).parameters
        self.cache_name = "cache" if "cache" in named else "past_key_values"

    def _require_supported(self) -> None:
        config = self.config
        if self.small_block_size < 1 or self.block_size % self.small_block_size:
            raise ModelError(
                f"config.json: small_block_size = {self.small_block_size} does not divide {self.facts.block_key} = "
                f"{self.block_size}; give one that does, or {self.block_size} to decode by whole blocks"
            )
        ends = (("eos_token_id", token) for token in self.end_tokens(config))
        for key, token in (("mask_token_id", self.mask_id), *ends):
            if not 0 <= token < self.vocab_size:
                raise ModelError(
                    f"config.json: {key} = {token} lies outside the vocabulary of {self.vocab_size}; "
                    f"give the id of that token in the tokenizer as {key}"
                )
        if config.get("use_sliding_window"):
            raise ModelError("config.json: use_sliding_window = true is not supported; every layer sees the whole mask")
        if odd := set(config.get("layer_types") or ()) - {"full_attention"}:
            raise ModelError(
                f"config.json: layer_types names {min(odd)!r}, which is not supported; every layer sees the whole mask "
                "(full_attention)"
            )
        config.rope_parameters()  # raises: rope_theta has no default

    def _trunk_config(self) -> PreTrainedConfig:
        try:
            # a copy: transformers writes into the nested rope_scaling, and ours is saved as it was read
            keys = deepcopy({k: v for k, v in self.config.items() if k not in HIDDEN_KEYS})
            trunk = self.trunk_config(ConfigJson({**keys, "attn_implementation": "sdpa"}, self.facts.model_type))
            # the grouped kernel refuses weights that start at odd addresses, as those gathered by ZeRO-3 do
            trunk._experts_implementation = "eager"
            return trunk
        except ModelError:
            raise
        except Exception as error:  # transformers checks its configs with a library of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(f"config.json: not a config of the {self.facts.trunk} trunk ({reason})") from None

    def vocabulary(self, config: ConfigJson) -> int:
        """Return the rows of the embedding."""
        return int(config["vocab_size"])

    def end_tokens(self, config: ConfigJson) -> list[int]:
        """Return the tokens that end a response, `eos_id` first."""
        return config.integers("eos_token_id", self.facts.eos_id)

    def trunk_config(self, keys: ConfigJson) -> PreTrainedConfig:
        """Convert the family's config keys, without HIDDEN_KEYS, to the trunk's config; by default unchanged."""
        config_class: Any = self.trunk.config_class
        config: PreTrainedConfig = config_class(**keys)
        return config

    @property
    def tied(self) -> bool:
        """True if the output head is the embedding, and so no tensor of the checkpoint."""
        return bool(self.lm.config.tie_word_embeddings)

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor, cache: object | None = None) -> Tensor:
        # a mask of four axes, or a dict of masks by kind of layer, bypasses the trunk's own causal mask
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:  # convert once: every layer would, and keep its copy
            mask = torch.zeros_like(mask, dtype=self.lm.dtype).masked_fill_(~mask, float("-inf"))
        kept = {} if cache is None else {self.cache_name: cache}
        return self.lm.model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask={"full_attention": mask} if self.mask_by_layer_type else mask,
            use_cache=cache is not None,
            **kept,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm.lm_head(hidden)

    def pieces(self) -> Iterator[TensorPiece]:
        for name in self.lm.state_dict():
            if not (self.tied and name == "lm_head.weight") and ".lora_" not in name:
                yield from self.upstream(name.replace(".base_layer.", "."))  # an adapted weight keeps its name

    def upstream(self, name: str) -> Iterator[TensorPiece]:
        """Return the pieces of one tensor of the trunk, in the order of its elements; by default the same name."""
        yield TensorPiece(name, f"lm.{name}")

    def tied_tensors(self) -> tuple[str, str] | None:
        if not self.tied:
            return None
        head, embedding = (next(self.upstream(name)) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        return head.upstream, embedding.upstream

    def finish(self, device: torch.device | str) -> None:
        """Tie the head, and compute the rotary frequencies in float32.

        A model built on the meta device has no frequencies, and ZeRO-3 rounds those computed while it builds.
        """
        if self.tied:
            self.lm.lm_head.weight = self.lm.model.embed_tokens.weight
        for module in self.modules():
            if hasattr(module, "inv_freq"):
                fresh: Any = type(module)(self.lm.config)  # type: ignore[call-arg]
                module.inv_freq = fresh.inv_freq.to(device, torch.float32)
                module.original_inv_freq = fresh.original_inv_freq.to(device, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrunkLM":
        # `.to(bfloat16)` would round the rotary frequencies and a router's bias; transformers keeps both in float32
        kept = {n: b for n, b in self.named_buffers() if b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if name in kept and buffer.dtype in (torch.bfloat16, torch.float16):
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, kept[name].to(buffer.device))
        return self


def split_experts(name: str, width: int, count: int) -> Iterator[TensorPiece]:
    """Split a trunk's stacked experts: gate over up [experts, 2 * width, H], or down [experts, H, width]."""
    stem, _, kind = name.rpartition(".")
    for expert in range(count):
        if kind == "down_proj":
            yield TensorPiece(f"{stem}.{expert}.down_proj.weight", f"lm.{name}", at=(expert,))
        else:
            yield TensorPiece(f"{stem}.{expert}.gate_proj.weight", f"lm.{name}", at=(expert, slice(0, width)))
            yield TensorPiece(f"{stem}.{expert}.up_proj.weight", f"lm.{name}", at=(expert, slice(width, 2 * width)))
