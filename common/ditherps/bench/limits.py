"""Shannon limits: the fewest bits a coordinate with which any code whatever reaches an error (algorithms.md, 2.1).

An unbiased estimate of error D has E[xy] = E[x^2], so y * s / (s + D) with s = E[x^2] has the error D' = s D / (s + D)
and carries the same bits: it needs at least R(D'), the rate-distortion function of the source. A biased estimate needs
R(D). What stands for R:

- Gaussian: 1/2 log2(s / D), exact; with D' it is 1/2 log2(1 + 1 / NMSE).
- Laplace, Student t(3): Shannon's lower bound h(x) - 1/2 log2(2 pi e D), at least 0, which is tight for small errors
  and below R for large ones.
- sparse: a lower bound by Berger's dual form, computed (Blahut 1972), less than 0.01 bit below R; below an NMSE of
  `_FINEST` continued with R's asymptotic slope, one bit for each factor of 4 and Gaussian coordinate, which R exceeds
  by up to 0.08 bit.

Gradients have no known distribution, hence no limit.
"""

from __future__ import annotations

import functools
import math
from typing import Final

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from ditherps.bench.sources import SPARSE_SHARE

_GAUSSIAN_ENTROPY: Final = 0.5 * math.log2(2 * math.pi * math.e)
_FINEST: Final = 0.002
_GRID: Final = np.linspace(0.0, 5.0, 401)  # finer than a third of the root of the smallest error of a Gaussian value
_SLOPES: Final = np.geomspace(0.8, 320.0, 24)
_ITERATIONS: Final = 400


@functools.cache
def _entropy(source: str) -> float:
    """Differential entropy in bits of the unit-variance source."""
    if source == "laplace":
        return float(scipy.stats.laplace(scale=0.5**0.5).entropy()) / math.log(2)
    return float(scipy.stats.t(3, scale=3**-0.5).entropy()) / math.log(2)


@functools.cache
def _sparse_bounds() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slopes s and heights F (nats) of lines below the sparse source's R: R(D) >= F - s D for each.

    For any density q of reproductions F = E[log 1/c(x)] - log max_y E[exp(-s (x-y)^2) / c(x)] with
    c(x) = sum_y q(y) exp(-s (x-y)^2); Blahut's iteration moves q to where the bound is R. By symmetry x and y are
    taken as absolute values of either sign.
    """
    weight = np.exp(-0.5 * _GRID**2)
    weight[0] /= 2  # the other points stand for both signs
    weight *= SPARSE_SHARE / weight.sum()
    weight[0] += 1 - SPARSE_SHARE
    q = np.full(_GRID.size, 1 / _GRID.size)
    heights = []
    for slope in _SLOPES:
        near, far = ((_GRID[:, None] - sign * _GRID) ** 2 for sign in (1, -1))
        kernel = 0.5 * (np.exp(-slope * near) + np.exp(-slope * far))
        for _ in range(_ITERATIONS):
            c = kernel @ q
            gain = (weight / c) @ kernel
            q = q * gain
        c = kernel @ q
        heights.append(-(weight @ np.log(c)) - math.log(((weight / c) @ kernel).max()))
        q = 0.99 * q / q.sum() + 0.01 / q.size  # where the next slope begins: nothing is lost for good
    return _SLOPES, np.array(heights)


def _sparse_rate(nmse: float) -> float:
    slopes, heights = _sparse_bounds()
    inside = max(nmse, _FINEST)
    bits = float((heights - slopes * SPARSE_SHARE * inside).max()) / math.log(2)
    return bits + SPARSE_SHARE * 0.5 * math.log2(inside / nmse)


def shannon_bits(source: str, nmse: float, *, unbiased: bool = True, energy: float | None = None) -> float | None:
    """The limit in bits a coordinate at an error; None where it is not known (gradients, or no error at all).

    Args:
        source: one of `SOURCES`, or anything else.
        nmse: squared error over squared norm, at least 0.
        unbiased: whether the estimate is.
        energy: mean square of the very vector that `nmse` refers to; default: its expectation. They differ much for
            Student t(3), whose fourth moment is infinite.
    """
    if nmse <= 0:
        return None
    relative = nmse / (1 + nmse) if unbiased else nmse
    if source == "gaussian":
        bits = -0.5 * math.log2(relative)
    elif source == "sparse":
        bits = _sparse_rate(relative)
    elif source in ("laplace", "student-t3"):
        bits = _entropy(source) - _GAUSSIAN_ENTROPY - 0.5 * math.log2(relative * (1.0 if energy is None else energy))
    else:
        return None
    return max(0.0, bits)
