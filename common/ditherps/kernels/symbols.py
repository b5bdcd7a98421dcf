"""Coding a tile's symbols: whole rows as vectors where the processor has them, the rest one by one. Same words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels import rans, rans_wide
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.vectors import WIDE

_1, _15 = np.uint64(1), np.uint64(15)


@kernel
def put_symbols(
    places: NDArray[np.uint16],
    count: Int,
    entries: NDArray[np.uint32],
    reciprocals: NDArray[np.uint64],
    begin: Int,
    end: Int,
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
    top: Int,
) -> Int:
    """As `rans.put_symbols`, with `begin` and `end` for `rans_wide.put_rows`.

    16 words below those that `count` symbols may take must exist, as scratch.
    """
    whole: Int = np.int64(0)
    if WIDE and states.size == rans.LANES:
        whole = count // rans.LANES * rans.LANES
    top = rans.put_symbols(places[whole:], count - whole, entries, reciprocals, states, words, top)
    if WIDE and whole:
        top = rans_wide.put_rows(places, whole, entries, begin, end, states, words, top)
    return top


@kernel
def get_symbols(
    lanes: NDArray[np.uint16],
    count: Int,
    class_bits: Int,
    nearest: NDArray[np.uint8],
    entries: NDArray[np.uint32],
    rows: NDArray[np.uint32],
    groups: Int,
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
    first: Int,
    classes: NDArray[np.uint8],
    symbols: NDArray[np.uint16],
) -> Int:
    """Decode `symbols[:count]` of a tile with this dither, reading words from `first` on; the position of the next.

    `rows` and `groups` are those of `rans_wide.fill_rows`, `classes` is scratch. Any words decode to something: beyond
    their end zeros are read.
    """
    done: Int = np.int64(0)
    next_: Int = first
    if WIDE and groups and states.size == rans.LANES:
        done, next_ = rans_wide.get_rows(lanes, count, class_bits, rows, groups, states, words, next_, symbols)
    # LLVM shifts vectors of 16 bits where it sees that no shift is by 16 or more.
    down, up = np.uint64(15 - class_bits) & _15, np.uint64(class_bits) & _15
    rest = lanes[done:count]
    for i in range(rest.size):
        classes[i] = np.uint8((np.uint64(rest[i]) >> _1) >> down)
    cells = symbols[done:count]
    next_ = rans.get_symbols(classes, cells.size, class_bits, nearest, entries, states, words, next_, cells)
    for i in range(cells.size):
        cells[i] = np.uint16(np.uint64(cells[i]) >> up)
    return next_
