"""Statistics over the senders of a round, coordinate by coordinate, and distances between them.

A block holds one chunk of every sender: shape (senders, coordinates), C-contiguous.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.cpu import SQUARE_LANES, sum_of_squares
from ditherps.kernels.jit import Int, inlined, kernel
from ditherps.kernels.philox import TILE

STRIP = 256
"""Coordinates that are sorted at a time: those of eight senders stay in a core's first cache."""


@inlined
def _ordered(word: np.int32) -> np.int32:
    """A float32's memory as an integer with its place among all floats, and back again."""
    return np.int32(word ^ ((word >> 31) & np.int32(0x7FFFFFFF)))


@functools.cache
def sorting_network(rows: int, first: int, last: int) -> NDArray[np.int32]:
    """Pairs (low, high) of rows whose exchange, in this order, puts ranks `first` .. `last` - 1 into their rows.

    Batcher's merge exchange (Knuth, The Art of Computer Programming, volume 3, 5.2.2, algorithm M), without the pairs
    on which no wanted rank depends. Shape (pairs, 2).
    """
    pairs = []
    top = 1 << max(0, (rows - 1).bit_length() - 1)
    p = top if rows > 1 else 0
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(rows - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    wanted = set(range(first, last))
    kept = []
    for low, high in reversed(pairs):
        if low in wanted or high in wanted:
            wanted |= {low, high}
            kept.append((low, high))
    return np.array(kept[::-1], np.int32).reshape(-1, 2)


@kernel
def middle_mean(
    bits: NDArray[np.int32], pairs: NDArray[np.int32], first: Int, last: Int, out: NDArray[np.float32]
) -> None:
    """Each coordinate's mean of its ranks `first` .. `last` - 1 over the senders; NaN ranks beyond infinity.

    `bits` is the memory of a float32 block, left as it is; `pairs` is the senders' `sorting_network`. The sum goes from
    the lowest rank to the highest, in double precision from +0, so it does not depend on the order of the senders.
    """
    # Integers in the order of the floats: exchanges of integers are what LLVM makes vector instructions of.
    ranked = np.empty((bits.shape[0], STRIP), np.int32)
    values = ranked.view(np.float32)
    sums = np.empty(STRIP, np.float64)
    ranked[:] = 0
    for lo in range(0, out.size, STRIP):
        part = out[lo : lo + STRIP]
        for row in range(bits.shape[0]):
            into, source = ranked[row], bits[row, lo : lo + part.size]
            for lane in range(source.size):
                into[lane] = _ordered(source[lane])
        for pair in range(pairs.shape[0]):
            low, high = ranked[pairs[pair, 0]], ranked[pairs[pair, 1]]
            for lane in range(STRIP):
                x, y = low[lane], high[lane]
                low[lane] = min(x, y)
                high[lane] = max(x, y)
        sums[:] = 0.0
        for row in range(first, last):
            into, value = ranked[row], values[row]
            for lane in range(STRIP):
                into[lane] = _ordered(into[lane])
            for lane in range(STRIP):
                sums[lane] += np.float64(value[lane])
        for lane in range(part.size):
            part[lane] = np.float32(sums[lane] / np.float64(last - first))


@kernel
def _added(sums: NDArray[np.float64]) -> np.float64:
    """The lanes' sum, pairwise; spends them."""
    width = SQUARE_LANES // 2
    while width:
        for lane in range(width):
            sums[lane] += sums[lane + width]
        width //= 2
    total: np.float64 = sums[0]
    return total


@kernel
def squared_distances(block: NDArray[np.float32], out: NDArray[np.float64]) -> None:
    """`out[tile, i, j]` = squared distance of senders i and j < i in each tile, in double precision; 0 elsewhere."""
    sums = np.empty(SQUARE_LANES, np.float64)
    out[:] = 0.0
    for tile in range(out.shape[0]):
        lo, hi = tile * TILE, min((tile + 1) * TILE, block.shape[1])
        for i in range(block.shape[0]):
            for j in range(i):
                sums[:] = 0.0
                for at in range(lo, hi, SQUARE_LANES):
                    end = min(at + SQUARE_LANES, hi)
                    a, b = block[i, at:end], block[j, at:end]
                    for lane in range(a.size):
                        difference = np.float64(a[lane]) - np.float64(b[lane])
                        sums[lane] += difference * difference
                out[tile, i, j] = _added(sums)


@kernel
def squared_norms(block: NDArray[np.float32], out: NDArray[np.float64]) -> None:
    """`out[tile, i]` = squared norm of sender i in each tile, in double precision."""
    sums = np.empty(SQUARE_LANES, np.float64)
    for tile in range(out.shape[0]):
        lo, hi = tile * TILE, min((tile + 1) * TILE, block.shape[1])
        for i in range(block.shape[0]):
            out[tile, i] = sum_of_squares(block[i], lo, hi, sums)


def warm() -> None:
    """Compile the kernels of this file, or load them from the cache."""
    block, out = np.zeros((3, 1), np.float32), np.zeros(1, np.float32)
    middle_mean(block.view(np.int32), sorting_network(3, 1, 2), np.int64(1), np.int64(2), out)
    squared_distances(block, np.zeros((1, 3, 3)))
    squared_norms(block, np.zeros((1, 3)))
