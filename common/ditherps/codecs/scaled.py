"""`scaled`: an unbiased codec made contractive, so that error feedback converges with it.

With E[C(x)] = x and E||C(x) - x||^2 = omega ||x||^2, the vector C(x) / (1 + omega) is nearer to x in the mean than any
other multiple of C(x): E||C(x) / (1 + omega) - x||^2 = omega / (1 + omega) ||x||^2 (Beznosikov, Horvath, Richtarik,
Safaryan, "On biased compression for distributed learning", arXiv 2002.12410). It is biased towards zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import BadInput, Context, Encoded, Span
from ditherps.codecs.omega import relative_error
from ditherps.codecs.wrapper import Nested, WrapperCodec, WrapperOptions
from ditherps.dither import Address
from ditherps.errors import OptionError, PayloadError, Reason


class ScaledCodec(WrapperCodec):
    """Header, the factor 1 / (1 + omega) as float32, the inner payload.

    omega is the squared error that the inner codec expects for this very vector, over its energy; where the codec does
    not know it, the error that decoding makes.
    """

    name = "scaled"
    tag = 16
    Options = WrapperOptions
    contractive = True
    own_nbytes = 4

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.inner.unbiased:
            raise OptionError("scaled.inner", self.options.inner, "an unbiased codec: scaling makes only these better")
        self.unbiased = False

    def expected_squared_error(self, encoded: Encoded) -> float:
        """factor * E, E the inner codec's: f^2 E + (1 - f)^2 ||x||^2 with f = 1 / (1 + E / ||x||^2)."""
        nested = self._index(encoded)
        return _factor(nested) * self.inner.expected_squared_error(nested.payload)

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        inner = self.inner._encode(x, address, context)
        factor = np.float32(1.0 / (1.0 + relative_error(self.inner, x, inner, address, context)))
        if not factor > 0:
            raise BadInput(0, x.size, f"too far from what {self.inner!r} makes of it")
        return self._wrapped(factor.tobytes(), inner, context)

    def _index(self, encoded: Encoded) -> Nested:
        nested = super()._index(encoded)
        if not 0 < _factor(nested) <= 1:
            raise PayloadError(f"payload has the factor {_factor(nested)}, not one in (0, 1]", Reason.NON_FINITE)
        return nested

    def _accumulate(
        self,
        encoded: Encoded,
        index: Nested,
        address: Address,
        into: NDArray[np.float32],
        weight: np.float32,
        span: Span,
        side: NDArray[np.float32] | None,
    ) -> int:
        scaled = weight * np.float32(_factor(index))
        return self.inner._accumulate(index.payload, index.index, address, into, scaled, span, None)


def _factor(nested: Nested) -> float:
    return float(nested.own.view(np.float32)[0])
