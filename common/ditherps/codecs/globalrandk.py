"""`globalrandk`: K coordinates that all workers of a round choose alike, quantized by their max norm (Vineeth S, arXiv
2109.12497, GlobalRandK-MaxNorm), done right: the other coordinates decode to zero, and n/K scales these.

The published code leaves each worker's own values in the coordinates that do not travel; its figures are those of
local SGD. Here the error of one message is n/K - 1 of the vector's square, and n/K times the quantizer's. Stochastic
rounding is unbiased to the 2^-17 of a step that a 16-bit dither leaves.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ditherps.codecs.base import Options
from ditherps.codecs.strata import StrataCodec, share
from ditherps.errors import OptionError


class GlobalRandkOptions(Options):
    """How many coordinates travel, and in how many bits."""

    coordinates: int | None = Field(
        None, ge=1, le=1 << 35, description="1 to 2^35 (10000, where fraction is not given)"
    )
    fraction: float | None = Field(None, gt=0, le=1, description="above 0, up to 1: K = max(1, ceil(fraction * n))")
    bits: int = Field(8, ge=0, le=15, description="1 to 15 bits of magnitude (and a sign), or 0 for float32 values")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        """Fill in the default, so that a dump is complete."""
        if self.coordinates is not None and self.fraction is not None:
            raise OptionError("globalrandk.fraction", self.fraction, "nothing where coordinates is given")
        if self.coordinates is None and self.fraction is None:
            self.__dict__["coordinates"] = 10000  # the model is frozen for everyone else
        return self


class GlobalRandkCodec(StrataCodec):
    """Header, then K float32 values, or a float32 norm and K packed digits, in the order of coordinates.

    Summable: all workers of a round send the same coordinates; float32 values add, and indices do where norms are
    equal. The norm is the largest magnitude among the worker's own chosen values.
    """

    name = "globalrandk"
    tag = 12
    shared = True
    summable = True
    Options = GlobalRandkOptions
    options: GlobalRandkOptions

    def _resolve(self) -> None:
        self.levels = (1 << self.options.bits) - 1

    def chosen(self, coordinates: int) -> int:
        """K, or all where there are fewer."""
        if self.options.fraction is not None:
            return share(self.options.fraction, coordinates)
        assert self.options.coordinates is not None  # filled in by the model
        return min(coordinates, self.options.coordinates)
