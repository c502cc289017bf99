"""The interface of a model: the rest of the package uses these facts, numbers and functions, and nothing else.

A family (one file in this folder) wraps a transformers trunk, and every quirk of its checkpoints stays in that file.
Shapes: B rows, T tokens of a row, H hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dtrpo_ray.models.config_json import ConfigJson
from dtrpo_ray.models.likelihood import token_logps


@dataclass(frozen=True, slots=True)
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
    attention: Literal["block", "full"]
    block_origin: Literal["global", "response"]
    shift: Literal[0, 1]
    block_key: str
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


class DiffusionLM(nn.Module, ABC):
    """A masked-diffusion language model.

    `mask_id` is the [MASK] token; `eos_id` ends a response, as do `other_ends` (from generation_config.json and the
    chat template); `vocab_size` is the exclusive upper bound of ids. `block_size` counts the tokens of a block, on the
    grid that starts at position 0 (`block_origin` "global") or at the first response token ("response"); its sub-blocks
    of `small_block_size` are decoded in turn. `attention` is "block" (a block sees itself and earlier blocks) or "full"
    (everything sees everything, later blocks as [MASK]). `shift` is 1 if the hidden state at position p - 1 predicts
    the token at p, else 0: callers read hidden states at `position - shift`.
    """

    facts: ClassVar[FamilyFacts]
    lm: Any  # the trunk: a causal language model of transformers
    lora: ClassVar[LoraTargets]
    config: ConfigJson
    mask_id: int
    eos_id: int
    other_ends: frozenset[int] = frozenset()
    block_size: int
    small_block_size: int
    vocab_size: int
    attention: Literal["block", "full"] = "block"
    block_origin: Literal["global", "response"] = "global"
    shift: Literal[0, 1] = 0

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor, row_N: Tensor, col_N: Tensor, target_N: Tensor
    ) -> Tensor:
        """Return log mu of the targets [N] whose hidden states lie at (row, col): training runs this one forward.

        It is `forward`, and not a function outside, because DeepSpeed hooks module calls.
        """
        hidden = self.hidden(ids_BT, positions_BT, mask)
        return token_logps(self.logits, hidden[row_N, col_N], target_N, self.vocab_size)

    @abstractmethod
    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor, cache: object | None = None) -> Tensor:
        """Return the last hidden states [B, T, H].

        `mask` is boolean [B or 1, 1, T, keys], True where attention is allowed.
        """

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states [..., H], for the token that each predicts (see `shift`)."""

    @abstractmethod
    def pieces(self) -> Iterator[TensorPiece]:
        """Map the checkpoint's tensors to ours, for loading and saving: each element of ours exactly once."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a response."""
        return self.other_ends | {self.eos_id}

    def tied_tensors(self) -> tuple[str, str] | None:
        """Return (head, embedding) in upstream names if they are tied; a checkpoint may hold the head all the same."""
        return None

    def finish(self, device: torch.device | str) -> None:
        """Make the tensors that no checkpoint holds, once the weights are in place."""
        del device

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
