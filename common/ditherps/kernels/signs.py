"""Kernels of `signsgd`: a mean magnitude a bucket, and one packed sign a coordinate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.cpu import INFINITY_BITS, SQUARE_LANES, Workspace, largest_bits
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.packing import pack, packed_nbytes, unpack
from ditherps.kernels.philox import TILE

SIGNS = (2, 8, 8)  # the packing of one bit a coordinate


@kernel
def mean_magnitude(x: NDArray[np.float32], lo: Int, hi: Int, sums: NDArray[np.float64]) -> np.float64:
    """Mean of |x[lo:hi]| in double precision, summed in the order of `cpu.sum_of_squares`."""
    for lane in range(SQUARE_LANES):
        sums[lane] = 0.0
    for i in range(lo, hi, SQUARE_LANES):
        row = x[i : min(i + SQUARE_LANES, hi)]
        if row.size == SQUARE_LANES:
            for lane in range(SQUARE_LANES):
                sums[lane] += np.float64(np.abs(row[lane]))
        else:
            for lane in range(row.size):
                sums[lane] += np.float64(np.abs(row[lane]))
    width = SQUARE_LANES // 2
    while width:
        for lane in range(width):
            sums[lane] += sums[lane + width]
        width //= 2
    total: np.float64 = sums[0] / (hi - lo)
    return total


@kernel
def encode_signs(
    x: NDArray[np.float32],
    bits: NDArray[np.int32],
    bucket: int,
    scales: NDArray[np.float32],
    out: NDArray[np.uint8],
    work: Workspace,
) -> Int:
    """Fill in `scales` and write the packed signs of x, whose memory is `bits`, to `out`.

    Returns 0, or -1 - c where the bucket from coordinate c on holds a value that is not finite.
    """
    for lo in range(0, x.size, bucket):
        hi = min(lo + bucket, x.size)
        if largest_bits(bits, lo, hi) >= INFINITY_BITS:
            return -1 - lo
        scales[lo // bucket] = np.float32(mean_magnitude(x, lo, hi, work.sums))
    digits, zero = work.digits, np.float32(0.0)
    at: Int = np.int64(0)
    for lo in range(0, x.size, TILE):
        tile = x[lo : min(lo + TILE, x.size)]
        for i in range(tile.size):
            digits[i] = np.uint16(tile[i] < zero)
        pack(SIGNS, digits, tile.size, work.fields, work.wide, out, at)
        at += packed_nbytes(SIGNS, tile.size)
    return np.int64(0)


@kernel
def accumulate_signs(
    data: NDArray[np.uint8],
    scales: NDArray[np.float32],
    bucket: int,
    lo: int,
    into: NDArray[np.float32],
    weight: np.float32,
    work: Workspace,
) -> None:
    """into += weight * (signs * scales), coordinates `lo ..` (a multiple of TILE); `data` holds all tiles."""
    digits = work.digits
    segment = min(bucket, TILE)
    end = lo + into.size
    for tile in range(lo, end, TILE):
        hi = min(tile + TILE, end)
        unpack(SIGNS, data, np.int64(tile // 8), hi - tile, work.fields, work.wide, digits)
        for s in range(tile, hi, segment):
            product = weight * scales[s // bucket]
            target, source = into[s - lo : min(s + segment, hi) - lo], digits[s - tile :]
            for i in range(target.size):
                target[i] += -product if source[i] else product
