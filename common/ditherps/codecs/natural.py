"""`natural`: natural compression, every value rounded at random to a power of two (Horvath et al., arXiv 1905.10988).

Unbiased, to the 2^-17 of the gap between two powers that a 16-bit dither leaves; nine bits a coordinate. The expected
squared error is at most 1/8 of the vector's square, and .0818 of it on a Gaussian.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import HEADER, BadInput, Bytes, Codec, Context, Encoded, Span
from ditherps.codecs.plain import NoOptions
from ditherps.dither import Address
from ditherps.errors import PayloadError, Reason
from ditherps.kernels import cpu, natural


class NaturalCodec(Codec):
    """Header, then tile by tile an exponent byte for each coordinate and the packed signs. Zeros stay zero."""

    name = "natural"
    tag = 13
    contractive = True  # but for denormals, whose error is below 2^-126
    Options = NoOptions

    def max_nbytes(self, coordinates: int) -> int:
        """Exactly what it takes."""
        return HEADER.size + coordinates + -(-coordinates // 8)

    def expected_squared_error(self, encoded: Encoded) -> float:
        """NaN: the error depends on mantissas, which the payload does not hold."""
        return math.nan

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        if cpu.largest_bits(x.view(np.int32), 0, x.size) > natural.LARGEST_BITS:
            raise BadInput(0, x.size, "beyond 2^127: the next power of two is beyond the range of float32")
        data = np.empty(self.max_nbytes(x.size), np.uint8)
        natural.encode_natural(x, x.view(np.uint32), address.stream(x.size), data[HEADER.size :], cpu.workspace())
        return self._finished(data, x.size, context)

    def _index(self, encoded: Encoded) -> Bytes:
        expected = self.max_nbytes(encoded.coordinates)
        if encoded.nbytes != expected or encoded.header.tail_bytes:
            raise PayloadError(f"payload has {encoded.nbytes} bytes, expected {expected}", Reason.SIZE)
        tiles = encoded.data[HEADER.size :]
        if natural.largest_exponent(tiles, encoded.coordinates) == 255:
            raise PayloadError("payload holds NaN or infinity", Reason.NON_FINITE)
        return tiles

    def _accumulate(
        self,
        encoded: Encoded,
        index: Any,
        address: Address,
        into: NDArray[np.float32],
        weight: np.float32,
        span: Span,
        side: NDArray[np.float32] | None,
    ) -> int:
        natural.accumulate_natural(index, span[0], into, weight, cpu.workspace())
        return 0
