"""Numba kernels of the dither stream: Philox4x32-10 (Salmon et al. 2011), addressed as design contract 1 says.

A `Stream` is what the kernels need of an address: `(key0, key1, c1, c2, c3, start)`, all Python integers.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, inlined, kernel
from ditherps.kernels.prefetch import LINE, prefetch

Stream: TypeAlias = tuple[int, int, int, int, int, int]

TILE = 4096  # coordinates a dither tile holds: 512 counters of eight 16-bit lanes
COLUMNS = TILE // 8
BLOCK = 32  # columns between two requests for memory (measured)

_LOW = np.uint64(0xFFFFFFFF)
_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint64(0x9E3779B9)
_W1 = np.uint64(0xBB67AE85)
_16 = np.uint64(16)
_32 = np.uint64(32)
_C = tuple(np.uint64(COLUMNS * lane) for lane in range(8))


@inlined
def _philox(stream: Stream, c0: np.uint64) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """The four output words for counter word `c0`, each in the low half of 64 bits; the upper halves are junk.

    All words stand in 64 bits and each product masks what it reads, so that one multiplication yields both halves.
    """
    x0, x1, x2, x3 = c0, np.uint64(stream[2]), np.uint64(stream[3]), np.uint64(stream[4])
    k0 = np.uint64(stream[0])
    k1 = np.uint64(stream[1])
    for _ in range(10):
        p0 = (x0 & _LOW) * _M0
        p1 = (x2 & _LOW) * _M1
        x0 = (p1 >> _32) ^ x1 ^ k0
        x1 = p1
        x2 = (p0 >> _32) ^ x3 ^ k1
        x3 = p0
        k0 = (k0 + _W0) & _LOW
        k1 = (k1 + _W1) & _LOW
    return x0, x1, x2, x3


@kernel
def philox_tile(stream: Stream, tile: Int, out: NDArray[np.uint16], ahead: NDArray[np.float32], at: Int) -> None:
    """Write the 4096 lanes of dither tile `tile` to `out[:4096]`.

    Meanwhile as much of `ahead` as a tile holds, from `ahead[at]` on, is asked for: what the caller reads next.
    """
    first = np.uint64(tile) * np.uint64(COLUMNS)
    for block in range(0, COLUMNS, BLOCK):
        near = at + 8 * block
        for line in range(near, min(near + 8 * BLOCK, ahead.size), LINE):
            prefetch(ahead, line)
        for column in range(BLOCK):
            # Unsigned, so that numba need not look for negative indices, and LLVM sees consecutive memory.
            place = np.uint64(block) + np.uint64(column)
            w0, w1, w2, w3 = _philox(stream, first + place)
            out[place] = np.uint16(w0)
            out[place + _C[1]] = np.uint16(w0 >> _16)
            out[place + _C[2]] = np.uint16(w1)
            out[place + _C[3]] = np.uint16(w1 >> _16)
            out[place + _C[4]] = np.uint16(w2)
            out[place + _C[5]] = np.uint16(w2 >> _16)
            out[place + _C[6]] = np.uint16(w3)
            out[place + _C[7]] = np.uint16(w3 >> _16)


@kernel
def fill_lanes(
    stream: Stream,
    offset: Int,
    count: Int,
    out: NDArray[np.uint16],
    scratch: NDArray[np.uint16],
    ahead: NDArray[np.float32],
    at: Int,
) -> None:
    """Write the lanes of flat coordinates `start + offset ...` to `out[:count]`; `scratch` has room for one tile.

    `ahead` and `at` as in `philox_tile`.
    """
    position = stream[5] + offset
    done: Int = np.int64(0)
    while done < count:
        tile = position // TILE
        inside = position - tile * TILE
        n = min(TILE - inside, count - done)
        if n == TILE:
            philox_tile(stream, tile, out[done : done + TILE], ahead, at)
        else:
            philox_tile(stream, tile, scratch, ahead, at)
            for i in range(n):
                out[done + i] = scratch[inside + i]
        position += n
        done += n


@kernel
def lane_at(stream: Stream, offset: Int) -> np.uint16:
    """The lane of flat coordinate `start + offset`, from its address alone."""
    position = stream[5] + offset
    inside = position % TILE
    words = _philox(stream, np.uint64(position // TILE * COLUMNS + inside % COLUMNS))
    lane = inside // COLUMNS
    return np.uint16(words[lane // 2] >> np.uint64(16 * (lane % 2)))


@kernel
def lanes_random(stream: Stream, offsets: NDArray[np.int64], out: NDArray[np.uint16]) -> None:
    """Write the lane of flat coordinate `start + offsets[i]` to `out[i]`."""
    for i in range(offsets.size):
        out[i] = lane_at(stream, offsets[i])
