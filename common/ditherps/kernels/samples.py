"""Levels of a data sample: quantization, one level from another, and reconstruction, in integers.

A feature is an integer x = 0 .. span - 1. With L = 2 lane + 1, t = x / span + u + 1/2 = x / span + L / 2^17, and the
cell of level l is q = floor(2^l t), of width step = span / 2^l. What is kept is the index s = q - floor(2^l (u + 1/2)):
the number of cells above that of zero, which is 0 for x = 0 whatever the dither is, and fits in the bits of x.

    s = floor(x / step + v),  v = 2^l (u + 1/2) mod 1 the dither that is left at level l
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, inlined, kernel

FINE = 17  # t is a whole number of 2^-17 / span
MOST_LEVEL = 15


@inlined
def cell_of(x: Int, odd: Int, level: Int, span: Int) -> Int:
    """q = floor(2^level t) for the integer x; `odd` is L."""
    return (((x << FINE) + span * odd) >> (FINE - level)) // span


@inlined
def first_in(cell: Int, odd: Int, level: Int, span: Int) -> Int:
    """The smallest integer x whose cell is `cell` or above; may lie outside 0 .. span - 1."""
    return -((odd - (cell << (FINE - level))) * span >> FINE)


@kernel
def quantize(
    x: NDArray[np.int32], lanes: NDArray[np.uint16], level: Int, span: Int, indices: NDArray[np.uint16]
) -> None:
    """`indices[i]`: that of `x[i]` at `level`."""
    for i in range(x.size):
        odd = 2 * np.int64(lanes[i]) + 1
        indices[i] = np.uint16(cell_of(np.int64(x[i]), odd, level, span) - (odd >> (FINE - level)))


@kernel
def coarsen(indices: NDArray[np.uint16], lanes: NDArray[np.uint16], fine: Int, level: Int) -> None:
    """Overwrite indices at level `fine` by those at the coarser `level`."""
    for i in range(indices.size):
        odd = 2 * np.int64(lanes[i]) + 1
        cell = (np.int64(indices[i]) + (odd >> (FINE - fine))) >> (fine - level)
        indices[i] = np.uint16(cell - (odd >> (FINE - level)))


@kernel
def reconstruct(
    indices: NDArray[np.uint16],
    lanes: NDArray[np.uint16],
    level: Int,
    span: Int,
    exact: bool,
    low: NDArray[np.float64],
    scale: NDArray[np.float64],
    values: NDArray[np.float32],
) -> None:
    """`values[i]` = low + scale * the middle of i's cell; where `exact`, scale times the only integer in it."""
    per_channel = indices.size // low.size
    for channel in range(low.size):
        for i in range(channel * per_channel, (channel + 1) * per_channel):
            odd = 2 * np.int64(lanes[i]) + 1
            cell = np.int64(indices[i]) + (odd >> (FINE - level))
            if exact:
                middle = np.float64(first_in(cell, odd, level, span))
            else:
                middle = np.float64((((2 * cell + 1) << (FINE - 1 - level)) - odd) * span) * 2.0**-FINE
            values[i] = np.float32(low[channel] + scale[channel] * middle)
