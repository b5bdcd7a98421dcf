"""How large a payload is, how far off what it decodes to, and whether the error is zero in expectation."""

from __future__ import annotations

import math
from typing import NamedTuple

import scipy.stats
import torch
from torch import Tensor

from ditherps.codecs import Codec
from ditherps.dither import Address, Domain


def round_address(round_: int) -> Address:
    """Where the dither of a measured round lies."""
    return Address(seed=2024, round=round_, sender=0, domain=Domain.UPDATE)


class Quality(NamedTuple):
    """Means over rounds of independent dither.

    Attributes:
        bits_per_coordinate: all bytes counted.
        nmse: squared error over the squared norm of the vector.
        bias_z: see `quality`.
        bias_nmse: the part of `nmse` that no averaging over rounds removes, |E[error]|^2 / |x|^2, estimated by products
            of the errors of different rounds; around 0, also below it, where there is none.
    """

    bits_per_coordinate: float
    nmse: float
    bias_z: float
    bias_nmse: float


def quality(used: Codec, x: Tensor, side: Tensor, rounds: int) -> Quality:
    """Encode and decode `x` in `rounds` rounds, whose dithers are independent, and look at the errors e_r = y_r - x.

    Bias shows as a slope of y on x that is not 1 (a shrunken, clipped or amplified vector), or as a mean:

    - slope: a_r = <e_r, x> / <x, x>, which is the regression coefficient of y_r on x, less 1;
    - mean: a_r = sum(e_r) / n.

    The z-score of either is mean(a_r) / s. Its squared standard error s^2 is the larger of two, both from the data:

    - var(a_r) / rounds, which holds however the errors of one round depend on each other (rotations, common scales);
      as few rounds give a Student t(rounds - 1), the ratio is turned into the normal quantile of the same probability;
    - sum_i(m_i^2 x_i^2) / <x, x>^2, or sum_i(m_i^2) / n^2 for the mean, with m = mean(e_r): independent coordinates. It
      is what remains of the first where the dither does nothing, as in a codec that rounds without any.

    `bias_z` is the score of larger magnitude: within about 4 for an unbiased codec; for a biased one it grows with the
    root of the coordinates.

    Args:
        used: the codec.
        x: float32, not all zero.
        side: what the server knows, for codecs that need it.
        rounds: at least 2.
    """
    signal = x.double()
    n, energy = x.numel(), float(signal.square().sum())
    total = torch.zeros_like(signal)
    squares, nbytes = 0.0, 0
    slopes, means = torch.empty(rounds, dtype=torch.float64), torch.empty(rounds, dtype=torch.float64)
    for round_ in range(rounds):
        address = round_address(round_)
        encoded = used.encode(x, address)
        known = side if used.needs_side_information else None
        error = used.decode(encoded, address, side_information=known).double().sub_(signal)
        slopes[round_] = torch.dot(error, signal) / energy
        means[round_] = error.mean()
        squares += float(torch.dot(error, error))
        nbytes += encoded.nbytes
        total += error
    common = float(torch.dot(total, total))
    across = total.div_(rounds)
    slope_z = _z(slopes, float(torch.dot((across * signal).square_(), torch.ones_like(signal))) / energy**2)
    mean_z = _z(means, common / rounds**2 / n**2)
    return Quality(
        bits_per_coordinate=8 * nbytes / rounds / n,
        nmse=squares / rounds / energy,
        bias_z=max(slope_z, mean_z, key=abs),
        bias_nmse=(common - squares) / (rounds * (rounds - 1)) / energy,
    )


def _z(values: Tensor, coordinates: float) -> float:
    """The z-score of the mean against 0; `coordinates` is its squared standard error over the coordinates."""
    rounds = values.numel()
    mean, variance = float(values.mean()), float(values.var()) / rounds
    if mean == 0.0:
        return 0.0
    ratio = mean / math.sqrt(max(variance, coordinates))
    if coordinates >= variance:
        return ratio
    score = -float(scipy.stats.norm.ppf(scipy.stats.t.sf(abs(ratio), rounds - 1)))
    return math.copysign(min(score, abs(ratio)), ratio)
