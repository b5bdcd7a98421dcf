"""Indices of a uniform quantizer and what they stand for, tile by tile."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.coder import ROW, Coder
from ditherps.kernels.cpu import LARGEST
from ditherps.kernels.jit import Int, inlined, kernel
from ditherps.kernels.philox import TILE
from ditherps.kernels.tables import (
    OFFSET_BITS,
)

NARROW = 1 << 30  # |x / step| * 2^16 below which integers of 32 bits do
WIDEST = 2.0**31 - 2  # of an index


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
    farthest = np.int32(0)
    nonzero = np.int32(0)
    for i in range(count):
        value = min(max(source[i] * scale, -bound), bound)
        scaled[i] = value
        # Not negative, so that cutting the fraction off rounds to nearest.
        whole = np.int32(np.int32(np.abs(value) + np.float32(0.5)))
        signed = np.int32(-whole) if value < np.float32(0.0) else whole
        index = np.int32(np.int32(signed + np.int32(random[i])) >> 16)
        indices[i] = index
        distance = np.int32(-index) if index < 0 else index
        farthest = distance if distance > farthest else farthest
        largest = whole if whole > largest else largest
        nonzero = np.int32(nonzero + np.int32(whole != 0))
    fits = True
    if largest >= NARROW:
        farthest = np.int32(0)
        for i in range(count):
            exact = np.floor(np.float64(source[i]) / step + (np.float64(random[i]) + 0.5) / 65536.0)
            size = np.float64(source[i]) / step
            fits &= np.abs(size) <= WIDEST  # whatever the dither: nothing that is reconstructed may depend on it
            indices[i] = np.int32(min(max(exact, -WIDEST), WIDEST))
            scaled[i] = np.float32(size * 65536.0)
            distance = np.int32(-indices[i]) if indices[i] < 0 else indices[i]
            farthest = distance if distance > farthest else farthest
    work.reach[0] = max(work.reach[0], np.int64(farthest))
    sums = work.sums
    sums[:] = np.float32(0.0)
    for row in range(0, count, ROW):
        part = scaled[row : row + ROW]
        for lane in range(part.size):
            sums[lane] += np.abs(part[lane])
            sums[ROW + lane] += part[lane] * part[lane]
    total, squares = 0.0, 0.0
    for lane in range(ROW):
        total += np.float64(sums[lane])
        squares += np.float64(sums[ROW + lane])
    return total * 2.0**-16, squares * 2.0**-32, np.int64(nonzero), fits


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


@inlined
def finite(value: float) -> np.float32:
    """Rounded to float32; cut at the largest, which only a forger or a value next to it exceeds."""
    return np.float32(min(max(value, -LARGEST), LARGEST))


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
            into[i] += weight * finite(np.float64(q[i]) * step)
    elif wide:
        for i in range(into.size):
            u = (np.float64(random[i]) + 0.5) / 65536.0 - 0.5
            into[i] += weight * finite((np.float64(q[i]) - u) * step)
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
            into[i] += weight * finite((np.float64(q[i]) - offset) * step)
    else:
        scale = np.float32(step * 2.0**-17)
        for i in range(into.size):
            fixed = np.int32(np.int32(q[i] * 131072) - offsets[random[i] >> (16 - OFFSET_BITS)])
            into[i] += weight * (np.float32(fixed) * scale)
