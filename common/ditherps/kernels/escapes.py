"""Indices outside the alphabet, as nibbles beside the symbols.

A number is written in groups of three bits, lowest first, a nibble each whose highest bit says that more follow; two
nibbles a byte, the lower half first. Reading beyond the end yields zeros, so any bytes decode to something.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, kernel

MOST_NIBBLES = 11  # of a number below 2^33
ESCAPE_NIBBLES = 12  # at most, of an index outside the alphabet
NOT_RAW = -1
FARTHEST = 2147483646.0  # distance beyond the alphabet that is still sent as one

BLOCK = 64  # symbols looked at together


@kernel
def any_up_to(symbols: NDArray[np.uint16], highest: int) -> bool:
    """Whether one of a block of symbols is at most `highest`: escapes are rare, and a look at each symbol slow."""
    found = False
    for i in range(symbols.size):
        found |= symbols[i] <= highest
    return found


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


@kernel
def put_escape(exact: float, half: int, bits: Int, out: NDArray[np.uint8], at: Int) -> Int:
    """Write a digit outside 0 .. 2M (2M = `half`): how far outside, or the coordinate's own 32 bits where that is far.

    The number is 0 before 32 bits as eight nibbles, else 1 + 2 (distance - 1) + (1 above the alphabet, 0 below).
    Rounding may have put `exact` just inside; the nearest digit outside is then as good.
    """
    above = exact > 0.5 * half
    distance = max(exact - half if above else -exact, 1.0)
    if distance > FARTHEST:
        at = put_number(np.int64(0), out, at)
        for group in range(8):
            at = put_nibble((bits >> (4 * group)) & 15, out, at)
        return at
    return put_number(2 * (np.int64(distance) - 1) + np.int64(above) + 1, out, at)


@kernel
def get_escape(data: NDArray[np.uint8], at: Int, half: int) -> tuple[Int, Int, Int]:
    """Read what `put_escape` wrote: (digit, the coordinate's bits or `NOT_RAW`, next place)."""
    number, at = get_number(data, at)
    if number == 0:
        bits: Int = np.int64(0)
        for group in range(8):
            bits |= get_nibble(data, at) << (4 * group)
            at += 1
        return np.int64(0), bits, at
    distance = ((number - 1) >> 1) + 1
    return (half + distance if (number - 1) & 1 else -distance), np.int64(NOT_RAW), at


@kernel
def check_escapes(data: NDArray[np.uint8], lo: Int, hi: Int) -> bool:
    """Whether all escapes in bytes lo .. hi of a tile are distances up to `FARTHEST` or finite values."""
    part = data[:hi]
    at = 2 * lo
    while at < 2 * hi:
        digit, bits, at = get_escape(part, at, 0)
        if bits != NOT_RAW:
            if bits & 0x7F800000 == 0x7F800000:
                return False
        elif np.abs(digit) > FARTHEST:
            return False
    return True
