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

from ditherps.kernels.alphabets import Alphabet, digits_nbytes, pack_digits, unpack_digits
from ditherps.kernels.buffers import buffer
from ditherps.kernels.checksum import CRC_TABLES, crc32_int16
from ditherps.kernels.escapes import NOT_RAW, check_escapes, get_escape, put_escape
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.packing import DIGITS, WIDE_FIELDS
from ditherps.kernels.philox import TILE, Stream, fill_lanes

SMALLEST_STEP = 2.0**-100  # so that step * 2^-17 stays a normal float32
NARROW_HALF = 126  # 2M up to which |q| < 64, and float32 reconstructs with one rounding
INFINITY_BITS = 0x7F800000
LARGEST = 3.4028234663852886e38  # of float32
BF16_INFINITY_BITS = 0x7F80
SQUARE_LANES = 64
MAX_RULE, RMS_RULE, L2_RULE = 0, 1, 2


class Scheme(NamedTuple):
    """What the kernels need of a fixed-width codec's options.

    Attributes:
        bucket: coordinates that share a step.
        rule: MAX_RULE, RMS_RULE or L2_RULE.
        half: 2M.
        ratio: k of the nested scheme, 0 for the plain one.
        escape: 1 where the digit 2M + 1 stands for an index outside 0 .. 2M, sent beside the tiles.
        subtract: 1 where the dither is subtracted, 0 for stochastic rounding.
        form: how digits are packed.
    """

    bucket: int
    rule: int
    half: int
    ratio: int
    escape: int
    subtract: int
    form: Alphabet


class Workspace(NamedTuple):
    """Buffers of one tile, one set a thread; `word` and `word_bits` are the same memory."""

    lanes: NDArray[np.uint16]
    scratch: NDArray[np.uint16]
    digits: NDArray[np.uint16]
    spare: NDArray[np.uint16]
    fields: NDArray[np.uint16]
    wide: NDArray[np.uint64]
    indices: NDArray[np.int64]
    sums: NDArray[np.float64]
    word: NDArray[np.float32]
    word_bits: NDArray[np.int32]
    crc: NDArray[np.uint32]
    kept: NDArray[np.float32]
    places: NDArray[np.int64]


_local = threading.local()


