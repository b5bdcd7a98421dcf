"""Bits and Exp-Golomb numbers in bytes, lowest bit first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, kernel

MOST_WIDTH = 20  # of a number's length prefix


@kernel
def put_bits(value: Int, bits: Int, out: NDArray[np.uint8], at: Int) -> Int:
    """Write `bits` bits at bit `at`; bits behind are not written yet. Return the next place."""
    for bit in range(bits):
        place = at + bit
        if place & 7 == 0:
            out[place >> 3] = 0
        out[place >> 3] |= np.uint8(((value >> bit) & 1) << (place & 7))
    return at + bits


@kernel
def get_bits(bits: Int, data: NDArray[np.uint8], at: Int) -> Int:
    """Read `bits` bits from bit `at`; ones beyond the end, so that no prefix goes on for ever."""
    value: Int = np.int64(0)
    for bit in range(bits):
        place = at + bit
        value |= (
            np.int64(data[place >> 3] >> np.uint8(place & 7)) & 1 if place >> 3 < data.size else np.int64(1)
        ) << bit
    return value


@kernel
def put_golomb(value: Int, order: Int, out: NDArray[np.uint8], at: Int) -> Int:
    """Write a number >= 0 as Exp-Golomb of that order: width w as w zeros and a one, then w + order bits."""
    rest = (value >> order) + 1
    width: Int = np.int64(0)
    while rest >> (width + 1):
        width += 1
    at = put_bits(np.int64(1) << width, width + 1, out, at)
    at = put_bits(rest & ((np.int64(1) << width) - 1), width, out, at)
    return put_bits(value & ((np.int64(1) << order) - 1), order, out, at)


@kernel
def get_golomb(order: Int, data: NDArray[np.uint8], at: Int) -> tuple[Int, Int]:
    """Read what `put_golomb` wrote: (number, or -1 where it is too wide; next place)."""
    width: Int = np.int64(0)
    while get_bits(np.int64(1), data, at + width) == 0:
        width += 1
        if width > MOST_WIDTH:
            return np.int64(-1), at
    at += width + 1
    rest = (np.int64(1) << width) + get_bits(width, data, at) - 1
    at += width
    return (rest << order) + get_bits(order, data, at), at + order
