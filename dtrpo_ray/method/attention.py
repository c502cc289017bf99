"""One row of tokens for one forward pass, and the block attention mask over it.

A row holds a prompt once and, for each side (chosen, rejected), a clean stream and the noisy streams of its draws:

    [ whole prompt blocks | clean 0 | noisy 0 | clean 1 | noisy 1 ]

Blocks are counted from position 0 (the global grid: the first response block may open with clean prompt tokens) or
from the first response token. The clean stream of a side ends before its last block, which no block may see; a noisy
stream may leave blocks out. Several pairs may share a row. Under full attention nothing is shared: each draw is the
prompt and a noisy response, one block that sees itself.
Legend: R rows, T tokens of a row.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

PAD, PROMPT = -2, -1  # values of `side` beside 0 (chosen) and 1 (rejected)
CLEAN = 0  # value of `stream`; noisy streams are numbered from 1
LEFT_OUT = -1  # id, in a noisy version, of the tokens of a block that the stream does without
FLEX_BUCKET = 256  # row lengths on a GPU are padded to a multiple, so that few shapes are compiled


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row as numpy vectors of length T; `noisy_at[side][draw]` is where that stream's first token lies.

    `position` feeds the rotary embedding, `block` numbers the blocks of the grid. The tokens of position below
    `first_position` belong to every stream.
    """

    ids: np.ndarray
    position: np.ndarray
    block: np.ndarray
    side: np.ndarray
    stream: np.ndarray
    first_position: int
    noisy_at: tuple[tuple[int, ...], ...]

    def columns(self, side: int, stream: int, position: np.ndarray) -> np.ndarray:
        """Where the tokens of a stream at these positions lie; all must be in the stream or in the shared prompt."""
        mine = np.flatnonzero((self.side == side) & (self.stream == stream))
        shared = position < self.first_position
        at = np.searchsorted(self.position[mine], position)
        found = np.append(mine, -1)[at]
        assert (shared | (self.position[found] == position)).all(), "a token is read that its stream does not hold"
        return np.where(shared, position, found)


Sides = list[tuple[np.ndarray, list[np.ndarray]]]


def grid_offset(prompt_len: int, block_size: int, origin: Literal["global", "response"]) -> int:
    """What to add to a position so that blocks begin at multiples of `block_size`."""
    return -prompt_len % block_size if origin == "response" else 0


