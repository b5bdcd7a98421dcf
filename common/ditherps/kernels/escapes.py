"""Indices outside the alphabet, as nibbles beside the symbols.

A number is written in groups of three bits, lowest first, a nibble each whose highest bit says that more follow; two
nibbles a byte, the lower half first. Reading beyond the end yields zeros, so any bytes decode to something.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, kernel

MOST_NIBBLES = 11  # of a number below 2^33


@kernel
def folded(value: Int) -> Int:
    """0, -1, 1, -2, 2 ... to 0, 1, 2, 3, 4 ..."""
    return (value << 1) ^ (value >> 63)


@kernel
def unfolded(value: Int) -> Int:
    """The inverse of `folded`."""
    return (value >> 1) ^ -(value & 1)


@kernel
def put_nibble(nibble: Int, out: NDArray[np.uint8], at: Int) -> Int:
    """Write half a byte at nibble `at` of `out`, where it and all behind are not written yet; return the next place."""
    if at & 1:
        out[at >> 1] |= np.uint8(nibble << 4)
    else:
        out[at >> 1] = np.uint8(nibble)
    return at + 1


@kernel
def get_nibble(data: NDArray[np.uint8], at: Int) -> Int:
    """Nibble `at` of `data`, 0 beyond its end."""
    return np.int64(data[at >> 1] >> np.uint8(4 * (at & 1))) & 15 if at >> 1 < data.size else np.int64(0)


@kernel
def put_number(value: Int, out: NDArray[np.uint8], at: Int) -> Int:
    """Write a number below 2^33 at nibble `at`; return the next place."""
    while value >= 8:
        at = put_nibble(value & 7 | 8, out, at)
        value >>= 3
    return put_nibble(value, out, at)


@kernel
def get_number(data: NDArray[np.uint8], at: Int) -> tuple[Int, Int]:
    """Read a number of at most `MOST_NIBBLES` nibbles; return it and the next place."""
    value: Int = np.int64(0)
    for group in range(MOST_NIBBLES):
        nibble = get_nibble(data, at)
        at += 1
        value |= (nibble & 7) << (3 * group)
        if nibble < 8:
            break
    return value, at
