"""One row of tokens for one forward pass, and the block attention mask over it.

A row holds a prompt once and, for each side (chosen, rejected), a clean stream and `draws` noisy streams:

    [ whole prompt blocks | clean 0 | noisy 0 | clean 1 | noisy 1 ]

The block grid is global: token at position p lies in block p // block_size, so the first response block may open
with clean prompt tokens. The clean stream of a side ends before its last block, which no block may see.
Legend: B rows, T tokens of a row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PAD, PROMPT = -2, -1  # values of `side` beside 0 (chosen) and 1 (rejected)
CLEAN = 0  # value of `stream`; noisy streams are numbered from 1


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row as numpy vectors of length T; `noisy_at[side][draw]` is where that stream's first token lies."""

    ids: np.ndarray
    position: np.ndarray
    side: np.ndarray
    stream: np.ndarray
    first_position: int
    noisy_at: tuple[tuple[int, ...], ...]


def pack_row(prompt: np.ndarray, sides: list[tuple[np.ndarray, list[np.ndarray]]], block_size: int) -> Row:
    """Pack a prompt and its sides, each (response ids, noisy versions of them), into one row.

    A noisy version has the response's length, with the mask id at the positions hidden in that state.
    """
    shared = len(prompt) // block_size * block_size
    tail = prompt[shared:]
    ids, position, side, stream = [prompt[:shared]], [np.arange(shared)], [np.full(shared, PROMPT)], [np.zeros(shared)]
    cursor, noisy_at = shared, []
    for index, (response, noisy_versions) in enumerate(sides):
        end = len(prompt) + len(response)
        last_block = (end - 1) // block_size * block_size
        clean = np.concatenate([tail, response])[: max(last_block - shared, 0)]
        starts = []
        for number, tokens in enumerate([clean, *(np.concatenate([tail, noisy]) for noisy in noisy_versions)]):
            if number:
                starts.append(cursor)
            ids.append(tokens)
            position.append(np.arange(shared, shared + len(tokens)))
            side.append(np.full(len(tokens), index))
            stream.append(np.full(len(tokens), number))
            cursor += len(tokens)
        noisy_at.append(tuple(starts))
    joined = (np.concatenate(parts).astype(np.int64) for parts in (ids, position, side, stream))
    return Row(*joined, shared, tuple(noisy_at))  # type: ignore[arg-type, call-arg]


def block_mask(position_BT: Tensor, side_BT: Tensor, stream_BT: Tensor, block_size: int) -> Tensor:
    """Who may attend to whom: boolean [B, 1, T, T], True where query (axis 2) sees key (axis 3).

    A token sees the prompt and its own side only. Clean keys are seen from later blocks, and from their own block
    by clean queries (clean blocks are bidirectional); noisy keys from their own block of their own stream only.
    Padding sees itself, lest a softmax over nothing give NaN.
    """
    block = position_BT // block_size
    query, key = (slice(None), slice(None), None), (slice(None), None)
    same_side = (side_BT[key] == side_BT[query]) | ((side_BT[key] == PROMPT) & (side_BT[query] != PAD))
    clean_key, clean_query = stream_BT[key] == CLEAN, stream_BT[query] == CLEAN
    earlier, same_block = block[key] < block[query], block[key] == block[query]
    from_clean = clean_key & (earlier | (same_block & clean_query))
    from_noisy = ~clean_key & same_block & (stream_BT[key] == stream_BT[query])
    allowed = same_side & (from_clean | from_noisy)
    padding = side_BT == PAD
    diagonal = torch.eye(side_BT.shape[1], dtype=torch.bool, device=side_BT.device)
    allowed = torch.where(padding[query], diagonal, allowed & ~padding[key])
    return allowed[:, None]