def pack_row(
    prompt: np.ndarray, sides: Sides, block_size: int, origin: Literal["global", "response"] = "global"
) -> Row:
    """Pack a prompt and its sides, each (response ids, noisy versions of them), into one row.

    A noisy version has the response's length, with the mask id at the positions hidden in that state and LEFT_OUT
    at the tokens of whole blocks that are not needed.
    """
    offset = grid_offset(len(prompt), block_size, origin)
    shared = (len(prompt) + offset) // block_size * block_size - offset
    tail = prompt[shared:]
    parts = [(prompt[:shared], np.arange(shared), PROMPT, CLEAN)]
    cursor, noisy_at = shared, []
    for index, (response, noisy_versions) in enumerate(sides):
        end = len(prompt) + len(response)
        last_block = (end - 1 + offset) // block_size * block_size - offset
        clean = np.concatenate([tail, response])[: max(last_block - shared, 0)]
        starts = []
        for number, tokens in enumerate([clean, *(_with_tail(tail, noisy) for noisy in noisy_versions)]):
            kept = np.flatnonzero(tokens != LEFT_OUT)
            if number:
                starts.append(cursor)
            parts.append((tokens[kept], shared + kept, index, number))
            cursor += len(kept)
        noisy_at.append(tuple(starts))
    return _row(parts, lambda position: (position + offset) // block_size, shared, tuple(noisy_at))


def _with_tail(tail: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """The tail of the prompt opens the first block, and goes with it."""
    left_out = len(noisy) and noisy[0] == LEFT_OUT
    return np.concatenate([np.full_like(tail, LEFT_OUT) if left_out else tail, noisy])


def pack_whole(prompt: np.ndarray, sides: Sides) -> Row:
    """The row of a full-attention model: for each side and draw the whole prompt and the noisy response, as one block.

    A draw so costs a forward of its own length; the prompt sees the response and cannot be shared.
    """
    parts, cursor, noisy_at = [], 0, []
    for index, (_, noisy_versions) in enumerate(sides):
        starts = []
        for number, noisy in enumerate(noisy_versions, start=1):
            tokens = np.concatenate([prompt, noisy])
            starts.append(cursor + len(prompt))
            parts.append((tokens, np.arange(len(tokens)), index, number))
            cursor += len(tokens)
        noisy_at.append(tuple(starts))
    return _row(parts, np.zeros_like, 0, tuple(noisy_at))


def _row(parts: list[tuple[np.ndarray, np.ndarray, int, int]], block_of: Any, first: int, noisy_at: Any) -> Row:
    ids, position = (np.concatenate([part[i] for part in parts]).astype(np.int64) for i in (0, 1))
    side, stream = (np.concatenate([np.full(len(p[0]), p[i], dtype=np.int64) for p in parts]) for i in (2, 3))
    return Row(ids, position, block_of(position), side, stream, first, noisy_at)


@dataclass(frozen=True, slots=True)
class Planes:
    """What the mask depends on, int64 [R, T]: block of the grid, side (PAD: padding), stream, pair within the row."""

    block: Tensor
    side: Tensor
    stream: Tensor
    pair: Tensor

    def at(self, *index: Any) -> tuple[Tensor, ...]:
        """The planes at an index, one tensor each."""
        return tuple(getattr(self, f.name)[index] for f in fields(self))

    def padded(self, length: int) -> "Planes":
        """Padding appended up to `length` tokens."""
        extra = (0, length - self.side.shape[1])
        values = {f.name: PAD if f.name == "side" else 0 for f in fields(self)}
        return Planes(
            **{name: torch.nn.functional.pad(getattr(self, name), extra, value=v) for name, v in values.items()}
        )


def _sees(query: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
    """The rule, for padding nobody: a token sees the prompt and its own side of its own pair only.

    Clean keys are seen from later blocks, and from their own block by clean queries (clean blocks are bidirectional);
    noisy keys from their own block of their own stream only.
    """
    block_q, side_q, stream_q, pair_q = query
    block_k, side_k, stream_k, pair_k = key
    same_text = (pair_k == pair_q) & ((side_k == side_q) | (side_k == PROMPT)) & (side_k != PAD) & (side_q != PAD)
    same_block, clean_key = block_k == block_q, stream_k == CLEAN
    from_clean = clean_key & ((block_k < block_q) | (same_block & (stream_q == CLEAN)))
    from_noisy = ~clean_key & same_block & (stream_k == stream_q)
    return same_text & (from_clean | from_noisy)


def dense_mask(planes: Planes) -> Tensor:
    """Who may attend to whom: boolean [R, 1, T, T], True where query (axis 2) sees key (axis 3).

    Padding sees itself, lest a softmax over nothing give NaN.
    """
    allowed = _sees(planes.at(slice(None), slice(None), None), planes.at(slice(None), None))
    diagonal = torch.eye(planes.side.shape[1], dtype=torch.bool, device=planes.side.device)
    return (allowed | (diagonal & (planes.side == PAD)[:, None]))[:, None]


def sparse_mask(planes: Planes) -> BlockMask:
    """The same mask for FlexAttention, which computes the tiles that hold anything and skips the others."""

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        padding = (query == key) & (planes.side[row, query] == PAD)
        return _sees(planes.at(row, query), planes.at(row, key)) | padding

    rows, length = planes.side.shape
    device = planes.side.device
    return create_block_mask(rule, rows, None, length, length, device=device, _compile=device.type == "cuda")


def block_mask(position_BT: Tensor, side_BT: Tensor, stream_BT: Tensor, block_size: int) -> Tensor:
    """`dense_mask` of rows that hold one pair each on the global grid."""
    return dense_mask(Planes(position_BT // block_size, side_BT, stream_BT, torch.zeros_like(side_BT)))
