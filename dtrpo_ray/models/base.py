"""What the rest of the package knows of a model: its facts, four numbers and two functions.

A family (one file in this folder) wraps a transformers trunk and ends every quirk of its checkpoints here.
Shapes: B rows, T tokens of a row, H hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dtrpo_ray.models.likelihood import token_logps


@dataclass(frozen=True, slots=True)
class Facts:
    """What is published of a family: `dtrpo models` prints it. `sources` say where each fact was read.

    `model_type` and `architectures` are what its `config.json` says of itself. `mask_id`, `eos_id` and `block_size`
    count where the config names none; None: the config must. `block_key` is the config's name of the block size.
    `small_block_size` are the tokens of a sub-block, which the release decodes one after the other; None: the block.
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
class Piece:
    """Rows [start, stop) of the tensor `upstream` of a checkpoint are our tensor `ours` at the index `at`.

    `stop` None is the last row; `at` () is all of ours. Most tensors are one piece: the same tensor by another name.
    """

    upstream: str
    ours: str
    start: int = 0
    stop: int | None = None
    at: tuple[int | slice, ...] = ()


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """Names of the linear modules that adapters go to, by part of the model."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    output: tuple[str, ...] = ("lm_head",)


class DiffusionLM(nn.Module, ABC):
    """A masked-diffusion language model.

    `config` holds the keys of its `config.json`. `mask_id` is the [MASK] token, `eos_id` ends a response, as do
    `other_ends` (those of generation_config.json and the chat template), `vocab_size` bounds every id. `block_size` is
    the tokens of a block, on the grid that starts where `block_origin` says: at position 0 ("global") or at the first
    response token ("response"); its sub-blocks of `small_block_size` are decoded in turn. `attention` is "block" (a
    block sees itself and earlier blocks) or "full" (everything sees everything, later blocks as [MASK]). `shift` is 1
    where the hidden state at position p - 1 predicts the token at p, else 0: callers read hidden states at
    `position - shift`.
    """

    facts: ClassVar[Facts]
    lm: Any  # the trunk: a causal language model of transformers
    lora: ClassVar[LoraTargets]
    config: dict[str, Any]
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
        """log mu of the targets [N] whose states end at (row, col): the one forward that training runs.

        It is `forward`, and not a function outside, because DeepSpeed hooks module calls.
        """
        hidden = self.hidden(ids_BT, positions_BT, mask)
        return token_logps(self.logits, hidden[row_N, col_N], target_N, self.vocab_size)

    @abstractmethod
    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor, cache: object | None = None) -> Tensor:
        """Last hidden states [B, T, H]; `mask` is boolean [B or 1, 1, T, keys], True where attention is allowed."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H], for the token that each hidden state predicts (see `shift`)."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Where each tensor of a checkpoint goes, both ways: every element of every tensor of ours exactly once."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends a response."""
        return self.other_ends | {self.eos_id}

    def tied_tensors(self) -> tuple[str, str] | None:
        """(head, embedding) in upstream names where the head is the embedding: a checkpoint may hold the head too."""
        return None

    def finish(self, device: torch.device | str) -> None:
        """Called once the weights are in place: make what no checkpoint holds."""
        del device

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in float32, that of the mask token -inf.

        A finished token is never [MASK], so the token predictor mu gives it no probability (the
        zero-masking-probability parameterisation of MDLM, arXiv 2406.07524, section 3.2.3). Training and decoding
        both read this.
        """
        logits = self.head(hidden).float()
        # past autograd, which would copy: where the probability is nought, so is the gradient of a log-softmax
        logits.detach()[..., self.mask_id] = float("-inf")
        return logits

    def log_mu(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Log of the token predictor mu [..., V] in float32."""
        logits = self.logits(hidden)
        return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
