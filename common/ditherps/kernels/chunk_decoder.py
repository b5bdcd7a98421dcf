"""Decoding of chunks, first tile to last, and the checks that a stranger's chunk must pass before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.alphabets import Alphabet, digits_nbytes, unpack_digits
from ditherps.kernels.coder import (
    DECODE,
    EXPLICIT,
    HEAD,
    MATCH,
    ROW_GROUPS,
    Coder,
    get_head,
    use_explicit,
    use_low_bits,
    use_model,
)
from ditherps.kernels.cpu import Workspace
from ditherps.kernels.escapes import BLOCK, any_up_to, get_number, unfolded
from ditherps.kernels.explicit import get_table
from ditherps.kernels.indices import add_part, add_shifted
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.parameters import ZERO_SHAPE, get_parameters
from ditherps.kernels.philox import TILE, Stream, fill_lanes
from ditherps.kernels.rans import LANES, get_low_bits
from ditherps.kernels.symbols import get_symbols
from ditherps.kernels.tables import (
    CELLS,
)

FARTHEST_FOLDED = 2 * (2**31 - 2)  # of an escaped index


@kernel
def check_chunk(data: NDArray[np.uint8], count: Int, work: Coder) -> Int:
    """How many of a coded chunk's `count` coordinates lie in tiles of zeros; -1 where sizes or models are malformed.

    Words and escapes need no check: whatever they are, they decode to finite values.
    """
    size, lanes, form, words = get_head(data)
    tiles = (count + TILE - 1) // TILE
    rows = work.parameters
    if HEAD + size + 4 * lanes + 2 * words > data.size or words > work.words.size or lanes not in (0, 1, LANES):
        return -1
    model = data[HEAD : HEAD + size]
    zero = 1 if form == EXPLICIT else ZERO_SHAPE
    if form == EXPLICIT:
        if get_table(model, tiles, work.slots, rows)[0] < 0:
            return -1
    elif not get_parameters(model, tiles, rows):
        return -1
    zeros: Int = np.int64(0)
    for tile in range(tiles):
        if rows[tile, 1] == zero:
            zeros += min(np.int64(TILE), count - tile * TILE)
    if lanes == 0 and zeros < count:
        return -1
    for lane in range(lanes):
        state = data[HEAD + size + 4 * lane : HEAD + size + 4 * lane + 4]
        if state[3] > 127 or (state[3] == 0 and state[2] == 0 and state[1] < 128):
            return -1
    return zeros


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
    size, lanes, form, count = get_head(data)
    tiles = (into.size + TILE - 1) // TILE
    explicit = form == EXPLICIT
    class_bits: Int = np.int64(0)
    low_bits: Int = np.int64(0)
    if explicit:
        class_bits, low_bits = get_table(data[HEAD : HEAD + size], tiles, work.slots, work.parameters)
        use_explicit(class_bits, DECODE, work)
    else:
        get_parameters(data[HEAD : HEAD + size], tiles, work.parameters)
    zero = 1 if explicit else ZERO_SHAPE
    purpose = MATCH if matched else DECODE
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
            class_bits, low_bits, _ = use_model(work.parameters[tile], dithered, purpose, work)
        fill_lanes(stream, first + begin, n, work.lanes, work.scratch, into, end)
        lane_row, symbols, indices = work.lanes[:n], work.places[:n], work.indices[:n]
        next_ = get_symbols(
            lane_row, n, class_bits, work.nearest, work.entries, work.rows, work.model[ROW_GROUPS], states, words,
            next_, work.classes, symbols,
        )  # fmt: skip
        half = np.int32((CELLS // 2) >> class_bits)
        escaped = np.int32(0)
        for i in range(n):
            symbol = np.int32(symbols[i])
            escaped = np.int32(escaped + np.int32(symbol == 0))
            indices[i] = np.int32(symbol - half)
        wide = class_bits == 0
        if low_bits:
            use_low_bits(low_bits, work.low_entries, work.low_reciprocals)
            next_ = get_low_bits(low_bits, n, states, words, next_, work.lows)
            for i in range(n):
                indices[i] = (indices[i] << low_bits) | np.int32(work.lows[i])
        if escaped:
            for block in range(0, n, BLOCK):
                end_of_block = min(block + BLOCK, n)
                if any_up_to(symbols[block:end_of_block], 0):
                    for i in range(block, end_of_block):
                        if symbols[i] == 0:
                            value, nibble = get_number(nibbles, nibble)
                            indices[i] = np.int32(unfolded(min(value, np.int64(FARTHEST_FOLDED))))
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
