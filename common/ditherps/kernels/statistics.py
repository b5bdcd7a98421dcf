"""One pass over a vector, for rules that need to know more than its norm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.entropy.family import Family
from ditherps.kernels.coder import ROW
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.philox import TILE
from ditherps.kernels.rans import PAD, SLOT_BITS, SLOTS
from ditherps.kernels.tables import CELLS, fill_cumulative, fill_entries, fit, resolution_of

MAGNITUDE_BITS = 17  # of a float32's mantissa that a histogram leaves out
MAGNITUDES = 1 << (31 - MAGNITUDE_BITS)


@kernel
def count_magnitudes(bits: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
    """Histogram of |x| by the upper bits below the sign of its memory `bits`."""
    for i in range(bits.size):
        counts[(bits[i] & 0x7FFFFFFF) >> MAGNITUDE_BITS] += 1


@kernel
def fit_tiles(x: NDArray[np.float32], unit: float, family: Family, rows: NDArray[np.int64]) -> None:
    """`rows[tile]` = scale, shape and spike of |x| / unit in each tile, and its coordinates; scale -1 for zeros."""
    none = np.full(3, -1, np.int64)
    sums = np.empty(2 * ROW, np.float64)
    for tile in range(rows.shape[0]):
        part = x[tile * TILE : (tile + 1) * TILE]
        sums[:] = 0.0
        nonzero = np.int32(0)
        for first in range(0, part.size, ROW):
            row = part[first : first + ROW]
            for lane in range(row.size):
                size = np.float64(np.abs(row[lane]))
                sums[lane] += size
                sums[ROW + lane] += size * size
                nonzero = np.int32(nonzero + np.int32(row[lane] != np.float32(0.0)))
        total, squares = 0.0, 0.0
        for lane in range(ROW):
            total += sums[lane]
            squares += sums[ROW + lane]
        rows[tile, 0] = -1
        rows[tile, 3] = part.size
        if nonzero and squares > 0.0:
            fit(
                np.int64(part.size), np.int64(nonzero), total / unit, squares / (unit * unit), rows[tile, :3], none,
                family,
            )  # fmt: skip


@kernel
def model_bits(
    scale: Int,
    shape: Int,
    spike: Int,
    dithered: bool,
    logarithms: NDArray[np.float64],
    escape_bits: float,
    family: Family,
    cumulative: NDArray[np.int64],
    entries: NDArray[np.uint32],
) -> float:
    """Expected bits of a symbol under a tile's model, `logarithms[f]` = log2 f; an escape costs `escape_bits` more."""
    class_bits, low_bits = resolution_of(scale, shape, dithered, family)
    fill_cumulative(scale, shape, spike, class_bits, low_bits, dithered, family, cumulative)
    fill_entries(cumulative, class_bits, entries)
    classes = np.int64(1) << class_bits
    total = 0.0
    for b in range(1, CELLS + 1):
        freq = np.int64(entries[PAD + b] >> 16)
        if freq:
            total += freq * (SLOT_BITS - logarithms[freq])
    escape = np.int64(entries[PAD] >> 16)
    return total / (SLOTS * classes) + escape * (SLOT_BITS + escape_bits) / SLOTS + low_bits
