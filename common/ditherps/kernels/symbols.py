"""Coding a tile's symbols: whole rows as vectors where the processor has them, the rest one by one, to the same words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels import rans, rans_wide
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.vectors import WIDE


@kernel
def put_symbols(
    places: NDArray[np.uint16],
    count: Int,
    entries: NDArray[np.uint32],
    reciprocals: NDArray[np.uint64],
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
    top: Int,
) -> Int:
    """As `rans.put_symbols`; 16 words below those that `count` symbols may take must exist, as scratch."""
    whole: Int = np.int64(0)
    if WIDE and states.size == rans.LANES:
        whole = count // rans.LANES * rans.LANES
    top = rans.put_symbols(places[whole:], count - whole, entries, reciprocals, states, words, top)
    if WIDE and whole:
        top = rans_wide.put_rows(places, whole, entries, states, words, top)
    return top


@kernel
def get_symbols(
    classes: NDArray[np.uint8],
    count: Int,
    class_bits: Int,
    nearest: NDArray[np.uint8],
    entries: NDArray[np.uint32],
    rows: NDArray[np.uint32],
    groups: Int,
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
    first: Int,
    cells: NDArray[np.uint16],
) -> Int:
    """As `rans.get_symbols`; `rows` and `groups` are those of `rans_wide.fill_rows`."""
    done: Int = np.int64(0)
    next_: Int = first
    if WIDE and groups and states.size == rans.LANES:
        done, next_ = rans_wide.get_rows(classes, count, class_bits, rows, groups, states, words, next_, cells)
    return rans.get_symbols(
        classes[done:], count - done, class_bits, nearest, entries, states, words, next_, cells[done:]
    )
