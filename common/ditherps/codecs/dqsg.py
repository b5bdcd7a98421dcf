"""`dqsg`: subtractively dithered uniform quantization (Abdi and Fekri, arXiv 1904.01197, DQSG).

The error of each coordinate is uniform over one step, zero-mean and independent of the vector (Schuchman 1964), to the
2^-17 of a step that a 16-bit dither leaves.
"""

from __future__ import annotations

from ditherps.codecs.integer import IntegerCodec


class DqsgCodec(IntegerCodec):
    """Ternary at fixed width by default, a step every 4096 coordinates; with `coder=rans` a step of one rms for all."""

    name = "dqsg"
    tag = 3
