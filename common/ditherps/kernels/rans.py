"""Interleaved range asymmetric numeral systems (Duda, arXiv 1311.2540): the coder's two loops over a tile.

Slots are 12 bits, states stand in [2^15, 2^31), and renormalisation moves 16-bit words. Symbol i of a tile belongs to
state i mod `states.size`; all states share one sequence of words. Encoding walks backwards through symbols and words,
decoding forwards. A symbol is a place in a table of entries `start | freq << 16` (`kernels.tables`).

Sixteen states stand in scalar variables (in an array they are several times slower), so that the processor works on
many at a time; any other number, and what is left of a row of sixteen, takes the loops over an array.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, inlined, kernel

SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
LANES = 16
LOWEST = 1 << 15  # of a state; encoding begins and decoding ends there
RECIPROCAL_BITS = 43  # x * ceil(2^43 / freq) >> 43 is x // freq for every x < 2^31 and freq <= 2^12

PAD = 16  # entries before that of cell 0: those below it, down to -(classes - 1), mean an escape

_START = np.uint64(0xFFFF)
_SLOT = np.uint64(SLOTS - 1)
_SLOTS = np.uint64(SLOTS)
_LOWEST = np.uint64(LOWEST)
_PAD = np.uint64(PAD)
_0, _1, _4, _12, _16, _19 = (np.uint64(n) for n in (0, 1, 4, SLOT_BITS, 16, 19))
_43 = np.uint64(RECIPROCAL_BITS)


@inlined
def _put(
    x: np.uint64,
    place: np.uint64,
    entries: NDArray[np.uint32],
    reciprocals: NDArray[np.uint64],
    words: NDArray[np.uint16],
    top: np.uint64,
) -> tuple[np.uint64, np.uint64]:
    """Code the symbol at `place` on state x; words lie from `top` upwards. Without a branch: none could be foreseen."""
    entry = np.uint64(entries[place])
    freq = entry >> _16
    words[top - _1] = np.uint16(x)  # kept only where the state is too large
    more = np.uint64(x >= (freq << _19))
    top -= more
    x >>= more << _4
    return x + (entry & _START) + ((x * reciprocals[place]) >> _43) * (_SLOTS - freq), top


@inlined
def _get(
    x: np.uint64, dither_class: np.uint64, grain: np.uint64, nearest: NDArray[np.uint8], entries: NDArray[np.uint32]
) -> tuple[np.uint64, np.uint64]:
    """Decode a symbol from state x: (x, cell + class); `grain` is -(number of classes)."""
    slot = x & _SLOT
    cell = np.uint64(nearest[slot]) + dither_class
    entry = np.uint64(entries[(cell & grain) + _PAD - dither_class])
    return (entry >> _16) * (x >> _12) + slot - (entry & _START), cell


@inlined
def _refilled(x: np.uint64, words: NDArray[np.uint16], next_: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Read a word where the state is too small. Without a branch: none could be foreseen."""
    fuller = (x << _16) | np.uint64(words[next_])
    next_ += np.uint64(x < _LOWEST)
    return fuller if x < _LOWEST else x, next_


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
    """Code `places[:count]` backwards, words downwards from `top`; return where they then begin.

    A symbol takes at most a word. `words[top - count - 1]` must exist: the word before the last kept one is scratch.
    """
    lanes = states.size
    whole = count // LANES * LANES if lanes == LANES else 0
    top_ = np.uint64(top)
    for i in range(count - 1, whole - 1, -1):
        lane = i % lanes
        states[lane], top_ = _put(states[lane], np.uint64(places[i]), entries, reciprocals, words, top_)
    if whole:
        x0 = states[0]
        x1 = states[1]
        x2 = states[2]
        x3 = states[3]
        x4 = states[4]
        x5 = states[5]
        x6 = states[6]
        x7 = states[7]
        x8 = states[8]
        x9 = states[9]
        x10 = states[10]
        x11 = states[11]
        x12 = states[12]
        x13 = states[13]
        x14 = states[14]
        x15 = states[15]
        for first in range(whole - LANES, -1, -LANES):
            row = places[first : first + LANES]
            x15, top_ = _put(x15, np.uint64(row[15]), entries, reciprocals, words, top_)
            x14, top_ = _put(x14, np.uint64(row[14]), entries, reciprocals, words, top_)
            x13, top_ = _put(x13, np.uint64(row[13]), entries, reciprocals, words, top_)
            x12, top_ = _put(x12, np.uint64(row[12]), entries, reciprocals, words, top_)
            x11, top_ = _put(x11, np.uint64(row[11]), entries, reciprocals, words, top_)
            x10, top_ = _put(x10, np.uint64(row[10]), entries, reciprocals, words, top_)
            x9, top_ = _put(x9, np.uint64(row[9]), entries, reciprocals, words, top_)
            x8, top_ = _put(x8, np.uint64(row[8]), entries, reciprocals, words, top_)
            x7, top_ = _put(x7, np.uint64(row[7]), entries, reciprocals, words, top_)
            x6, top_ = _put(x6, np.uint64(row[6]), entries, reciprocals, words, top_)
            x5, top_ = _put(x5, np.uint64(row[5]), entries, reciprocals, words, top_)
            x4, top_ = _put(x4, np.uint64(row[4]), entries, reciprocals, words, top_)
            x3, top_ = _put(x3, np.uint64(row[3]), entries, reciprocals, words, top_)
            x2, top_ = _put(x2, np.uint64(row[2]), entries, reciprocals, words, top_)
            x1, top_ = _put(x1, np.uint64(row[1]), entries, reciprocals, words, top_)
            x0, top_ = _put(x0, np.uint64(row[0]), entries, reciprocals, words, top_)
        states[0] = x0
        states[1] = x1
        states[2] = x2
        states[3] = x3
        states[4] = x4
        states[5] = x5
        states[6] = x6
        states[7] = x7
        states[8] = x8
        states[9] = x9
        states[10] = x10
        states[11] = x11
        states[12] = x12
        states[13] = x13
        states[14] = x14
        states[15] = x15
    return np.int64(top_)


