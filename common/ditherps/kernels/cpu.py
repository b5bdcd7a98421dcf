"""Fused numba kernels of the codecs: statistics, dither, quantization and packing, tile by tile through L1 buffers.

Digits. With u the dither and M = `half` / 2 levels a side, the plain scheme's digit is d = floor(x/step + u + M + 1/2),
0 .. 2M, and the reconstruction (d - M - u) * step; for whole M that is the mid-tread quantizer, for half-integers the
mid-rise one. The nested scheme's fine index is Q = d - floor(M), of which Q mod k travels. Lane k stands for
u = (k + 1/2) / 65536 - 1/2, so u + 1/2 is k / 65536 but for half a lane, and integers do the rounding.

Arithmetic is IEEE without contraction, each coordinate's operations are always the same ones, and sums have a fixed
order: results are equal on every machine.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.checksum import CRC_TABLES, crc32_int16
from ditherps.kernels.exceptions import LARGEST
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.packing import DIGITS, WIDE_FIELDS, pack, packed_nbytes, unpack
from ditherps.kernels.philox import TILE, Stream, fill_lanes

SMALLEST_STEP = 2.0**-100  # so that step * 2^-17 stays a normal float32
NARROW_HALF = 126  # 2M up to which |q| < 64, and float32 reconstructs with one rounding
INFINITY_BITS = 0x7F800000
BF16_INFINITY_BITS = 0x7F80
SQUARE_LANES = 64


class Scheme(NamedTuple):
    """What the kernels need of a fixed-width codec's options.

    Attributes:
        bucket: coordinates that share a step.
        rms: 1 for the rms rule, 0 for the max rule.
        half: 2M.
        ratio: k of the nested scheme, 0 for the plain one.
        base: of the digits, with `group` and `bits` as in `Packing`.
    """

    bucket: int
    rms: int
    half: int
    ratio: int
    base: int
    group: int
    bits: int


class Workspace(NamedTuple):
    """Buffers of one tile, one set a thread; `word` and `word_bits` are the same memory."""

    lanes: NDArray[np.uint16]
    scratch: NDArray[np.uint16]
    digits: NDArray[np.uint16]
    fields: NDArray[np.uint16]
    wide: NDArray[np.uint64]
    indices: NDArray[np.int64]
    sums: NDArray[np.float64]
    word: NDArray[np.float32]
    word_bits: NDArray[np.int32]
    crc: NDArray[np.uint32]


_local = threading.local()


def workspace() -> Workspace:
    """This thread's buffers."""
    try:
        found: Workspace = _local.workspace
    except AttributeError:
        word = np.empty(TILE, np.float32)
        found = _local.workspace = Workspace(
            lanes=np.empty(TILE, np.uint16),
            scratch=np.empty(TILE, np.uint16),
            digits=np.empty(DIGITS, np.uint16),
            fields=np.empty(DIGITS, np.uint16),
            wide=np.empty(WIDE_FIELDS, np.uint64),
            indices=np.empty(TILE, np.int64),
            sums=np.empty(SQUARE_LANES, np.float64),
            word=word,
            word_bits=word.view(np.int32),
            crc=CRC_TABLES,
        )
    return found


# --- statistics -------------------------------------------------------------------------------------------------------


@kernel
def largest_bits(bits: NDArray[np.int32], lo: Int, hi: Int) -> Int:
    """The largest |value| of float32 memory `lo .. hi`, seen as int32; from `INFINITY_BITS` on, one is not finite."""
    part = bits[lo:hi]
    largest = np.int32(0)
    for i in range(part.size):
        word = np.int32(part[i] & np.int32(0x7FFFFFFF))
        largest = word if word > largest else largest
    return np.int64(largest)


@kernel
def sum_of_squares(x: NDArray[np.float32], lo: Int, hi: Int, sums: NDArray[np.float64]) -> np.float64:
    """Sum of squares of x[lo:hi] in double precision: lane i % 64 sums in order, then the lanes are added pairwise."""
    for lane in range(SQUARE_LANES):
        sums[lane] = 0.0
    for i in range(lo, hi, SQUARE_LANES):
        row = x[i : min(i + SQUARE_LANES, hi)]
        if row.size == SQUARE_LANES:
            for lane in range(SQUARE_LANES):
                sums[lane] += np.float64(row[lane]) * np.float64(row[lane])
        else:
            for lane in range(row.size):
                sums[lane] += np.float64(row[lane]) * np.float64(row[lane])
    width = SQUARE_LANES // 2
    while width:
        for lane in range(width):
            sums[lane] += sums[lane + width]
        width //= 2
    total: np.float64 = sums[0]
    return total


