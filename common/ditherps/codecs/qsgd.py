"""`qsgd`, `terngrad`, `maxnorm`: stochastic rounding, the schemes that `dqsg` is compared with.

Their index is that of `dqsg`, floor(x / step + u + 1/2), but the dither is not subtracted: the error depends on the
vector, and its variance is d (1 - d) step^2 where d is the distance to the next multiple of the step. Unbiased to the
2^-17 of a step that a 16-bit dither leaves. The coder does not use the dither either, as in the published schemes.
"""

from __future__ import annotations

import math
from concurrent.futures import Executor
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ditherps.codecs.base import Codec, Context, Encoded, Options
from ditherps.codecs.integer import IntegerCodec
from ditherps.codecs.steps import StepOptions
from ditherps.dither import Address
from ditherps.kernels import cpu

Coder = Literal["fixed", "rans"]
_CODER = "fixed (packed, all indices as wide as another), rans (entropy-coded)"


class QsgdOptions(StepOptions):
    """As of any uniform quantizer, but with a zero among the levels."""

    whole = True


class QsgdCodec(IntegerCodec):
    """QSGD (Alistarh et al., NeurIPS 2017): `step=max` or `step=l2` is its norm, `levels` its s."""

    name = "qsgd"
    tag = 5
    Options = QsgdOptions
    subtract = False


class TerngradOptions(Options):
    """One scale for the whole vector, as for a tensor in the paper."""

    clip: float = Field(2.5, ge=0, le=1e6, description="0 (none) to 1e6: rms beyond which values are clipped")
    coder: Coder = Field("fixed", description=_CODER)


class TerngradCodec(IntegerCodec):
    """TernGrad (Wen et al., NeurIPS 2017): -1, 0, 1 times the largest value after clipping. Biased where it clips."""

    name = "terngrad"
    tag = 6
    Options = TerngradOptions
    options: TerngradOptions
    subtract = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.unbiased = self.options.clip == 0

    def _step_rule(self) -> StepOptions:
        return StepOptions(coder=self.options.coder, step="max", levels=1, bucket=0)

    def for_model(self) -> Codec:
        """`qsgd`: three levels are too coarse."""
        return QsgdCodec(coder=self.options.coder, bucket=0).for_model()

    def _encode_on(self, pool: Executor | None, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        if self.options.clip and x.size and cpu.largest_bits(x.view(np.int32), 0, x.size) < cpu.INFINITY_BITS:
            square = cpu.sum_of_squares(x, 0, x.size, cpu.workspace().sums) / x.size
            clipped = np.empty_like(x)
            cpu.clip(x, np.float32(min(self.options.clip * math.sqrt(square), cpu.LARGEST)), clipped)
            x = clipped
        return super()._encode_on(pool, x, address, context)


class MaxnormOptions(Options):
    """The scale is the largest value of the whole vector."""

    bits: int = Field(4, ge=1, le=15, description="1 to 15: of the magnitude; 2^bits - 1 levels on each side of zero")
    coder: Coder = Field("fixed", description=_CODER)


class MaxnormCodec(IntegerCodec):
    """QSGD-MaxNorm (Vineeth S, arXiv 2109.12497, single scale), with every worker's own norm.

    Indices of workers with a common norm can be added: all are multiples of the same step, norm / (2^bits - 1).
    """

    name = "maxnorm"
    tag = 7
    Options = MaxnormOptions
    options: MaxnormOptions
    subtract = False
    summable = True

    def _step_rule(self) -> StepOptions:
        return StepOptions(coder=self.options.coder, step="max", levels=(1 << self.options.bits) - 1, bucket=0)

    def for_model(self) -> Codec:
        """`qsgd`, whose step does not follow from the largest value alone."""
        return QsgdCodec(coder=self.options.coder, bucket=0).for_model()
