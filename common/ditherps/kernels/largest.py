"""Kernels of `topk`: the k largest magnitudes without sorting, and their places as Rice-coded gaps, chunk by chunk.

Code of a chunk. With last = -1 at its beginning, each place p gives a gap g = p - last - 1: g >> r zero bits, a one
bit, then the low r bits of g; least significant bits first, padded to whole bytes with zeros. Where each of n
coordinates is among the k with the same chance k/n, up to 1/2, the best r costs within 4 % of the entropy H2(k/n) n.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.philox import TILE

CHUNK = 64 * TILE
LARGEST_RICE = 18  # CHUNK = 2^18: from here on all gaps have quotient 0
COUNT_BITS = 24  # of a directory entry's first word; the Rice parameter stands above
SELECT_COUNTS = 4 * 2048
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_BLOCK = 16  # coordinates looked at together


@kernel
def threshold(bits: NDArray[np.uint32], k: Int, counts: NDArray[np.int64]) -> tuple[Int, Int]:
    """The k-th largest (k > 0) of the integers `bits & 0x7fffffff`, and how many of those equal to it belong to k.

    A radix search from the top, 11, 10 and 10 bits; `counts` is scratch. Magnitudes of float32 order as such integers.
    """
    # Neighbours often fall into one bin; four tables keep their increments from waiting for each other.
    counts[:] = 0
    whole = bits.size // 4 * 4
    for i in range(0, whole, 4):
        for table in range(4):
            counts[table * 2048 + np.int64((bits[i + table] & _MAGNITUDE) >> np.uint32(20))] += 1
    for i in range(whole, bits.size):
        counts[np.int64((bits[i] & _MAGNITUDE) >> np.uint32(20))] += 1
    for bin_ in range(2048):
        counts[bin_] += counts[2048 + bin_] + counts[4096 + bin_] + counts[6144 + bin_]
    found, left = _bin(counts, 2047, k)
    for level in range(2):
        low = np.uint32(10 - 10 * level)
        above = low + np.uint32(10)
        prefix = np.uint32(found)
        counts[:1024] = 0
        for lo in range(0, bits.size, _BLOCK):
            part = bits[lo : min(lo + _BLOCK, bits.size)]
            hits = 0
            for i in range(part.size):
                hits += (part[i] & _MAGNITUDE) >> above == prefix
            if hits:
                for i in range(part.size):
                    word = part[i] & _MAGNITUDE
                    if word >> above == prefix:
                        counts[np.int64((word >> low) & np.uint32(1023))] += 1
        place, left = _bin(counts, 1023, left)
        found = found << 10 | place
    return found, left


@kernel
def _bin(counts: NDArray[np.int64], highest: int, k: Int) -> tuple[Int, Int]:
    """The bin that holds the k-th entry, counted from `highest` down, and which of that bin it is."""
    place: Int = np.int64(highest)
    while counts[place] < k:
        k -= counts[place]
        place -= 1
    return place, k


@kernel
def gather_largest(
    bits: NDArray[np.uint32],
    least: Int,
    ties: Int,
    places: NDArray[np.uint32],
    values: NDArray[np.uint32],
    counts: NDArray[np.uint32],
) -> None:
    """Of float32 memory `bits`, all magnitudes above `least` and the first `ties` equal to it, in order.

    Their memory goes to `values`, their places in their chunk to `places`, and how many each chunk has to `counts`.
    """
    limit = np.uint32(least)
    found: Int = np.int64(0)
    for chunk in range(0, bits.size, CHUNK):
        before = found
        end = min(chunk + CHUNK, bits.size)
        for lo in range(chunk, end, _BLOCK):
            part = bits[lo : min(lo + _BLOCK, end)]
            hits = 0
            for i in range(part.size):
                hits += part[i] & _MAGNITUDE >= limit
            if hits:
                for i in range(part.size):
                    word = part[i] & _MAGNITUDE
                    if word < limit or (word == limit and ties == 0):
                        continue
                    ties -= word == limit
                    values[found] = part[i]
                    places[found] = np.uint32(lo + i - chunk)
                    found += 1
        counts[chunk // CHUNK] = np.uint32(found - before)


@kernel
def round_to_bf16(values: NDArray[np.uint32], out: NDArray[np.uint16]) -> None:
    """float32 memory to the nearest bfloat16, ties to even."""
    for i in range(out.size):
        word = values[i]
        odd = (word >> np.uint32(16)) & np.uint32(1)
        out[i] = np.uint16((word + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@kernel
def rice_bits(places: NDArray[np.uint32], lo: Int, hi: Int, rice: int) -> Int:
    """Bits of the code of the ascending `places[lo:hi]` of one chunk with Rice parameter `rice`."""
    if lo == hi:
        return np.int64(0)
    shift = np.uint32(rice)
    total = np.int64(places[lo] >> shift)
    left, right = places[lo : hi - 1], places[lo + 1 : hi]
    for i in range(left.size):
        total += np.int64((right[i] - left[i] - np.uint32(1)) >> shift)
    return total + (hi - lo) * (rice + 1)


@kernel
def encode_places(places: NDArray[np.uint32], directory: NDArray[np.uint32], out: NDArray[np.uint8]) -> Int:
    """Code the places of all chunks to `out`; return the bytes written.

    `directory` has two words a chunk: the count, which the parameter of the fewest bits (the lowest of such) joins, and
    the bytes of the code, which are filled in.
    """
    at: Int = np.int64(0)
    lo: Int = np.int64(0)
    for chunk in range(directory.size // 2):
        count = np.int64(directory[2 * chunk])
        hi = lo + count
        best, fewest = 0, rice_bits(places, lo, hi, 0)
        for rice in range(1, LARGEST_RICE + 1):
            total = rice_bits(places, lo, hi, rice)
            if total >= fewest:
                break  # the sum of g >> r is convex in r: it only grows from here
            best, fewest = rice, total
        before = at
        at = _put_gaps(places, lo, hi, best, out, at)
        directory[2 * chunk] = np.uint32(count | best << COUNT_BITS)
        directory[2 * chunk + 1] = np.uint32(at - before)
        lo = hi
    return at


@kernel
def _put_gaps(places: NDArray[np.uint32], lo: Int, hi: Int, rice: Int, out: NDArray[np.uint8], at: Int) -> Int:
    """Write the code of `places[lo:hi]`; return the position behind."""
    held: Int = np.int64(0)  # bits that are not written yet, fewer than 8
    filled: Int = np.int64(0)
    last: Int = np.int64(-1)
    for i in range(lo, hi):
        gap = np.int64(places[i]) - last - 1
        last = np.int64(places[i])
        zeros = filled + (gap >> rice)
        while zeros >= 8:
            out[at] = np.uint8(held)
            held = np.int64(0)
            zeros -= 8
            at += 1
        held |= (1 | (gap & ((1 << rice) - 1)) << 1) << zeros
        filled = zeros + 1 + rice
        while filled >= 8:
            out[at] = np.uint8(held & 0xFF)
            held >>= 8
            filled -= 8
            at += 1
    if filled:
        out[at] = np.uint8(held)
        at += 1
    return at


@kernel
def get_gap(data: NDArray[np.uint8], bit: Int, end: Int, rice: Int) -> tuple[Int, Int]:
    """Read the gap at bit `bit` of `data`: (the bit behind it, or -1 where it does not end before bit `end`, gap)."""
    gap: Int = np.int64(0)
    while True:
        if bit >= end:
            return np.int64(-1), gap
        rest = np.int64(data[bit >> 3]) >> (bit & 7)
        if rest == 0:
            zeros = 8 - (bit & 7)
            gap += zeros
            bit += zeros
            continue
        while rest & 1 == 0:
            rest >>= 1
            gap += 1
            bit += 1
        break
    bit += 1
    if bit + rice > end:
        return np.int64(-1), gap
    gap <<= rice
    done: Int = np.int64(0)
    while done < rice:
        width = min(8 - (bit & 7), rice - done)
        gap |= ((np.int64(data[bit >> 3]) >> (bit & 7)) & ((1 << width) - 1)) << done
        done += width
        bit += width
    return bit, gap


@kernel
def places_are_right(data: NDArray[np.uint8], at: Int, size: Int, count: Int, rice: Int, length: Int) -> bool:
    """Whether `data[at : at + size]` is the code of exactly `count` places below `length`."""
    bit, end = 8 * at, 8 * (at + size)
    place: Int = np.int64(-1)
    for _ in range(count):
        bit, gap = get_gap(data, bit, end, rice)
        place += gap + 1
        if bit < 0 or place >= length:
            return False
    return bool(end - bit < 8)


@kernel
def _add_chunk(
    data: NDArray[np.uint8],
    at: Int,
    size: Int,
    count: Int,
    rice: Int,
    values: NDArray[np.float32],
    first: Int,
    into: NDArray[np.float32],
    lo: Int,
    weight: np.float32,
) -> None:
    """into[lo + place] += weight * value for the `count` places of a chunk's code, values from `first` on."""
    bit, end = 8 * at, 8 * (at + size)
    place = lo - 1
    for i in range(count):
        bit, gap = get_gap(data, bit, end, rice)
        place += gap + 1
        into[place] += weight * values[first + i]


