"""`ndqsg`: nested dithered quantization (Abdi and Fekri, arXiv 1904.01197, NDQSG).

The fine index travels modulo `ratio`; the server finds the rest from a vector nearby. With alpha = 1 decoding equals
`dqsg` of the same fine step bit for bit wherever |x - y| < step * (ratio - 1) / 2. Beyond, a coordinate stays within half
a coarse step (ratio * step / 2) of the side information y; the CRC-32 of each tile's fine indices makes that visible.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ditherps.codecs.base import Codec, Context, Encoded, Role, Span
from ditherps.codecs.dqsg import DqsgCodec
from ditherps.codecs.fixed import FixedCodec, FixedOptions
from ditherps.dither import Address
from ditherps.kernels import cpu
from ditherps.kernels.checksum import CRC_TABLES
from ditherps.kernels.packing import Packing, packing


class NdqsgOptions(FixedOptions):
    """Seven fine levels sent modulo three; one step for the whole vector, which nested coding needs (measured)."""

    default_levels = 3.0

    bucket: int = Field(0, ge=0, description=FixedOptions.model_fields["bucket"].description)
    ratio: int = Field(3, ge=2, le=256, description="2 to 256: the coarse step is ratio fine steps")
    alpha: float = Field(1.0, gt=0, le=1, description="above 0, at most 1; below 1 biases towards the side information")
    side: Literal["sources", "running"] = Field(
        "sources", description="sources (aggregate of all sources), running (mean of all decoded so far)"
    )
    side_fraction: float = Field(0.5, gt=0, lt=1, description="between 0 and 1: share of workers that are sources")


class NdqsgCodec(FixedCodec):
    """Header, steps, then tile by tile the packed residues and the CRC-32 of the fine indices."""

    name = "ndqsg"
    tag = 4
    Options = NdqsgOptions
    options: NdqsgOptions
    needs_side_information = True
    roles = (Role.SOURCE, Role.NESTED)
    extra = 4

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """With alpha = 1, where decoding succeeds."""
        return self.options.alpha == 1.0

    def _packing(self) -> Packing:
        return packing(self.options.ratio)

    def format_options(self) -> dict[str, Any]:
        """Without what only the server's round policy reads."""
        return self.options.model_dump(exclude={"side", "side_fraction"})

    def for_role(self, role: Role) -> Codec:
        """Sources send dqsg with the same levels, step rule and buckets."""
        if role is Role.SOURCE:
            return DqsgCodec(**self.options.model_dump(include=set(FixedOptions.model_fields)))
        return super().for_role(role)

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        data, steps, tiles = self._frame(x.size)
        cursor = np.array([0, -1, 0, 0], np.int64)
        status = cpu.encode_nested(
            x,
            address.stream(x.size),
            self._bucket(x.size),
            self._rule,
            self._factor,
            self._half,
            self.options.alpha,
            self._form,
            steps,
            tiles,
            cursor,
            CRC_TABLES,
            cpu.workspace(),
        )
        if status:
            raise self._refused(status, int(cursor[2]), x)
        return self._finished(data, int(cursor[3]), np.empty(0, np.uint8), x.size, context)

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
        return cpu.accumulate_nested(
            index.tiles,
            index.steps,
            index.table,
            encoded.coordinates,
            self._bucket(encoded.coordinates),
            self._half,
            self.options.alpha,
            self._form,
            address.stream(encoded.coordinates),
            span[0],
            into,
            weight,
            side,
            CRC_TABLES,
            cpu.workspace(),
        )
