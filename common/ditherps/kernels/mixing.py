"""Probabilities of bits, learned while they are coded: counters, and a mixture of them in the logistic domain.

Each of several contexts keeps a counter of the bits that it has seen. Their probabilities, stretched to
ln(p / (1 - p)), are added with weights that move along the gradient of the code length (Mahoney, "Adaptive weighing of
context models for lossless data compression", 2005). All of it is in integers, so that both ends learn the same.

Probabilities are of a one, in 2^-16; stretched they are in 2^-8. The tables come from `decimal`, which rounds
logarithms and exponentials correctly, and so equally on every machine.
"""

from __future__ import annotations

from decimal import Context, Decimal
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, inlined

REACH: Final = 12 << 8  # of stretched values
ONE: Final = 1 << 16
WEIGHT_ONE: Final = 1 << 16  # a weight of one
_EXACT: Final = Context(prec=20)


def _squash() -> NDArray[np.int64]:
    """2^16 / (1 + e^(-x / 256)) for x = -REACH .. REACH, rounded down, within 1 .. 2^16 - 1."""
    powers = [(Decimal(-x) / 256).exp(_EXACT) for x in range(-REACH, REACH + 1)]
    return np.array([max(int(ONE / (1 + power)), 1) for power in powers], np.int64)


def _stretch() -> NDArray[np.int64]:
    """256 ln((p + 1/2) / (4096 - p - 1/2)) for p = 0 .. 4095, rounded to nearest."""
    quotients = [(Decimal(2 * p + 1) / (8191 - 2 * p)).ln(_EXACT) * 256 for p in range(4096)]
    return np.array([int(value.to_integral_value()) for value in quotients], np.int64)


SQUASH: Final = _squash()
STRETCH: Final = _stretch()
RATE: Final = np.array([2 * ONE // (2 * seen + 3) for seen in range(256)], np.int64)  # 1 / (seen + 3/2)
MOST_SEEN: Final = 255


@inlined
def squash(x: Int) -> Int:
    """The probability whose stretched value is x."""
    return np.int64(SQUASH[min(max(x, -REACH), REACH) + REACH])


@inlined
def stretch(p: Int) -> Int:
    """The stretched value of a probability."""
    return np.int64(STRETCH[p >> 4])
