"""natural: powers of two, without bias."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ditherps import Address, Domain, codec
from ditherps.codecs.base import HEADER
from ditherps.errors import EncodingError
from ditherps.kernels import reference

ADDRESS = Address(seed=1, round=2, sender=3, domain=Domain.UPDATE)


def gaussian(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 4097, 9000])
def test_payload_is_as_documented(n: int) -> None:
    x = gaussian(n).numpy()
    x[::5] = (x[::5].astype(np.float64) * 1e-39).astype(np.float32)
    lanes = reference.lanes_at(ADDRESS, np.arange(n)).astype(np.int64)
    bits = x.view(np.uint32).astype(np.int64)
    exponents = ((bits & 0x7FFFFFFF) + 128 * lanes + 64) >> 23
    expected = b"".join(
        exponents[lo : lo + 4096].astype(np.uint8).tobytes() + reference.pack(bits[lo : lo + 4096] >> 31, 2)
        for lo in range(0, n, 4096)
    )
    encoded = codec("natural").encode(torch.from_numpy(x), ADDRESS)
    assert encoded.to_bytes()[HEADER.size :] == expected
    assert encoded.nbytes == codec("natural").max_nbytes(n)
    values = np.where(bits >> 31, -1.0, 1.0) * np.where(exponents > 0, 2.0 ** (exponents - 127.0), 0.0)
    np.testing.assert_array_equal(codec("natural").decode(encoded, ADDRESS).numpy(), values.astype(np.float32))


def test_values_become_one_of_their_two_neighbours() -> None:
    x = gaussian(1 << 16)
    decoded = codec("natural").decode(codec("natural").encode(x, ADDRESS), ADDRESS)
    below = torch.exp2(torch.floor(torch.log2(x.abs().double())))
    assert bool(((decoded.abs() == below) | (decoded.abs() == 2 * below)).all())
    assert torch.equal(torch.sign(decoded), torch.sign(x))


def test_powers_of_two_and_zeros_are_kept() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.0, 2.0**-126, 2.0**127, -(2.0**-20)]).repeat(3000)
    assert torch.equal(codec("natural").decode(codec("natural").encode(x, ADDRESS), ADDRESS), x)


def test_error_on_a_gaussian() -> None:
    n = 1 << 20
    x = gaussian(n).double()
    encoded = codec("natural").encode(x, ADDRESS)
    error = codec("natural").decode(encoded, ADDRESS).double() - x
    below = torch.exp2(torch.floor(torch.log2(x.abs())))
    variance = (x.abs() - below) * (2 * below - x.abs())
    squared = float((error**2).sum())
    assert abs(squared - float(variance.sum())) < 4 * math.sqrt(n) * float((error**2 - variance).std())
    assert squared / float((x**2).sum()) == pytest.approx(0.0818, abs=0.0005)
    assert encoded.bits_per_coordinate < 9.001
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(n)


@pytest.mark.parametrize("value", [1.0000001, 1.3, -1.5, 1.9999, 3e-39, -1e-38, 1.1e30])
def test_no_value_is_biased(value: float) -> None:
    n = 1 << 18
    x = torch.full((n,), value)
    exact = float(x[0])
    decoded = codec("natural").decode(codec("natural").encode(x, ADDRESS), ADDRESS).double()
    below = 2.0 ** math.floor(math.log2(abs(exact))) if abs(exact) >= 2.0**-126 else 0.0
    above = 2 * below or 2.0**-126
    p = (abs(exact) - below) / (above - below)
    deviation = (above - below) * math.sqrt(p * (1 - p) / n)
    assert abs(float(decoded.mean()) - exact) <= 4 * deviation + (above - below) * 2.0**-17


def test_values_whose_next_power_overflows_are_refused() -> None:
    with pytest.raises(EncodingError, match=r"coordinate 1 .*2\^127"):
        codec("natural").encode(torch.tensor([1.0, 1.8e38]), ADDRESS)