@kernel
def add_largest(
    directory: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    codes: NDArray[np.uint8],
    values: NDArray[np.float32],
    halves: NDArray[np.uint16],
    lo: Int,
    into: NDArray[np.float32],
    weight: np.float32,
    scratch: NDArray[np.float32],
    scratch_bits: NDArray[np.uint32],
) -> None:
    """into += weight * values at their places, coordinates `lo ..` (a multiple of CHUNK).

    `offsets[c]` = (values, bytes of code) before chunk c. Where `values` is empty, `halves` holds them as bfloat16, and
    `scratch`, whose memory is `scratch_bits`, has room for those of a chunk.
    """
    for begin in range(0, into.size, CHUNK):
        chunk = (lo + begin) // CHUNK
        count = np.int64(directory[2 * chunk] & np.uint32((1 << COUNT_BITS) - 1))
        rice = np.int64(directory[2 * chunk] >> np.uint32(COUNT_BITS))
        size = np.int64(directory[2 * chunk + 1])
        first, at = offsets[chunk, 0], offsets[chunk, 1]
        if values.size:
            _add_chunk(codes, at, size, count, rice, values, first, into, begin, weight)
        else:
            for i in range(count):
                scratch_bits[i] = np.uint32(halves[first + i]) << np.uint32(16)
            _add_chunk(codes, at, size, count, rice, scratch, np.int64(0), into, begin, weight)
