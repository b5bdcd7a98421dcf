"""Explicit models: a chunk's own distribution, sent as the slots of each cell (proto/FORMAT.md, "Models").

The grid is that of `kernels.tables`; where the family of models fits badly, as for values that are few or discrete, the
histogram itself is worth its bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.bits import get_bits, get_golomb, put_bits, put_golomb
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.rans import SLOTS
from ditherps.kernels.tables import CELLS, ESCAPE_SLOTS, MAX_LOW_BITS

_SPAN = SLOTS - ESCAPE_SLOTS
MAX_CLASS_BITS = 4


@kernel
def share_slots(counts: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
    """`slots[cell]`: counts in proportion to their sum, rounded, the largest taking up what is left."""
    total: Int = np.int64(0)
    largest = 0
    for cell in range(CELLS):
        total += counts[cell]
        if counts[cell] > counts[largest]:
            largest = cell
    left = np.int64(_SPAN)
    for cell in range(CELLS):
        slots[cell] = (2 * counts[cell] * _SPAN + total) // (2 * total)
        left -= slots[cell]
    slots[largest] += left


@kernel
def fill_from_slots(slots: NDArray[np.int64], cumulative: NDArray[np.int64]) -> None:
    """`cumulative[:CELLS + 1]` of slots that sum to all but those of escapes."""
    cumulative[0] = ESCAPE_SLOTS
    for cell in range(CELLS):
        cumulative[cell + 1] = cumulative[cell] + slots[cell]
    cumulative[CELLS + 1] = SLOTS


@kernel
def put_table(
    class_bits: Int,
    low_bits: Int,
    slots: NDArray[np.int64],
    rows: NDArray[np.int64],
    tiles: Int,
    out: NDArray[np.uint8],
) -> Int:
    """Write the model, and which tiles are zero (`rows[:, 1]` not 0); return whole bytes."""
    first, last = 0, CELLS - 1
    while slots[first] == 0:
        first += 1
    while slots[last] == 0:
        last -= 1
    best, order = np.int64(1) << 40, np.int64(0)
    for candidate in range(10):
        size = np.int64(0)
        for cell in range(first, last + 1):
            rest = (slots[cell] >> candidate) + 1
            while rest > 1:
                size += 2
                rest >>= 1
            size += 1 + candidate
        if size < best:
            best, order = size, np.int64(candidate)
    at = put_bits(class_bits, np.int64(3), out, np.int64(0))
    at = put_bits(low_bits, np.int64(4), out, at)
    at = put_bits(order, np.int64(4), out, at)
    at = put_bits(np.int64(first), np.int64(8), out, at)
    at = put_bits(np.int64(last), np.int64(8), out, at)
    for cell in range(first, last + 1):
        at = put_golomb(slots[cell], order, out, at)
    for tile in range(tiles):
        at = put_bits(np.int64(rows[tile, 1] != 0), np.int64(1), out, at)
    return (at + 7) >> 3


@kernel
def get_table(
    data: NDArray[np.uint8], tiles: Int, slots: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[Int, Int]:
    """Read what `put_table` wrote: (class bits, low bits), or (-1, 0) where it is malformed."""
    refused = np.int64(-1), np.int64(0)
    class_bits = get_bits(np.int64(3), data, np.int64(0))
    low_bits = get_bits(np.int64(4), data, np.int64(3))
    order = get_bits(np.int64(4), data, np.int64(7))
    first = get_bits(np.int64(8), data, np.int64(11))
    last = get_bits(np.int64(8), data, np.int64(19))
    at: Int = np.int64(27)
    if class_bits > MAX_CLASS_BITS or low_bits > MAX_LOW_BITS or (class_bits and low_bits) or order > 12:
        return refused
    if first < np.int64(1) << class_bits or last > CELLS - (np.int64(1) << class_bits):
        return refused  # where escapes are
    left = np.int64(_SPAN)
    slots[:] = 0
    for cell in range(first, last + 1):
        value, at = get_golomb(order, data, at)
        if value < 0 or value > left:
            return refused
        slots[cell] = value
        left -= value
    for tile in range(tiles):
        rows[tile, 1] = get_bits(np.int64(1), data, at)
        at += 1
    if left or (at + 7) >> 3 != data.size:
        return refused
    return class_bits, low_bits