@kernel
def get_symbols(
    classes: NDArray[np.uint8],
    count: Int,
    class_bits: Int,
    nearest: NDArray[np.uint8],
    entries: NDArray[np.uint32],
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
    first: Int,
    cells: NDArray[np.uint16],
) -> Int:
    """Decode `count` symbols, reading words from `first` on; return the position of the next word.

    `classes` are those of their dither. Symbol i is `cells[i] >> class_bits`. Any words decode to something: beyond
    their end zeros are read.
    """
    grain = _0 - (_1 << np.uint64(class_bits))
    width = states.size
    done: Int = np.int64(0)
    next_ = np.uint64(first)
    if width == LANES:
        x0 = states[0]
        x1 = states[1]
        x2 = states[2]
        x3 = states[3]
        x4 = states[4]
        x5 = states[5]
        x6 = states[6]
        x7 = states[7]
        x8 = states[8]
        x9 = states[9]
        x10 = states[10]
        x11 = states[11]
        x12 = states[12]
        x13 = states[13]
        x14 = states[14]
        x15 = states[15]
        while count - done >= LANES and np.int64(next_) + LANES <= words.size:
            row, out = classes[done : done + LANES], cells[done : done + LANES]
            x0, cell = _get(x0, np.uint64(row[0]), grain, nearest, entries)
            out[0] = np.uint16(cell)
            x0, next_ = _refilled(x0, words, next_)
            x1, cell = _get(x1, np.uint64(row[1]), grain, nearest, entries)
            out[1] = np.uint16(cell)
            x1, next_ = _refilled(x1, words, next_)
            x2, cell = _get(x2, np.uint64(row[2]), grain, nearest, entries)
            out[2] = np.uint16(cell)
            x2, next_ = _refilled(x2, words, next_)
            x3, cell = _get(x3, np.uint64(row[3]), grain, nearest, entries)
            out[3] = np.uint16(cell)
            x3, next_ = _refilled(x3, words, next_)
            x4, cell = _get(x4, np.uint64(row[4]), grain, nearest, entries)
            out[4] = np.uint16(cell)
            x4, next_ = _refilled(x4, words, next_)
            x5, cell = _get(x5, np.uint64(row[5]), grain, nearest, entries)
            out[5] = np.uint16(cell)
            x5, next_ = _refilled(x5, words, next_)
            x6, cell = _get(x6, np.uint64(row[6]), grain, nearest, entries)
            out[6] = np.uint16(cell)
            x6, next_ = _refilled(x6, words, next_)
            x7, cell = _get(x7, np.uint64(row[7]), grain, nearest, entries)
            out[7] = np.uint16(cell)
            x7, next_ = _refilled(x7, words, next_)
            x8, cell = _get(x8, np.uint64(row[8]), grain, nearest, entries)
            out[8] = np.uint16(cell)
            x8, next_ = _refilled(x8, words, next_)
            x9, cell = _get(x9, np.uint64(row[9]), grain, nearest, entries)
            out[9] = np.uint16(cell)
            x9, next_ = _refilled(x9, words, next_)
            x10, cell = _get(x10, np.uint64(row[10]), grain, nearest, entries)
            out[10] = np.uint16(cell)
            x10, next_ = _refilled(x10, words, next_)
            x11, cell = _get(x11, np.uint64(row[11]), grain, nearest, entries)
            out[11] = np.uint16(cell)
            x11, next_ = _refilled(x11, words, next_)
            x12, cell = _get(x12, np.uint64(row[12]), grain, nearest, entries)
            out[12] = np.uint16(cell)
            x12, next_ = _refilled(x12, words, next_)
            x13, cell = _get(x13, np.uint64(row[13]), grain, nearest, entries)
            out[13] = np.uint16(cell)
            x13, next_ = _refilled(x13, words, next_)
            x14, cell = _get(x14, np.uint64(row[14]), grain, nearest, entries)
            out[14] = np.uint16(cell)
            x14, next_ = _refilled(x14, words, next_)
            x15, cell = _get(x15, np.uint64(row[15]), grain, nearest, entries)
            out[15] = np.uint16(cell)
            x15, next_ = _refilled(x15, words, next_)
            done += LANES
        states[0] = x0
        states[1] = x1
        states[2] = x2
        states[3] = x3
        states[4] = x4
        states[5] = x5
        states[6] = x6
        states[7] = x7
        states[8] = x8
        states[9] = x9
        states[10] = x10
        states[11] = x11
        states[12] = x12
        states[13] = x13
        states[14] = x14
        states[15] = x15
    for i in range(done, count):
        lane = i % width
        x, cell = _get(states[lane], np.uint64(classes[i]), grain, nearest, entries)
        if x < _LOWEST:
            x <<= _16
            if np.int64(next_) < words.size:
                x |= np.uint64(words[next_])
                next_ += _1
        states[lane] = x
        cells[i] = np.uint16(cell)
    return np.int64(next_)


@kernel
def get_low_bits(
    bits: Int, count: Int, states: NDArray[np.uint64], words: NDArray[np.uint16], first: Int, lows: NDArray[np.uint16]
) -> Int:
    """Decode uniform symbols of `bits` bits; return the position of the next word. As `get_symbols` otherwise."""
    down = np.uint64(12 - bits)
    mask = (np.uint64(1) << down) - np.uint64(1)
    next_ = first
    for i in range(count):
        lane = i % states.size
        x = states[lane]
        slot = x & np.uint64(SLOTS - 1)
        lows[i] = np.uint16(slot >> down)
        x = ((x >> np.uint64(12)) << down) + (slot & mask)
        if x < np.uint64(LOWEST):
            x <<= np.uint64(16)
            if next_ < words.size:
                x |= np.uint64(words[next_])
                next_ += 1
        states[lane] = x
    return next_
