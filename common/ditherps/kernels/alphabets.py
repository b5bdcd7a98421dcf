"""Packing of alphabets of any size up to 65535 in nearly their bits: beyond 256 symbols, digits go in two parts.

The low byte of each digit is packed as base 256 (a byte each), the rest in base ceil(k / 256), behind it; so 511
symbols take 9.00 bits and not 16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.packing import Packing, pack, packed_nbytes, packing, unpack


class Alphabet(NamedTuple):
    """How digits below `base` are packed: `low` and `high` are packings as kernels take them; `high` may be none."""

    base: int
    low: tuple[int, int, int]
    high: tuple[int, int, int]

    def nbytes(self, count: int) -> int:
        """Bytes that `count` digits take."""
        return Packing(*self.low).nbytes(count) + (Packing(*self.high).nbytes(count) if self.high[0] else 0)


def alphabet(base: int) -> Alphabet:
    """The packing of digits below `base` (2 .. 65535)."""
    if base <= 256:
        return Alphabet(base, (*packing(base),), (0, 1, 8))
    return Alphabet(base, (*packing(256),), (*packing(-(-base // 256)),))


@kernel
def digits_nbytes(form: Alphabet, count: Int) -> Int:
    """`Alphabet.nbytes` for kernels."""
    size = packed_nbytes(form.low, count)
    if form.high[0]:
        size += packed_nbytes(form.high, count)
    return size


@kernel
def pack_digits(
    form: Alphabet,
    digits: NDArray[np.uint16],
    count: Int,
    spare: NDArray[np.uint16],
    fields: NDArray[np.uint16],
    wide: NDArray[np.uint64],
    out: NDArray[np.uint8],
    at: Int,
) -> None:
    """Pack `digits[:count]`, which are overwritten, to `out[at:]`; `spare` is a second buffer like `digits`."""
    if form.high[0]:
        for i in range(count):
            spare[i] = digits[i] >> 8
            digits[i] &= 0xFF
        pack(form.high, spare, count, fields, wide, out, at + packed_nbytes(form.low, count))
    pack(form.low, digits, count, fields, wide, out, at)


@kernel
def unpack_digits(
    form: Alphabet,
    data: NDArray[np.uint8],
    at: Int,
    count: Int,
    spare: NDArray[np.uint16],
    fields: NDArray[np.uint16],
    wide: NDArray[np.uint64],
    digits: NDArray[np.uint16],
) -> None:
    """Unpack `count` digits from `data[at:]` to `digits[:count]`; one beyond the alphabet counts as its last symbol."""
    unpack(form.low, data, at, count, fields, wide, digits)
    if form.high[0]:
        unpack(form.high, data, at + packed_nbytes(form.low, count), count, fields, wide, spare)
        last = np.uint16(form.base - 1)
        for i in range(count):
            digit = np.uint16(digits[i] | (spare[i] << 8))
            digits[i] = digit if digit < last else last
