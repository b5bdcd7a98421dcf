"""The parameters of a chunk's tiles in bits: differences, since neighbours resemble each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.entropy.family import SCALES, SHAPES, SPIKES
from ditherps.kernels.bits import get_golomb, put_golomb
from ditherps.kernels.escapes import folded, unfolded
from ditherps.kernels.jit import Int, kernel

ZERO_SHAPE = SHAPES  # a tile of zeros


@kernel
def put_parameters(rows: NDArray[np.int64], tiles: Int, out: NDArray[np.uint8]) -> Int:
    """Write scale, shape and spike of each tile as differences from the tile before; return whole bytes."""
    at: Int = np.int64(0)
    for tile in range(tiles):
        for column in range(3):
            before = rows[tile - 1, column] if tile else np.int64(0)
            at = put_golomb(folded(rows[tile, column] - before), np.int64(0), out, at)
    return (at + 7) >> 3


@kernel
def get_parameters(data: NDArray[np.uint8], tiles: Int, rows: NDArray[np.int64]) -> bool:
    """Read what `put_parameters` wrote; False where a value is out of range or bytes are left over."""
    at: Int = np.int64(0)
    for tile in range(tiles):
        for column in range(3):
            number, at = get_golomb(np.int64(0), data, at)
            if number < 0:
                return False
            rows[tile, column] = unfolded(number) + (rows[tile - 1, column] if tile else np.int64(0))
        scale, shape, spike = rows[tile]
        if not (0 <= scale < SCALES and 0 <= shape <= ZERO_SHAPE and 0 <= spike < SPIKES):
            return False
    return (at + 7) >> 3 == data.size
