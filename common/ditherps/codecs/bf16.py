"""`bf16`: float32 rounded to nearest even to its upper 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditherps.codecs.base import BadInput, Context, Encoded
from ditherps.codecs.plain import PlainCodec
from ditherps.dither import Address
from ditherps.kernels import cpu


class Bf16Codec(PlainCodec):
    """Header, then bfloat16 little-endian values. Deterministic rounding, so not unbiased."""

    name = "bf16"
    tag = 2
    unbiased = False
    contractive = True
    item = np.uint16

    def _finite(self, values: NDArray[Any]) -> bool:
        return bool(cpu.largest_bf16_bits(values) < cpu.BF16_INFINITY_BITS)

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        rounded = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        if not self._finite(rounded):
            raise BadInput(0, x.size, "beyond the range of bfloat16")
        return self._pack(rounded, context)

    def _add(self, values: NDArray[Any], into: NDArray[np.float32], weight: np.float32) -> None:
        cpu.accumulate_bf16(values, into, weight, cpu.workspace())
