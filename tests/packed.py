"""Helpers of tests that read packed rows."""

import numpy as np
from torch import Tensor, zeros_like

from dtrpo_ray.method.attention import CLEAN, PackedRow, Planes, dense_mask


def block_mask(position_BT: Tensor, side_BT: Tensor, stream_BT: Tensor, block_size: int) -> Tensor:
    """`dense_mask` of rows that hold one pair each on the global grid."""
    return dense_mask(Planes(position_BT // block_size, side_BT, stream_BT, zeros_like(side_BT)))


def noisy_starts(row: PackedRow) -> list[list[int]]:
    """Where each noisy stream of each side begins."""
    sides = range(int(row.side.max()) + 1)
    streams = [np.unique(row.stream[(row.side == side) & (row.stream != CLEAN)]) for side in sides]
    return [
        [int(np.flatnonzero((row.side == side) & (row.stream == stream))[0]) for stream in streams[side]]
        for side in sides
    ]
