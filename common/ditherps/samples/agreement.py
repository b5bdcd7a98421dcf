"""How far a worker and the server agree on the gradient at the same reconstructed samples.

They compute the same thing, but on other devices sums may be in another order; what differs enters the refined estimate
as a bias. So from time to time a worker sends some coordinates of its gradient, and the server compares them with its
own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ditherps.dither import Address, words
from ditherps.sampling import Ids


class Agreement(NamedTuple):
    """Of two vectors: their cosine (1 for two zeros), and ||a - b|| / ||b|| (0 for two zeros)."""

    cosine: float
    relative_error: float


def agreement(mine: Tensor, theirs: Tensor) -> Agreement:
    """How far vector `mine` is from `theirs`, in double precision; NaN where either is not finite."""
    a, b = mine.detach().cpu().double(), theirs.detach().cpu().double()
    size, reference, distance = (float(vector.norm()) for vector in (a, b, a - b))
    if not math.isfinite(size + reference):
        return Agreement(math.nan, math.nan)
    if reference == 0 or size == 0:
        same = size == reference
        return Agreement(float(same), 0.0 if same else (math.inf if reference == 0 else 1.0))
    return Agreement(float(a @ b) / (size * reference), distance / reference)


def probed(address: Address, coordinates: int, count: int) -> Ids:
    """Coordinates of a probe, ascending: (min(count, coordinates),), one of each of as many equal parts of the vector.

    `address`: in the domain PROBE, of round and worker.
    """
    count = min(count, coordinates)
    borders = np.arange(count + 1, dtype=np.int64) * coordinates // max(count, 1)
    sizes = np.diff(borders)
    share = (words(address, count) >> np.uint64(32)).astype(np.int64)
    return borders[:-1] + (share * sizes >> 32)
