"""How much error each tensor may have, so that all together meet one budget with the fewest bits.

Two answers, both for tensors of which only the mean square s_i^2 is known, D_i being the mean squared error of each:

- `water_fill`, of rate-distortion theory: D_i = min(theta, s_i^2), for a rate of log2(s_i^2 / D_i) / 2. A tensor below
  the water is not sent. (Cover and Thomas, "Elements of Information Theory", section 10.3.3.)
- `unbiased_fill`: what an unbiased codec can use. It may not leave a tensor out: its rate is log2(1 + s_i^2 / D_i) / 2,
  with an error beyond s_i^2 where it hardly sends anything, and the best errors have D_i (D_i + s_i^2) = c s_i^2:
  far above the water all equal c, far below it s_i sqrt(c).

Above the water both say: equal errors, so equal steps. Measured on saved gradients, bits a coordinate with all bytes
counted, at an NMSE of 0.1 over the whole vector. `one`: one step, encoded as one vector; `equal`: equal NMSE in each
tensor; `water`: one step again, encoded tensor by tensor; `unbiased`: steps sqrt(12 D_i) of `unbiased_fill`.

==================  =======================  ======  ======  ======  ========
codec               gradient                    one   equal   water  unbiased
==================  =======================  ======  ======  ======  ========
rans, matched       FC-300-100, round 20      1.060   1.387   1.059     1.061
reconstruction      FC-300-100, round 200     1.095   1.171   1.096     1.096
                    CifarNet, round 20        0.983   1.260   0.977     0.975
                    CifarNet, round 300       0.971   1.200   0.967     0.967
                    ResNet-18, round 0        0.971   1.958   0.972     0.967
                    ResNet-18, round 25       0.364   1.164   0.362     0.378
rans                FC-300-100, round 20      1.211   1.455   1.211     1.208
                    FC-300-100, round 200     1.257   1.291   1.258     1.257
                    CifarNet, round 20        1.116   1.336   1.111     1.106
                    CifarNet, round 300       1.115   1.264   1.113     1.109
                    ResNet-18, round 0        0.995   1.959   0.996     0.980
                    ResNet-18, round 25       0.510   1.213   0.507     0.497
fixed, bucket = 0,  FC-300-100, round 20      2.084   2.220   2.080     2.076
alphabets that      FC-300-100, round 200     2.118   2.131   2.119     2.120
suit the data       CifarNet, round 20        2.058   2.190   2.048     2.042
                    CifarNet, round 300       2.031   2.094   2.018     2.011
                    ResNet-18, round 0        1.892   2.457   1.843     1.805
                    ResNet-18, round 25       1.749   2.097   1.750     1.724
==================  =======================  ======  ======  ======  ========

With an entropy coder one step for all is the default, since nothing is much better. At 0.01, 0.1 and 0.3 `unbiased`
saves at most 1.7 % for FC-300-100 and CifarNet and 3.3 % for ResNet-18, and nothing, or less, where the reconstruction
is matched. Nor is there much left to find: with each tensor's step chosen from its measured curve of bits against error
(in quarters of an octave) it is 4.5 % at most, with matched reconstruction 0.7 %.

At fixed width what counts is the alphabet. The rows above compare the best one for all tensors with the best for each;
the allocation saves up to 0.6 % for FC-300-100, 1.7 % for CifarNet, 6.8 % for ResNet-18 (of all three errors). Far more
comes from taking the alphabet from the data at all: `dqsg` alone, which takes it from the NMSE (`steps.levels_for`),
needs 2.28, 2.34, 2.27, 2.26, 2.13 and 2.08 bits in these rows. The codec `tensors` does both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditherps.errors import OptionError


def water_fill(
    rms: ArrayLike, sizes: Sequence[int], *, nmse: float | None = None, bits: float | None = None
) -> NDArray[np.float64]:
    """Reverse water-filling: the mean squared errors D_i = min(theta, rms_i^2) that meet a budget exactly.

    Sorted by rms, the level theta follows in closed form. With `nmse` only correctly rounded operations decide.

    Args:
        rms: root of the mean square of each tensor.
        sizes: coordinates of each tensor.
        nmse: the budget: sum of sizes_i D_i over sum of sizes_i rms_i^2; from 1 on nothing is sent.
        bits: or this one: sum of sizes_i log2(rms_i^2 / D_i) / 2 over the sum of the sizes.

    Raises:
        OptionError: negative or non-finite rms or sizes, of unequal number; a negative budget, none or two of them.
    """
    squares, counts = _checked(rms, sizes)
    distortions = np.zeros(squares.size)
    if (nmse is None) == (bits is None):
        raise OptionError("nmse, bits", (nmse, bits), "exactly one of them")
    budget = bits if nmse is None else nmse
    if budget is None or not 0 <= budget < math.inf:
        raise OptionError("nmse" if nmse is not None else "bits", budget, "0 or more")
    some = np.flatnonzero((squares > 0) & (counts > 0))
    order = some[np.argsort(-squares[some], kind="stable")]
    if order.size == 0:
        return distortions
    s, n = squares[order].tolist(), counts[order].tolist()
    theta = _level_of_error(s, n, nmse) if nmse is not None else _level_of_rate(s, n, float(counts.sum()) * budget)
    distortions[some] = np.minimum(theta, squares[some])
    return distortions


def _level_of_error(s: list[float], n: list[float], nmse: float) -> float:
    """theta for mean squares in falling order: the first count of tensors above the water that is consistent."""
    energies = [count * square for count, square in zip(n, s, strict=True)]
    budget = nmse * math.fsum(energies)
    theta = s[0]
    for above in range(len(s), 0, -1):
        theta = (budget - math.fsum(energies[above:])) / math.fsum(n[:above])
        if theta <= s[above - 1]:
            return theta
    return max(theta, s[0])


def _level_of_rate(s: list[float], n: list[float], bits: float) -> float:
    """As `_level_of_error`, for a total of bits."""
    logarithms = [count * math.log2(square) for count, square in zip(n, s, strict=True)]
    theta = s[0]
    for above in range(len(s), 0, -1):
        theta = math.pow(2.0, (math.fsum(logarithms[:above]) - 2 * bits) / math.fsum(n[:above]))
        if theta <= s[above - 1]:
            return theta
    return s[0]  # no bits, and the logarithm was rounded


def unbiased_fill(rms: ArrayLike, sizes: Sequence[int], *, nmse: float) -> NDArray[np.float64]:
    """The mean squared errors D_i with the least sum of sizes_i log2(1 + rms_i^2 / D_i) / 2 for a total error.

    D_i = 2 c / (1 + sqrt(1 + 4 c / rms_i^2)), c the largest double with which the budget is kept. It has no closed
    form; it is found by halving down to neighbouring doubles, with correctly rounded operations only, so that the
    result is the same on every machine.

    Args:
        rms: root of the mean square of each tensor; 0 gives D_i = 0.
        sizes: coordinates of each tensor.
        nmse: the budget: sum of sizes_i D_i over sum of sizes_i rms_i^2; may exceed 1.

    Raises:
        OptionError: as `water_fill`.
    """
    squares, counts = _checked(rms, sizes)
    if not 0 <= nmse < math.inf:
        raise OptionError("nmse", nmse, "0 or more")
    distortions = np.zeros(squares.size)
    some = np.flatnonzero((squares > 0) & (counts > 0))
    if some.size == 0 or nmse == 0:
        return distortions
    s, n = squares[some], counts[some]

    def errors(c: float) -> NDArray[np.float64]:
        return np.asarray(2 * c / (1 + np.sqrt(1 + 4 * c / s)))

    budget = nmse * math.fsum((n * s).tolist())
    low = high = budget / math.fsum(n.tolist())  # D_i <= c
    while math.fsum((n * errors(high)).tolist()) <= budget:
        low, high = high, 2 * high
    while True:
        middle = low + (high - low) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if math.fsum((n * errors(middle)).tolist()) <= budget else (low, middle)
    distortions[some] = errors(low)
    return distortions


def _checked(rms: ArrayLike, sizes: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean squares and sizes."""
    values, counts = np.asarray(rms, np.float64), np.asarray(sizes, np.float64)
    for name, array in (("rms", values), ("sizes", counts)):
        if array.ndim != 1 or not np.all((array >= 0) & np.isfinite(array)):
            raise OptionError(name, array.tolist(), "a list of finite numbers, 0 or more")
    if values.size != counts.size:
        raise OptionError("sizes", counts.size, f"as many as there are rms, {values.size}")
    return values * values, counts
