"""`rans`, a row of sixteen symbols at a time: one vector holds all states. For processors that `vectors.WIDE` names.

Decoding without a look-up in memory, whose latency all sixteen would wait for: where the symbols of a model are few, a
vector holds what one symbol is under each of the sixteen classes, as `start << 19 | row << 13 | freq`. A state's slot
lies in the symbol of the largest start that is not beyond it. Subtracted from `slot << 19 | (1 << 19) - 1`, unsigned,
that entry leaves the least, which is `slot - start`, and the complement of its row and its frequency.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.rans import LOWEST, PAD, SLOT_BITS, SLOTS
from ditherps.kernels.tables import CELLS, ESCAPE_SLOTS
from ditherps.kernels.vectors import (
    WIDTH,
    compress,
    count_set,
    expand,
    gather,
    least,
    load,
    pick,
    pick_of_two,
    quotient,
    same,
    select,
    store,
)

ROWS = 16  # symbols at most, escapes among them
ROW_GROUP = 4  # taken together
PART = 2 * WIDTH  # entries that are looked up together
ROWS_SIZE = (ROWS + 1) * WIDTH  # the last row names the symbols

_KEY = (1 << 19) - 1
_FREQ = (1 << 13) - 1
_NEVER = SLOTS << 19  # begins behind all slots
_POSITIONS = np.arange(WIDTH, dtype=np.uint32)


@kernel
def place_rows(
    indices: NDArray[np.int32],
    lanes: NDArray[np.uint16],
    whole: Int,
    class_bits: Int,
    bound: Int,
    highest: Int,
    places: NDArray[np.uint16],
) -> Int:
    """places[:whole], whole rows, as `chunk_encoder.place_symbols`; how many are not escapes."""
    half, coded = (CELLS // 2) >> class_bits, np.int64(0)
    for first in range(0, whole, WIDTH):
        class_ = load(lanes, first) >> (16 - class_bits)
        symbol = least(load(indices, first) + half, same(2 * half))  # one below the grid looks like one above it
        place = (symbol << class_bits) - class_
        inside = place - (bound + 1) < highest - bound - 1
        coded += count_set(inside)
        store(places, first, select(inside, place, same(0) - class_) + PAD)
    return coded


@kernel
def put_rows(
    places: NDArray[np.uint16],
    whole: Int,
    entries: NDArray[np.uint32],
    begin: Int,
    end: Int,
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
    top: Int,
) -> Int:
    """`rans.put_symbols` of `places[:whole]`, whole rows; the 16 words below those of a row are scratch.

    All places but those of escapes lie from `begin` on and before `end`; where these are equal they may lie anywhere.
    """
    parts = (end - begin + PART - 1) // PART
    x = load(states, 0)
    positions = load(_POSITIONS, 0)
    for first in range(whole - WIDTH, -1, -WIDTH):
        place = load(places, first)
        if parts:
            place = place - begin  # an escape's is in no part
            part, entry = place >> 5, same(ESCAPE_SLOTS << 16)
            for i in range(parts):
                at = begin + PART * i
                found = pick_of_two(load(entries, at), load(entries, at + WIDTH), place)
                entry = select(part == i, found, entry)
        else:
            entry = gather(entries, place)
        freq = entry >> 16
        full = x >= freq << 19
        written = count_set(full)
        # The kept words move to the upper lanes, so that what lies below them is not written yet.
        store(words, top - WIDTH, pick(compress(x, full), positions + written))
        top -= written
        x = select(full, x >> 16, x)
        rough = quotient(x, freq)
        more = same(SLOTS) - freq
        coded = x + (entry & 0xFFFF) + rough * more
        x = select(x - rough * freq >= freq, coded + more, coded)
    store(states, 0, x)
    return top


@kernel
def fill_rows(class_bits: Int, entries: NDArray[np.uint32], rows: NDArray[np.uint32]) -> Int:
    """Fill `rows` from the entries of a model; return how many groups of rows it has, 0 for too many symbols.

    The first is that of escapes, slot 0 under each class. Symbols without a slot under any class are left out.
    """
    classes = np.int64(1) << class_bits
    rows[:] = np.uint32(_NEVER)
    names = rows[ROWS * WIDTH :]
    names[:] = np.uint32(0)
    rows[:WIDTH] = entries[PAD] >> np.uint32(16)
    found: Int = np.int64(1)
    for symbol in range(1, (CELLS >> class_bits) + 1):
        part = entries[PAD + classes * (symbol - 1) + 1 : PAD + classes * symbol + 1]
        slots: Int = np.int64(0)
        for place in range(classes):
            slots += np.int64(part[place] >> 16)
        if slots:
            if found == ROWS:
                return np.int64(0)
            for class_ in range(classes):
                entry = np.int64(part[classes - 1 - class_])
                rows[found * WIDTH + class_] = np.uint32((entry & 0xFFFF) << 19 | found << 13 | entry >> 16)
            names[found] = np.uint32(symbol)
            found += 1
    return (found + ROW_GROUP - 1) // ROW_GROUP


@kernel
def get_rows(
    lanes: NDArray[np.uint16],
    count: Int,
    class_bits: Int,
    rows: NDArray[np.uint32],
    groups: Int,
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
    next_: Int,
    symbols: NDArray[np.uint16],
) -> tuple[Int, Int]:
    """`symbols.get_symbols` as long as 16 symbols and 16 words are left; how many it decoded, and the next word."""
    x = load(states, 0)
    names = load(rows, ROWS * WIDTH)
    done: Int = np.int64(0)
    while count - done >= WIDTH and next_ + WIDTH <= words.size:
        class_ = load(lanes, done) >> (16 - class_bits)
        key = (x & (SLOTS - 1)) << 19 | _KEY
        found = same(2**32 - 1)
        for group in range(groups):
            at = group * (ROW_GROUP * WIDTH)
            found = least(
                found,
                least(
                    least(key - pick(load(rows, at), class_), key - pick(load(rows, at + 16), class_)),
                    least(key - pick(load(rows, at + 32), class_), key - pick(load(rows, at + 48), class_)),
                ),
            )
        entry = found ^ _KEY
        x = (entry & _FREQ) * (x >> SLOT_BITS) + (found >> 19)
        low = x < LOWEST
        x = select(low, x << 16, x) | expand(load(words, next_), low)
        next_ += count_set(low)
        store(symbols, done, pick(names, entry >> 13))
        done += WIDTH
    store(states, 0, x)
    return done, next_
