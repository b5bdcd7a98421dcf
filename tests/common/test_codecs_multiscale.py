"""maxnorm-multiscale: the choice of the scale, no bias, the error that stochastic rounding makes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ditherps import Address, Domain, codec
from ditherps.codecs.base import HEADER
from ditherps.kernels import reference

ADDRESS = Address(seed=1, round=2, sender=3, domain=Domain.UPDATE)
PAIRS = [(2, 6), (4, 8), (6, 10), (8, 12)]


def gaussian(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def variance(x: NDArray[np.float64], low: int, high: int) -> NDArray[np.float64]:
    """Of each coordinate's rounding: step^2 p (1 - p)."""
    norm = np.abs(x).max()
    coarse, fine = 2**low - 1, 2**high - 1
    s = np.where(np.ceil(fine * np.abs(x) / norm) <= coarse, fine, coarse)
    p = np.mod(s * x / norm, 1)
    return np.asarray((norm / s) ** 2 * p * (1 - p))


def _packed(digits: NDArray[np.int64], base: int) -> bytes:
    if base <= 256:
        return reference.pack(digits, base)
    return (digits % 256).astype(np.uint8).tobytes() + reference.pack(digits // 256, -(-base // 256))


@pytest.mark.parametrize(("low", "high"), [*PAIRS, (1, 2), (3, 15)])
def test_payload_is_as_documented(low: int, high: int) -> None:
    n, coarse, fine = 4096 + 300, 2**low - 1, 2**high - 1
    x = gaussian(n).numpy()
    x[::9] = 0
    norm = float(np.abs(x).max())
    wide = x.astype(np.float64)
    is_fine = np.abs(wide * (fine / norm)) <= coarse
    lanes = reference.lanes_at(ADDRESS, np.arange(n))
    q = np.floor(np.where(is_fine, wide * (fine / norm), wide * (coarse / norm)) + (lanes + 0.5) / 65536)
    assert np.abs(q).max() <= coarse
    expected = np.float32(norm).tobytes()
    for lo in range(0, n, 4096):
        tile = slice(lo, lo + 4096)
        expected += _packed(q[tile].astype(np.int64) + coarse, 2 * coarse + 1)
        expected += reference.pack(is_fine[tile].astype(np.int64), 2)
    used = codec("maxnorm-multiscale", low=low, high=high)
    encoded = used.encode(torch.from_numpy(x), ADDRESS)
    assert encoded.to_bytes()[HEADER.size :] == expected
    assert encoded.nbytes == used.max_nbytes(n)
    values = (q * np.where(is_fine, norm / fine, norm / coarse)).astype(np.float32)
    np.testing.assert_array_equal(used.decode(encoded, ADDRESS).numpy(), values)


@pytest.mark.parametrize(("low", "high"), PAIRS)
def test_error_is_that_of_stochastic_rounding(low: int, high: int) -> None:
    n = 1 << 18
    used = codec("maxnorm-multiscale", low=low, high=high)
    x = gaussian(n)
    encoded = used.encode(x, ADDRESS)
    error = used.decode(encoded, ADDRESS).double().numpy() - x.double().numpy()
    expected = variance(x.double().numpy(), low, high)
    assert abs((error**2 - expected).mean()) < 4 * (error**2 - expected).std() / math.sqrt(n)
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(n)
    # Not more than low + 2 bits, but for what the packing of odd alphabets wastes.
    assert encoded.bits_per_coordinate <= low + 2 + (0.4 if low == 4 else 0.01)


@pytest.mark.parametrize("place", [0.3, 2.1, 2.5, 2.9, 3.0, 3.1, 3.5, 3.9, 5.0, 21.7, 62.5])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_bin_is_biased_the_boundary_least_of_all(place: float, sign: int) -> None:
    """Deciding after rounding would move the mean by p (1 - p) / 63, hundreds of standard errors."""
    n = 1 << 17
    x = torch.full((n,), sign * place / 63)
    x[0] = 1.0
    exact = float(x[1])
    used = codec("maxnorm-multiscale", low=2, high=6)
    decoded = used.decode(used.encode(x, ADDRESS), ADDRESS)[1:].double()
    step = 1 / 63 if abs(exact) * 63 <= 3 else 1 / 3
    p = abs(exact) / step % 1
    assert abs(float(decoded.mean()) - exact) <= 4 * step * math.sqrt(p * (1 - p) / n) + step * 2.0**-17
    assert set((decoded / step).round().abs().tolist()) <= {
        float(math.floor(abs(exact) / step)),
        math.ceil(place / 63 / step),
    }


def test_it_beats_one_scale_of_the_same_digits() -> None:
    x = gaussian(1 << 16).double().numpy()
    norm = np.abs(x).max()
    p = np.mod(3 * x / norm, 1)
    assert variance(x, 2, 6).sum() < ((norm / 3) ** 2 * p * (1 - p)).sum()
