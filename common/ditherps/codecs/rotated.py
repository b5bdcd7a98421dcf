"""`rotated`: another codec in the basis of a randomized Hadamard transform (kernels/hadamard.py).

Rotated coordinates are close to Gaussian whatever the vector is, so a fixed-width codec meets no heavy tails: its step
no longer follows one large coordinate. The rotation is orthonormal: errors keep their square sum and stay unbiased.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import BadInput, Context, Encoded, Span
from ditherps.codecs.rotation import DEFAULT_BLOCK, Block, check_rotatable, signs_of
from ditherps.codecs.wrapper import Nested, WrapperCodec, WrapperOptions
from ditherps.dither import Address
from ditherps.kernels import cpu, hadamard


class RotatedOptions(WrapperOptions):
    """The codec of the rotated coordinates, and how many are mixed."""

    block: Block = DEFAULT_BLOCK


class RotatedCodec(WrapperCodec):
    """Header, then the payload of the inner codec for the rotated vector, under the same address."""

    name = "rotated"
    tag = 15
    Options = RotatedOptions
    options: RotatedOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.contractive = self.inner.contractive
        self.chunk_coordinates = math.lcm(self.options.block, self.inner.chunk_coordinates)

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        block, work = self.options.block, cpu.workspace()
        check_rotatable(x, block)
        rotated = np.empty_like(x)
        stream = signs_of(address, x.size)
        hadamard.rotate_vector(x, block, stream, work.lanes, work.word, work.word_bits, rotated)
        try:
            inner = self.inner._encode(rotated, address, context)
        except BadInput as bad:
            # These are rotated coordinates: of x one knows the blocks that hold the culprit.
            hi = min(-(-bad.hi // block) * block, x.size)
            raise BadInput(bad.lo // block * block, hi, bad.problem) from None
        return self._wrapped(b"", inner, context)

    def _accumulate(
        self,
        encoded: Encoded,
        index: Nested,
        address: Address,
        into: NDArray[np.float32],
        weight: np.float32,
        span: Span,
        side: NDArray[np.float32] | None,
    ) -> int:
        block, unit, work = self.options.block, self.chunk_coordinates, cpu.workspace()
        stream = signs_of(address, encoded.coordinates)
        chunk = np.empty(min(unit, into.size), np.float32)
        failed = 0
        for lo in range(*span, unit):
            hi = min(lo + unit, span[1])
            part = chunk[: hi - lo]
            part.fill(0.0)
            failed += self.inner._accumulate(index.payload, index.index, address, part, np.float32(1.0), (lo, hi), None)
            for begin in range(lo, hi, block):
                count = min(block, hi - begin)
                hadamard.add_rotated_back(
                    part,
                    part.view(np.int32),
                    begin - lo,
                    count,
                    stream,
                    begin,
                    work.lanes,
                    work.word,
                    work.word_bits,
                    weight,
                    into,
                    begin - span[0],
                )
        return failed
