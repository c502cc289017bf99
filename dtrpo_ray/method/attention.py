"""Pack a prompt and its responses into one row of tokens, and make the block attention mask over it.

A row holds a prompt once and, for each side (chosen, rejected), a clean stream and one noisy stream per draw:

    [ whole prompt blocks | clean 0 | noisy 0 | clean 1 | noisy 1 ]

Blocks are counted from position 0 (the global grid: the first response block may open with clean prompt tokens) or
from the first response token. The clean stream of a side ends before its last block, which no other block sees; a
noisy stream may leave blocks out. Several pairs may share a row. Under full attention nothing is shared: each draw is
the prompt and a noisy response, one block that sees itself.
Legend: R rows, T tokens of a row.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

PAD, PROMPT = -2, -1  # values of `side` beside 0 (chosen) and 1 (rejected)
CLEAN = 0  # value of `stream`; noisy streams are numbered from 1
LEFT_OUT = -1  # marks, in a noisy version, the tokens of a block that the stream leaves out
FLEX_BUCKET = 256  # row lengths on a GPU are padded to a multiple, so that few shapes are compiled
ONE_BLOCK = 2**62  # the block size under full attention: all text is one block

NoisySides = list[tuple[np.ndarray, list[np.ndarray]]]  # per side: response ids, and their noisy versions


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One packed row as numpy vectors of length T.

    `position` feeds the rotary embedding, `block` numbers the blocks of the grid. Tokens at positions below
    `first_position` belong to every stream.
    """

    ids: np.ndarray
    position: np.ndarray
    block: np.ndarray
    side: np.ndarray
    stream: np.ndarray
    first_position: int

    def columns(self, side: int, stream: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Find the columns of tokens of a side's streams; each lies in its stream or the shared prompt."""
        mine, span = np.flatnonzero(self.side == side), self.position.max(initial=0) + 1
        at = np.searchsorted(self.stream[mine] * span + self.position[mine], stream * span + position)
        found, shared = np.append(mine, -1)[at], position < self.first_position
        held = (self.stream[found] == stream) & (self.position[found] == position)
        assert (shared | held).all(), "a token is read that its stream does not hold"
        return np.where(shared, position, found)


def grid_offset(prompt_len: int, block_size: int, origin: Literal["global", "response"]) -> int:
    """Return what to add to a position so that blocks begin at multiples of `block_size`."""
    return -prompt_len % block_size if origin == "response" else 0


def pack_row(
    prompt: np.ndarray, sides: NoisySides, block_size: int, origin: Literal["global", "response"] = "global"
) -> PackedRow:
    """Pack a prompt and its sides into one row.

    A noisy version has the response's length, with the mask id at the positions hidden in that state and LEFT_OUT
    at the tokens of whole blocks that are not needed. With blocks of ONE_BLOCK each version holds the whole prompt,
    which sees the response and cannot be shared.
    """
    offset = grid_offset(len(prompt), block_size, origin)
    shared = (len(prompt) + offset) // block_size * block_size - offset
    tail = prompt[shared:]
    segments = [(prompt[:shared], np.arange(shared), PROMPT, CLEAN)]
    for side, (response, noisy_versions) in enumerate(sides):
        last_block = (len(prompt) + len(response) - 1 + offset) // block_size * block_size - offset
        clean = np.concatenate([tail, response])[: max(last_block - shared, 0)]
        for stream, tokens in enumerate([clean, *(_add_tail(tail, noisy) for noisy in noisy_versions)]):
            kept = np.flatnonzero(tokens != LEFT_OUT)
            segments.append((tokens[kept], shared + kept, side, stream))
    ids, positions, of_side, of_stream = zip(*segments, strict=True)
    position, lengths = np.concatenate(positions), list(map(len, ids))
    return PackedRow(
        ids=np.concatenate(ids).astype(np.int64),
        position=position,
        block=(position + offset) // block_size,
        side=np.repeat(of_side, lengths),
        stream=np.repeat(of_stream, lengths),
        first_position=shared,
    )


def _add_tail(tail: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """Put the prompt's tail before the first block, which it opens: it is left out with that block."""
    return np.concatenate([np.full_like(tail, LEFT_OUT) if LEFT_OUT in noisy[:1] else tail, noisy])


class Planes(NamedTuple):
    """The inputs of the mask, int64 [R, T]: block of the grid, side (PAD: padding), stream, pair within the row."""

    block: Tensor
    side: Tensor
    stream: Tensor
    pair: Tensor

    def at(self, *index: Any) -> "Planes":
        """Index every plane."""
        return Planes(*(plane[index] for plane in self))

    def pad(self, length: int) -> "Planes":
        """Append padding up to `length` tokens."""
        extra = (0, length - self.side.shape[1])
        return Planes(*(F.pad(plane, extra, value=PAD if plane is self.side else 0) for plane in self))


def _sees(query: Planes, key: Planes) -> Tensor:
    """Apply the rule: a token sees the prompt and its own side of its own pair; nobody sees padding.

    Clean keys are seen from later blocks, and from their own block by clean queries (clean blocks are bidirectional).
    Noisy keys are seen from their own block of their own stream only.
    """
    same_side = (key.side == query.side) | (key.side == PROMPT)
    same_text = (key.pair == query.pair) & same_side & (key.side != PAD) & (query.side != PAD)
    same_block, clean_key = key.block == query.block, key.stream == CLEAN
    from_clean = clean_key & ((key.block < query.block) | (same_block & (query.stream == CLEAN)))
    from_noisy = ~clean_key & same_block & (key.stream == query.stream)
    return same_text & (from_clean | from_noisy)


def dense_mask(planes: Planes) -> Tensor:
    """Return a boolean mask [R, 1, T, T], True where query (axis 2) sees key (axis 3).

    Padding sees itself: a softmax over nothing would give NaN.
    """
    allowed = _sees(planes.at(slice(None), slice(None), None), planes.at(slice(None), None))
    diagonal = torch.eye(planes.side.shape[1], dtype=torch.bool, device=planes.side.device)
    return (allowed | (diagonal & (planes.side == PAD)[:, None]))[:, None]


def sparse_mask(planes: Planes) -> BlockMask:
    """Return the same mask for FlexAttention, which skips tiles where no query sees a key."""

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        padding = (query == key) & (planes.side[row, query] == PAD)
        return _sees(planes.at(row, query), planes.at(row, key)) | padding

    (rows, length), device = planes.side.shape, planes.side.device
    return create_block_mask(rule, rows, None, length, length, device=device, _compile=device.type == "cuda")
