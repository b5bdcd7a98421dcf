"""Kernels of `randk` and `globalrandk`: k of n coordinates at random, one from each of k strata, and their values.

Stratum i is a run of n // k consecutive coordinates, or one more for the first n mod k strata. From one of s
coordinates, W = the number whose base-2^16 digits are the lanes of its first m = min(s, 4) coordinates (the first least
significant), uniform below 2^16m, chooses coordinate floor(W s / 2^16m). Of the 2^16m values of W, either floor or ceil
of 2^16m / s choose a given coordinate, so each is chosen with probability 1/s to within 2^-16m: exactly, where s is a
power of two, else with a relative error below s / 2^64 (3 / 2^48 for s = 3; no number of random bits makes thirds). So
a value times s has the coordinate as its expectation, to far less than float32 resolves. Different strata read
different lanes: they choose independently.

A stratum needs nothing of the others, so any span can be decoded alone, in time proportional to its strata.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.alphabets import Alphabet, digits_nbytes, pack_digits, unpack_digits
from ditherps.kernels.cpu import Workspace
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.packing import DIGITS
from ditherps.kernels.philox import TILE, Stream, lane_at

LANES = 4


@kernel
def stratum(n: Int, k: Int, i: Int) -> tuple[Int, Int]:
    """First coordinate and size of stratum i of k."""
    size, larger = n // k, n % k
    return i * size + min(i, larger), size + np.int64(i < larger)


@kernel
def stratum_of(n: Int, k: Int, coordinate: Int) -> Int:
    """The stratum that holds a coordinate."""
    size, larger = n // k, n % k
    if coordinate < larger * (size + 1):
        return coordinate // (size + 1)
    return larger + (coordinate - larger * (size + 1)) // size


@kernel
def chosen(choice: Stream, begin: Int, size: Int) -> Int:
    """The coordinate that is taken from a stratum."""
    lanes = min(size, LANES)
    highest = np.int64(lane_at(choice, begin + lanes - 1)) * size
    place: Int = np.int64(0)
    if highest & 0xFFFF > 0x10000 - size:  # else what the lower lanes carry, below s, changes nothing
        for lane in range(lanes - 1):
            place = (np.int64(lane_at(choice, begin + lane)) * size + place) >> 16  # floor(W s / 2^16m), digit by digit
    return begin + (highest + place >> 16)


@kernel
def gather(x: NDArray[np.float32], choice: Stream, values: NDArray[np.float32], places: NDArray[np.int64]) -> None:
    """The chosen coordinates of x and where they lie, in their order; as many as `values` has room for."""
    k = values.size
    for i in range(k):
        begin, size = stratum(x.size, k, i)
        place = chosen(choice, begin, size)
        places[i] = place
        values[i] = x[place]


@kernel
def round_bf16(bits: NDArray[np.uint32], places: NDArray[np.int64], stream: Stream, out: NDArray[np.uint16]) -> None:
    """Round float32 memory at random to bfloat16, exactly unbiased: of 65536 lanes, the lower half's value carry."""
    for i in range(out.size):
        out[i] = np.uint16((bits[i] + np.uint32(lane_at(stream, places[i]))) >> np.uint32(16))


@kernel
def quantize_chosen(
    values: NDArray[np.float32],
    places: NDArray[np.int64],
    norm: np.float64,
    levels: int,
    form: Alphabet,
    stream: Stream,
    out: NDArray[np.uint8],
    work: Workspace,
) -> None:
    """Round values at random to multiples of norm / levels, norm > 0 their largest magnitude, and pack them by 4096."""
    digits, spare = work.digits, np.empty(DIGITS, np.uint16)
    up = np.float64(levels) / norm
    at: Int = np.int64(0)
    for lo in range(0, values.size, TILE):
        part = values[lo : lo + TILE]
        for i in range(part.size):
            random = (np.float64(lane_at(stream, places[lo + i])) + 0.5) / 65536.0
            digits[i] = np.uint16(np.int32(np.floor(np.float64(part[i]) * up + random) + np.float64(levels)))
        pack_digits(form, digits, part.size, spare, work.fields, work.wide, out, at)
        at += digits_nbytes(form, part.size)


@kernel
def add_float32(
    values: NDArray[np.float32], n: int, choice: Stream, lo: int, into: NDArray[np.float32], weight: np.float32
) -> None:
    """into += weight * size * value at the chosen coordinates of the span `lo ..` of n."""
    if into.size == 0:
        return
    for i in range(stratum_of(n, values.size, lo), values.size):
        begin, size = stratum(n, values.size, i)
        if begin >= lo + into.size:
            break
        place = chosen(choice, begin, size) - lo
        if 0 <= place < into.size:
            into[place] += weight * np.float32(np.float64(values[i]) * np.float64(size))


@kernel
def add_bf16(
    values: NDArray[np.uint16],
    n: int,
    choice: Stream,
    lo: int,
    into: NDArray[np.float32],
    weight: np.float32,
    work: Workspace,
) -> None:
    """`add_float32` for values that are the upper halves of float32."""
    if into.size == 0:
        return
    for i in range(stratum_of(n, values.size, lo), values.size):
        begin, size = stratum(n, values.size, i)
        if begin >= lo + into.size:
            break
        place = chosen(choice, begin, size) - lo
        if 0 <= place < into.size:
            work.word_bits[0] = np.int32(np.uint32(values[i]) << np.uint32(16))
            into[place] += weight * np.float32(np.float64(work.word[0]) * np.float64(size))


@kernel
def add_quantized(
    data: NDArray[np.uint8],
    k: int,
    norm: np.float64,
    levels: int,
    form: Alphabet,
    n: int,
    choice: Stream,
    lo: int,
    into: NDArray[np.float32],
    weight: np.float32,
    work: Workspace,
) -> None:
    """`add_float32` for k packed digits, as `quantize_chosen` writes them."""
    if into.size == 0:
        return
    digits, spare = work.digits, np.empty(DIGITS, np.uint16)
    step = norm / levels
    run: Int = np.int64(-1)
    for i in range(stratum_of(n, k, lo), k):
        begin, size = stratum(n, k, i)
        if begin >= lo + into.size:
            break
        place = chosen(choice, begin, size) - lo
        if 0 <= place < into.size:
            if i // TILE != run:
                run = i // TILE
                at = run * digits_nbytes(form, np.int64(TILE))
                unpack_digits(form, data, at, min(TILE, k - run * TILE), spare, work.fields, work.wide, digits)
            index = np.float64(np.int32(digits[i % TILE]) - levels)
            into[place] += weight * np.float32(index * step * np.float64(size))
