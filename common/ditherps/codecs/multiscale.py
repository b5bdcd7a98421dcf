"""`maxnorm-multiscale`: two grids under one alphabet (Vineeth S, arXiv 2109.12497), made unbiased.

Each coordinate is rounded at random to a multiple of norm / s, s = 2^low - 1 or 2^high - 1, norm = max|x|. The finer
grid is taken where ceil(s_high |x| / norm) <= s_low, so that both neighbours fit into the alphabet of the coarse one.
The published code decides after rounding (the rounded index <= s_low), which biases the boundary bin. Unbiased to the
2^-17 of a step that a 16-bit dither leaves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ditherps.codecs.base import HEADER, BadInput, Bytes, Codec, Context, Encoded, Options, Span
from ditherps.codecs.qsgd import QsgdCodec
from ditherps.dither import TILE, Address
from ditherps.errors import OptionError, PayloadError, Reason
from ditherps.kernels import cpu, multiscale
from ditherps.kernels.alphabets import alphabet


class MultiscaleOptions(Options):
    """Bits of magnitude of the two grids; the papers' pairs are (2, 6), (4, 8), (6, 10), (8, 12)."""

    low: int = Field(2, ge=1, le=14, description="1 to 14, below high: bits of magnitude that travel")
    high: int = Field(6, ge=2, le=15, description="2 to 15, above low: bits of the finer grid")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise OptionError("maxnorm-multiscale.high", self.high, f"above low = {self.low}, up to 15")
        return self


class Index(NamedTuple):
    """The sections of a checked payload."""

    norm: np.float64
    tiles: Bytes


class MultiscaleCodec(Codec):
    """Header, the float32 norm, then tile by tile packed digits and a scale bit for each coordinate.

    Summable as indices: where norm and scale bit of a coordinate agree between workers, its indices add. The norm is
    the worker's own.
    """

    name = "maxnorm-multiscale"
    tag = 8
    summable = True
    Options = MultiscaleOptions
    options: MultiscaleOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._coarse = (1 << self.options.low) - 1
        self._fine = (1 << self.options.high) - 1
        self._form = alphabet(2 * self._coarse + 1)

    def for_model(self) -> Codec:
        """`qsgd`, whose step does not follow from the largest value alone."""
        return QsgdCodec(bucket=0).for_model()

    def max_nbytes(self, coordinates: int) -> int:
        """Exactly what a vector takes that is not all zero."""
        whole, rest = divmod(coordinates, TILE)
        tile, last = (int(multiscale.multiscale_nbytes(self._form, count)) for count in (TILE, rest))
        return HEADER.size + 4 + whole * tile + last

    def expected_squared_error(self, encoded: Encoded) -> float:
        """NaN: the variance of stochastic rounding depends on values that the payload does not hold."""
        return math.nan

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        largest = np.int32(cpu.largest_bits(x.view(np.int32), 0, x.size))
        if largest >= cpu.INFINITY_BITS:
            raise BadInput(0, x.size, "not finite")
        norm = largest.view(np.float32)
        data = np.empty(self.max_nbytes(x.size) if largest else HEADER.size + 4, np.uint8)
        data[HEADER.size : HEADER.size + 4].view(np.float32)[0] = norm
        if largest:
            multiscale.encode_multiscale(
                x,
                np.float64(norm),
                self._coarse,
                self._fine,
                self._form,
                address.stream(x.size),
                data[HEADER.size + 4 :],
                cpu.workspace(),
            )
        return self._finished(data, x.size, context)

    def _index(self, encoded: Encoded) -> Index:
        begin = HEADER.size + 4
        if encoded.nbytes < begin or encoded.header.tail_bytes:
            raise PayloadError(f"payload of {encoded.nbytes} bytes has no room for its norm", Reason.SIZE)
        norm = encoded.data[HEADER.size : begin].view(np.float32)[0]
        if not np.isfinite(norm) or np.signbit(norm):
            raise PayloadError("payload holds a norm that is negative or not finite", Reason.NON_FINITE)
        expected = self.max_nbytes(encoded.coordinates) if norm else begin
        if encoded.nbytes != expected:
            raise PayloadError(f"payload has {encoded.nbytes} bytes, its norm announces {expected}", Reason.SIZE)
        return Index(np.float64(norm), encoded.data[begin:])

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
        if index.norm:
            multiscale.accumulate_multiscale(
                index.tiles,
                index.norm,
                self._coarse,
                self._fine,
                self._form,
                span[0],
                into,
                weight,
                cpu.workspace(),
            )
        return 0