def workspace() -> Workspace:
    """This thread's buffers."""
    try:
        found: Workspace = _local.workspace
    except AttributeError:
        word = buffer(TILE, np.float32)
        found = _local.workspace = Workspace(
            lanes=buffer(TILE, np.uint16),
            scratch=buffer(TILE, np.uint16),
            digits=buffer(DIGITS, np.uint16),
            spare=buffer(DIGITS, np.uint16),
            fields=buffer(DIGITS, np.uint16),
            wide=buffer(WIDE_FIELDS, np.uint64),
            indices=buffer(TILE, np.int64),
            sums=buffer(SQUARE_LANES, np.float64),
            word=word,
            word_bits=word.view(np.int32),
            crc=CRC_TABLES,
            kept=buffer(TILE, np.float32),
            places=buffer(TILE, np.int64),
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

    `bits` is x's memory, `word` and `word_bits` are one; `factor` is M for the max and l2 rules, else the resolution.
    """
    largest = largest_bits(bits, lo, hi)
    if largest >= INFINITY_BITS:
        return np.float32(-1.0)
    if largest == 0:
        return np.float32(0.0)
    word_bits[0] = largest
    size = np.float64(word[0])
    if scheme.rule == RMS_RULE:
        exact = np.sqrt(sum_of_squares(x, lo, hi, sums) / (hi - lo)) * factor
    elif scheme.rule == L2_RULE:
        exact = np.sqrt(sum_of_squares(x, lo, hi, sums)) / factor
    else:
        exact = size / factor
    if scheme.escape and size + exact >= LARGEST:
        return np.float32(-1.0)
    return rounded_up(exact, farthest(scheme))


@kernel
def farthest(scheme: Scheme) -> float:
    """Steps beyond what any digit stands for, that of escapes included: so many must be finite as float32."""
    return 0.5 * scheme.half + 1.0 + scheme.escape


@kernel
def rounded_up(exact: float, reach: float) -> np.float32:
    """A step as float32, not below `exact`; -1 where `reach` steps would not be finite."""
    exact = max(exact, SMALLEST_STEP)
    if exact * reach >= LARGEST:
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
    return digits_nbytes(scheme.form, count) + 4 * (scheme.ratio > 0)


@kernel
def index_tiles(steps: NDArray[np.float32], n: int, scheme: Scheme, table: NDArray[np.int64]) -> Int:
    """Check the steps and find where tiles begin; return the bytes of all tiles, or -1 where a step is refused.

    `table[i]` is the offset of bucket i's first tile, or of tile i where buckets are smaller than a tile. A tile whose
    buckets are all zero takes nothing.
    """
    limit = LARGEST / farthest(scheme)
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


@kernel
def index_escapes(sizes: NDArray[np.uint16], data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> bool:
    """Find where the escapes of each tile begin, `offsets[tiles]` the end of the last; whether all is well-formed."""
    at: Int = np.int64(0)
    for tile in range(sizes.size):
        offsets[tile] = at
        at += np.int64(sizes[tile])
        if at > data.size:
            return False
        if not check_escapes(data, offsets[tile], at):
            return False
    offsets[sizes.size] = at
    return at == data.size


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
def quantize_escaping(
    x: NDArray[np.float32],
    lo: Int,
    hi: Int,
    step: float,
    half: int,
    lanes: NDArray[np.uint16],
    lane: Int,
    digits: NDArray[np.uint16],
    digit: Int,
) -> Int:
    """As `quantize`, but the digit 2M + 1 wherever another would be outside 0 .. 2M; returns how many those are."""
    source, random, target = x[lo:hi], lanes[lane:], digits[digit:]
    found = np.int32(0)
    escape = np.uint16(half + 1)
    if half <= NARROW_HALF:
        scale = np.float32(65536.0 / step)
        bound = np.float32(half * 32768 + 65536)
        up = np.float32(half * 32768 + 65536 + 0.5)
        top = np.int32(half + 1)
        for i in range(source.size):
            # Digits from 1 on, so that those outside are 0 and 2M + 2.
            scaled = np.int32(min(max(source[i] * scale, -bound), bound) + up)
            value = np.int32(np.int32(scaled + np.int32(random[i])) >> 16)
            inside = (value > 0) & (value <= top)
            found = np.int32(found + np.int32(inside))
            target[i] = np.uint16(np.int32(value - 1)) if inside else escape
    else:
        for i in range(source.size):
            exact = np.floor(np.float64(source[i]) / step + ((np.float64(random[i]) + 0.5) / 65536.0 + 0.5 * half))
            inside = (exact >= 0.0) & (exact <= half)
            found = np.int32(found + np.int32(inside))
            target[i] = np.uint16(np.int32(min(max(exact, 0.0), np.float64(half)))) if inside else escape
    return source.size - np.int64(found)


@kernel
def put_escapes(
    x: NDArray[np.float32],
    bits: NDArray[np.int32],
    lo: Int,
    hi: Int,
    step: float,
    half: int,
    lanes: NDArray[np.uint16],
    lane: Int,
    digits: NDArray[np.uint16],
    digit: Int,
    out: NDArray[np.uint8],
    at: Int,
) -> Int:
    """Write the indices of the digits 2M + 1 at nibble `at` of `out`, in order; return the next place."""
    for i in range(hi - lo):
        if digits[digit + i] == half + 1:
            u = (np.float64(lanes[lane + i]) + 0.5) / 65536.0
            exact = np.floor(np.float64(x[lo + i]) / step + (u + 0.5 * half))
            at = put_escape(exact, half, np.int64(bits[lo + i]) & 0xFFFFFFFF, out, at)
    return at


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
    given: bool,
    steps: NDArray[np.float32],
    sizes: NDArray[np.uint16],
    out: NDArray[np.uint8],
    escapes: NDArray[np.uint8],
    work: Workspace,
) -> tuple[Int, Int]:
    """Encode x, whose memory is `bits`: fill in `steps` unless they are given, and write tiles to `out`.

    Where the scheme has escapes, those of tile t are `sizes[t]` bytes of `escapes`. Returns the bytes written to `out`
    and `escapes`; (-1 - c, 0) where the bucket that holds coordinate c cannot be encoded.
    """
    lanes, scratch, digits, fields, wide = work.lanes, work.scratch, work.digits, work.fields, work.wide
    indices, crc, sums, word, word_bits = work.indices, work.crc, work.sums, work.word, work.word_bits
    bucket, half, ratio = scheme.bucket, scheme.half, scheme.ratio
    form = scheme.form
    segment = min(bucket, TILE)
    at: Int = np.int64(0)
    escaped: Int = np.int64(0)
    for lo in range(0, x.size, TILE):
        hi = min(lo + TILE, x.size)
        count: Int = np.int64(0)
        nibble = 2 * escaped
        for s in range(lo, hi, segment):
            if s % bucket == 0 and not given:
                found = bucket_step(x, bits, s, min(s + bucket, x.size), scheme, factor, sums, word, word_bits)
                if found < 0.0:
                    return -1 - s, np.int64(0)
                steps[s // bucket] = found
            step = np.float64(steps[s // bucket])
            if step > 0.0:
                if count == 0:
                    fill_lanes(stream, lo, hi - lo, lanes, scratch, x, hi)
                end = min(s + segment, hi)
                if ratio:
                    quantize_nested(x, s, end, step, half, ratio, alpha, lanes, s - lo, digits, indices, count)
                elif scheme.escape:
                    if quantize_escaping(x, s, end, step, half, lanes, s - lo, digits, count):
                        nibble = put_escapes(x, bits, s, end, step, half, lanes, s - lo, digits, count, escapes, nibble)
                else:
                    quantize(x, s, end, step, half, lanes, s - lo, digits, count)
                count += end - s
        if scheme.escape:
            sizes[lo // TILE] = np.uint16((nibble + 1) // 2 - escaped)
            escaped = (nibble + 1) // 2
        if count:
            pack_digits(form, digits, count, work.spare, fields, wide, out, at)
            at += tile_nbytes(scheme, count)
            if ratio:
                check = crc32_int16(indices, count, crc)
                for byte in range(4):
                    out[at - 4 + byte] = np.uint8(check >> (8 * byte))
    return at, escaped


@kernel
def add(
    digits: NDArray[np.uint16],
    digit: Int,
    lanes: NDArray[np.uint16],
    lane: Int,
    half: int,
    subtract: int,
    step: float,
    weight: np.float32,
    into: NDArray[np.float32],
    lo: Int,
    hi: Int,
) -> None:
    """into[lo:hi] += weight * (digits - M - u) * step, the reconstruction rounded once to float32.

    Digits and lanes are read from `digits[digit]` and `lanes[lane]` on. Without `subtract`, u is left out.
    """
    target, source, random = into[lo:hi], digits[digit:], lanes[lane:]
    if not subtract:
        for i in range(target.size):
            target[i] += weight * np.float32((np.float64(source[i]) - 0.5 * half) * step)
    elif half <= NARROW_HALF:
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
def keep_escaped(
    digits: NDArray[np.uint16], digit: Int, half: int, into: NDArray[np.float32], lo: Int, hi: Int, work: Workspace
) -> Int:
    """Note where in into[lo:hi] the digits are 2M + 1, and what stands there; return how many.

    So the kernel that adds all others needs no branch.
    """
    found: Int = np.int64(0)
    source = digits[digit:]
    for i in range(hi - lo):
        if source[i] == half + 1:
            work.places[found] = lo + i
            work.kept[found] = into[lo + i]
            found += 1
    return found


@kernel
def add_escapes(
    found: Int,
    data: NDArray[np.uint8],
    nibble: Int,
    lanes: NDArray[np.uint16],
    shift: Int,
    half: int,
    subtract: int,
    step: float,
    weight: np.float32,
    into: NDArray[np.float32],
    work: Workspace,
) -> Int:
    """Put what the escaped coordinates should be where `keep_escaped` found them; return the next nibble.

    The lane of into[i] is `lanes[i + shift]`. Values are cut at the largest float32, which only a forger exceeds.
    """
    for place in range(found):
        at = work.places[place]
        index, raw, nibble = get_escape(data, nibble, half)
        u = subtract * ((np.float64(lanes[at + shift]) + 0.5) / 65536.0 - 0.5)
        value = np.float32(min(max((np.float64(index) - 0.5 * half - u) * step, -LARGEST), LARGEST))
        if raw != NOT_RAW:
            work.word_bits[0] = np.int32(raw)
            value = work.word[0]
        into[at] = work.kept[place] + weight * value
    return nibble


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
    escapes: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    work: Workspace,
) -> int:
    """into += weight * decoded coordinates `lo ..` (a multiple of TILE); return the tiles whose check fails.

    `side` is the side information of the same span in the nested scheme, else empty. The escapes of tile t begin at
    byte `offsets[t]` of `escapes` and end where the next tile's begin; empty where the scheme has none.
    """
    lanes, scratch, digits, fields, wide = work.lanes, work.scratch, work.digits, work.fields, work.wide
    indices, crc = work.indices, work.crc
    bucket, half, ratio = scheme.bucket, scheme.half, scheme.ratio
    form = scheme.form
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
        unpack_digits(form, tiles, at, count, work.spare, fields, wide, digits)
        fill_lanes(stream, tile, hi - tile, lanes, scratch, into, hi - lo)
        done: Int = np.int64(0)
        nibble = 2 * offsets[tile // TILE] if scheme.escape else np.int64(0)
        for s in range(tile, hi, segment):
            step = np.float64(steps[s // bucket])
            if step > 0.0:
                a, b, lane = s - lo, min(s + segment, hi) - lo, s - tile
                if ratio:
                    add_nested(digits, indices, done, lanes, lane, half, ratio, alpha, step, weight, side, into, a, b)
                elif scheme.escape and offsets[tile // TILE] < offsets[tile // TILE + 1]:
                    part = escapes[: offsets[tile // TILE + 1]]
                    found = keep_escaped(digits, done, half, into, a, b, work)
                    add(digits, done, lanes, lane, half, scheme.subtract, step, weight, into, a, b)
                    nibble = add_escapes(
                        found, part, nibble, lanes, lane - a, half, scheme.subtract, step, weight, into, work
                    )
                else:
                    add(digits, done, lanes, lane, half, scheme.subtract, step, weight, into, a, b)
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


@kernel
def clip(x: NDArray[np.float32], bound: np.float32, out: NDArray[np.float32]) -> None:
    """out = x within -bound .. bound."""
    for i in range(x.size):
        out[i] = min(max(x[i], -bound), bound)
