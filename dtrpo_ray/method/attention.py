"""Pack a prompt and its responses into one row of tokens, and make the block attention mask over it.

A row holds a prompt once and, for each side (chosen, rejected), a clean stream and one noisy stream per draw:

    [ whole prompt blocks | clean 0 | noisy 0 | clean 1 | noisy 1 ]

Blocks are counted from position 0 (the global grid: the first response block may open with clean prompt tokens) or
from the first response token. The clean stream of a side ends before its last block, which no other block sees; a
noisy stream may leave blocks out. Several pairs may share a row. Under full attention nothing is shared: each draw is
the prompt and a noisy response, one block that sees itself.
Legend: R rows, T tokens of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

PAD, PROMPT = -2, -1  # values of `side` beside 0 (chosen) and 1 (rejected)
CLEAN = 0  # value of `stream`; noisy streams are numbered from 1
LEFT_OUT = -1  # marks, in a noisy version, the tokens of a block that the stream leaves out
FLEX_BUCKET = 256  # row lengths on a GPU are padded to a multiple, so that few shapes are compiled

NoisySides = list[tuple[np.ndarray, list[np.ndarray]]]  # per side: response ids, and their noisy versions
_Segment = tuple[np.ndarray, np.ndarray, int, int]  # ids, positions, side, stream


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

    def columns(self, side: int, stream: int, position: np.ndarray) -> np.ndarray:
        """Find the columns of a stream's tokens at these positions; each lies in the stream or the shared prompt."""
        mine = np.flatnonzero((self.side == side) & (self.stream == stream))
        shared = position < self.first_position
        at = np.searchsorted(self.position[mine], position)
        found = np.append(mine, -1)[at]
        assert (shared | (self.position[found] == position)).all(), "a token is read that its stream does not hold"
        return np.where(shared, position, found)


def grid_offset(prompt_len: int, block_size: int, origin: Literal["global", "response"]) -> int:
    """Return what to add to a position so that blocks begin at multiples of `block_size`."""
    return -prompt_len % block_size if origin == "response" else 0


def pack_row(
    prompt: np.ndarray, sides: NoisySides, block_size: int, origin: Literal["global", "response"] = "global"
) -> PackedRow:
    """Pack a prompt and its sides into one row.

    A noisy version has the response's length, with the mask id at the positions hidden in that state and LEFT_OUT
    at the tokens of whole blocks that are not needed.
    """
    offset = grid_offset(len(prompt), block_size, origin)
    shared = (len(prompt) + offset) // block_size * block_size - offset
    tail = prompt[shared:]
    segments: list[_Segment] = [(prompt[:shared], np.arange(shared), PROMPT, CLEAN)]
    for side, (response, noisy_versions) in enumerate(sides):
        end = len(prompt) + len(response)
        last_block = (end - 1 + offset) // block_size * block_size - offset
        clean = np.concatenate([tail, response])[: max(last_block - shared, 0)]
        for stream, tokens in enumerate([clean, *(_add_tail(tail, noisy) for noisy in noisy_versions)]):
            kept = np.flatnonzero(tokens != LEFT_OUT)
            segments.append((tokens[kept], shared + kept, side, stream))
    return _join(segments, lambda position: (position + offset) // block_size, shared)


def _add_tail(tail: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """Put the prompt's tail before the first block, which it opens: it is left out with that block."""
    left_out = len(noisy) and noisy[0] == LEFT_OUT
    return np.concatenate([np.full_like(tail, LEFT_OUT) if left_out else tail, noisy])


def pack_whole(prompt: np.ndarray, sides: NoisySides) -> PackedRow:
    """Pack for full attention: for each side and draw the whole prompt and the noisy response, as one block.

    The prompt sees the response and cannot be shared, so each draw costs a forward of its own length.
    """
    segments: list[_Segment] = []
    for side, (_, noisy_versions) in enumerate(sides):
        for stream, noisy in enumerate(noisy_versions, start=1):
            tokens = np.concatenate([prompt, noisy])
            segments.append((tokens, np.arange(len(tokens)), side, stream))
    return _join(segments, np.zeros_like, 0)


def _join(segments: list[_Segment], block_of: Callable[[np.ndarray], np.ndarray], first_position: int) -> PackedRow:
    ids, position = (np.concatenate([segment[i] for segment in segments]).astype(np.int64) for i in (0, 1))
    side, stream = (np.concatenate([np.full(len(s[0]), s[i], dtype=np.int64) for s in segments]) for i in (2, 3))
    block = block_of(position)
    return PackedRow(ids, position, block, side=side, stream=stream, first_position=first_position)


@dataclass(frozen=True, slots=True)
class Planes:
    """The inputs of the mask, int64 [R, T]: block of the grid, side (PAD: padding), stream, pair within the row."""

    block: Tensor
    side: Tensor
    stream: Tensor
    pair: Tensor

    def at(self, *index: Any) -> tuple[Tensor, ...]:
        """Index every plane."""
        return tuple(getattr(self, f.name)[index] for f in fields(self))

    def pad(self, length: int) -> "Planes":
        """Append padding up to `length` tokens."""
        extra = (0, length - self.side.shape[1])
        fills = {f.name: PAD if f.name == "side" else 0 for f in fields(self)}
        return Planes(*(F.pad(getattr(self, name), extra, value=fill) for name, fill in fills.items()))


def _sees(query: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
    """Apply the rule: a token sees the prompt and its own side of its own pair; nobody sees padding.

    Clean keys are seen from later blocks, and from their own block by clean queries (clean blocks are bidirectional).
    Noisy keys are seen from their own block of their own stream only.
    """
    block_q, side_q, stream_q, pair_q = query
    block_k, side_k, stream_k, pair_k = key
    same_text = (pair_k == pair_q) & ((side_k == side_q) | (side_k == PROMPT)) & (side_k != PAD) & (side_q != PAD)
    same_block, clean_key = block_k == block_q, stream_k == CLEAN
    from_clean = clean_key & ((block_k < block_q) | (same_block & (stream_q == CLEAN)))
    from_noisy = ~clean_key & same_block & (stream_k == stream_q)
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

    rows, length = planes.side.shape
    device = planes.side.device
    return create_block_mask(rule, rows, None, length, length, device=device, _compile=device.type == "cuda")
