"""Fused numba kernels of the codecs: statistics, dither, quantization and packing, tile by tile through L1 buffers.

Digits. With u the dither and M = `half` / 2 levels a side, the plain scheme's digit is d = floor(x/step + u + M + 1/2) in
0 .. 2M, the nested scheme's fine index Q = floor(x/step + u + 1/2 + (M mod 1)), and the reconstruction is
(d - M - u) * step. For whole M that is the mid-tread quantizer, for half-integers the mid-rise one. Lane k stands for
u = (k + 1/2) / 65536 - 1/2, so that u + 1/2 is k / 65536 up to half a lane, and integers do the rounding.

Arithmetic is IEEE without contraction, and each loop performs the same operations on each coordinate, so results are the
same on every machine.
"""

from __future__ import annotations

import threading
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.checksum import crc32_int16
from ditherps.kernels.jit import kernel
from ditherps.kernels.packing import DIGITS, WIDE_FIELDS, pack, packed_nbytes, unpack
from ditherps.kernels.philox import TILE, Stream, fill_lanes

Form: TypeAlias = tuple[int, int, int]

MAX_RULE, RMS_RULE = 0, 1
SMALLEST_STEP = 2.0**-100  # so that step * 2^-17 stays a normal float32
LARGEST = 3.4028234663852886e38  # of float32
NARROW_HALF = 126  # 2M up to which |q| < 64, and float32 reconstructs with one rounding
EXCEPTION_ROOM = TILE * 11  # the most bytes that the exceptions of a tile take
CHECKPOINT = 64  # exceptions between two entries of the index into them

# What `encode_*` returns instead of a position.
NON_FINITE, TOO_LARGE, MORE_ROOM = -1, -2, -3

INFINITY_BITS = 0x7F800000


class Workspace(NamedTuple):
    """Buffers of one tile, one set a thread."""

    lanes: NDArray[np.uint16]
    scratch: NDArray[np.uint16]
    digits: NDArray[np.uint16]
    fields: NDArray[np.uint16]
    wide: NDArray[np.uint64]
    indices: NDArray[np.int64]
    kept: NDArray[np.float32]
    sums: NDArray[np.float64]
    bits: NDArray[np.int32]


_local = threading.local()


def workspace() -> Workspace:
    """This thread's buffers."""
    try:
        found: Workspace = _local.workspace
    except AttributeError:
        found = _local.workspace = Workspace(
            lanes=np.empty(TILE, np.uint16),
            scratch=np.empty(TILE, np.uint16),
            digits=np.empty(DIGITS, np.uint16),
            fields=np.empty(DIGITS, np.uint16),
            wide=np.empty(WIDE_FIELDS, np.uint64),
            indices=np.empty(TILE, np.int64),
            kept=np.empty(TILE, np.float32),
            sums=np.empty(16, np.float64),
            bits=np.empty(1, np.int32),
        )
    return found


# --- statistics -------------------------------------------------------------------------------------------------------


@kernel
def largest_bits(x: NDArray[np.float32]) -> int:
    """The largest |x| as the bits of a float32; from 0x7f800000 on, x holds an infinity or NaN."""
    largest = np.int32(0)
    for bits in x.view(np.int32):
        largest = max(largest, np.int32(bits & 0x7FFFFFFF))
    return largest


@kernel
def sum_of_squares(x: NDArray[np.float32], sums: NDArray[np.float64]) -> float:
    """Sum of squares in double precision: lane i % 16 sums in order, then lanes are added pairwise."""
    sums[:] = 0.0
    whole = x.size // 16 * 16
    for i in range(0, whole, 16):
        row = x[i : i + 16]
        for lane in range(16):
            value = np.float64(row[lane])
            sums[lane] += value * value
    for i in range(whole, x.size):
        value = np.float64(x[i])
        sums[i - whole] += value * value
    width = 8
    while width:
        for lane in range(width):
            sums[lane] += sums[lane + width]
        width //= 2
    return sums[0]


