"""`ndqsg`: nested dithered quantization (Abdi and Fekri, arXiv 1904.01197, NDQSG).

The fine index travels modulo `ratio`; the server finds the rest from a vector nearby. With alpha = 1 decoding equals
`dqsg` of the same fine step bit for bit wherever |x - y| < step * (ratio - 1) / 2. Beyond, a coordinate stays within
half a coarse step (ratio * step / 2) of the side information y; the CRC-32 of each tile's fine indices tells.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ditherps.codecs.base import Codec, Role
from ditherps.codecs.coded import CodedLayout
from ditherps.codecs.dqsg import DqsgCodec
from ditherps.codecs.fixed import FixedLayout
from ditherps.codecs.integer import IntegerCodec
from ditherps.codecs.steps import StepOptions
from ditherps.errors import OptionError


class NdqsgOptions(StepOptions):
    """Seven fine levels sent modulo three; one step for the whole vector, which nested coding needs (measured).

    `coder` is that of the sources: nested indices are almost uniform, and packing them loses next to nothing.
    """

    default_levels = 3.0
    default_bucket = 0

    ratio: int = Field(3, ge=2, le=256, description="2 to 256: the coarse step is ratio fine steps")
    alpha: float = Field(1.0, gt=0, le=1, description="above 0, at most 1; below 1 biases towards the side information")
    side: Literal["sources", "running"] = Field(
        "sources", description="sources (aggregate of all sources), running (mean of all decoded so far)"
    )
    side_fraction: float = Field(0.5, gt=0, lt=1, description="between 0 and 1: share of workers that are sources")

    @model_validator(mode="after")
    def _no_bits(self) -> Self:
        if self.bits is not None:
            raise OptionError("bits", self.bits, "nothing with ndqsg, whose nested indices take log2(ratio) bits")
        return self


class NdqsgCodec(IntegerCodec):
    """Header, steps, then tile by tile the packed residues and the CRC-32 of the fine indices."""

    name = "ndqsg"
    tag = 4
    Options = NdqsgOptions
    options: NdqsgOptions
    needs_side_information = True
    roles = (Role.SOURCE, Role.NESTED)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.unbiased = self.options.alpha == 1.0  # wherever decoding succeeds

    def _chosen_layout(self) -> FixedLayout | CodedLayout:
        rule = self._rule
        if rule.levels is None:  # sources are entropy-coded and need none; nested indices only take its parity
            rule = rule.model_copy(update={"levels": NdqsgOptions.default_levels})
        return FixedLayout(rule, subtract=True, alpha=self.options.alpha, ratio=self.options.ratio)

    def format_options(self) -> dict[str, Any]:
        """Without what only the server's round policy reads."""
        return self.options.model_dump(exclude={"side", "side_fraction"})

    def for_role(self, role: Role) -> Codec:
        """Sources send dqsg with the same levels, step rule and buckets."""
        if role is Role.SOURCE:
            return DqsgCodec(**self.options.model_dump(include=set(StepOptions.model_fields)))
        return super().for_role(role)
