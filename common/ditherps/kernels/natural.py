"""Kernels of `natural`: magnitudes rounded at random to a power of two, as an exponent byte and a packed sign.

The bits of |x| as an integer, (exponent << 23) + mantissa, grow by 2^23 from each power of two to the next, and in
between in proportion to |x|. So adding a uniform number below 2^23 and dropping the mantissa rounds to a neighbour
without bias; for denormals (exponent 0) too, whose neighbours are 0 and 2^-126.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.cpu import Workspace
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.packing import pack, packed_nbytes, unpack
from ditherps.kernels.philox import TILE, Stream, fill_lanes
from ditherps.kernels.signs import SIGNS

LARGEST_BITS = 0x7F000000  # of 2^127: above, rounding could end at infinity


@kernel
def natural_nbytes(count: Int) -> Int:
    """Bytes of a tile of `count` coordinates."""
    return count + packed_nbytes(SIGNS, count)


@kernel
def encode_natural(
    x: NDArray[np.float32], bits: NDArray[np.uint32], stream: Stream, out: NDArray[np.uint8], work: Workspace
) -> None:
    """Write the tiles of x, whose memory is `bits` and whose magnitudes are at most 2^127."""
    lanes, digits = work.lanes, work.digits
    at: Int = np.int64(0)
    for lo in range(0, x.size, TILE):
        hi = min(lo + TILE, x.size)
        fill_lanes(stream, lo, hi - lo, lanes, work.scratch, x, hi)
        tile, exponents = bits[lo:hi], out[at : at + hi - lo]
        for i in range(tile.size):
            # Lane k stands for 128 k + 64: the middle of the 128 mantissas that it decides about.
            random = (np.uint32(lanes[i]) << np.uint32(7)) + np.uint32(64)
            exponents[i] = np.uint8(((tile[i] & np.uint32(0x7FFFFFFF)) + random) >> np.uint32(23))
            digits[i] = np.uint16(tile[i] >> np.uint32(31))
        pack(SIGNS, digits, hi - lo, work.fields, work.wide, out, at + hi - lo)
        at += natural_nbytes(hi - lo)


@kernel
def largest_exponent(data: NDArray[np.uint8], n: int) -> Int:
    """The largest exponent byte of the tiles `data` of n coordinates; 255 is not finite."""
    largest = np.uint8(0)
    at: Int = np.int64(0)
    for lo in range(0, n, TILE):
        count = min(TILE, n - lo)
        part = data[at : at + count]
        for i in range(part.size):
            largest = part[i] if part[i] > largest else largest
        at += natural_nbytes(count)
    return np.int64(largest)


@kernel
def accumulate_natural(
    data: NDArray[np.uint8], lo: int, into: NDArray[np.float32], weight: np.float32, work: Workspace
) -> None:
    """into += weight * decoded coordinates `lo ..` (a multiple of TILE); `data` holds all tiles."""
    digits, word, word_bits = work.digits, work.word, work.word_bits
    for tile in range(0, into.size, TILE):
        target = into[tile : tile + TILE]
        at = (lo + tile) // TILE * natural_nbytes(np.int64(TILE))
        exponents = data[at : at + target.size]
        unpack(SIGNS, data, at + target.size, target.size, work.fields, work.wide, digits)
        for i in range(target.size):
            word_bits[i] = np.int32(
                (np.uint32(digits[i]) << np.uint32(31)) | (np.uint32(exponents[i]) << np.uint32(23))
            )
        for i in range(target.size):
            target[i] += weight * word[i]