@kernel
def bucket_step(
    x: NDArray[np.float32],
    bits: NDArray[np.int32],
    lo: Int,
    hi: Int,
    scheme: Scheme,
    factor: float,
    sums: NDArray[np.float64],
    word: NDArray[np.float32],
    word_bits: NDArray[np.int32],
) -> np.float32:
    """The step of the bucket x[lo:hi], rounded up to float32; 0 for zeros, -1 where it cannot be encoded.

    `bits` is x's memory, `word` and `word_bits` are one; `factor` is M for the max rule, for rms the resolution.
    """
    largest = largest_bits(bits, lo, hi)
    if largest >= INFINITY_BITS:
        return np.float32(-1.0)
    if largest == 0:
        return np.float32(0.0)
    if scheme.rms:
        exact = np.sqrt(sum_of_squares(x, lo, hi, sums) / (hi - lo)) * factor
    else:
        word_bits[0] = largest
        exact = np.float64(word[0]) / factor
    exact = max(exact, SMALLEST_STEP)
    if exact * (0.5 * scheme.half + 1.0) >= LARGEST:
        return np.float32(-1.0)
    step = np.float32(exact)
    if np.float64(step) < exact:
        step = np.float32(exact + exact * 2.0**-24)  # between half an ulp and one and a half above: the next float32
    return step


# --- layout of a payload ----------------------------------------------------------------------------------------------


