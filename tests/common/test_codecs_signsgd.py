"""signsgd: signs, scales, what it loses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ditherps import Address, Domain, codec
from ditherps.codecs.base import HEADER
from ditherps.kernels import reference

ADDRESS = Address(seed=1, round=2, sender=3, domain=Domain.UPDATE)


def gaussian(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def scale_of(x: NDArray[np.float32]) -> np.float32:
    """The mean magnitude, summed as proto/FORMAT.md says."""
    sums = [0.0] * 64
    for i, value in enumerate(x.astype(np.float64)):
        sums[i % 64] += abs(float(value))
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [sums[i] + sums[i + half] for i in range(half)]
    return np.float32(sums[0] / x.size)


@pytest.mark.parametrize("bucket", [0, 64, 512, 4096])
@pytest.mark.parametrize("n", [1, 63, 4097, 9000])
def test_payload_is_as_documented(bucket: int, n: int) -> None:
    x = gaussian(n).numpy()
    x[::7] = 0.0
    x[1::7] = -0.0
    width = bucket or n
    scales = [scale_of(x[lo : lo + width]) for lo in range(0, n, width)]
    tiles = b"".join(reference.pack((x[lo : lo + 4096] < 0).astype(np.int64), 2) for lo in range(0, n, 4096))
    encoded = codec("signsgd", bucket=bucket).encode(torch.from_numpy(x), ADDRESS)
    assert encoded.to_bytes()[HEADER.size :] == np.array(scales, "<f4").tobytes() + tiles
    assert encoded.nbytes == codec("signsgd", bucket=bucket).max_nbytes(n)
    decoded = codec("signsgd", bucket=bucket).decode(encoded, ADDRESS).numpy()
    expected = np.where(x < 0, -1, 1).astype(np.float32) * np.repeat(np.array(scales, np.float32), width)[:n]
    np.testing.assert_array_equal(decoded, expected)


def test_error_on_a_gaussian_is_one_minus_two_over_pi() -> None:
    n = 1 << 20
    x = gaussian(n).double()
    encoded = codec("signsgd").encode(x, ADDRESS)
    error = codec("signsgd").decode(encoded, ADDRESS).double() - x
    nmse = float((error**2).sum() / (x**2).sum())
    # 1 - m^2 / v of the sample: its standard deviation is about sqrt(Var(2 m |x| - m^2 x^2) / n) for m^2 = 2/pi.
    m = math.sqrt(2 / math.pi)
    deviation = float((2 * m * x.abs() - m**2 * x**2).std()) / math.sqrt(n)
    assert abs(nmse - (1 - 2 / math.pi)) < 4 * deviation
    assert encoded.bits_per_coordinate < 1.001


@pytest.mark.parametrize("options", [{}, {"bucket": 256}], ids=str)
def test_it_is_a_contraction(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for x in (rng.standard_t(1.2, 5000), rng.laplace(size=300), np.eye(1, 4096)[0], np.full(777, -3.0)):
        values = torch.from_numpy(x.astype(np.float32))
        used = codec("signsgd", **options)
        error = used.decode(used.encode(values, ADDRESS), ADDRESS).double() - values.double()
        width = options.get("bucket") or values.numel()
        assert float((error**2).sum()) <= (1 - 1 / width) * float((values.double() ** 2).sum()) * (1 + 1e-6)
    assert codec("signsgd").contractive
    assert not codec("signsgd").unbiased


def test_zero_buckets_stay_zero_beside_others() -> None:
    x = gaussian(8192)
    x[:4096] = 0
    decoded = codec("signsgd", bucket=4096).decode(codec("signsgd", bucket=4096).encode(x, ADDRESS), ADDRESS)
    assert torch.count_nonzero(decoded[:4096]) == 0
    assert torch.count_nonzero(decoded[4096:]) == 4096
