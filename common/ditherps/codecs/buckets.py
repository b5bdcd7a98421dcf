"""What both layouts of a uniform quantizer begin with: a step for each bucket, behind the header."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import HEADER, Bytes
from ditherps.codecs.steps import StepOptions


class BucketLayout:
    """Where the steps of a payload are, and how many.

    Attributes:
        subtracts_dither: whether the dither itself is subtracted, so that the error does not depend on the vector.
    """

    def __init__(self, options: StepOptions, *, subtract: bool, subtracts_dither: bool) -> None:
        self._options = options
        self._subtract = subtract
        self.subtracts_dither = subtracts_dither

    def _bucket(self, coordinates: int) -> int:
        """Coordinates that share a step: the option, or all of them."""
        return self._options.width or max(coordinates, 1)

    def buckets(self, coordinates: int) -> int:
        """How many steps a payload has."""
        return -(-coordinates // self._bucket(coordinates))

    def steps(self, data: Bytes, coordinates: int) -> NDArray[np.float32]:
        """The steps in a payload's bytes."""
        return data[HEADER.size : HEADER.size + 4 * self.buckets(coordinates)].view(np.float32)
