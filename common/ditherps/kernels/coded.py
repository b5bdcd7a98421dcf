"""Entropy-coded chunks: quantization, models and rANS, tile by tile through L1 buffers (proto/FORMAT.md, "Chunks").

A chunk of `CHUNK` coordinates stands alone: its tiles' parameters, the coder's states and words, and its escapes are
together. Tiles are encoded last to first, since the coder walks backwards, and decoded first to last.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.entropy.family import Family, family, logarithms
from ditherps.kernels.alphabets import Alphabet, digits_nbytes, pack_digits, unpack_digits
from ditherps.kernels.cpu import LARGEST, Workspace
from ditherps.kernels.escapes import folded, get_number, put_number, unfolded
from ditherps.kernels.explicit import fill_from_slots, get_table, put_table, share_slots
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.parameters import ZERO_SHAPE, get_parameters, put_parameters
from ditherps.kernels.philox import TILE, Stream, fill_lanes
from ditherps.kernels.rans import LANES, LOWEST, PAD, SLOT_BITS, SLOTS, get_symbols, put_symbols
from ditherps.kernels.tables import (
    CELLS,
    ENTRIES,
    FILL,
    OFFSET_BITS,
    OFFSETS,
    fill_cumulative,
    fill_entries,
    fill_nearest,
    fill_offsets,
    fill_reciprocals,
    fit,
    resolution_of,
)

CHUNK_TILES = 64
CHUNK = CHUNK_TILES * TILE
SMALL = 8192  # coordinates of a chunk below which one state is cheaper than sixteen
HEAD = 8  # bytes before the rest of a chunk
CODED, PACKED, PLAIN, EXPLICIT = 0, 1, 2, 3  # forms of a chunk
REACH = 2.0 ** (20)  # steps that every chunk must be able to hold as float32
NARROW = 1 << 30  # |x / step| * 2^16 below which integers of 32 bits do
WIDEST = 2.0**31 - 2  # of an index
_ROW = 64
MOST_MODEL_BYTES = 2048  # of parameters (57 bits a tile) or a table (41 bits a cell, and a bit a tile)
GAIN = 0.9  # of the bits under the family's model, below which an explicit one is worth its table
FIT_BITS = 1.5  # that a cell's own count seems to save in its sample, and does not
ESCAPE_BITS = 10  # about what an escape takes beside its symbol


class Coder(NamedTuple):
    """What one thread needs to code chunks: buffers of a tile, and room for the words and escapes of a chunk."""

    family: Family
    lanes: NDArray[np.uint16]
    scratch: NDArray[np.uint16]
    scaled: NDArray[np.float32]
    sums: NDArray[np.float32]
    indices: NDArray[np.int32]
    classes: NDArray[np.uint8]
    places: NDArray[np.uint16]
    lows: NDArray[np.uint16]
    highs: NDArray[np.int32]
    parameters: NDArray[np.int64]
    cumulative: NDArray[np.int64]
    entries: NDArray[np.uint32]
    reciprocals: NDArray[np.uint64]
    nearest: NDArray[np.uint8]
    offsets: NDArray[np.int32]
    low_entries: NDArray[np.uint32]
    low_reciprocals: NDArray[np.uint64]
    states: NDArray[np.uint64]
    one_state: NDArray[np.uint64]
    words: NDArray[np.uint16]
    nibbles: NDArray[np.uint8]
    escapes: NDArray[np.uint8]
    model: NDArray[np.int64]
    slots: NDArray[np.int64]
    counts: NDArray[np.int64]
    used: NDArray[np.int64]
    logarithms: NDArray[np.float64]
    reach: NDArray[np.int64]
    out: NDArray[np.uint8]


_local = threading.local()


def coder() -> Coder:
    """This thread's buffers."""
    try:
        found: Coder = _local.coder
    except AttributeError:
        found = _local.coder = Coder(
            family=family(),
            lanes=np.empty(TILE, np.uint16),
            scratch=np.empty(TILE, np.uint16),
            scaled=np.empty(TILE, np.float32),
            sums=np.empty(2 * _ROW, np.float32),
            indices=np.empty(TILE, np.int32),
            classes=np.empty(TILE, np.uint8),
            places=np.empty(TILE, np.uint16),
            lows=np.empty(TILE, np.uint16),
            highs=np.empty(TILE, np.int32),
            parameters=np.empty((CHUNK_TILES, 3), np.int64),
            cumulative=np.empty(CELLS + 2, np.int64),
            entries=np.empty(ENTRIES, np.uint32),
            reciprocals=np.empty(ENTRIES, np.uint64),
            nearest=np.empty(SLOTS + FILL, np.uint8),
            offsets=np.empty(OFFSETS, np.int32),
            low_entries=np.empty(SLOTS, np.uint32),
            low_reciprocals=np.empty(SLOTS, np.uint64),
            states=np.empty(LANES, np.uint64),
            one_state=np.empty(1, np.uint64),
            words=np.empty(2 * CHUNK + 2 * LANES, np.uint16),
            nibbles=np.empty(6 * TILE, np.uint8),
            escapes=np.empty(6 * CHUNK, np.uint8),
            model=np.full(4, -1, np.int64),
            slots=np.empty(CELLS, np.int64),
            counts=np.empty(CELLS, np.int64),
            used=np.empty(ENTRIES, np.int64),
            logarithms=logarithms(),
            reach=np.zeros(1, np.int64),
            out=np.empty(HEAD + 4 * CHUNK, np.uint8),
        )
    return found


