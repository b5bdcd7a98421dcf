"""Packing of base-k digits in whole bytes, tile by tile.

One idea serves every alphabet: a *field* of B bits holds g digits as a binary fraction, F = ceil(v * 2^B / k^g) where v
is the number whose base-k digits they are, first digit most significant. Unpacking is then "multiply by k, the top bits
are the digit, keep the rest", and it yields digits below k whatever the bytes are. A run of n digits has
f = ceil(n / g) fields; field j holds the digits j, j + f, j + 2f, ... (missing ones are 0), so that every loop walks
through consecutive memory.

Fields are laid out so (`Packing.bits`):

* 8: one byte each.
* 7: in eight columns of m = ceil(f / 8) fields; byte c*m + j (c < 7) is field c*m + j in its upper seven bits, and
  bit c of field 7m + j in its lowest.
* 48: six planes of f bytes, the least significant first.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, inlined, kernel


class Packing(NamedTuple):
    """How digits below `base` are packed: `group` of them in a field of `bits` bits."""

    base: int
    group: int
    bits: int

    def nbytes(self, count: int) -> int:
        """Bytes that `count` digits take."""
        fields = -(-count // self.group)
        return -(-fields // 8) * 7 if self.bits == 7 else fields * (self.bits // 8)


# Digits that a tile's buffer must hold: 4096, rounded up to whole fields of any group, and a column's vectors.
DIGITS = 4096 + 128
# Of those, the fields of 48 bits: groups of at least 6.
WIDE_FIELDS = 1024


@functools.cache
def packing(base: int) -> Packing:
    """The packing of digits below `base` (2 .. 256) with the fewest bits a digit; of equals, whole bytes first."""
    candidates = []
    for order, bits in enumerate((8, 7, 48)):
        group = 0
        while base ** (group + 1) <= 1 << bits:
            group += 1
        if group:
            candidates.append((bits / group, order, bits, group))
    _, _, bits, group = min(candidates)
    return Packing(base, group, bits)


@inlined
def packed_nbytes(form: tuple[int, int, int], count: Int) -> Int:
    """`Packing.nbytes` for kernels."""
    fields = (count + form[1] - 1) // form[1]
    return (fields + 7) // 8 * 7 if form[2] == 7 else fields * (form[2] // 8)


@kernel
def pack(
    form: tuple[int, int, int],
    digits: NDArray[np.uint16],
    count: Int,
    fields: NDArray[np.uint16],
    wide: NDArray[np.uint64],
    whole: NDArray[np.uint8],
    at: Int,
) -> None:
    """Pack `digits[:count]` to `whole[at:]`; `digits` is padded with zeros in place.

    Slices, not sums of indices, address columns: numba wraps negative indices, and a sum may be one for all it knows.
    """
    base, group, bits = form
    out = whole[at:]
    f = (count + group - 1) // group
    for i in range(count, f * group):
        digits[i] = 0
    if bits == 48:
        _pack_wide(base, group, digits, f, wide, out)
    else:
        # Whole vectors: what is computed beyond the f fields is never written.
        padded = (f + 63) // 64 * 64
        for j in range(padded):
            fields[j] = digits[j]
        values = base
        for p in range(1, group):
            values *= base
            column = digits[p * f : p * f + padded]
            for j in range(padded):
                fields[j] = np.uint16(fields[j] * np.uint16(base) + column[j])
        if values != 1 << bits:
            # The ceiling, exactly: v * 2^B / k^g is a multiple of 1 / k^g, and single precision errs far less (2^-16).
            scale = np.float32(np.float64(1 << bits) / values)
            up = np.float32(1.0 - 0.5 / values)
            for j in range(padded):
                fields[j] = np.uint16(np.int32(np.float32(fields[j]) * scale + up))
        if bits == 8:
            for j in range(f):
                out[j] = np.uint8(fields[j])
        else:
            m = (f + 7) // 8
            for j in range(f, 8 * m):
                fields[j] = 0
            last = fields[7 * m : 8 * m]
            for c in range(7):
                column, target = fields[c * m : (c + 1) * m], out[c * m : (c + 1) * m]
                for j in range(m):
                    target[j] = np.uint8((column[j] << 1) | ((last[j] >> c) & 1))


@kernel
def _pack_wide(
    base: int, group: int, digits: NDArray[np.uint16], f: Int, wide: NDArray[np.uint64], out: NDArray[np.uint8]
) -> None:
    """`pack` for fields of 48 bits."""
    for j in range(f):
        wide[j] = digits[j]
    values = base
    for p in range(1, group):
        values *= base
        column = digits[p * f : (p + 1) * f]
        for j in range(f):
            wide[j] = wide[j] * np.uint64(base) + np.uint64(column[j])
    scale = 2.0**48 / values
    for j in range(f):
        # Double precision errs by less than 1/8, so this is the ceiling or one less; the remainder F * k^g - v * 2^48,
        # small and so exact modulo 2^64, says which.
        field = np.uint64(np.int64(np.float64(np.int64(wide[j])) * scale + 0.25))
        remainder = field * np.uint64(values) - (wide[j] << np.uint64(48))
        wide[j] = field + (remainder >> np.uint64(63))
    for plane in range(6):
        target = out[plane * f : (plane + 1) * f]
        for j in range(f):
            target[j] = np.uint8(wide[j] >> np.uint64(8 * plane))


@kernel
def unpack(
    form: tuple[int, int, int],
    whole: NDArray[np.uint8],
    at: Int,
    count: Int,
    fields: NDArray[np.uint16],
    wide: NDArray[np.uint64],
    digits: NDArray[np.uint16],
) -> None:
    """Unpack `count` digits from `whole[at:]` to `digits[:count]` (a few beyond are overwritten)."""
    base, group, bits = form
    data = whole[at:]
    f = (count + group - 1) // group
    if bits == 48:
        _unpack_wide(base, group, data, f, wide, digits)
    elif base == 256:
        for j in range(f):
            digits[j] = data[j]
    else:
        # Fields as fractions of 8 bits: those of 7 have a zero below.
        if bits == 8:
            for j in range(f):
                fields[j] = data[j]
        else:
            m = (f + 7) // 8
            last = fields[7 * m : 8 * m]
            for j in range(m):
                last[j] = 0
            for c in range(7):
                source, column = data[c * m : (c + 1) * m], fields[c * m : (c + 1) * m]
                for j in range(m):
                    column[j] = source[j] & 0xFE
                    last[j] |= np.uint16((source[j] & 1) << (c + 1))
        # In whole vectors: what spills beyond a column is overwritten by the next, or lies behind the last.
        padded = (f + 63) // 64 * 64
        for p in range(group):
            column = digits[p * f : p * f + padded]
            for j in range(padded):
                product = np.uint16(np.uint16(fields[j] & 0xFF) * np.uint16(base & 0xFF))
                column[j] = product >> 8
                fields[j] = product & 0xFF


@kernel
def _unpack_wide(
    base: int, group: int, data: NDArray[np.uint8], f: Int, wide: NDArray[np.uint64], digits: NDArray[np.uint16]
) -> None:
    """`unpack` for fields of 48 bits."""
    for j in range(f):
        wide[j] = 0
    for plane in range(6):
        source = data[plane * f : (plane + 1) * f]
        for j in range(f):
            wide[j] |= np.uint64(source[j]) << np.uint64(8 * plane)
    for p in range(group):
        column = digits[p * f : (p + 1) * f]
        for j in range(f):
            product = wide[j] * np.uint64(base)
            column[j] = np.uint16(product >> np.uint64(48))
            wide[j] = product & np.uint64(0xFFFFFFFFFFFF)
