"""`randk`: k coordinates of each sender's own random choice, scaled so that decoding is unbiased (Rand-K).

The error is n/k - 1 times the vector's square (99 at 1 %): it is what one compares with, not what one wants. With error
feedback, scale by k/n first.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from ditherps.codecs.base import Options
from ditherps.codecs.strata import StrataCodec, share


class RandkOptions(Options):
    """How many coordinates travel, and in what type."""

    fraction: float = Field(0.01, gt=0, le=1, description="above 0, up to 1: k = max(1, ceil(fraction * n))")
    values: Literal["float32", "bf16"] = Field("float32", description="float32, bf16 (rounded at random, unbiased)")


class RandkCodec(StrataCodec):
    """Header, then k values in the order of coordinates."""

    name = "randk"
    tag = 11
    shared = False
    Options = RandkOptions
    options: RandkOptions

    def _resolve(self) -> None:
        self.item = np.uint16 if self.options.values == "bf16" else np.float32

    def chosen(self, coordinates: int) -> int:
        """max(1, ceil(fraction * n)); 0 of none."""
        return share(self.options.fraction, coordinates)
