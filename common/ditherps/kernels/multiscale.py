"""Kernels of `maxnorm-multiscale`: stochastic rounding on one of two grids, the finer where an index surely fits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.alphabets import Alphabet, digits_nbytes, pack_digits, unpack_digits
from ditherps.kernels.cpu import Workspace
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.packing import DIGITS, pack, packed_nbytes, unpack
from ditherps.kernels.philox import TILE, Stream, fill_lanes
from ditherps.kernels.signs import SIGNS


@kernel
def multiscale_nbytes(form: Alphabet, count: Int) -> Int:
    """Bytes of a tile of `count` coordinates: digits, then a scale bit each."""
    return digits_nbytes(form, count) + packed_nbytes(SIGNS, count)


@kernel
def encode_multiscale(
    x: NDArray[np.float32],
    norm: np.float64,
    coarse: int,
    fine: int,
    form: Alphabet,
    stream: Stream,
    out: NDArray[np.uint8],
    work: Workspace,
) -> None:
    """Write the tiles of x, where `norm` > 0 is max|x| and `coarse` < `fine` are the levels s of the two grids."""
    lanes, digits = work.lanes, work.digits
    spare, scales = np.empty(DIGITS, np.uint16), np.empty(DIGITS, np.uint16)
    up_coarse, up_fine = np.float64(coarse) / norm, np.float64(fine) / norm
    limit = np.float64(coarse)
    at: Int = np.int64(0)
    for lo in range(0, x.size, TILE):
        hi = min(lo + TILE, x.size)
        fill_lanes(stream, lo, hi - lo, lanes, work.scratch, x, hi)
        tile = x[lo:hi]
        for i in range(tile.size):
            value = np.float64(tile[i])
            exact = value * up_fine
            # Whether both neighbours fit, not whether the one that chance picks does: that would be biased.
            fits = np.abs(exact) <= limit
            exact = exact if fits else value * up_coarse
            # Never beyond `coarse`: u stays 2^-17 away from a whole step, far more than the arithmetic errs.
            index = np.floor(exact + (np.float64(lanes[i]) + 0.5) / 65536.0)
            digits[i] = np.uint16(np.int32(index + limit))
            scales[i] = np.uint16(fits)
        pack_digits(form, digits, hi - lo, spare, work.fields, work.wide, out, at)
        pack(SIGNS, scales, hi - lo, work.fields, work.wide, out, at + digits_nbytes(form, hi - lo))
        at += multiscale_nbytes(form, hi - lo)


@kernel
def accumulate_multiscale(
    data: NDArray[np.uint8],
    norm: np.float64,
    coarse: int,
    fine: int,
    form: Alphabet,
    lo: int,
    into: NDArray[np.float32],
    weight: np.float32,
    work: Workspace,
) -> None:
    """into += weight * decoded coordinates `lo ..` (a multiple of TILE); `data` holds all tiles."""
    digits = work.digits
    spare, scales = np.empty(DIGITS, np.uint16), np.empty(DIGITS, np.uint16)
    step_coarse, step_fine = norm / coarse, norm / fine
    zero = np.float64(coarse)  # the digit of index 0
    for tile in range(0, into.size, TILE):
        target = into[tile : tile + TILE]
        at = (lo + tile) // TILE * multiscale_nbytes(form, np.int64(TILE))
        unpack_digits(form, data, at, target.size, spare, work.fields, work.wide, digits)
        unpack(SIGNS, data, at + digits_nbytes(form, target.size), target.size, work.fields, work.wide, scales)
        for i in range(target.size):
            step = step_fine if scales[i] else step_coarse
            target[i] += weight * np.float32((np.float64(np.int32(digits[i])) - zero) * step)
