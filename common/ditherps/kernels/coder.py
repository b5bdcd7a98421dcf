"""What one thread needs to code chunks: its buffers, and the tables of the model in use (proto/FORMAT.md, "Chunks")."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.entropy.family import Family, family, logarithms
from ditherps.kernels.buffers import buffer
from ditherps.kernels.explicit import fill_from_slots
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.philox import TILE
from ditherps.kernels.rans import LANES, SLOTS
from ditherps.kernels.rans_wide import PART, ROWS_SIZE, fill_rows
from ditherps.kernels.tables import (
    CELLS,
    ENTRIES,
    FILL,
    OFFSETS,
    fill_cumulative,
    fill_entries,
    fill_nearest,
    fill_offsets,
    fill_reciprocals,
    resolution_of,
)
from ditherps.kernels.vectors import WIDE

CHUNK_TILES = 64
CHUNK = CHUNK_TILES * TILE
HEAD = 8  # bytes before the rest of a chunk
CODED, PACKED, PLAIN, EXPLICIT = 0, 1, 2, 3  # forms of a chunk
HEADROOM = 2.0**20  # steps that float32 must be able to hold: beyond what any symbol stands for
MOST_BYTES = 10  # of a coordinate: words of its symbol and of its low bits, and nibbles of its escape
MOST_MODEL_BYTES = 2048  # of parameters (57 bits a tile) or a table (41 bits a cell, and a bit a tile), and of states
ENCODE, DECODE, MATCH = 0, 1, 2  # what tables are for
ROW = 64
ROW_GROUPS = 5  # of `Coder.model`: what `fill_rows` found


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
    rows: NDArray[np.uint32]
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
            lanes=buffer(TILE, np.uint16),
            scratch=buffer(TILE, np.uint16),
            scaled=buffer(TILE, np.float32),
            sums=buffer(2 * ROW, np.float32),
            indices=buffer(TILE, np.int32),
            classes=buffer(TILE, np.uint8),
            places=buffer(TILE, np.uint16),
            lows=buffer(TILE, np.uint16),
            highs=buffer(TILE, np.int32),
            parameters=buffer((CHUNK_TILES, 3), np.int64),
            cumulative=buffer(CELLS + 2, np.int64),
            entries=buffer(ENTRIES + PART, np.uint32),  # whole parts may be read
            reciprocals=buffer(ENTRIES, np.uint64),
            nearest=buffer(SLOTS + FILL, np.uint8),
            rows=buffer(ROWS_SIZE, np.uint32),
            offsets=buffer(OFFSETS, np.int32),
            low_entries=buffer(SLOTS, np.uint32),
            low_reciprocals=buffer(SLOTS, np.uint64),
            states=buffer(LANES, np.uint64),
            one_state=buffer(1, np.uint64),
            words=buffer(2 * CHUNK + 2 * LANES, np.uint16),
            nibbles=buffer(6 * TILE, np.uint8),
            escapes=buffer(6 * CHUNK, np.uint8),
            model=buffer(6, np.int64),
            slots=buffer(CELLS, np.int64),
            counts=buffer(CELLS, np.int64),
            used=buffer(ENTRIES, np.int64),
            logarithms=logarithms(),
            reach=buffer(1, np.int64),
            out=buffer(HEAD + MOST_MODEL_BYTES + MOST_BYTES * CHUNK, np.uint8),
        )
        found.model[:] = -1  # none yet
    return found


@kernel
def use_slots(class_bits: Int, work: Coder) -> None:
    """Fill the tables that decoding needs besides the entries."""
    fill_nearest(work.cumulative, work.nearest)
    work.model[ROW_GROUPS] = fill_rows(class_bits, work.entries, work.rows) if WIDE else 0


@kernel
def use_model(row: NDArray[np.int64], dithered: bool, purpose: Int, work: Coder) -> tuple[Int, Int, Int]:
    """Fill the tables of a tile's parameters where they are not those of the last; (class bits, low bits, bound).

    `purpose` is `ENCODE`, `DECODE` or `MATCH`, decoding with the matched reconstruction.
    """
    scale, shape, spike = row
    class_bits, low_bits = resolution_of(scale, shape, dithered, work.family)
    key = scale | shape << 8 | spike << 12 | np.int64(dithered) << 20
    model = work.model
    if model[0] != key:
        model[1] = fill_cumulative(scale, shape, spike, class_bits, low_bits, dithered, work.family, work.cumulative)
        fill_entries(work.cumulative, class_bits, work.entries)
        model[0] = key
    if purpose == ENCODE and model[2] != key:
        fill_reciprocals(work.entries, work.reciprocals)
        model[2] = key
    if purpose != ENCODE and model[3] != key:
        use_slots(class_bits, work)
        model[3] = key
    if purpose == MATCH and model[4] != key:
        fill_offsets(scale, shape, spike, class_bits, work.family, work.offsets)
        model[4] = key
    return class_bits, low_bits, model[1]


@kernel
def use_explicit(class_bits: Int, purpose: Int, work: Coder) -> None:
    """Fill the tables from `slots`; those of the next tile with parameters are then made anew."""
    fill_from_slots(work.slots, work.cumulative)
    fill_entries(work.cumulative, class_bits, work.entries)
    if purpose == ENCODE:
        fill_reciprocals(work.entries, work.reciprocals)
    work.model[:] = -1
    if purpose != ENCODE:
        use_slots(class_bits, work)


@kernel
def use_low_bits(bits: Int, entries: NDArray[np.uint32], reciprocals: NDArray[np.uint64]) -> None:
    """Entries of uniform symbols of that many bits."""
    freq = np.int64(SLOTS) >> bits
    for value in range(np.int64(1) << bits):
        entries[value] = np.uint32(value * freq | freq << 16)
        reciprocals[value] = np.uint64((np.int64(1) << 43) // freq)


@kernel
def put_head(size: Int, lanes: Int, form: Int, count: Int, out: NDArray[np.uint8]) -> None:
    """Write a chunk's first bytes: u16, u8, u8, u32."""
    for place, value in ((0, size), (1, size >> 8), (2, lanes), (3, form)):
        out[place] = np.uint8(value)
    for byte in range(4):
        out[4 + byte] = np.uint8(count >> (8 * byte))


@kernel
def get_head(data: NDArray[np.uint8]) -> tuple[Int, Int, Int, Int]:
    """Bytes of the models (or the reach), states, form, words of a chunk."""
    size = np.int64(data[0]) | np.int64(data[1]) << 8
    count = np.int64(data[4]) | np.int64(data[5]) << 8 | np.int64(data[6]) << 16 | np.int64(data[7]) << 24
    return size, np.int64(data[2]), np.int64(data[3]), count
