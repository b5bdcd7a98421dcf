"""`none`: float32 as it is, the baseline against which everything is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import BadInput, Context, Encoded
from ditherps.codecs.plain import PlainCodec
from ditherps.dither import Address
from ditherps.kernels import cpu


class NoneCodec(PlainCodec):
    """Header, then float32 little-endian values. Lossless for float32 input."""

    name = "none"
    tag = 1
    contractive = True
    summable = True
    item = np.float32

    def expected_squared_error(self, encoded: Encoded) -> float:
        """Nothing is lost."""
        return 0.0

    def _finite(self, values: NDArray[Any]) -> bool:
        return bool(cpu.largest_bits(values.view(np.int32), 0, values.size) < cpu.INFINITY_BITS)

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        if not self._finite(x):
            raise BadInput(0, x.size, "not finite")
        return self._pack(x, context)

    def _add(self, values: NDArray[Any], into: NDArray[np.float32], weight: np.float32) -> None:
        cpu.accumulate_float32(values, into, weight)
