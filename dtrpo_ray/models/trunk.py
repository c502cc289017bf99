"""What the families share: a causal language model of transformers, run with explicit positions and masks.

A family says which trunk class it is, how its config keys read (`trunk_config`) and, where names or shapes differ,
how its tensors map (`pieces`). The trunk's own causal mask, its training forward and remote code are never used.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import DiffusionLM, Facts, LoraTargets, Piece

QWEN_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# kept from the trunk; a pad token too: torch would freeze its embedding at zero, and most configs pad with the
# end-of-sequence token, which is text (our rows are padded by the attention mask)
NOT_OF_THE_TRUNK = (
    "architectures", "attn_implementation", "auto_map", "dtype", "model_type", "pad_token_id", "torch_dtype",
    "transformers_version", "_name_or_path",
)  # fmt: skip
QWEN_LORA = LoraTargets(("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))


class TrunkLM(DiffusionLM):
    """A family on a trunk of transformers: `lm.model` gives hidden states, `lm.lm_head` logits."""

    trunk: type[PreTrainedModel]
    sizes: tuple[str, ...] = QWEN_SIZES
    lora = QWEN_LORA

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        facts = self.facts
        require_sizes(config, self.sizes, facts)
        self.config = dict(config)
        self.vocab_size = self.vocabulary(config)
        self.mask_id = integer(config, "mask_token_id", facts.mask_id, facts)
        self.eos_id, *others = self.end_tokens(config)
        self.other_ends = frozenset(others)
        self.block_size = integer(config, facts.block_key, facts.block_size, facts)
        self.attention, self.block_origin, self.shift = facts.attention, facts.block_origin, facts.shift
        if self.block_size < 1:
            raise ModelError(
                f"config.json: {facts.block_key} = {self.block_size}; {_kind(facts)} needs at least 1 here"
            )
        whole = min(facts.small_block_size or self.block_size, self.block_size)
        self.small_block_size = integer(config, "small_block_size", whole, facts)
        if self.small_block_size < 1 or self.block_size % self.small_block_size:
            raise ModelError(
                f"config.json: small_block_size = {self.small_block_size} does not divide {facts.block_key} = "
                f"{self.block_size}; give one that does, or {self.block_size} to decode by whole blocks"
            )
        ends = (("eos_token_id", token) for token in (self.eos_id, *others))
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
        rope_parameters(config, facts)  # whose base has no default here
        try:
            # a copy: transformers writes into the nested rope_scaling, which is saved as it was read
            keys = deepcopy({k: v for k, v in config.items() if k not in NOT_OF_THE_TRUNK})
            trunk = self.trunk_config({**keys, "attn_implementation": "sdpa"})
            # the grouped kernel refuses weights that start at odd addresses, as those gathered by ZeRO-3 do
            trunk._experts_implementation = "eager"
        except ModelError:
            raise
        except Exception as error:  # transformers checks its configs with a library of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(f"config.json: not a config of the {facts.trunk} trunk ({reason})") from None
        self.lm = self.trunk(trunk)
        # transformers renames the argument within version 5
        named = signature(self.lm.model.forward).parameters
        self.cache_name = "cache" if "cache" in named else "past_key_values"

    def vocabulary(self, config: dict[str, Any]) -> int:
        """Rows of the embedding."""
        return int(config["vocab_size"])

    def end_tokens(self, config: dict[str, Any]) -> list[int]:
        """The tokens that end a response, `eos_id` first."""
        return integers(config, "eos_token_id", self.facts.eos_id, self.facts)

    @abstractmethod
    def trunk_config(self, keys: dict[str, Any]) -> PreTrainedConfig:
        """The trunk's config from the family's config keys, without those no trunk reads."""

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding, and so no tensor of the checkpoint."""
        return bool(self.lm.config.tie_word_embeddings)

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor, cache: object | None = None) -> Tensor:
        # a mask of four axes, or a dict of masks by kind of layer, bypasses the trunk's own causal mask
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:  # else every layer would make this of it, and keep it
            mask = torch.zeros_like(mask, dtype=self.lm.dtype).masked_fill_(~mask, float("-inf"))
        kept = {} if cache is None else {self.cache_name: cache}
        return self.lm.model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=self.trunk_mask(mask),
            use_cache=cache is not None,
            **kept,
        ).last_hidden_state

    def trunk_mask(self, mask: Tensor) -> Any:
        """The mask as the trunk takes a finished one."""
        return mask

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm.lm_head(hidden)

    def pieces(self) -> Iterator[Piece]:
        for name in self.lm.state_dict():
            if not (self.tied and name == "lm_head.weight") and ".lora_" not in name:
                yield from self.upstream(name.replace(".base_layer.", "."))  # a weight under an adapter is itself

    def upstream(self, name: str) -> Iterator[Piece]:
        """The pieces of one tensor of the trunk, in the order of its elements; by default its upstream twin."""
        yield Piece(name, f"lm.{name}")

    def tied_tensors(self) -> tuple[str, str] | None:
        if not self.tied:
            return None
        head, embedding = (next(self.upstream(name)) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        return head.upstream, embedding.upstream

    def finish(self, device: torch.device | str) -> None:
        """Tie the head, and compute the rotary frequencies anew in float32: a model built on the meta device has
        none, and ZeRO-3 rounds what is computed while it builds."""
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


def integer(config: dict[str, Any], key: str, default: int | None, facts: Facts) -> int:
    """An integer of `config.json`, or the family's constant where the key is absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"config.json: {key} = {value!r}; {_kind(facts)} needs an integer here")
    return value


def integers(config: dict[str, Any], key: str, default: int | None, facts: Facts) -> list[int]:
    """As `integer`, where the key may also hold a list of them."""
    value = config.get(key)
    if not isinstance(value, list):
        return [integer(config, key, default, facts)]
    if not value:
        raise ModelError(f"config.json: {key} = []; {_kind(facts)} needs at least one id here")
    return [integer({key: each}, key, None, facts) for each in value]


def number(config: dict[str, Any], key: str, facts: Facts) -> float:
    """A positive number of `config.json` for which no default stands in: a guess would load, and compute noise."""
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ModelError(
            f"config.json: {key} = {value!r}; {_kind(facts)} needs a number above 0 here; copy it from the release's"
        )
    return float(value)


def rope_parameters(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """The rotary positions as transformers 5 says them; `rope_theta` may be a key of its own, as it was before."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {"rope_type": "default"}
    theta = given.get("rope_theta") if config.get("rope_theta") is None else config["rope_theta"]
    return {**given, "rope_theta": number({"rope_theta": theta}, "rope_theta", facts)}


def require_sizes(config: dict[str, Any], keys: tuple[str, ...], facts: Facts) -> None:
    """Raise ModelError for a size that is absent, no integer, or below 1."""
    for key in keys:
        if integer(config, key, None, facts) < 1:
            raise ModelError(f"config.json: {key} = {config[key]}; {_kind(facts)} needs at least 1 here")


def refuse(config: dict[str, Any], facts: Facts, **supported: tuple[Any, ...]) -> None:
    """Raise ModelError for a key whose value changes the architecture; absent and null mean the first one."""
    for key, allowed in supported.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            known = " or ".join(repr(a) for a in allowed)
            raise ModelError(f"config.json: {key} = {value!r} is not supported for {facts.model_type}; only {known} is")


def split_experts(name: str, width: int, count: int) -> Iterator[Piece]:
    """Pieces of a trunk's stacked experts: gate over up [experts, 2 * width, H], or down [experts, H, width]."""
    stem, _, kind = name.rpartition(".")
    for expert in range(count):
        if kind == "down_proj":
            yield Piece(f"{stem}.{expert}.down_proj.weight", f"lm.{name}", at=(expert,))
        else:
            yield Piece(f"{stem}.{expert}.gate_proj.weight", f"lm.{name}", at=(expert, slice(0, width)))
            yield Piece(f"{stem}.{expert}.up_proj.weight", f"lm.{name}", at=(expert, slice(width, 2 * width)))


def _kind(facts: Facts) -> str:
    return f"a config of {facts.model_type}"