# --- models ----------------------------------------------------------------------------------------------------------


@kernel
def use_model(row: NDArray[np.int64], dithered: bool, decoding: bool, work: Coder) -> tuple[Int, Int, Int]:
    """Fill the tables of a tile's parameters where they are not those of the last; (class bits, low bits, bound)."""
    scale, shape, spike = row
    class_bits, low_bits = resolution_of(scale, shape, dithered, work.family)
    key = scale | shape << 8 | spike << 12 | np.int64(dithered) << 20
    model = work.model
    if model[0] != key:
        model[1] = fill_cumulative(scale, shape, spike, class_bits, low_bits, dithered, work.family, work.cumulative)
        fill_entries(work.cumulative, class_bits, work.entries)
        model[0] = key
    if decoding and model[2] != key:
        fill_nearest(work.cumulative, work.nearest)
        fill_offsets(scale, shape, spike, class_bits, work.family, work.offsets)
        model[2] = key
    elif not decoding and model[3] != key:
        fill_reciprocals(work.entries, work.reciprocals)
        model[3] = key
    return class_bits, low_bits, model[1]


@kernel
def use_explicit(class_bits: Int, decoding: bool, work: Coder) -> None:
    """Fill the tables from `slots`; those of the next tile with parameters are then made anew."""
    fill_from_slots(work.slots, work.cumulative)
    fill_entries(work.cumulative, class_bits, work.entries)
    if decoding:
        fill_nearest(work.cumulative, work.nearest)
    else:
        fill_reciprocals(work.entries, work.reciprocals)
    work.model[:] = -1


