"""CRC-32 (zlib's) of fine indices, for nested coding."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, kernel


def _tables() -> NDArray[np.uint32]:
    """Slicing-by-8 tables: row s holds the CRC register after a byte and s zero bytes more."""
    tables = np.empty((8, 256), np.uint32)
    for byte in range(256):
        # zlib inverts the register before and after; undo both to get the bare table.
        tables[0, byte] = zlib.crc32(bytes([byte]), 0xFFFFFFFF) ^ 0xFFFFFFFF
    for row in range(1, 8):
        tables[row] = (tables[row - 1] >> np.uint32(8)) ^ tables[0][tables[row - 1] & 0xFF]
    return tables


CRC_TABLES = _tables()


@kernel
def crc32_int16(values: NDArray[np.int64], count: Int, tables: NDArray[np.uint32]) -> Int:
    """`zlib.crc32` of the low 16 bits of `values[:count]`, little-endian; four values a step."""
    register = np.uint64(0xFFFFFFFF)
    byte = np.uint64(0xFF)
    whole = count // 4 * 4
    for i in range(0, whole, 4):
        low = register ^ np.uint64((values[i] & 0xFFFF) | ((values[i + 1] & 0xFFFF) << 16))
        high = np.uint64((values[i + 2] & 0xFFFF) | ((values[i + 3] & 0xFFFF) << 16))
        register = np.uint64(
            tables[7, low & byte]
            ^ tables[6, (low >> np.uint64(8)) & byte]
            ^ tables[5, (low >> np.uint64(16)) & byte]
            ^ tables[4, (low >> np.uint64(24)) & byte]
            ^ tables[3, high & byte]
            ^ tables[2, (high >> np.uint64(8)) & byte]
            ^ tables[1, (high >> np.uint64(16)) & byte]
            ^ tables[0, (high >> np.uint64(24)) & byte]
        )
    for i in range(whole, count):
        for shift in (np.uint64(0), np.uint64(8)):
            register = (register >> np.uint64(8)) ^ np.uint64(
                tables[0, (register ^ (np.uint64(values[i]) >> shift)) & byte]
            )
    return np.int64(register ^ np.uint64(0xFFFFFFFF))
