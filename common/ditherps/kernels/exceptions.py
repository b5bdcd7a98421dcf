"""Indices outside the alphabet, which only the rms rule has: a list beside the tiles.

An exception is LEB128 of (gap << 1 | raw), where gap counts the coordinates between it and the one before, and then
either LEB128 of the zigzagged index q (within int32), or, where raw is 1, the coordinate itself as float32. In the tile
its digit is clamped to the alphabet; decoding puts the exception in its place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.philox import Stream, lane_at

LARGEST = 3.4028234663852886e38  # of float32
CHECKPOINT = 64  # exceptions between two entries of the index into them
_BLOCK = 64  # coordinates looked at together for candidates
_ROOM = _BLOCK * 11  # the most bytes that the exceptions of a block take


@kernel
def put_varint(value: Int, out: NDArray[np.uint8], at: Int) -> Int:
    """Write LEB128; return the position after it."""
    while value >= 128:
        out[at] = np.uint8(value & 127 | 128)
        value >>= 7
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@kernel
def get_varint(data: NDArray[np.uint8], at: Int, end: Int) -> tuple[Int, Int]:
    """Read LEB128 of at most 63 bits; return value and position after it, which is -1 where there is none."""
    value: Int = np.int64(0)
    for shift in range(0, 63, 7):
        if at >= end:
            break
        byte = np.int64(data[at])
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return np.int64(0), np.int64(-1)


@kernel
def get_exception(data: NDArray[np.uint8], at: Int) -> tuple[Int, Int, Int, bool]:
    """Read one exception: (position behind or -1, gap, index q or bits of the coordinate, whether it is the latter)."""
    head, at = get_varint(data, at, data.size)
    raw = head & 1 == 1
    value: Int = np.int64(0)
    if raw and 0 <= at <= data.size - 4:
        for byte in range(4):
            value |= np.int64(data[at + byte]) << (8 * byte)
        at += 4
    elif raw:
        at = np.int64(-1)
    elif at >= 0:
        folded, at = get_varint(data, at, data.size)
        if folded > 0xFFFFFFFF:
            at = np.int64(-1)
        value = (folded >> 1) ^ -(folded & 1)
    return at, head >> 1, value, raw


@kernel
def find_exceptions(
    x: NDArray[np.float32],
    bits: NDArray[np.uint32],
    stream: Stream,
    bucket: int,
    half: int,
    steps: NDArray[np.float32],
    out: NDArray[np.uint8],
    cursor: NDArray[np.int64],
) -> bool:
    """Write the exceptions of x, whose memory `bits` shows as integers, to `out`; False where `out` is full.

    `cursor` = (position in `out`, last exceptional coordinate, next coordinate to look at): call again with more room.
    """
    lowest, highest = -(half // 2), half - half // 2
    shift = 0.5 * (half & 1)
    while cursor[2] < x.size:
        lo = cursor[2]
        # Blocks never straddle buckets, whose size is a multiple of the block's, or everything.
        hi = min(lo + _BLOCK, x.size)
        step = np.float64(steps[lo // bucket])
        limit = np.float32(0.5 * half * step)  # below, no dither leads outside
        found = 0
        for value in x[lo:hi]:
            found += np.abs(value) >= limit
        if found and step > 0.0:
            if out.size - cursor[0] < _ROOM:
                return False
            for i in range(lo, hi):
                if np.abs(x[i]) < limit:
                    continue
                lane = np.float64(lane_at(stream, i))
                q = np.floor(np.float64(x[i]) / step + ((lane + 0.5) / 65536.0 + shift))
                if lowest <= q and q <= highest:
                    continue
                raw = np.abs(q) > 2147483647.0 or (np.abs(q) + 2.0) * step > LARGEST
                at = put_varint((i - cursor[1] - 1) << 1 | np.int64(raw), out, cursor[0])
                if raw:
                    for byte in range(4):
                        out[at + byte] = np.uint8(bits[i] >> (8 * byte))
                    at += 4
                else:
                    index = np.int64(q)
                    at = put_varint((index << 1) ^ (index >> 63), out, at)
                cursor[0] = at
                cursor[1] = i
        cursor[2] = hi
    return True


@kernel
def index_exceptions(
    data: NDArray[np.uint8], n: int, bucket: int, steps: NDArray[np.float32], checkpoints: NDArray[np.int64]
) -> int:
    """Check the exceptions `data` of n coordinates; return their number, or -1 where they are malformed.

    Every `CHECKPOINT`-th one leaves (coordinate of the one before, position) in `checkpoints`.
    """
    count = 0
    coordinate: Int = np.int64(-1)
    at: Int = np.int64(0)
    while at < data.size:
        if count % CHECKPOINT == 0:
            checkpoints[count // CHECKPOINT, 0] = coordinate
            checkpoints[count // CHECKPOINT, 1] = at
        at, gap, value, raw = get_exception(data, at)
        if at < 0 or gap >= n - coordinate - 1:
            return -1
        coordinate += gap + 1
        step = np.float64(steps[coordinate // bucket])
        if step == 0.0:
            return -1
        if raw:
            if value & 0x7F800000 == 0x7F800000:
                return -1
        elif (np.abs(np.float64(value)) + 2.0) * step > LARGEST:
            return -1
        count += 1
    return count


@kernel
def visit_exceptions(
    data: NDArray[np.uint8],
    at: Int,
    last: Int,
    lo: int,
    into: NDArray[np.float32],
    kept: NDArray[np.float32],
    kept_bits: NDArray[np.uint32],
    apply: bool,
    weight: np.float32,
    half: int,
    steps: NDArray[np.float32],
    bucket: int,
    stream: Stream,
) -> None:
    """Save the exceptional coordinates of the span `lo ..` in `kept`, or (`apply`) put back what they should be.

    So the kernel that adds all others in between needs no branch. Reading begins at position `at`, behind coordinate
    `last`; `kept[0]` and `kept_bits[0]` are the same memory, used as a scratch word.
    """
    shift = 0.5 * (half & 1)
    found = 1
    while at < data.size:
        at, gap, value, raw = get_exception(data, at)
        last += gap + 1
        if last >= lo + into.size:
            break
        if last < lo:
            continue
        if apply:
            step = np.float64(steps[last // bucket])
            u = (np.float64(lane_at(stream, last)) + 0.5) / 65536.0 - 0.5
            kept[0] = np.float32((np.float64(value) - shift - u) * step)
            if raw:
                kept_bits[0] = np.uint32(value)
            into[last - lo] = kept[found] + weight * kept[0]
        else:
            kept[found] = into[last - lo]
        found += 1
