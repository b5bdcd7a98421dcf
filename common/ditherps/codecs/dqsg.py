"""`dqsg`: subtractively dithered uniform quantization at fixed width (Abdi and Fekri, arXiv 1904.01197, DQSG).

The error of each coordinate is uniform over one step, zero-mean and independent of the vector (Schuchman 1964), to the
2^-17 of a step that a 16-bit dither leaves.
"""

from __future__ import annotations

from ditherps.codecs.fixed import FixedCodec, FixedOptions


class DqsgOptions(FixedOptions):
    """Ternary by default, a step every 4096 coordinates."""

    default_levels = 1.0


class DqsgCodec(FixedCodec):
    """Header, steps, packed indices tile by tile, exceptions (rms rule only)."""

    name = "dqsg"
    tag = 3
    Options = DqsgOptions
