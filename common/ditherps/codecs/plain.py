"""What the unquantized codecs share: one section, the values."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import HEADER, Codec, Context, Encoded, Options, Span
from ditherps.dither import Address
from ditherps.errors import PayloadError, Reason


class NoOptions(Options):
    """A codec without options."""


class PlainCodec(Codec):
    """Header, then one value a coordinate."""

    Options = NoOptions
    item: ClassVar[type[np.float32] | type[np.uint16]]

    @abstractmethod
    def _finite(self, values: NDArray[Any]) -> bool:
        """Whether all values are finite."""

    def max_nbytes(self, coordinates: int) -> int:
        """Exactly what it takes."""
        return HEADER.size + np.dtype(self.item).itemsize * coordinates

    def expected_squared_error(self, encoded: Encoded) -> float:
        """NaN: the rounding error depends on values that the payload does not hold."""
        return math.nan

    def _pack(self, values: NDArray[Any], context: Context) -> Encoded:
        data = np.empty(self.max_nbytes(values.size), np.uint8)
        data[HEADER.size :].view(self.item)[:] = values
        return self._finished(data, values.size, context)

    def _index(self, encoded: Encoded) -> NDArray[Any]:
        expected = self.max_nbytes(encoded.coordinates)
        if encoded.nbytes != expected or encoded.header.tail_bytes:
            raise PayloadError(f"payload has {encoded.nbytes} bytes, expected {expected}", Reason.SIZE)
        values = encoded.data[HEADER.size :].view(self.item)
        if not self._finite(values):
            raise PayloadError("payload holds NaN or infinity", Reason.NON_FINITE)
        return values

    @abstractmethod
    def _add(self, values: NDArray[Any], into: NDArray[np.float32], weight: np.float32) -> None:
        """into += weight * values."""

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
        self._add(index[span[0] : span[1]], into, weight)
        return 0
