"""`dqsg`: subtractively dithered uniform quantization at fixed width (Abdi and Fekri, arXiv 1904.01197, DQSG).

The error of each coordinate is uniform over one step, zero-mean and independent of the vector (Schuchman 1964), to the
2^-17 of a step that a 16-bit dither leaves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import Context, Encoded, Span
from ditherps.codecs.fixed import FixedCodec, FixedOptions
from ditherps.dither import Address
from ditherps.kernels import cpu
from ditherps.kernels.packing import Packing, packing

_NO_EXCEPTIONS = np.empty(0, np.uint8)


class DqsgOptions(FixedOptions):
    """Ternary by default, a step every 4096 coordinates."""

    default_levels = 1.0


class DqsgCodec(FixedCodec):
    """Header, steps, packed indices tile by tile, exceptions (rms rule only)."""

    name = "dqsg"
    tag = 3
    Options = DqsgOptions
    extra = 0

    def _packing(self) -> Packing:
        return packing(self._half + 1)

    def _exception_bound(self, coordinates: int) -> int:
        """Nothing for the max rule. For rms: at most E = n / (M resolution)^2 values can lie M steps out.

        Their gaps sum to n and the squares of their indices to about n / resolution^2; both varint lengths are concave,
        so equal gaps and equal indices bound them (one byte of slack each for rounding).
        """
        if self.options.resolution is None or coordinates == 0:
            return 0
        n, resolution = coordinates, self.options.resolution
        most = min(float(n), math.ceil(n / (self.levels * resolution) ** 2))
        gaps = most * (2 + math.log(2 * n / most, 128))
        values = most * min(5.0, 2 + 0.5 * math.log(max(4 * n / (most * resolution**2), 1.0), 128))
        return math.ceil(gaps + values)

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        data, steps, tiles = self._frame(x.size)
        stream = address.stream(x.size)
        exceptions = _NO_EXCEPTIONS
        if self._rule == cpu.RMS_RULE:
            exceptions = np.empty(cpu.EXCEPTION_ROOM + x.size // 16, np.uint8)
        cursor = np.array([0, -1, 0, 0], np.int64)
        bucket = self._bucket(x.size)
        while status := cpu.encode_plain(
            x,
            stream,
            bucket,
            self._rule,
            self._factor,
            self._half,
            self._form,
            steps,
            tiles,
            exceptions,
            cursor,
            cpu.workspace(),
        ):
            if status != cpu.MORE_ROOM:
                raise self._refused(status, int(cursor[2]), x)
            exceptions = np.concatenate((exceptions, np.empty_like(exceptions)))
        return self._finished(data, int(cursor[3]), exceptions[: int(cursor[0])], x.size, context)

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
        last, at = -1, 0
        if index.exceptions.size:
            # The last checkpoint behind which no exception of this span lies.
            found = max(int(np.searchsorted(index.checkpoints[:, 0], span[0])) - 1, 0)
            last, at = (int(value) for value in index.checkpoints[found])
        cpu.accumulate_plain(
            index.tiles,
            index.steps,
            index.table,
            encoded.coordinates,
            self._bucket(encoded.coordinates),
            self._half,
            self._form,
            address.stream(encoded.coordinates),
            span[0],
            into,
            weight,
            index.exceptions,
            at,
            last,
            cpu.workspace(),
        )
        return 0
