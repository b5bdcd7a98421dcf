"""omega: the squared error of an encoded vector over the vector's energy, as a rate of memory needs it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import Codec, Context, Encoded
from ditherps.dither import TILE, Address
from ditherps.kernels import cpu

_MEASURED_COORDINATES = 32 * TILE


def relative_error(
    codec: Codec, x: NDArray[np.float32], encoded: Encoded, address: Address, context: Context | None = None
) -> float:
    """E||C(x) - x||^2 / ||x||^2 over the dither for this very x; where the payload does not say, of the error made.

    Args:
        codec: that encoded it.
        x: the vector, contiguous.
        encoded: C(x), from this very process.
        address: of x[0]'s dither.
        context: it was encoded with.

    Returns:
        0 for a zero vector.
    """
    energy = _energy(x)
    if energy == 0:
        return 0.0
    error = codec.expected_squared_error(encoded)
    return (error if math.isfinite(error) else _made(codec, x, encoded, address, context)) / energy


def _made(codec: Codec, x: NDArray[np.float32], encoded: Encoded, address: Address, context: Context | None) -> float:
    """||x - decoded||^2, chunk by chunk: no temporary of the model's size."""
    index, n = codec._indexed(encoded, context), x.size
    unit = codec.chunk_coordinates * max(1, _MEASURED_COORDINATES // codec.chunk_coordinates)
    rest, total = np.empty(min(unit, n), np.float32), 0.0
    for lo in range(0, n, unit):
        hi = min(lo + unit, n)
        part = rest[: hi - lo]
        part[:] = x[lo:hi]
        codec._accumulate(encoded, index, address, part, np.float32(-1), (lo, hi), None)
        total += _energy(part)
    return total


def _energy(x: NDArray[np.float32]) -> float:
    return float(cpu.sum_of_squares(x, 0, x.size, cpu.workspace().sums))