@kernel
def bucket_step(x: NDArray[np.float32], rule: int, factor: float, half: int, work: Workspace) -> float:
    """The step of one bucket, rounded up to float32; 0 for zeros, negative (a status) where it cannot be encoded.

    `factor` is M for the max rule, the resolution for the rms rule.
    """
    bits = work.bits
    bits[0] = largest_bits(x)
    if bits[0] >= INFINITY_BITS:
        return NON_FINITE
    if bits[0] == 0:
        return 0.0
    exact = np.float64(bits.view(np.float32)[0]) / factor
    if rule == RMS_RULE:
        exact = np.sqrt(sum_of_squares(x, work.sums) / x.size) * factor
    exact = max(exact, SMALLEST_STEP)
    if exact * (0.5 * half + 1.0) >= LARGEST:
        return TOO_LARGE
    step = bits.view(np.float32)
    step[0] = np.float32(exact)
    if np.float64(step[0]) < exact:
        bits[0] += 1
    return np.float64(step[0])


@kernel
def bucket_steps(
    x: NDArray[np.float32],
    bucket: int,
    lo: int,
    rule: int,
    factor: float,
    half: int,
    steps: NDArray[np.float32],
    work: Workspace,
) -> int:
    """Fill in the steps of all buckets that begin in the tile at `lo`; 0 or a status."""
    hi = min(lo + TILE, x.size)
    first = (lo + bucket - 1) // bucket
    for b in range(first, (hi + bucket - 1) // bucket):
        step = bucket_step(x[b * bucket : (b + 1) * bucket], rule, factor, half, work)
        if step < 0.0:
            return np.int64(step)
        steps[b] = np.float32(step)
    return 0


# --- exceptions: indices outside the alphabet ---------------------------------------------------------------------------


@kernel
def put_varint(value: int, out: NDArray[np.uint8], at: int) -> int:
    """Write LEB128; return the position after it."""
    while value >= 128:
        out[at] = np.uint8(value & 127 | 128)
        value >>= 7
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@kernel
def get_varint(data: NDArray[np.uint8], at: int, end: int) -> tuple[int, int]:
    """Read LEB128 of at most 63 bits; return value and position after it, which is -1 where there is none."""
    value = 0
    for shift in range(0, 63, 7):
        if at >= end:
            return 0, -1
        byte = np.int64(data[at])
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return 0, -1


@kernel
def get_exception(
    data: NDArray[np.uint8], at: int, end: int, work: Workspace
) -> tuple[int, int, float, bool]:
    """Read one exception: (position after it or -1, gap, value, whether the value is the coordinate itself)."""
    head, at = get_varint(data, at, end)
    if at < 0:
        return -1, 0, 0.0, False
    if head & 1:
        if at + 4 > end:
            return -1, 0, 0.0, False
        work.bits[0] = np.int32(
            np.uint32(data[at]) | np.uint32(data[at + 1]) << 8 | np.uint32(data[at + 2]) << 16 | np.uint32(data[at + 3]) << 24
        )
        return at + 4, head >> 1, np.float64(work.bits.view(np.float32)[0]), True
    folded, at = get_varint(data, at, end)
    if at < 0 or folded > 0xFFFFFFFF:
        return -1, 0, 0.0, False
    return at, head >> 1, np.float64((folded >> 1) ^ -(folded & 1)), False


@kernel
def exceptional_value(value: float, raw: bool, lane: int, half: int, step: float) -> np.float32:
    """The float32 that an exception stands for: itself, or the reconstruction of index `value`."""
    if raw:
        return np.float32(value)
    shift = 0.5 * (half & 1)
    return np.float32((value - shift - ((lane + 0.5) / 65536.0 - 0.5)) * step)


@kernel
def put_exceptions(
    x: NDArray[np.float32],
    step: float,
    half: int,
    lanes: NDArray[np.uint16],
    coordinate: int,
    out: NDArray[np.uint8],
    cursor: NDArray[np.int64],
) -> None:
    """Append the exceptions of one segment, whose first coordinate is `coordinate`.

    `cursor` holds position in `out` and the last exceptional coordinate. Only |x| > M * step can fall outside.
    """
    limit = np.float32(0.5 * half * step)
    shift = 0.5 * (half & 1)
    lowest, highest = -(half // 2), half - half // 2
    for block in range(0, x.size, 64):
        part = x[block : block + 64]
        found = 0
        for i in range(part.size):
            found += np.abs(part[i]) >= limit
        if found == 0:
            continue
        for i in range(part.size):
            if np.abs(part[i]) < limit:
                continue
            lane = np.int64(lanes[block + i])
            q = np.floor(np.float64(part[i]) / step + ((lane + 0.5) / 65536.0) + shift)
            if lowest <= q <= highest:
                continue
            at, last = cursor[0], cursor[1]
            position = coordinate + block + i
            raw = np.abs(q) > 0x7FFFFFFF or (np.abs(q) + 2.0) * step > LARGEST
            at = put_varint((position - last - 1) << 1 | np.int64(raw), out, at)
            if raw:
                bits = part[i : i + 1].view(np.uint32)[0]
                for byte in range(4):
                    out[at + byte] = np.uint8(bits >> (8 * byte))
                at += 4
            else:
                index = np.int64(q)
                at = put_varint((index << 1) ^ (index >> 63), out, at)
            cursor[0], cursor[1] = at, position


@kernel
def visit_exceptions(
    data: NDArray[np.uint8],
    at: int,
    last: int,
    tile: int,
    hi: int,
    lo: int,
    into: NDArray[np.float32],
    apply: bool,
    weight: np.float32,
    half: int,
    steps: NDArray[np.float32],
    bucket: int,
    work: Workspace,
) -> tuple[int, int]:
    """Save the exceptional coordinates of the tile `tile .. hi`, or (`apply`) add their values to what was saved.

    So the loop over the others in between needs no branch. `into[0]` is coordinate `lo`. Returns where to go on.
    """
    found = 0
    while at < data.size:
        after, gap, value, raw = get_exception(data, at, data.size, work)
        coordinate = last + gap + 1
        if coordinate >= hi:
            break
        if coordinate >= tile:
            if apply:
                step = np.float64(steps[coordinate // bucket])
                exact = exceptional_value(value, raw, np.int64(work.lanes[coordinate - tile]), half, step)
                into[coordinate - lo] = work.kept[found] + weight * exact
            else:
                work.kept[found] = into[coordinate - lo]
            found += 1
        at, last = after, coordinate
    return at, last


@kernel
def index_exceptions(
    data: NDArray[np.uint8],
    at: int,
    n: int,
    bucket: int,
    steps: NDArray[np.float32],
    checkpoints: NDArray[np.int64],
    work: Workspace,
) -> int:
    """Check the exceptions `data[at:]`; return their number, or -1 where they are malformed.

    Every `CHECKPOINT`-th one leaves (coordinate before it, position) in `checkpoints`.
    """
    count, coordinate = 0, -1
    while at < data.size:
        if count % CHECKPOINT == 0:
            checkpoints[count // CHECKPOINT, 0] = coordinate
            checkpoints[count // CHECKPOINT, 1] = at
        at, gap, value, raw = get_exception(data, at, data.size, work)
        if at < 0 or gap >= n - coordinate - 1:
            return -1
        coordinate += gap + 1
        step = np.float64(steps[coordinate // bucket])
        if step == 0.0:
            return -1
        if not (np.abs(value) <= LARGEST if raw else (np.abs(value) + 2.0) * step <= LARGEST):
            return -1
        count += 1
    return count


# --- layout of a payload ------------------------------------------------------------------------------------------------


@kernel
def index_tiles(
    steps: NDArray[np.float32], n: int, bucket: int, form: Form, extra: int, half: int, table: NDArray[np.int64]
) -> int:
    """Check the steps and find where tiles begin; return the bytes of all tiles, or -1 where a step is refused.

    `table[i]` is the offset of bucket i's first tile, or of tile i where buckets are smaller than a tile. A tile takes its
    packed digits and `extra` bytes; one whose buckets are all zero takes nothing.
    """
    limit = LARGEST / (0.5 * half + 1.0)
    for step in steps:
        if not (step == 0.0 or (SMALLEST_STEP <= step and step <= limit)):
            return -1
    at = 0
    if bucket >= TILE:
        whole = packed_nbytes(form, TILE) + extra
        for b in range(steps.size):
            table[b] = at
            if steps[b] > 0.0:
                m = min(bucket, n - b * bucket)
                at += m // TILE * whole
                if m % TILE:
                    at += packed_nbytes(form, m % TILE) + extra
        return at
    for tile in range(table.size):
        table[tile] = at
        count = present(steps, tile * TILE, min((tile + 1) * TILE, n), bucket)
        if count:
            at += packed_nbytes(form, count) + extra
    return at


@kernel
def present(steps: NDArray[np.float32], lo: int, hi: int, bucket: int) -> int:
    """How many coordinates of the tile `lo .. hi` lie in buckets that are not all zero."""
    count = 0
    for s in range(lo, hi, min(bucket, TILE)):
        if steps[s // bucket] > 0.0:
            count += min(bucket, hi - s)
    return count


@kernel
def tile_offset(table: NDArray[np.int64], lo: int, bucket: int, form: Form, extra: int) -> int:
    """Where the tile at coordinate `lo` begins, if it is there at all."""
    if bucket < TILE:
        return table[lo // TILE]
    b = lo // bucket
    return table[b] + (lo - b * bucket) // TILE * (packed_nbytes(form, TILE) + extra)


# --- plain dithered quantization ----------------------------------------------------------------------------------------


@kernel
def quantize(
    x: NDArray[np.float32], step: float, half: int, lanes: NDArray[np.uint16], digits: NDArray[np.uint16]
) -> None:
    """digits[i] = floor(x[i]/step + u[i] + M + 1/2), clamped to 0 .. 2M."""
    if half <= NARROW_HALF:
        scale = np.float32(65536.0 / step)
        bound = np.float32(half * 32768)
        up = np.int32(half * 32768)
        for i in range(x.size):
            scaled = np.int32(np.rint(min(max(x[i] * scale, -bound), bound)))
            digits[i] = np.uint16(np.int32(scaled + np.int32(lanes[i]) + up) >> 16)
    else:
        for i in range(x.size):
            exact = np.floor(np.float64(x[i]) / step + ((lanes[i] + 0.5) / 65536.0 + 0.5 * half))
            digits[i] = np.uint16(np.int32(min(max(exact, 0.0), np.float64(half))))


@kernel
def encode_plain(
    x: NDArray[np.float32],
    stream: Stream,
    bucket: int,
    rule: int,
    factor: float,
    half: int,
    form: Form,
    steps: NDArray[np.float32],
    out: NDArray[np.uint8],
    exceptions: NDArray[np.uint8],
    cursor: NDArray[np.int64],
    work: Workspace,
) -> int:
    """Encode x: fills `steps`, writes tiles to `out` and exceptions to `exceptions`.

    `cursor` = (position in `exceptions`, last exceptional coordinate, next tile's coordinate, position in `out`) lets the
    caller come again with more room for exceptions. Returns 0, NON_FINITE, TOO_LARGE (cursor[2] is then in the tile where
    the offending bucket begins) or MORE_ROOM.
    """
    lanes, digits = work.lanes, work.digits
    n = x.size
    segment = min(bucket, TILE)
    while cursor[2] < n:
        lo = cursor[2]
        at = cursor[3]
        hi = min(lo + TILE, n)
        if rule == RMS_RULE and exceptions.size - cursor[0] < EXCEPTION_ROOM:
            return MORE_ROOM
        status = bucket_steps(x, bucket, lo, rule, factor, half, steps, work)
        if status < 0:
            return status
        count = 0
        for s in range(lo, hi, segment):
            step = np.float64(steps[s // bucket])
            if step > 0.0:
                if count == 0:
                    fill_lanes(stream, lo, hi - lo, lanes, work.scratch)
                part = x[s : min(s + segment, hi)]
                here = lanes[s - lo : s - lo + part.size]
                quantize(part, step, half, here, digits[count : count + part.size])
                count += part.size
                if rule == RMS_RULE:
                    put_exceptions(part, step, half, here, s, exceptions, cursor)
        if count:
            pack(form, digits, count, work.fields, work.wide, out[at:])
            at += packed_nbytes(form, count)
        cursor[2] = hi
        cursor[3] = at
    return 0


@kernel
def add_plain(
    digits: NDArray[np.uint16],
    lanes: NDArray[np.uint16],
    half: int,
    step: float,
    weight: np.float32,
    into: NDArray[np.float32],
) -> None:
    """into[i] += weight * (digits[i] - M - u[i]) * step, the reconstruction rounded once to float32."""
    if half <= NARROW_HALF:
        scale = np.float32(step * 2.0**-17)
        offset = np.int32(65535 - half * 65536)
        for i in range(into.size):
            fixed = np.int32((np.int32(digits[i]) << 17) - (np.int32(lanes[i]) << 1) + offset)
            into[i] += weight * (np.float32(fixed) * scale)
    else:
        for i in range(into.size):
            exact = np.float64(digits[i]) - 0.5 * half - ((lanes[i] + 0.5) / 65536.0 - 0.5)
            into[i] += weight * np.float32(exact * step)


@kernel
def accumulate_plain(
    data: NDArray[np.uint8],
    steps: NDArray[np.float32],
    table: NDArray[np.int64],
    n: int,
    bucket: int,
    half: int,
    form: Form,
    stream: Stream,
    lo: int,
    into: NDArray[np.float32],
    weight: np.float32,
    exceptions: NDArray[np.uint8],
    at: int,
    last: int,
    work: Workspace,
) -> None:
    """into += weight * decoded coordinates `lo ..` (a multiple of TILE).

    `data` begins at the first tile; `exceptions` are read from position `at`, where coordinate `last` is behind.
    """
    lanes, digits = work.lanes, work.digits
    end = lo + into.size
    segment = min(bucket, TILE)
    for tile in range(lo, end, TILE):
        hi = min(tile + TILE, end)
        count = present(steps, tile, hi, bucket)
        if count == 0:
            continue
        unpack(form, data[tile_offset(table, tile, bucket, form, 0) :], count, work.fields, work.wide, digits)
        fill_lanes(stream, tile, hi - tile, lanes, work.scratch)
        if exceptions.size:
            visit_exceptions(exceptions, at, last, tile, hi, lo, into, False, weight, half, steps, bucket, work)
        count = 0
        for s in range(tile, hi, segment):
            step = np.float64(steps[s // bucket])
            if step > 0.0:
                part = into[s - lo : min(s + segment, hi) - lo]
                add_plain(digits[count:], lanes[s - tile :], half, step, weight, part)
                count += part.size
        if exceptions.size:
            at, last = visit_exceptions(exceptions, at, last, tile, hi, lo, into, True, weight, half, steps, bucket, work)


# --- nested dithered quantization ---------------------------------------------------------------------------------------


@kernel
def encode_nested(
    x: NDArray[np.float32],
    stream: Stream,
    bucket: int,
    rule: int,
    factor: float,
    half: int,
    alpha: float,
    form: Form,
    steps: NDArray[np.float32],
    out: NDArray[np.uint8],
    cursor: NDArray[np.int64],
    tables: NDArray[np.uint32],
    work: Workspace,
) -> int:
    """Encode x as fine indices modulo `form[0]`, each tile followed by the CRC-32 of its fine indices.

    `cursor` and the result are those of `encode_plain`; there are no exceptions.
    """
    lanes, digits, indices = work.lanes, work.digits, work.indices
    n = x.size
    segment = min(bucket, TILE)
    base = form[0]
    shift = 0.5 * (half & 1)
    while cursor[2] < n:
        lo = cursor[2]
        at = cursor[3]
        hi = min(lo + TILE, n)
        status = bucket_steps(x, bucket, lo, rule, factor, half, steps, work)
        if status < 0:
            return status
        count = 0
        for s in range(lo, hi, segment):
            step = np.float64(steps[s // bucket])
            if step > 0.0:
                if count == 0:
                    fill_lanes(stream, lo, hi - lo, lanes, work.scratch)
                part = x[s : min(s + segment, hi)]
                here, fine, digit = lanes[s - lo :], indices[count:], digits[count:]
                for i in range(part.size):
                    index = np.floor(alpha * np.float64(part[i]) / step + ((here[i] + 0.5) / 65536.0 + shift))
                    fine[i] = np.int64(index)
                    digit[i] = np.uint16(index - base * np.floor(index / base))
                count += part.size
        if count:
            pack(form, digits, count, work.fields, work.wide, out[at:])
            at += packed_nbytes(form, count)
            check = crc32_int16(indices, count, tables)
            for byte in range(4):
                out[at + byte] = np.uint8(check >> (8 * byte))
            at += 4
        cursor[2] = hi
        cursor[3] = at
    return 0


@kernel
def accumulate_nested(
    data: NDArray[np.uint8],
    steps: NDArray[np.float32],
    table: NDArray[np.int64],
    n: int,
    bucket: int,
    half: int,
    alpha: float,
    form: Form,
    stream: Stream,
    lo: int,
    into: NDArray[np.float32],
    weight: np.float32,
    side: NDArray[np.float32],
    tables: NDArray[np.uint32],
    work: Workspace,
) -> int:
    """into += weight * decoded coordinates `lo ..`, with side information of the same span; return the failed tiles.

    Q = q + k * floor((alpha * y/step + u + (M mod 1) - q)/k + 1/2); x = (1 - alpha^2) y + alpha (Q - u) step, which for
    alpha = 1 is the plain reconstruction.
    """
    lanes, digits, indices = work.lanes, work.digits, work.indices
    end = lo + into.size
    segment = min(bucket, TILE)
    base = np.float64(form[0])
    shift = 0.5 * (half & 1)
    failed = 0
    for tile in range(lo, end, TILE):
        hi = min(tile + TILE, end)
        count = present(steps, tile, hi, bucket)
        if count == 0:
            continue
        here = data[tile_offset(table, tile, bucket, form, 4) :]
        unpack(form, here, count, work.fields, work.wide, digits)
        fill_lanes(stream, tile, hi - tile, lanes, work.scratch)
        done = 0
        for s in range(tile, hi, segment):
            step = np.float64(steps[s // bucket])
            if step > 0.0:
                part = into[s - lo : min(s + segment, hi) - lo]
                known, lane, digit, fine = side[s - lo :], lanes[s - tile :], digits[done:], indices[done:]
                for i in range(part.size):
                    u = (lane[i] + 0.5) / 65536.0 - 0.5
                    y = np.float64(known[i])
                    q = np.float64(digit[i])
                    index = q + base * np.floor((alpha * y / step + u + shift - q) / base + 0.5)
                    fine[i] = np.int64(index)
                    exact = (index - shift - u) * step
                    if alpha != 1.0:
                        exact = (1.0 - alpha * alpha) * y + alpha * exact
                    part[i] += weight * np.float32(exact)
                done += part.size
        at = packed_nbytes(form, count)
        check = 0
        for byte in range(4):
            check |= np.int64(here[at + byte]) << (8 * byte)
        failed += crc32_int16(indices, count, tables) != check
    return failed


# --- unquantized values -------------------------------------------------------------------------------------------------


@kernel
def accumulate_float32(values: NDArray[np.float32], into: NDArray[np.float32], weight: np.float32) -> None:
    """into += weight * values."""
    for i in range(into.size):
        into[i] += weight * values[i]


@kernel
def largest_bf16_bits(values: NDArray[np.uint16]) -> int:
    """The largest |value| as the bits of a bfloat16; from 0x7f80 on, there is an infinity or NaN."""
    largest = np.uint16(0)
    for bits in values:
        largest = max(largest, np.uint16(bits & 0x7FFF))
    return np.int64(largest)


@kernel
def accumulate_bf16(values: NDArray[np.uint16], into: NDArray[np.float32], weight: np.float32, work: Workspace) -> None:
    """into += weight * values, which are the upper halves of float32."""
    exact = work.kept
    bits = exact.view(np.uint32)
    for lo in range(0, into.size, TILE):
        part, source = into[lo : lo + TILE], values[lo : lo + TILE]
        for i in range(part.size):
            bits[i] = np.uint32(source[i]) << 16
        for i in range(part.size):
            part[i] += weight * exact[i]
