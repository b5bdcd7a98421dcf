"""What all uniform quantizers share: a step rule, a dither that is subtracted or not, and one of two ways to write.

`fixed` packs all indices as wide as another, `rans` codes each with as many bits as it is worth.
"""

from __future__ import annotations

import math
from concurrent.futures import Executor
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import Codec, Context, Encoded, Options, Span
from ditherps.codecs.coded import CodedLayout
from ditherps.codecs.fixed import FixedLayout
from ditherps.codecs.steps import StepOptions
from ditherps.codecs.target import step_for_bits
from ditherps.dither import Address
from ditherps.kernels import cpu

_STEP_FIELDS = {"step", "levels", "resolution", "nmse", "bits"}
MODEL_NMSE = 1 / 3
"""Relative error of the model's steps: the workers' model lags by as many rounds. With momentum 0.9 a lag of three
rounds, as `step=max` with one level makes it, lets training diverge that goes well without."""


class IntegerCodec(Codec):
    """A uniform quantizer. Subclasses say whether the dither is subtracted, and what is nested."""

    Options: ClassVar[type[Options]] = StepOptions
    subtract: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._rule = self._step_rule()
        self._layout = self._chosen_layout()
        self.chunk_coordinates = self._layout.chunk_coordinates

    def _step_rule(self) -> StepOptions:
        """The step rule that the options mean; where they are one, themselves."""
        assert isinstance(self.options, StepOptions)
        return self.options

    def _chosen_layout(self) -> FixedLayout | CodedLayout:
        kind = CodedLayout if self._rule.coder == "rans" else FixedLayout
        return kind(self._rule, subtract=self.subtract)

    def for_model(self) -> Codec:
        """With a step that follows from the rms, so that the relative error is at most a third."""
        options, coarsest = self.options, math.sqrt((12 if self.subtract else 6) * MODEL_NMSE)
        if not isinstance(options, StepOptions) or (options.known_resolution or math.inf) <= coarsest:
            return self
        kept = options.model_dump(exclude_unset=True, exclude_none=True, exclude=_STEP_FIELDS)
        return type(self)(**kept, step="rms", resolution=coarsest)

    def max_nbytes(self, coordinates: int) -> int:
        """Header, steps, indices, and what escapes could take at most."""
        return self._layout.max_nbytes(coordinates)

    def expected_squared_error(self, encoded: Encoded) -> float:
        """step^2 / 12 for each coordinate that has an error (Schuchman 1964).

        NaN where not the dither is subtracted, so that the data decide, and where several steps make it unknown which
        of them belong to the coordinates that are decoded exactly.
        """
        n = encoded.coordinates
        steps = self._layout.steps(encoded.data, n)
        exact = self._layout.exact_coordinates(encoded)
        if not self._layout.subtracts_dither or (exact and steps.size > 1):
            return math.nan
        if steps.size < 2:
            return float(np.sum(np.float64(steps) ** 2)) * (n - exact) / 12
        width = self._rule.width
        squares = cpu.sum_of_squares(steps, 0, steps.size - 1, cpu.workspace().sums)
        last = n - width * (steps.size - 1)
        return float(width * squares + last * np.float64(steps[-1]) ** 2) / 12

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        return self._encode_on(None, x, address, context)

    def _encode_on(self, pool: Executor | None, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        step = step_for_bits(x, self._rule, subtract=self.subtract) if self._rule.bits is not None else None
        data, tail, sealed = self._layout.encode(x, address, step, pool)
        return self._finished(data, x.size, context, tail, sealed)

    def _sealed_bytes(self, encoded: Encoded) -> int:
        return self._layout.sealed_bytes(encoded)

    def _index(self, encoded: Encoded) -> Any:
        return self._layout.index(encoded)

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
        return self._layout.accumulate(encoded, index, address, into, weight, span, side)