@kernel
def use_low_bits(bits: Int, entries: NDArray[np.uint32], reciprocals: NDArray[np.uint64]) -> None:
    """Entries of uniform symbols of that many bits."""
    freq = np.int64(SLOTS) >> bits
    for value in range(np.int64(1) << bits):
        entries[value] = np.uint32(value * freq | freq << 16)
        reciprocals[value] = np.uint64((np.int64(1) << 43) // freq)


# --- quantization -----------------------------------------------------------------------------------------------------


@kernel
def index_part(
    x: NDArray[np.float32], lo: Int, hi: Int, step: float, first: Int, work: Coder
) -> tuple[float, float, Int, bool]:
    """indices[first:] = floor(x / step + u + 1/2) of x[lo:hi]; `reach` grows to the largest of their sizes.

    Returns the sums of |x / step| and its square in a fixed order, how many are not zero, and whether all indices fit.
    """
    count = hi - lo
    source, random = x[lo:hi], work.lanes[first : first + count]
    scaled, indices = work.scaled[:count], work.indices[first : first + count]
    scale = np.float32(65536.0 / step) if step > 0.0 else np.float32(0.0)
    bound = np.float32(NARROW)
    largest = np.int32(0)
    nonzero = np.int32(0)
    for i in range(count):
        value = min(max(source[i] * scale, -bound), bound)
        scaled[i] = value
        # Not negative, so that cutting the fraction off rounds to nearest.
        whole = np.int32(np.int32(np.abs(value) + np.float32(0.5)))
        signed = np.int32(-whole) if value < np.float32(0.0) else whole
        indices[i] = np.int32(np.int32(signed + np.int32(random[i])) >> 16)
        largest = whole if whole > largest else largest
        nonzero = np.int32(nonzero + np.int32(whole != 0))
    farthest = np.int32(0)
    fits = True
    if largest >= NARROW:
        for i in range(count):
            exact = np.floor(np.float64(source[i]) / step + (np.float64(random[i]) + 0.5) / 65536.0)
            fits &= np.abs(exact) <= WIDEST
            indices[i] = np.int32(min(max(exact, -WIDEST), WIDEST))
            scaled[i] = np.float32(np.float64(source[i]) / step)
        unit = 1.0
    else:
        unit = 2.0**-16
    for i in range(count):
        size = np.int32(-indices[i]) if indices[i] < 0 else indices[i]
        farthest = size if size > farthest else farthest
    work.reach[0] = max(work.reach[0], np.int64(farthest))
    sums = work.sums
    sums[:] = np.float32(0.0)
    for row in range(0, count, _ROW):
        part = scaled[row : row + _ROW]
        for lane in range(part.size):
            sums[lane] += np.abs(part[lane])
            sums[_ROW + lane] += part[lane] * part[lane]
    total, squares = 0.0, 0.0
    for lane in range(_ROW):
        total += np.float64(sums[lane])
        squares += np.float64(sums[_ROW + lane])
    return total * unit, squares * unit * unit, np.int64(nonzero), fits


@kernel
def quantize_tile(
    x: NDArray[np.float32], lo: Int, hi: Int, bucket: Int, steps: NDArray[np.float32], work: Coder
) -> tuple[float, float, Int, bool]:
    """`index_part` of all buckets of the tile x[lo:hi]."""
    total, squares, nonzero, fits = 0.0, 0.0, np.int64(0), True
    segment = min(bucket, TILE)
    for s in range(lo, hi, segment):
        some, more, found, good = index_part(x, s, min(s + segment, hi), np.float64(steps[s // bucket]), s - lo, work)
        total += some
        squares += more
        nonzero += found
        fits = fits and good
    return total, squares, nonzero, fits


@kernel
def place_symbols(count: Int, class_bits: Int, low_bits: Int, bound: Int, work: Coder) -> Int:
    """places[:count] of the tile's indices under its model, and lows; returns how many are escapes."""
    half, classes = np.int32((CELLS // 2) >> class_bits), np.int32(1 << class_bits)
    lowest, highest = np.int32(bound), np.int32(CELLS + 1 - classes - bound)
    indices, lanes, places, lows = work.indices[:count], work.lanes[:count], work.places[:count], work.lows[:count]
    if low_bits:
        mask = np.int32((1 << low_bits) - 1)
        for i in range(count):
            lows[i] = np.uint16(indices[i] & mask)
            work.highs[i] = np.int32(indices[i] >> low_bits)
        indices = work.highs[:count]
    escaped = np.int32(0)
    for i in range(count):
        # Shifts by a constant: numba widens others to 64 bits, and half of the vector unit is lost.
        shift = np.int32(np.int32(np.int32(lanes[i]) * classes) >> 16)
        index = indices[i]
        index = np.int32(-half) if index < -half else index
        index = half if index > half else index
        begin = np.int32(np.int32(np.int32(index + half) * classes) - shift)
        inside = (begin > lowest) & (begin < highest)
        escaped = np.int32(escaped + np.int32(inside))
        places[i] = np.uint16(np.int32((begin if inside else np.int32(-shift)) + np.int32(PAD)))
    escaped = np.int32(count) - escaped
    return np.int64(escaped)


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
    class_bits, low_bits, bound = use_model(row, dithered, False, work)
    place_symbols(count, class_bits, low_bits, bound, work)
    family_bits = cost_of_places(count, work)
    work.counts[:] = 0
    count_cells(count, class_bits, low_bits, bool(dithered and bucket >= TILE), work)
    if work.counts.sum() == 0:
        return refused
    share_slots(work.counts, work.slots)
    use_explicit(class_bits, False, work)
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
    use_explicit(class_bits, False, work)
    return True


@kernel
def put_head(size: Int, lanes: Int, form: Int, count: Int, out: NDArray[np.uint8]) -> None:
    """Write a chunk's first bytes: u16, u8, u8, u32."""
    for place, value in ((0, size), (1, size >> 8), (2, lanes), (3, form)):
        out[place] = np.uint8(value)
    for byte in range(4):
        out[4 + byte] = np.uint8(count >> (8 * byte))


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
    work: Coder,
    out: NDArray[np.uint8],
) -> Int:
    """Write x[lo:hi] to `out` under a model for each tile, or an explicit one for all; return the bytes.

    -1 where they would not fit, an index is too large, or there is no explicit model. `reach` becomes the largest
    |index|.
    """
    work.reach[0] = 0
    states = work.states if hi - lo >= SMALL else work.one_state
    states[:] = np.uint64(LOWEST)
    words, rows = work.words, work.parameters
    top: Int = np.int64(words.size)
    tail: Int = np.int64(work.escapes.size)
    tiles = (hi - lo + TILE - 1) // TILE
    room = out.size - HEAD - 4 * LANES - MOST_MODEL_BYTES
    any_symbols = False
    last = np.full(3, -1, np.int64)
    class_bits: Int = np.int64(0)
    low_bits: Int = np.int64(0)
    if explicit:
        _, class_bits, low_bits = prefers_explicit(x, lo, hi, bucket, steps, dithered, work)
        if not gather_explicit(x, lo, hi, stream, bucket, steps, dithered, class_bits, low_bits, work):
            return -1
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
            place_symbols(count, class_bits, low_bits, (np.int64(1) << class_bits) - 1, work)
            escaped = escape_the_rare(count, class_bits, work)
        else:
            fit(count, nonzero, total, squares, row, last, work.family)
            last = row
            class_bits, low_bits, bound = use_model(row, dithered, False, work)
            escaped = place_symbols(count, class_bits, low_bits, bound, work)
        if escaped:
            down = 16 - class_bits
            at: Int = np.int64(0)
            for i in range(count):
                if np.int64(work.places[i]) == PAD - (np.int64(work.lanes[i]) >> down):
                    at = put_number(folded(np.int64(work.indices[i])), work.nibbles, at)
            size = (at + 1) >> 1
            tail -= size
            for byte in range(size):
                work.escapes[tail + byte] = work.nibbles[byte]
        if low_bits:
            use_low_bits(low_bits, work.low_entries, work.low_reciprocals)
            top = put_symbols(work.lows, count, work.low_entries, work.low_reciprocals, states, words, top)
        top = put_symbols(work.places, count, work.entries, work.reciprocals, states, words, top)
        if 2 * (words.size - top) + work.escapes.size - tail > room:
            return -1
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


# --- decoding ---------------------------------------------------------------------------------------------------------


@kernel
def check_chunk(data: NDArray[np.uint8], count: Int, largest_step: float, work: Coder) -> bool:
    """Whether `data` is a coded chunk of `count` coordinates that decodes to finite values: sizes, models, escapes."""
    size = np.int64(data[0]) | np.int64(data[1]) << 8
    lanes = np.int64(data[2])
    words = np.int64(data[4]) | np.int64(data[5]) << 8 | np.int64(data[6]) << 16 | np.int64(data[7]) << 24
    at = HEAD + size + 4 * lanes + 2 * words
    tiles = (count + TILE - 1) // TILE
    rows = work.parameters
    if at > data.size or words > work.words.size or lanes not in (0, 1, LANES):
        return False
    model = data[HEAD : HEAD + size]
    if data[3] == EXPLICIT:
        if get_table(model, tiles, work.slots, rows)[0] < 0:
            return False
    elif not get_parameters(model, tiles, rows):
        return False
    if lanes == 0:
        for tile in range(tiles):
            if rows[tile, 1] != (1 if data[3] == EXPLICIT else ZERO_SHAPE):
                return False
    for lane in range(lanes):
        state = data[HEAD + size + 4 * lane : HEAD + size + 4 * lane + 4]
        if state[3] > 127 or (state[3] == 0 and state[2] == 0 and state[1] < 128):
            return False
    nibbles = data[at:]
    nibble: Int = np.int64(0)
    while nibble >> 1 < nibbles.size:
        value, nibble = get_number(nibbles, nibble)
        if value >= 1 << 32 or (np.float64(value >> 1) + 2.0) * largest_step > LARGEST:
            return False
    return True


@kernel
def accumulate_chunk(
    data: NDArray[np.uint8],
    first: Int,
    stream: Stream,
    bucket: Int,
    steps: NDArray[np.float32],
    dithered: bool,
    matched: bool,
    work: Coder,
    into: NDArray[np.float32],
    weight: np.float32,
) -> None:
    """into += weight * decoded, of a checked chunk that begins at coordinate `first` and has as many as `into`."""
    size = np.int64(data[0]) | np.int64(data[1]) << 8
    lanes = np.int64(data[2])
    count = np.int64(data[4]) | np.int64(data[5]) << 8 | np.int64(data[6]) << 16 | np.int64(data[7]) << 24
    tiles = (into.size + TILE - 1) // TILE
    explicit = data[3] == EXPLICIT
    class_bits: Int = np.int64(0)
    low_bits: Int = np.int64(0)
    if explicit:
        class_bits, low_bits = get_table(data[HEAD : HEAD + size], tiles, work.slots, work.parameters)
        use_explicit(class_bits, True, work)
    else:
        get_parameters(data[HEAD : HEAD + size], tiles, work.parameters)
    zero = 1 if explicit else ZERO_SHAPE
    states = work.states if lanes == LANES else work.one_state
    at = np.int64(HEAD + size)
    for lane in range(lanes):
        states[lane] = np.uint64(
            np.int64(data[at])
            | np.int64(data[at + 1]) << 8
            | np.int64(data[at + 2]) << 16
            | np.int64(data[at + 3]) << 24
        )
        at += 4
    words, source = work.words[:count], data[at : at + 2 * count]
    for i in range(count):
        words[i] = np.uint16(source[2 * i]) | np.uint16(source[2 * i + 1]) << np.uint16(8)
    nibbles = data[at + 2 * count :]
    nibble: Int = np.int64(0)
    next_: Int = np.int64(0)
    for tile in range(tiles):
        begin = tile * TILE
        end = min(begin + TILE, into.size)
        n = end - begin
        if work.parameters[tile, 1] == zero:
            continue
        if not explicit:
            class_bits, low_bits, _ = use_model(work.parameters[tile], dithered, True, work)
        fill_lanes(stream, first + begin, n, work.lanes, work.scratch, into, end)
        classes, lane_row, cells, indices = work.classes[:n], work.lanes[:n], work.places[:n], work.indices[:n]
        count_of_classes, inverse = np.int32(1 << class_bits), np.int32(65536 >> class_bits)
        for i in range(n):
            classes[i] = np.uint8(np.int32(np.int32(lane_row[i]) * count_of_classes) >> 16)
        next_ = get_symbols(classes, n, class_bits, work.nearest, work.entries, states, words, next_, cells)
        half = np.int32((CELLS // 2) >> class_bits)
        escaped = np.int32(0)
        for i in range(n):
            symbol = np.int32(np.int32(np.int32(cells[i]) * inverse) >> 16)
            escaped = np.int32(escaped + np.int32(symbol == 0))
            indices[i] = np.int32(symbol - half)
        wide = class_bits == 0
        if low_bits:
            use_low_bits(low_bits, work.low_entries, work.low_reciprocals)
            next_ = get_low_bits(low_bits, n, states, words, next_, work.lows)
            for i in range(n):
                indices[i] = (indices[i] << low_bits) | np.int32(work.lows[i])
        if escaped:
            for i in range(n):
                if cells[i] >> class_bits == 0:
                    value, nibble = get_number(nibbles, nibble)
                    indices[i] = np.int32(unfolded(value & 0xFFFFFFFF))
                    wide = wide or bool(abs(indices[i]) > 63)
            nibble = (nibble + 1) & ~1
        segment = min(bucket, TILE)
        shifted = matched and not explicit and (class_bits >= 3 or (class_bits > 0 and work.parameters[tile, 2] > 0))
        for s in range(begin, end, segment):
            step = np.float64(steps[(first + s) // bucket])
            part = into[s : min(s + segment, end)]
            if shifted:
                add_shifted(indices, lane_row, s - begin, step, work.offsets, wide, weight, part)
            else:
                add_part(indices, lane_row, s - begin, step, dithered, wide, weight, part)


@kernel
def accumulate_packed(
    data: NDArray[np.uint8],
    first: Int,
    stream: Stream,
    bucket: Int,
    steps: NDArray[np.float32],
    dithered: bool,
    form: Alphabet,
    reach: Int,
    work: Coder,
    tile_work: Workspace,
    into: NDArray[np.float32],
    weight: np.float32,
) -> None:
    """As `accumulate_chunk`, for a packed chunk."""
    at = np.int64(HEAD)
    digits, spare = tile_work.digits, tile_work.spare
    for begin in range(0, into.size, TILE):
        end = min(begin + TILE, into.size)
        count = end - begin
        unpack_digits(form, data, at, count, spare, tile_work.fields, tile_work.wide, digits)
        at += digits_nbytes(form, count)
        fill_lanes(stream, first + begin, count, work.lanes, work.scratch, into, end)
        for i in range(count):
            work.indices[i] = np.int32(np.int64(digits[i]) - reach)
        for s in range(begin, end, min(bucket, TILE)):
            step = np.float64(steps[(first + s) // bucket])
            part = into[s : min(s + min(bucket, TILE), end)]
            add_part(work.indices, work.lanes, s - begin, step, dithered, bool(reach > 63), weight, part)


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


@kernel
def add_part(
    indices: NDArray[np.int32],
    lanes: NDArray[np.uint16],
    first: Int,
    step: float,
    dithered: bool,
    wide: bool,
    weight: np.float32,
    into: NDArray[np.float32],
) -> None:
    """into += weight * (q - u) * step, or q * step where the dither is not subtracted; one rounding to float32."""
    q, random = indices[first : first + into.size], lanes[first : first + into.size]
    if not dithered:
        for i in range(into.size):
            into[i] += weight * np.float32(np.float64(q[i]) * step)
    elif wide:
        for i in range(into.size):
            u = (np.float64(random[i]) + 0.5) / 65536.0 - 0.5
            into[i] += weight * np.float32((np.float64(q[i]) - u) * step)
    else:
        # In units of 2^-16 step: integers and one half, below 2^23, so exact until the multiplication.
        scale = np.float32(step * 2.0**-16)
        for i in range(into.size):
            fixed = np.int32(np.int32(q[i] << 16) - np.int32(random[i]))
            into[i] += weight * ((np.float32(fixed) + np.float32(32767.5)) * scale)


@kernel
def add_shifted(
    indices: NDArray[np.int32],
    lanes: NDArray[np.uint16],
    first: Int,
    step: float,
    offsets: NDArray[np.int32],
    wide: bool,
    weight: np.float32,
    into: NDArray[np.float32],
) -> None:
    """into += weight * (q - E[q | u]) * step (`tables.fill_offsets`); one rounding to float32."""
    q, random = indices[first : first + into.size], lanes[first : first + into.size]
    if wide:
        for i in range(into.size):
            offset = np.float64(offsets[random[i] >> (16 - OFFSET_BITS)]) / 131072.0
            into[i] += weight * np.float32((np.float64(q[i]) - offset) * step)
    else:
        scale = np.float32(step * 2.0**-17)
        for i in range(into.size):
            fixed = np.int32(np.int32(q[i] * 131072) - offsets[random[i] >> (16 - OFFSET_BITS)])
            into[i] += weight * (np.float32(fixed) * scale)
