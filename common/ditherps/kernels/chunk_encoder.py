"""Encoding of chunks: quantization, models and rANS, tile by tile through L1 buffers (proto/FORMAT.md, "Chunks").

A chunk of `CHUNK` coordinates stands alone: its models, the coder's states and words, and its escapes are together.
Tiles are encoded last to first, since the coder walks backwards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.entropy.family import SCALES_PER_OCTAVE
from ditherps.kernels.alphabets import Alphabet, digits_nbytes, pack_digits
from ditherps.kernels.coder import (
    CODED,
    ENCODE,
    EXPLICIT,
    HEAD,
    PACKED,
    Coder,
    put_head,
    use_explicit,
    use_low_bits,
    use_model,
)
from ditherps.kernels.cpu import Workspace
from ditherps.kernels.escapes import BLOCK, any_up_to, folded, put_number
from ditherps.kernels.explicit import put_table, share_slots
from ditherps.kernels.indices import index_part, quantize_tile
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.parameters import ZERO_SHAPE, put_parameters
from ditherps.kernels.philox import TILE, Stream, fill_lanes
from ditherps.kernels.rans import LOWEST, PAD, SLOT_BITS
from ditherps.kernels.rans_wide import place_rows
from ditherps.kernels.symbols import put_symbols
from ditherps.kernels.tables import (
    CELLS,
    ENTRIES,
    fit,
    resolution_of,
)
from ditherps.kernels.vectors import WIDE, WIDTH

SMALL = 8192  # coordinates of a chunk below which one state is cheaper than sixteen
GAIN = 0.9  # of the bits under the family's model, below which an explicit one is worth its table
RARE_BITS = 28  # about what an index far outside takes, its escape included
FIT_BITS = 1.5  # that a cell's own count seems to save in its sample, and does not
ESCAPE_BITS = 10  # about what an escape takes beside its symbol


@kernel
def keep_narrow(count: Int, nonzero: Int, row: NDArray[np.int64], dithered: bool, work: Coder) -> None:
    """Lower the scale to one without low bits where escaping the few values that are not zero is cheaper than these."""
    _, low_bits = resolution_of(row[0], row[1], dithered, work.family)
    if low_bits * count > RARE_BITS * nonzero:
        row[0] -= SCALES_PER_OCTAVE * low_bits


@kernel
def end_of_places(class_bits: Int, low_bits: Int, bound: Int) -> Int:
    """A symbol that begins at b is coded where bound < b < this (`tables.fill_cumulative`)."""
    return max(np.int64(CELLS + (low_bits == 0) - (1 << class_bits) - bound), np.int64(CELLS // 2 + 1))


@kernel
def place_symbols(count: Int, class_bits: Int, low_bits: Int, bound: Int, work: Coder) -> Int:
    """places[:count] of the tile's indices under its model, and lows; returns how many are escapes."""
    half, classes = np.int32((CELLS // 2) >> class_bits), np.int32(1 << class_bits)
    end = end_of_places(class_bits, low_bits, bound)
    lowest, highest = np.int32(bound), np.int32(end)
    indices, lanes, places, lows = work.indices[:count], work.lanes[:count], work.places[:count], work.lows[:count]
    if low_bits:
        mask = np.int32((1 << low_bits) - 1)
        for i in range(count):
            lows[i] = np.uint16(indices[i] & mask)
            work.highs[i] = np.int32(indices[i] >> low_bits)
        indices = work.highs[:count]
    down = np.uint64(15 - class_bits) & np.uint64(15)
    whole: Int = np.int64(0)
    coded = np.int32(0)
    if WIDE:
        whole = count // WIDTH * WIDTH
        coded = np.int32(place_rows(indices, lanes, whole, class_bits, bound, end, places))
    for i in range(whole, count):
        # LLVM shifts vectors of 32 bits where it sees that no shift is by 32 or more.
        shift = np.int32((np.uint64(lanes[i]) >> np.uint64(1)) >> down)
        index = indices[i]
        index = np.int32(-half) if index < -half else index
        index = half if index > half else index
        begin = np.int32(np.int32(np.int32(index + half) * classes) - shift)
        inside = (begin > lowest) & (begin < highest)
        coded = np.int32(coded + np.int32(inside))
        places[i] = np.uint16(np.int32((begin if inside else np.int32(-shift)) + np.int32(PAD)))
    return count - np.int64(coded)


@kernel
def escape_the_rare(count: Int, class_bits: Int, work: Coder) -> Int:
    """Make escapes of the symbols that have no slot, as an explicit model may leave some; how many there are now."""
    escaped: Int = np.int64(0)
    classes = np.int32(1 << class_bits)
    for i in range(count):
        if work.entries[work.places[i]] >> 16 == 0:
            work.places[i] = np.uint16(PAD - (np.int32(np.int32(work.lanes[i]) * classes) >> 16))
        escaped += work.places[i] <= PAD
    return escaped


@kernel
def count_cells(count: Int, class_bits: Int, low_bits: Int, dithered: bool, work: Coder) -> None:
    """Add the tile's values to `counts`: the cell of x / step where a dither class is known, else the index's."""
    classes = np.int64(1) << class_bits
    fine = dithered and low_bits == 0
    for i in range(count):
        if fine:
            cell = np.int64(np.floor(np.float64(work.scaled[i]) * 2.0**-16 * classes + 0.5))
        else:
            cell = np.int64(work.indices[i] >> low_bits)
        cell += CELLS // 2
        if classes <= cell <= CELLS - classes:
            work.counts[cell] += 1


@kernel
def cost_of_places(count: Int, work: Coder) -> float:
    """Bits of the tile's symbols under the entries."""
    used = work.used
    used[:] = 0
    for i in range(count):
        used[work.places[i]] += 1
    bits = 0.0
    for place in range(ENTRIES):
        if used[place]:
            freq = work.entries[place] >> 16
            bits += used[place] * (SLOT_BITS - work.logarithms[freq])
            if place <= PAD:
                bits += ESCAPE_BITS * used[place]
    return bits


@kernel
def prefers_explicit(
    x: NDArray[np.float32], lo: Int, hi: Int, bucket: Int, steps: NDArray[np.float32], dithered: bool, work: Coder
) -> tuple[bool, Int, Int]:
    """Whether an explicit model codes the middle tile of the chunk x[lo:hi] in clearly fewer bits; the model's bits.

    It may still cost more for the whole chunk, whose tiles need not resemble each other.
    """
    refused = False, np.int64(0), np.int64(0)
    lo += (hi - lo) // TILE // 2 * TILE
    hi = min(lo + TILE, hi)
    count = hi - lo
    for i in range(count):
        work.lanes[i] = np.uint16(i * 40503)  # evenly spread
    total, squares, nonzero, fits = quantize_tile(x, lo, hi, bucket, steps, work)
    if not fits or nonzero == 0 or not squares > 0.0:
        return refused
    row = work.parameters[0]
    fit(count, nonzero, total, squares, row, np.full(3, -1, np.int64), work.family)
    keep_narrow(count, nonzero, row, dithered, work)
    class_bits, low_bits, bound = use_model(row, dithered, ENCODE, work)
    place_symbols(count, class_bits, low_bits, bound, work)
    family_bits = cost_of_places(count, work)
    work.counts[:] = 0
    count_cells(count, class_bits, low_bits, bool(dithered and bucket >= TILE), work)
    if work.counts.sum() == 0:
        return refused
    share_slots(work.counts, work.slots)
    use_explicit(class_bits, ENCODE, work)
    place_symbols(count, class_bits, low_bits, (np.int64(1) << class_bits) - 1, work)
    escape_the_rare(count, class_bits, work)
    cells: Int = np.int64(0)
    for cell in range(CELLS):
        cells += work.slots[cell] > 0
    explicit_bits = cost_of_places(count, work) + FIT_BITS * cells
    return explicit_bits < GAIN * family_bits, class_bits, low_bits


@kernel
def gather_explicit(
    x: NDArray[np.float32],
    lo: Int,
    hi: Int,
    stream: Stream,
    bucket: Int,
    steps: NDArray[np.float32],
    dithered: bool,
    class_bits: Int,
    low_bits: Int,
    work: Coder,
) -> bool:
    """Fill the tables with the explicit model of the chunk x[lo:hi]; False where there is none."""
    work.counts[:] = 0
    for begin in range(lo, hi, TILE):
        end = min(begin + TILE, hi)
        fill_lanes(stream, begin, end - begin, work.lanes, work.scratch, x, end)
        _, squares, _, fits = quantize_tile(x, begin, end, bucket, steps, work)
        if not fits:
            return False
        if squares > 0.0:
            count_cells(end - begin, class_bits, low_bits, bool(dithered and bucket >= TILE), work)
    if work.counts.sum() == 0:
        return False
    share_slots(work.counts, work.slots)
    if work.slots.min() < 0:
        return False
    use_explicit(class_bits, ENCODE, work)
    return True


@kernel
def pack_chunk(
    x: NDArray[np.float32],
    lo: Int,
    hi: Int,
    stream: Stream,
    bucket: Int,
    steps: NDArray[np.float32],
    form: Alphabet,
    reach: Int,
    work: Coder,
    tile_work: Workspace,
    out: NDArray[np.uint8],
) -> Int:
    """Write x[lo:hi], whose indices lie within `reach`, to `out` as a packed chunk; return the bytes."""
    put_head(reach, np.int64(0), PACKED, np.int64(0), out)
    at = np.int64(HEAD)
    digits, spare = tile_work.digits, tile_work.spare
    for begin in range(lo, hi, TILE):
        end = min(begin + TILE, hi)
        count = end - begin
        fill_lanes(stream, begin, count, work.lanes, work.scratch, x, end)
        for s in range(begin, end, min(bucket, TILE)):
            index_part(x, s, min(s + min(bucket, TILE), end), np.float64(steps[s // bucket]), s - begin, work)
        for i in range(count):
            digits[i] = np.uint16(work.indices[i] + reach)
        pack_digits(form, digits, count, spare, tile_work.fields, tile_work.wide, out, at)
        at += digits_nbytes(form, count)
    return at


@kernel
def encode_chunk(
    x: NDArray[np.float32],
    lo: Int,
    hi: Int,
    stream: Stream,
    bucket: Int,
    steps: NDArray[np.float32],
    dithered: bool,
    explicit: bool,
    class_bits: Int,
    low_bits: Int,
    work: Coder,
    out: NDArray[np.uint8],
) -> Int:
    """Write x[lo:hi] to `out`, which has room for all that a chunk may take; return the bytes, -1 for too large values.

    Under a model for each tile, or where `explicit` under the one that `gather_explicit` left, with these bits. `reach`
    becomes the largest |index|.
    """
    work.reach[0] = 0
    states = work.states if hi - lo >= SMALL else work.one_state
    states[:] = np.uint64(LOWEST)
    words, rows = work.words, work.parameters
    top: Int = np.int64(words.size)
    tail: Int = np.int64(work.escapes.size)
    tiles = (hi - lo + TILE - 1) // TILE
    any_symbols = False
    bound: Int = (np.int64(1) << class_bits) - 1  # of an explicit model
    last = np.full(3, -1, np.int64)
    for tile in range(tiles - 1, -1, -1):
        begin = lo + tile * TILE
        end = min(begin + TILE, hi)
        count = end - begin
        fill_lanes(stream, begin, count, work.lanes, work.scratch, x, max(begin - TILE, 0))
        total, squares, nonzero, fits = quantize_tile(x, begin, end, bucket, steps, work)
        if not fits:
            return -1
        row = rows[tile]
        if nonzero == 0 or not squares > 0.0:
            row[1] = ZERO_SHAPE
            continue
        any_symbols = True
        if explicit:
            row[1] = 0
            place_symbols(count, class_bits, low_bits, bound, work)
            escaped = escape_the_rare(count, class_bits, work)
        else:
            fit(count, nonzero, total, squares, row, last, work.family)
            keep_narrow(count, nonzero, row, dithered, work)
            last = row
            class_bits, low_bits, bound = use_model(row, dithered, ENCODE, work)
            escaped = place_symbols(count, class_bits, low_bits, bound, work)
        if escaped:
            at: Int = np.int64(0)
            for first in range(0, count, BLOCK):
                block = work.places[first : min(first + BLOCK, count)]
                if any_up_to(block, PAD):
                    for i in range(block.size):
                        if block[i] <= PAD:
                            at = put_number(folded(np.int64(work.indices[first + i])), work.nibbles, at)
            size = (at + 1) >> 1
            tail -= size
            for byte in range(size):
                work.escapes[tail + byte] = work.nibbles[byte]
        if low_bits:
            use_low_bits(low_bits, work.low_entries, work.low_reciprocals)
            top = put_symbols(work.lows, count, work.low_entries, work.low_reciprocals, PAD, PAD, states, words, top)
        place, end_place = PAD + bound + 1, PAD + end_of_places(class_bits, low_bits, bound)
        top = put_symbols(work.places, count, work.entries, work.reciprocals, place, end_place, states, words, top)
    if explicit:
        size = put_table(class_bits, low_bits, work.slots, rows, tiles, out[HEAD:])
    else:
        for tile in range(tiles):
            if rows[tile, 1] == ZERO_SHAPE:  # the others as before: that costs least
                rows[tile, 0] = rows[tile - 1, 0] if tile else 0
                rows[tile, 2] = rows[tile - 1, 2] if tile else 0
        size = put_parameters(rows, tiles, out[HEAD:])
    lanes = states.size if any_symbols else 0
    count = words.size - top
    put_head(size, lanes, np.int64(EXPLICIT if explicit else CODED), count, out)
    at = np.int64(HEAD + size)
    for lane in range(lanes):
        for byte in range(4):
            out[at] = np.uint8(states[lane] >> np.uint64(8 * byte))
            at += 1
    target = out[at:]
    for i in range(count):
        target[2 * i] = np.uint8(words[top + i])
        target[2 * i + 1] = np.uint8(words[top + i] >> 8)
    at += 2 * count
    for i in range(tail, work.escapes.size):
        out[at] = work.escapes[i]
        at += 1
    return at
