"""The shipped family of source models: generalised Gaussians of eight shapes, as integers (proto/FORMAT.md, "Models").

A model says how a tile's values x/step are distributed: a share of exact zeros (the spike), and a density proportional
to exp(-|z / a|^beta) with mean |z| = 1 for the others, scaled by their mean absolute value. Tables of integers, not
formulas, are the contract: both ends of a link, whatever their mathematical library, read the same file.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BETAS = (0.3, 0.4, 0.55, 0.75, 1.0, 1.4, 2.0, 4.0)
SHAPES = len(BETAS)
SCALES = 256  # of |x/step|'s mean: 2^((index - SCALE_ORIGIN) / SCALES_PER_OCTAVE)
SCALE_ORIGIN = 96
SCALES_PER_OCTAVE = 12
SPIKES = 48
LINES = 32  # of a table, per octave of z + 1/8
LOGARITHMS = 4096
OCTAVES = 9  # from 1/8 to 64
TAIL_PROBABILITY = 2.0**-12  # outside the range of symbols, both sides together, at least by the model
# Both follow from BETAS (a test recomputes them); constants, since they decide about bytes.
_REACH = np.array((65, 57, 49, 42, 37, 31, 26, 20), np.int64)
_RATIOS = np.array((0.1908, 0.2805, 0.376, 0.4613, 0.5378, 0.6061, 0.6719), np.float64)
_FILE = Path(__file__).with_name("family.npy")


class Family(NamedTuple):
    """What the kernels read.

    Attributes:
        tails: uint32[SHAPES, OCTAVES * LINES + 2]: 2^31 P(Z > z) where z + 1/8 is
            2^(i // LINES - 3) (1 + i % LINES / LINES).
        reach: int64[SHAPES]: 12 log2 of the z beyond which `TAIL_PROBABILITY` lies, rounded.
        ratios: float64[SHAPES - 1]: (E|Z|)^2 / E Z^2 half-way between neighbouring shapes.
        octave: uint64[SCALES_PER_OCTAVE]: 2^(32 - i / 12), rounded.
        mantissas: float64[SCALES_PER_OCTAVE]: 2^((i + 1/2) / 12), the borders between scales.
        spikes: int64[SPIKES]: share of exact zeros, times 2^16.
    """

    tails: NDArray[np.uint32]
    reach: NDArray[np.int64]
    ratios: NDArray[np.float64]
    octave: NDArray[np.uint64]
    mantissas: NDArray[np.float64]
    spikes: NDArray[np.int64]


def spikes() -> NDArray[np.int64]:
    """Shares of zeros: thirty-seconds, then one minus half-octaves from 2^-5.5 down to 2^-13."""
    even = [(i << 16) // 32 for i in range(32)]
    sparse = [(1 << 16) - math.isqrt((1 << 32) >> (10 + i)) for i in range(1, SPIKES - 31)]
    return np.array(even + sparse, np.int64)


def generate() -> NDArray[np.uint32]:
    """The contents of `family.npy`, from SciPy's incomplete gamma function; tests compare the file with it."""
    from scipy import special

    line = np.arange(OCTAVES * LINES + 2)
    z = 2.0 ** (line // LINES - 3) * (1 + line % LINES / LINES) - 0.125
    rows = []
    for beta in BETAS:
        mean = special.gamma(2 / beta) / special.gamma(1 / beta)  # of |Z| where a = 1
        rows.append(0.5 * special.gammaincc(1 / beta, (z * mean) ** beta))
    return np.rint(np.array(rows) * 2.0**31).astype(np.uint32)


@functools.cache
def family() -> Family:
    """The family, read once; only what decides about bytes is read or made of integers."""
    tails = np.load(_FILE, allow_pickle=False)
    octave = np.array([root(12, 2 ** (32 * 12 - i)) for i in range(SCALES_PER_OCTAVE)], np.uint64)
    half = np.array([root(24, 2 ** (52 * 24 + 2 * i + 1)) for i in range(SCALES_PER_OCTAVE)], np.float64)
    return Family(tails, _REACH, _RATIOS, octave, half * 2.0**-52, spikes())


def root(degree: int, value: int) -> int:
    """The integer root, rounded down: no floating-point power is the same everywhere."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle)
    return low


@functools.cache
def logarithms() -> NDArray[np.float64]:
    """log2 of 0 (as 0) .. 4096 in units of 2^-20, by repeated squaring of integers."""
    out = np.zeros(LOGARITHMS + 1, np.float64)
    for number in range(1, LOGARITHMS + 1):
        whole = number.bit_length() - 1
        mantissa, result = (number << 30) >> whole, whole
        for _ in range(20):
            mantissa = mantissa * mantissa >> 30
            result = 2 * result + (mantissa >> 31)
            mantissa >>= mantissa >> 31
        out[number] = result * 2.0**-20
    return out
