"""Kernels of `eden`: choice of coordinates, quantization to the codebooks of a Gaussian, and back.

The codebooks are those of Lloyd and Max for a standard Gaussian: each level is the mean of its cell, each cut the
middle of two levels. Sums are in double precision, in 64 lanes of a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.cpu import SQUARE_LANES
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.packing import Packing, pack, packed_nbytes, packing, unpack
from ditherps.kernels.philox import TILE, Stream, fill_lanes


class Codebook(NamedTuple):
    """The 2^bits levels for a standard Gaussian.

    Attributes:
        levels: ascending, as the decoder multiplies them.
        cuts: between them.
        distortion: mean squared error for a standard Gaussian.
        form: how digits are packed.
    """

    levels: NDArray[np.float32]
    cuts: NDArray[np.float64]
    distortion: float
    form: Packing


def _codebook(distortion: float, *positive: float) -> Codebook:
    levels = np.array([*(-level for level in reversed(positive)), *positive])
    return Codebook(levels.astype(np.float32), (levels[1:] + levels[:-1]) / 2, distortion, packing(levels.size))


CODEBOOKS: dict[int, Codebook] = {
    1: _codebook(0.3633802276324186, 0.7978845608028654),
    2: _codebook(0.11748184782932913, 0.45278003463649197, 1.5104176084990952),
    3: _codebook(0.034547760788503745, 0.2450941789442214, 0.7560052812058768, 1.3439092785049993, 2.151945704536986),
    4: _codebook(
        0.009501008008191647,
        0.12839502985114684,
        0.38804829949029196,
        0.6567591185324659,
        0.9423404564869651,
        1.2562311973471794,
        1.6180463860218848,
        2.06901722653139,
        2.732589570995169,
    ),
}


@kernel
def choose(
    stream: Stream,
    offset: Int,
    count: Int,
    chosen: Int,
    lanes: NDArray[np.uint16],
    scratch: NDArray[np.uint16],
    nothing: NDArray[np.float32],
    places: NDArray[np.int32],
) -> None:
    """Choose `chosen` of the coordinates `offset .. offset + count`, each set of that many being equally likely.

    places[:count] = the others, then the chosen ones, each in ascending order and counted from `offset`. Knuth's
    algorithm S (The Art of Computer Programming, volume 2, 3.4.2): a coordinate is taken with probability (still to be
    chosen) / (still to come), which the coordinate's 16-bit lane decides to within 2^-17.

    `lanes` and `scratch` have room for a tile, `nothing` is empty.
    """
    other, one = np.int64(0), count - chosen
    for tile in range(0, count, TILE):
        n = min(TILE, count - tile)
        fill_lanes(stream, offset + tile, n, lanes, scratch, nothing, 0)
        for i in range(n):
            # (lane + 1/2) / 65536 < wanted / left; no branch, which nothing could predict.
            taken = np.int64((2 * np.int64(lanes[i]) + 1) * (count - tile - i) < 131072 * (count - one))
            places[other + taken * (one - other)] = tile + i
            one += taken
            other += 1 - taken


@kernel
def gather(x: NDArray[np.float32], lo: Int, places: NDArray[np.int32], out: NDArray[np.float32]) -> None:
    """out[i] = x[lo + places[i]]."""
    part = x[lo:]
    for i in range(places.size):
        out[i] = part[places[i]]


@kernel
def scatter(x: NDArray[np.float32], places: NDArray[np.int32], out: NDArray[np.float32]) -> None:
    """out[places[i]] = x[i]."""
    for i in range(places.size):
        out[places[i]] = x[i]


@kernel
def scatter_add(
    x: NDArray[np.float32], places: NDArray[np.int32], weight: np.float32, into: NDArray[np.float32], lo: Int
) -> None:
    """into[lo + places[i]] += weight * x[i]."""
    part = into[lo:]
    for i in range(places.size):
        part[places[i]] += weight * x[i]


@kernel
def digits_nbytes(form: tuple[int, int, int], count: Int) -> Int:
    """Bytes of `count` digits, packed in runs of a tile."""
    rest = count % TILE
    return count // TILE * packed_nbytes(form, np.int64(TILE)) + packed_nbytes(form, rest)


@kernel
def quantize(
    x: NDArray[np.float32],
    lo: Int,
    hi: Int,
    sigma: float,
    levels: NDArray[np.float32],
    cuts: NDArray[np.float64],
    form: tuple[int, int, int],
    digits: NDArray[np.uint16],
    fields: NDArray[np.uint16],
    wide: NDArray[np.uint64],
    sums: NDArray[np.float64],
    out: NDArray[np.uint8],
    at: Int,
) -> Int:
    """Write the digits of x[lo:hi] / sigma to `out[at:]`, return where they end; `sums` += products of x and level.

    Lane j of `sums` gets those of the coordinates lo + j, lo + j + 64 ...
    """
    for begin in range(lo, hi, TILE):
        n = min(TILE, hi - begin)
        part = x[begin : begin + n]
        for i in range(n):
            digits[i] = 0
        for k in range(cuts.size):
            cut = np.float32(cuts[k] * sigma)
            for i in range(n):
                digits[i] += np.uint16(part[i] > cut)
        for i in range(0, n, SQUARE_LANES):
            for j in range(min(SQUARE_LANES, n - i)):
                sums[j] += np.float64(part[i + j]) * np.float64(levels[digits[i + j]])
        pack(form, digits, n, fields, wide, out, at)
        at += packed_nbytes(form, n)
    return at


@kernel
def folded(sums: NDArray[np.float64]) -> np.float64:
    """The sum of all lanes: l and l + 32, then l and l + 16, and so on; `sums` is overwritten."""
    width = SQUARE_LANES // 2
    while width:
        for lane in range(width):
            sums[lane] += sums[lane + width]
        width //= 2
    total: np.float64 = sums[0]
    return total


@kernel
def reconstruct(
    data: NDArray[np.uint8],
    at: Int,
    scale: np.float32,
    levels: NDArray[np.float32],
    form: tuple[int, int, int],
    digits: NDArray[np.uint16],
    fields: NDArray[np.uint16],
    wide: NDArray[np.uint64],
    out: NDArray[np.float32],
    lo: Int,
    hi: Int,
) -> None:
    """out[lo:hi] = scale * the levels whose digits begin at `data[at]`."""
    for begin in range(lo, hi, TILE):
        n = min(TILE, hi - begin)
        unpack(form, data, at, n, fields, wide, digits)
        part = out[begin : begin + n]
        for i in range(n):
            part[i] = scale * levels[digits[i]]
        at += packed_nbytes(form, n)
