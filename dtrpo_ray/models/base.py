"""The interface of a model: the rest of the package uses these facts, numbers and functions, and nothing else.

A family (a class of this folder) names its trunk, a causal language model of transformers that is run with explicit
positions and masks, converts its config keys (`trunk_config`) and, if names or shapes differ, maps its tensors
(`upstream`); every quirk of its checkpoints stays in its file. The trunk's own causal mask, its training forward and
remote code are never used.
Shapes: B rows, T tokens of a row, N scored tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.config_json import ConfigJson

CHUNK_LOGITS = 2**26  # 256 MiB of float32
QWEN_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# keys that the trunk must not see. pad_token_id among them: torch would freeze its embedding at zero, and most configs
# pad with the end-of-sequence token, which is text (our rows are padded by the attention mask)
HIDDEN_KEYS = (
    "architectures", "attn_implementation", "auto_map", "dtype", "model_type", "pad_token_id", "torch_dtype",
    "transformers_version", "_name_or_path",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFacts:
    """The published facts of a family, printed by `dtrpo models`; `sources` say where each was read.

    `model_type` and `architectures` are those of its `config.json`. `mask_id`, `eos_id` and `block_size` apply if the
    config names none; None means that the config must. `block_key` is the config's name of the block size.
    `small_block_size` counts the tokens of a sub-block (the release decodes sub-blocks in turn); None: the whole block.
    """

    model_type: str
    architectures: tuple[str, ...]
    releases: str
    trunk: str
    attention: Literal["block", "full"] = "block"
    block_origin: Literal["global", "response"] = "global"
    shift: Literal[0, 1] = 0
    block_key: str = "block_size"
    block_size: int | None
    mask_id: int | None
    eos_id: int | None
    sources: tuple[str, ...]
    small_block_size: int | None = None


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Rows [start, stop) of the checkpoint's tensor `upstream` are our tensor `ours` at the index `at`.

    `stop` None means up to the last row; `at` () means all of ours. Most tensors are one piece under another name.
    """

    upstream: str
    ours: str
    start: int = 0
    stop: int | None = None
    at: tuple[int | slice, ...] = ()


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """The linear modules that take adapters, by part of the model."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    output: tuple[str, ...] = ("lm_head",)


QWEN_LORA = LoraTargets(("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))


class DiffusionLM(nn.Module):
    """A masked-diffusion language model: `lm.model` computes hidden states, `lm.lm_head` logits.

    `mask_id` is the [MASK] token; `eos_id` ends a response, as do `other_ends` (from generation_config.json and the
    chat template); `vocab_size` is the exclusive upper bound of ids. `block_size` counts the tokens of a block, on the
    grid that starts at position 0 (`block_origin` "global") or at the first response token ("response"); its sub-blocks
    of `small_block_size` are decoded in turn. `attention` is "block" (a block sees itself and earlier blocks) or "full"
    (everything sees everything, later blocks as [MASK]). `shift` is 1 if the hidden state at position p - 1 predicts
    the token at p, else 0: callers read hidden states at `position - shift`.
    """

    facts: ClassVar[FamilyFacts]
    trunk: ClassVar[type[PreTrainedModel]]
    sizes: ClassVar[tuple[str, ...]] = QWEN_SIZES
    lora: ClassVar[LoraTargets] = QWEN_LORA
    lm: Any  # an instance of `trunk`

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        facts = self.facts
        self.config = config = ConfigJson(config, facts.model_type)
        for key in self.sizes:
            if config.integer(key) < 1:
                raise config.error(key, "at least 1", config[key])
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
        ends = self.end_tokens(config)
        for key, token in (("mask_token_id", self.mask_id), *(("eos_token_id", end) for end in ends)):
            if not 0 <= token < self.vocab_size:
                raise ModelError(
                    f"config.json: {key} = {token} lies outside the vocabulary of {self.vocab_size}; "
                    f"give the id of that token in the tokenizer as {key}"
                )
        sliding = "use_sliding_window = true is" if config.get("use_sliding_window") else ""
        if odd := set(config.get("layer_types") or ()) - {"full_attention"}:
            sliding = f"layer_types names {min(odd)!r}, which is"
        if sliding:
            raise ModelError(f"config.json: {sliding} not supported; every layer sees the whole mask (full_attention)")
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
        return self.trunk.config_class(**keys)  # type: ignore[misc]

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor, row_N: Tensor, col_N: Tensor, target_N: Tensor
    ) -> Tensor:
        """Return log mu of the targets [N] whose hidden states lie at (row, col): training runs this one forward.

        It is `forward`, and not a function outside, because DeepSpeed hooks module calls.
        """
        hidden = self.hidden(ids_BT, positions_BT, mask)
        return token_logps(self.logits, hidden[row_N, col_N], target_N, self.vocab_size)

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor, cache: object | None = None) -> Tensor:
        """Return the last hidden states [B, T, H].

        `mask` is boolean [B or 1, 1, T, keys], True where attention is allowed.
        """
        # a mask of four axes bypasses the trunk's own causal mask
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:  # convert once: every layer would, and keep its copy
            mask = torch.zeros_like(mask, dtype=self.lm.dtype).masked_fill_(~mask, float("-inf"))
        kept = {} if cache is None else {self.cache_name: cache}
        return self.lm.model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=mask,
            use_cache=cache is not None,
            **kept,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states [..., H], for the token that each predicts (see `shift`)."""
        return self.lm.lm_head(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] in float32, that of the mask token -inf.

        A finished token is never [MASK], so the token predictor mu gives it no probability (the
        zero-masking-probability parameterisation of MDLM, arXiv 2406.07524, section 3.2.3). Training and decoding
        both read this.
        """
        logits = self.head(hidden).float()
        # detached, so that autograd makes no copy: a log-softmax has no gradient where the probability is 0
        logits.detach()[..., self.mask_id] = float("-inf")
        return logits

    def log_mu(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the log of the token predictor mu [..., V] in float32."""
        logits = self.logits(hidden)
        return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a response."""
        return self.other_ends | {self.eos_id}

    def pieces(self) -> Iterator[TensorPiece]:
        """Map the checkpoint's tensors to ours, for loading and saving: each element of ours exactly once."""
        tied = self.lm.config.tie_word_embeddings
        for name in self.lm.state_dict():
            if not (tied and name == "lm_head.weight") and ".lora_" not in name:
                yield from self.upstream(name.replace(".base_layer.", "."))  # an adapted weight keeps its name

    def checkpoint_tensors(self) -> dict[str, list[TensorPiece]]:
        """Return the pieces of each tensor of the checkpoint, in the model's order."""
        found: dict[str, list[TensorPiece]] = {}
        for piece in self.pieces():
            found.setdefault(piece.upstream, []).append(piece)
        return found

    def upstream(self, name: str) -> Iterator[TensorPiece]:
        """Return the pieces of one tensor of the trunk, in the order of its elements; by default the same name."""
        yield TensorPiece(name, f"lm.{name}")

    def split_experts(self, name: str) -> Iterator[TensorPiece]:
        """Split a trunk's stacked experts: gate over up [experts, 2 * width, H], or down [experts, H, width]."""
        stem, _, kind = name.rpartition(".")
        width = self.config["moe_intermediate_size"]
        for expert in range(self.config["num_experts"]):
            if kind == "down_proj":
                yield TensorPiece(f"{stem}.{expert}.down_proj.weight", f"lm.{name}", at=(expert,))
            else:
                yield TensorPiece(f"{stem}.{expert}.gate_proj.weight", f"lm.{name}", at=(expert, slice(0, width)))
                yield TensorPiece(f"{stem}.{expert}.up_proj.weight", f"lm.{name}", at=(expert, slice(width, 2 * width)))

    def tied_tensors(self) -> tuple[str, str] | None:
        """Return (head, embedding) in upstream names if they are tied; a checkpoint may hold the head all the same."""
        if not self.lm.config.tie_word_embeddings:
            return None
        head, embedding = (next(self.upstream(name)) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        return head.upstream, embedding.upstream

    def finish(self, device: torch.device | str) -> None:
        """Make what no checkpoint holds, once the weights are in place: a tied head, float32 rotary frequencies.

        A model built on the meta device has no frequencies, and ZeRO-3 rounds those computed while it builds.
        """
        if self.lm.config.tie_word_embeddings:
            self.lm.lm_head.weight = self.lm.model.embed_tokens.weight
        for module in self.modules():
            if hasattr(module, "inv_freq"):
                fresh: Any = type(module)(self.lm.config)  # type: ignore[call-arg]
                module.inv_freq = fresh.inv_freq.to(device, torch.float32)
                module.original_inv_freq = fresh.original_inv_freq.to(device, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(bfloat16)` would round the rotary frequencies and a router's bias; transformers keeps both in float32
        kept = {n: b for n, b in self.named_buffers() if b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if name in kept and buffer.dtype in (torch.bfloat16, torch.float16):
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, kept[name].to(buffer.device))
        return self


class _LogSoftmaxAt(torch.autograd.Function):
    """`log_softmax(logits)[target]` [N] that keeps one [N, V] tensor for the backward pass, and makes no other there.

    For the logits z of a token: d log p(target) / d z_v = [v = target] - p_v.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        log_p_NV, target_N1 = torch.log_softmax(logits_NV, -1), target_N[:, None]
        ctx.save_for_backward(log_p_NV, target_N1)
        return log_p_NV.gather(-1, target_N1)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        log_p_NV, target_N1 = ctx.saved_tensors
        grad_N1 = grads[0][:, None]
        # in place: nobody else holds the tensor, and autograd refuses a second backward pass
        grad_NV = log_p_NV.exp_().mul_(-grad_N1).scatter_add_(-1, target_N1, grad_N1)
        return grad_NV, None


def token_logps(logits: Callable[[Tensor], Tensor], hidden_NH: Tensor, target_N: Tensor, vocab_size: int) -> Tensor:
    """Return log mu(target) [N] of a model's `logits`, without a [tokens, vocabulary] tensor where it would be large.

    Above CHUNK_LOGITS the head runs in chunks, which are computed again in the backward pass.
    """

    def logps(hidden: Tensor, target: Tensor) -> Tensor:
        return _LogSoftmaxAt.apply(logits(hidden), target)  # type: ignore[no-untyped-call]

    chunk = max(1, CHUNK_LOGITS // vocab_size)
    if len(target_N) <= chunk:
        return logps(hidden_NH, target_N)
    chunks = zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True)
    return torch.cat([checkpoint(logps, h, t, use_reentrant=False) for h, t in chunks])