@kernel
def present(steps: NDArray[np.float32], lo: Int, hi: Int, bucket: int) -> Int:
    """How many coordinates of the tile `lo .. hi` lie in buckets that are not all zero."""
    count: Int = np.int64(0)
    for s in range(lo, hi, min(bucket, TILE)):
        if steps[s // bucket] > 0.0:
            count += min(bucket, hi - s)
    return count


@kernel
def tile_nbytes(scheme: Scheme, count: Int) -> Int:
    """Bytes of a tile with `count` digits: packed digits, and a CRC-32 in the nested scheme."""
    return packed_nbytes((scheme.base, scheme.group, scheme.bits), count) + 4 * (scheme.ratio > 0)


@kernel
def index_tiles(steps: NDArray[np.float32], n: int, scheme: Scheme, table: NDArray[np.int64]) -> Int:
    """Check the steps and find where tiles begin; return the bytes of all tiles, or -1 where a step is refused.

    `table[i]` is the offset of bucket i's first tile, or of tile i where buckets are smaller than a tile. A tile whose
    buckets are all zero takes nothing.
    """
    limit = LARGEST / (0.5 * scheme.half + 1.0)
    for step in steps:
        if not (step == 0.0 or (step >= SMALLEST_STEP and step <= limit)):
            return -1
    at: Int = np.int64(0)
    width = max(scheme.bucket, TILE)
    whole = tile_nbytes(scheme, TILE)
    for entry in range(table.size):
        table[entry] = at
        lo = entry * width
        hi = min(lo + width, n)
        if width == TILE:
            count = present(steps, lo, hi, scheme.bucket)
        else:
            size = (hi - lo) * np.int64(steps[entry] > 0.0)
            at += size // TILE * whole
            count = size % TILE
        if count:
            at += tile_nbytes(scheme, count)
    return at


# --- dithered quantization --------------------------------------------------------------------------------------------


# These take whole arrays and where to begin, and cut slices themselves: an array that is passed on costs two atomic
# reference counts, a slice that stays inside costs nothing.


@kernel
def quantize(
    x: NDArray[np.float32],
    lo: Int,
    hi: Int,
    step: float,
    half: int,
    lanes: NDArray[np.uint16],
    lane: Int,
    digits: NDArray[np.uint16],
    digit: Int,
) -> None:
    """Digits floor(x/step + u + M + 1/2), clamped to 0 .. 2M: of x[lo:hi], from `lanes[lane]`, to `digits[digit]`."""
    source, random, target = x[lo:hi], lanes[lane:], digits[digit:]
    if half <= NARROW_HALF:
        scale = np.float32(65536.0 / step)
        bound = np.float32(half * 32768)
        up = np.float32(half * 32768 + 0.5)
        for i in range(source.size):
            # Not negative, so that cutting the fraction off rounds to nearest.
            scaled = np.int32(min(max(source[i] * scale, -bound), bound) + up)
            target[i] = np.uint16(np.int32(scaled + np.int32(random[i])) >> 16)
    else:
        for i in range(source.size):
            exact = np.floor(np.float64(source[i]) / step + ((np.float64(random[i]) + 0.5) / 65536.0 + 0.5 * half))
            target[i] = np.uint16(np.int32(min(max(exact, 0.0), np.float64(half))))


@kernel
def quantize_nested(
    x: NDArray[np.float32],
    lo: Int,
    hi: Int,
    step: float,
    half: int,
    ratio: int,
    alpha: float,
    lanes: NDArray[np.uint16],
    lane: Int,
    digits: NDArray[np.uint16],
    indices: NDArray[np.int64],
    digit: Int,
) -> None:
    """indices = Q of alpha * x, digits = Q mod k; places as in `quantize`."""
    source, random, target, fine = x[lo:hi], lanes[lane:], digits[digit:], indices[digit:]
    shift = 0.5 * (half & 1)
    base = np.float64(ratio)
    for i in range(source.size):
        index = np.floor(alpha * np.float64(source[i]) / step + ((np.float64(random[i]) + 0.5) / 65536.0 + shift))
        fine[i] = np.int64(index)
        target[i] = np.uint16(np.int32(index - base * np.floor(index / base)))


@kernel
def encode(
    x: NDArray[np.float32],
    bits: NDArray[np.int32],
    stream: Stream,
    scheme: Scheme,
    factor: float,
    alpha: float,
    steps: NDArray[np.float32],
    out: NDArray[np.uint8],
    work: Workspace,
) -> Int:
    """Encode x, whose memory is `bits`: fill in `steps` and write tiles to `out`.

    Returns the bytes written, or -1 - c where the bucket that holds coordinate c cannot be encoded.
    """
    lanes, scratch, digits, fields, wide = work.lanes, work.scratch, work.digits, work.fields, work.wide
    indices, crc, sums, word, word_bits = work.indices, work.crc, work.sums, work.word, work.word_bits
    bucket, half, ratio = scheme.bucket, scheme.half, scheme.ratio
    form = (scheme.base, scheme.group, scheme.bits)
    segment = min(bucket, TILE)
    at: Int = np.int64(0)
    for lo in range(0, x.size, TILE):
        hi = min(lo + TILE, x.size)
        count: Int = np.int64(0)
        for s in range(lo, hi, segment):
            if s % bucket == 0:
                found = bucket_step(x, bits, s, min(s + bucket, x.size), scheme, factor, sums, word, word_bits)
                if found < 0.0:
                    return -1 - s
                steps[s // bucket] = found
            step = np.float64(steps[s // bucket])
            if step > 0.0:
                if count == 0:
                    fill_lanes(stream, lo, hi - lo, lanes, scratch, x, hi)
                end = min(s + segment, hi)
                if ratio:
                    quantize_nested(x, s, end, step, half, ratio, alpha, lanes, s - lo, digits, indices, count)
                else:
                    quantize(x, s, end, step, half, lanes, s - lo, digits, count)
                count += end - s
        if count:
            pack(form, digits, count, fields, wide, out, at)
            at += tile_nbytes(scheme, count)
            if ratio:
                check = crc32_int16(indices, count, crc)
                for byte in range(4):
                    out[at - 4 + byte] = np.uint8(check >> (8 * byte))
    return at


@kernel
def add(
    digits: NDArray[np.uint16],
    digit: Int,
    lanes: NDArray[np.uint16],
    lane: Int,
    half: int,
    step: float,
    weight: np.float32,
    into: NDArray[np.float32],
    lo: Int,
    hi: Int,
) -> None:
    """into[lo:hi] += weight * (digits - M - u) * step, the reconstruction rounded once to float32.

    Digits and lanes are read from `digits[digit]` and `lanes[lane]` on.
    """
    target, source, random = into[lo:hi], digits[digit:], lanes[lane:]
    if half <= NARROW_HALF:
        # In units of 2^-16 step: integers and one half, below 2^23, so exact until the multiplication.
        scale = np.float32(step * 2.0**-16)
        offset = np.float32(32767.5 - half * 32768.0)
        for i in range(target.size):
            fixed = np.int32((np.int32(source[i]) << 16) - np.int32(random[i]))
            target[i] += weight * ((np.float32(fixed) + offset) * scale)
    else:
        for i in range(target.size):
            u = (np.float64(random[i]) + 0.5) / 65536.0 - 0.5
            target[i] += weight * np.float32((np.float64(source[i]) - 0.5 * half - u) * step)


@kernel
def add_nested(
    digits: NDArray[np.uint16],
    indices: NDArray[np.int64],
    digit: Int,
    lanes: NDArray[np.uint16],
    lane: Int,
    half: int,
    ratio: int,
    alpha: float,
    step: float,
    weight: np.float32,
    side: NDArray[np.float32],
    into: NDArray[np.float32],
    lo: Int,
    hi: Int,
) -> None:
    """Recover Q from q = Q mod k and the side information y, and add weight times the reconstruction; as `add`.

    With s = M mod 1: Q = q + k * floor((alpha * y/step + u + s - q)/k + 1/2), and the reconstruction is
    (1 - alpha^2) y + alpha (Q - s - u) step, which for alpha = 1 is the plain reconstruction (algorithms.md 1.2).
    """
    target, known, source, random, fine = into[lo:hi], side[lo:hi], digits[digit:], lanes[lane:], indices[digit:]
    shift = 0.5 * (half & 1)
    base = np.float64(ratio)
    for i in range(target.size):
        u = (np.float64(random[i]) + 0.5) / 65536.0 - 0.5
        y = np.float64(known[i])
        q = np.float64(source[i])
        index = q + base * np.floor((alpha * y / step + u + shift - q) / base + 0.5)
        fine[i] = np.int64(index)
        exact = (index - shift - u) * step
        if alpha != 1.0:
            exact = (1.0 - alpha * alpha) * y + alpha * exact
        target[i] += weight * np.float32(exact)


@kernel
def accumulate(
    tiles: NDArray[np.uint8],
    steps: NDArray[np.float32],
    table: NDArray[np.int64],
    stream: Stream,
    scheme: Scheme,
    alpha: float,
    lo: int,
    into: NDArray[np.float32],
    weight: np.float32,
    side: NDArray[np.float32],
    work: Workspace,
) -> int:
    """into += weight * decoded coordinates `lo ..` (a multiple of TILE); return the tiles whose check fails.

    `side` is the side information of the same span in the nested scheme, else empty. Exceptions are not this kernel's.
    """
    lanes, scratch, digits, fields, wide = work.lanes, work.scratch, work.digits, work.fields, work.wide
    indices, crc = work.indices, work.crc
    bucket, half, ratio = scheme.bucket, scheme.half, scheme.ratio
    form = (scheme.base, scheme.group, scheme.bits)
    segment = min(bucket, TILE)
    width = max(bucket, TILE)
    whole = tile_nbytes(scheme, TILE)
    end = lo + into.size
    failed = 0
    for tile in range(lo, end, TILE):
        hi = min(tile + TILE, end)
        count = present(steps, tile, hi, bucket)
        if count == 0:
            continue
        entry = tile // width
        at = table[entry] + (tile - entry * width) // TILE * whole
        unpack(form, tiles, at, count, fields, wide, digits)
        fill_lanes(stream, tile, hi - tile, lanes, scratch, into, hi - lo)
        done: Int = np.int64(0)
        for s in range(tile, hi, segment):
            step = np.float64(steps[s // bucket])
            if step > 0.0:
                a, b, lane = s - lo, min(s + segment, hi) - lo, s - tile
                if ratio:
                    add_nested(digits, indices, done, lanes, lane, half, ratio, alpha, step, weight, side, into, a, b)
                else:
                    add(digits, done, lanes, lane, half, step, weight, into, a, b)
                done += b - a
        if ratio:
            check = np.int64(0)
            for byte in range(4):
                check |= np.int64(tiles[at + tile_nbytes(scheme, count) - 4 + byte]) << (8 * byte)
            failed += crc32_int16(indices, count, crc) != check
    return failed


# --- unquantized values -----------------------------------------------------------------------------------------------


@kernel
def accumulate_float32(values: NDArray[np.float32], into: NDArray[np.float32], weight: np.float32) -> None:
    """into += weight * values."""
    for i in range(into.size):
        into[i] += weight * values[i]


@kernel
def largest_bf16_bits(values: NDArray[np.uint16]) -> Int:
    """The largest |value| of bfloat16 memory, as such bits; from `BF16_INFINITY_BITS` on, one is not finite."""
    largest = np.uint16(0)
    for i in range(values.size):
        word = np.uint16(values[i] & np.uint16(0x7FFF))
        largest = word if word > largest else largest
    return np.int64(largest)


@kernel
def accumulate_bf16(values: NDArray[np.uint16], into: NDArray[np.float32], weight: np.float32, work: Workspace) -> None:
    """into += weight * values, which are the upper halves of float32."""
    for lo in range(0, into.size, TILE):
        part, source = into[lo : lo + TILE], values[lo : lo + TILE]
        for i in range(part.size):
            work.word_bits[i] = np.int32(np.uint32(source[i]) << 16)
        for i in range(part.size):
            part[i] += weight * work.word[i]
