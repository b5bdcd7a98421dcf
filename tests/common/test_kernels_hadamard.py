"""The randomized Hadamard transform against a slow one, its inverse, its signs, its bounds."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import hadamard as hadamard_matrix

from ditherps import Address, Domain
from ditherps.dither import TILE, lanes_at
from ditherps.kernels import hadamard

SIZES = [1, 2, 3, 5, 63, 64, 65, 100, 4095, 4096, 4097, 5000, 8192, 12000]
LANES, SIGNS = np.empty(TILE, np.uint16), np.empty(TILE, np.float32)
TOOLS = (LANES, SIGNS, SIGNS.view(np.int32))


def address(start: int = 0, round_: int = 1) -> Address:
    return Address(seed=5, round=round_, sender=2, domain=Domain.ROTATION, start=start)


def gaussian(n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def rotated(x: NDArray[np.float32], block: int = 65536, start: int = 0, round_: int = 1) -> NDArray[np.float32]:
    out = np.full_like(x, np.nan)
    hadamard.rotate_vector(x, block, address(start, round_).stream(x.size), *TOOLS, out)
    return out


def rotated_back(x: NDArray[np.float32], block: int = 65536, start: int = 0) -> NDArray[np.float32]:
    into = np.zeros_like(x)
    for lo in range(0, x.size, block):
        part = x[lo : lo + block].copy()
        stream = address(start).stream(x.size)
        one = np.float32(1.0)
        hadamard.add_rotated_back(part, part.view(np.int32), 0, part.size, stream, lo, *TOOLS, one, into, lo)
    return into


def slow_transform(x: NDArray[np.float64]) -> NDArray[np.float64]:
    if x.size == 1:
        return x
    a, b = slow_transform(x[: x.size // 2]), slow_transform(x[x.size // 2 :])
    return np.concatenate((a + b, a - b))


def slow_signs(begin: int, count: int, second: bool) -> NDArray[np.float64]:
    f = np.arange(begin, begin + count)
    lane = lanes_at(address(), f // 65536 * 4096 + f % 4096 + (second << 34))
    return np.where((lane >> (f // 4096 % 16)) & 1, -1.0, 1.0)


def slow_rotation(x: NDArray[np.float32], block: int, start: int) -> NDArray[np.float64]:
    out = x.astype(np.float64)
    for lo in range(0, x.size, block):
        part = out[lo : lo + block]
        p = 1 << (part.size.bit_length() - 1)
        part[:p] = slow_transform(slow_signs(start + lo, p, False) * part[:p]) / np.sqrt(p)
        if p < part.size:
            rest = part.size - p
            part[rest:] = slow_transform(slow_signs(start + lo + rest, p, True) * part[rest:]) / np.sqrt(p)
    return out


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_transform_is_the_hadamard_matrix(size: int) -> None:
    x = np.random.default_rng(size).integers(-100, 100, size + 7).astype(np.float32)  # sums of integers are exact
    y = x.copy()
    hadamard.transform(y, 3, size)
    np.testing.assert_array_equal(y[3 : 3 + size], hadamard_matrix(size) @ x[3 : 3 + size].astype(np.float64))
    np.testing.assert_array_equal(np.delete(y, slice(3, 3 + size)), np.delete(x, slice(3, 3 + size)))


@pytest.mark.parametrize("size", [8192, 16384, 65536, 131072])
def test_transform_beyond_a_tile(size: int) -> None:
    x = np.random.default_rng(size).integers(-20, 20, size).astype(np.float32)
    y = x.copy()
    hadamard.transform(y, 0, size)
    np.testing.assert_array_equal(y, slow_transform(x.astype(np.float64)))


@pytest.mark.parametrize("start", [0, 1000, 65536 * 3 - 2000])
@pytest.mark.parametrize("size", SIZES)
def test_rotation_is_the_documented_one(size: int, start: int) -> None:
    x = gaussian(size)
    np.testing.assert_allclose(rotated(x, 4096, start), slow_rotation(x, 4096, start), atol=3e-6)
    np.testing.assert_allclose(rotated(x, 65536, start), slow_rotation(x, 65536, start), atol=3e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100, 200])
def test_rotation_is_orthonormal(size: int) -> None:
    matrix = np.stack([rotated(row) for row in np.eye(size, dtype=np.float32)]).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)


@pytest.mark.parametrize("block", [4096, 65536])
@pytest.mark.parametrize("start", [0, 777, 2**35 - 70000])
@pytest.mark.parametrize("size", [*SIZES, 70000])
def test_rotating_back_inverts(size: int, start: int, block: int) -> None:
    x = gaussian(size)
    y = rotated(x, block, start)
    assert abs(np.linalg.norm(y.astype(np.float64)) / np.linalg.norm(x.astype(np.float64)) - 1) < 1e-6
    np.testing.assert_allclose(rotated_back(y, block, start), x, atol=5e-6)


def test_rotating_back_adds_weight_times() -> None:
    x, before = gaussian(5000), gaussian(5000, 1)
    into, y = before.copy(), rotated(x)
    part = y.copy()
    stream, weight = address().stream(5000), np.float32(0.3)
    hadamard.add_rotated_back(part, part.view(np.int32), 0, 5000, stream, 0, *TOOLS, weight, into, 0)
    np.testing.assert_array_equal(into, before + weight * rotated_back(y))


def test_rounds_and_coordinates_have_their_own_signs() -> None:
    n = 1 << 17
    one = np.ones(n, np.float32)
    streams = [address(0), address(0, 2), address(n)]
    signs = []
    for each in streams:
        out = np.empty(n, np.float32)
        for lo in range(0, n, TILE):
            scale = np.float32(1.0)
            hadamard.fill_signs(each.stream(n), lo, TILE, 0, scale, -1, *TOOLS)
            out[lo : lo + TILE] = SIGNS
        signs.append(out)
        assert abs(out @ one) < 4 * np.sqrt(n)
        for lag in (1, 512, 4096, 65536):
            assert abs(out[lag:] @ out[:-lag]) < 4 * np.sqrt(n)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(signs[a] @ signs[b]) < 4 * np.sqrt(n)


def test_a_spike_is_spread_evenly() -> None:
    x = np.zeros(65536, np.float32)
    x[1234] = 256.0
    assert np.all(np.abs(rotated(x)) == 1.0)


def test_heavy_tails_become_gaussian() -> None:
    from scipy import stats

    x = np.random.default_rng(3).standard_t(3, 65536).astype(np.float32)
    y = rotated(x).astype(np.float64)
    assert float(stats.kurtosis(x)) > 10
    assert abs(float(stats.kurtosis(y))) < 0.1
    assert stats.kstest(y / y.std(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("size", [100, 4096, 5000, 65536, 1 << 20])
def test_rotating_back_stays_finite(size: int) -> None:
    x = np.full(size, np.finfo(np.float32).max, np.float32)
    x[::3] *= -1
    assert np.isfinite(rotated_back(x, 1 << 20)).all()
    x[:] = np.float32(hadamard.LARGEST_INPUT)
    assert np.abs(rotated(x, 1 << 20)).max() <= hadamard.LARGEST_ROTATED
