"""`signsgd`: one sign a coordinate and the mean magnitude of a bucket.

Signs after Bernstein et al. (arXiv 1802.04434), scaled as by Karimireddy et al. (arXiv 1901.09847). Deterministic and
biased: sign(x) * ||x||_1 / d loses ||x||^2 - ||x||_1^2 / d, which is 1 - 2/pi of ||x||^2 on a Gaussian. It wants error
feedback.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ditherps.codecs.base import HEADER, BadInput, Bytes, Codec, Context, Encoded, Options, Span
from ditherps.dither import TILE, Address
from ditherps.errors import OptionError, PayloadError, Reason
from ditherps.kernels import cpu, signs

_BUCKETS = "0 (the whole vector), a power of two from 64 to 2048, or a multiple of 4096 below 2^35"


class SignOptions(Options):
    """How many values share a scale."""

    bucket: int = Field(0, ge=0, description=_BUCKETS)

    @field_validator("bucket")
    @classmethod
    def _aligned(cls, bucket: int) -> int:
        if (bucket % TILE or bucket >= 1 << 35) and bucket not in (64, 128, 256, 512, 1024, 2048):
            raise OptionError("signsgd.bucket", bucket, _BUCKETS)
        return bucket


class Index(NamedTuple):
    """The sections of a checked payload."""

    scales: NDArray[np.float32]
    tiles: Bytes


class SignsgdCodec(Codec):
    """Header, a float32 scale for each bucket, packed signs tile by tile.

    A coordinate that is exactly zero (of either sign) counts as positive: it becomes +scale. A bucket of zeros has
    scale 0 and decodes to zeros.
    """

    name = "signsgd"
    tag = 9
    unbiased = False
    contractive = True
    Options = SignOptions
    options: SignOptions

    def _bucket(self, coordinates: int) -> int:
        return self.options.bucket or max(coordinates, 1)

    def _tiles_at(self, coordinates: int) -> int:
        return HEADER.size + 4 * -(-coordinates // self._bucket(coordinates))

    def max_nbytes(self, coordinates: int) -> int:
        """Exactly what it takes: it follows from the number of coordinates alone."""
        return self._tiles_at(coordinates) + -(-coordinates // 8)

    def expected_squared_error(self, encoded: Encoded) -> float:
        """NaN: the error depends on the norm, which the payload does not hold."""
        return math.nan

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        data = np.empty(self.max_nbytes(x.size), np.uint8)
        begin, bucket = self._tiles_at(x.size), self._bucket(x.size)
        scales = data[HEADER.size : begin].view(np.float32)
        bad = signs.encode_signs(x, x.view(np.int32), bucket, scales, data[begin:], cpu.workspace())
        if bad < 0:
            raise BadInput(-1 - int(bad), -1 - int(bad) + bucket, "not finite")
        return self._finished(data, x.size, context)

    def _index(self, encoded: Encoded) -> Index:
        expected = self.max_nbytes(encoded.coordinates)
        if encoded.nbytes != expected or encoded.header.tail_bytes:
            raise PayloadError(f"payload has {encoded.nbytes} bytes, expected {expected}", Reason.SIZE)
        begin = self._tiles_at(encoded.coordinates)
        scales = encoded.data[HEADER.size : begin].view(np.float32)
        # As integers, negative and not finite numbers lie beyond all others.
        if scales.size and int(scales.view(np.uint32).max()) >= cpu.INFINITY_BITS:
            raise PayloadError("payload holds a scale that is negative or not finite", Reason.NON_FINITE)
        return Index(scales, encoded.data[begin:])

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
        bucket = self._bucket(encoded.coordinates)
        signs.accumulate_signs(index.tiles, index.scales, bucket, span[0], into, weight, cpu.workspace())
        return 0
