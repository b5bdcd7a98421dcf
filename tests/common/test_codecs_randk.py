"""randk and globalrandk: which coordinates travel, that each has its chance, that nothing is biased."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from ditherps import Address, Domain, codec
from ditherps.codecs.base import HEADER, Codec
from ditherps.codecs.strata import share
from ditherps.dither import SERVER
from ditherps.kernels import reference, strata

ADDRESS = Address(seed=1, round=2, sender=3, domain=Domain.UPDATE, start=700)


def gaussian(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def choice(address: Address, sender: int, n: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chosen coordinates and the sizes of their strata, in Python integers (proto/FORMAT.md)."""
    where = Address(address.seed, address.round, sender, Domain.COORDINATES, address.attempt, address.start)
    places, sizes, begin = [], [], 0
    for i in range(k):
        size = n // k + (i < n % k)
        m = min(size, 4)
        lanes = reference.lanes_at(where, begin + np.arange(m)).tolist()
        word = sum(lane << 16 * j for j, lane in enumerate(lanes))
        places.append(begin + (word * size >> 16 * m))
        sizes.append(size)
        begin += size
    assert begin == n
    return np.array(places, np.int64), np.array(sizes, np.int64)


@pytest.mark.parametrize(
    ("n", "fraction"), [(1, 0.01), (9001, 0.01), (5000, 0.3), (5000, 0.45), (5000, 0.8), (4097, 1)]
)
@pytest.mark.parametrize("values", ["float32", "bf16"])
def test_payload_of_randk_is_as_documented(n: int, fraction: float, values: str) -> None:
    x = gaussian(n).numpy()
    used = codec("randk", fraction=fraction, values=values)
    places, sizes = choice(ADDRESS, ADDRESS.sender, n, max(1, math.ceil(fraction * n)))
    section = x[places]
    if values == "bf16":
        lanes = reference.lanes_at(ADDRESS, places).astype(np.int64)
        halves = ((section.view(np.uint32).astype(np.int64) + lanes) >> 16).astype("<u2")
        section = (halves.astype(np.uint32) << 16).view(np.float32)
    encoded = used.encode(torch.from_numpy(x), ADDRESS)
    assert encoded.to_bytes()[HEADER.size :] == (halves if values == "bf16" else section).tobytes()
    expected = np.zeros(n, np.float32)
    expected[places] = (section.astype(np.float64) * sizes).astype(np.float32)
    np.testing.assert_array_equal(used.decode(encoded, ADDRESS).numpy(), expected)


@pytest.mark.parametrize("bits", [0, 1, 2, 4, 6, 8, 12])
@pytest.mark.parametrize("k", [1, 300, 4500])
def test_payload_of_globalrandk_is_as_documented(k: int, bits: int) -> None:
    n = 7000
    x = gaussian(n).numpy()
    used = codec("globalrandk", coordinates=k, bits=bits)
    places, sizes = choice(ADDRESS, SERVER, n, k)
    values = x[places].astype(np.float64)
    encoded = used.encode(torch.from_numpy(x), ADDRESS)
    section = encoded.to_bytes()[HEADER.size :]
    if bits:
        norm, s = np.abs(values).max(), 2**bits - 1
        q = np.floor(values * (s / norm) + (reference.lanes_at(ADDRESS, places) + 0.5) / 65536).astype(np.int64)
        expected = np.float32(norm).tobytes()
        for lo in range(0, k, 4096):
            run = q[lo : lo + 4096] + s
            if 2 * s + 1 > 256:
                expected += (run % 256).astype(np.uint8).tobytes()
                expected += reference.pack(run // 256, -(-(2 * s + 1) // 256))
            else:
                expected += reference.pack(run, 2 * s + 1)
        assert section == expected
        values = q * (norm / s)
    else:
        assert section == x[places].tobytes()
    decoded = np.zeros(n, np.float32)
    decoded[places] = (values * sizes).astype(np.float32)
    np.testing.assert_array_equal(used.decode(encoded, ADDRESS).numpy(), decoded)


@pytest.mark.parametrize("size", [*range(1, 40), 100, 4096, 65537, 2**35])
def test_each_coordinate_of_a_stratum_has_its_chance(size: int) -> None:
    """Of all words W, floor or ceil of 2^16m / s choose coordinate j: counted exactly, not drawn."""
    m = min(size, 4)
    words = 1 << 16 * m
    for j in {*range(min(size, 50)), size - 1}:
        first, beyond = -(-j * words // size), -(-(j + 1) * words // size)
        assert first * size >> 16 * m == j == (beyond - 1) * size >> 16 * m
        assert beyond - first in (words // size, -(-words // size))
        assert abs((beyond - first) * size - words) < size
        assert (beyond - first) * size == words or size & (size - 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 100, 1000, 65535, 65537, 2**33])
def test_choosing_equals_long_multiplication(size: int) -> None:
    """Also where only the lower lanes decide, which is rare for small strata: so many are tried."""
    stream = ADDRESS.stream(0)
    m = min(size, 4)
    begins = np.arange(4000) * m
    lanes = reference.lanes_at(ADDRESS, begins[:, None] + np.arange(m)).tolist()
    for begin, digits in zip(begins.tolist(), lanes, strict=True):
        word = sum(lane << 16 * j for j, lane in enumerate(digits))
        assert strata.chosen(stream, begin, size) == begin + (word * size >> 16 * m)


@pytest.mark.parametrize(("n", "k"), [(10, 3), (10, 10), (10, 1), (9, 4), (2**35, 7), (2**35, 2**34 + 5)])
def test_strata_follow_each_other(n: int, k: int) -> None:
    for i in {0, min(1, k - 1), k // 3, n % k, k - 1}:
        begin, size = strata.stratum(n, k, i)
        assert strata.stratum_of(n, k, begin) == strata.stratum_of(n, k, begin + size - 1) == i
        assert begin + size == (strata.stratum(n, k, i + 1)[0] if i + 1 < k else n)


def places_of(used: Codec, n: int, address: Address) -> NDArray[np.int64]:
    return np.flatnonzero(used.decode(used.encode(torch.ones(n), address), address).numpy())


def test_choices_are_uniform_and_independent() -> None:
    size, k = 7, 30000
    used = codec("randk", fraction=1 / 7)
    places = places_of(used, size * k, ADDRESS)
    assert places.size == k
    inside = places - size * np.arange(k)
    assert stats.chisquare(np.bincount(inside, minlength=size)).pvalue > 1e-3
    pairs = np.bincount(inside[:-1] * size + inside[1:], minlength=size * size)
    assert stats.chisquare(pairs).pvalue > 1e-3
    later = places_of(used, size * k, Address(1, 3, 3, Domain.UPDATE, start=700)) - size * np.arange(k)
    assert stats.chisquare(np.bincount(inside * size + later, minlength=size * size)).pvalue > 1e-3


@pytest.mark.parametrize(("name", "shared"), [("randk", False), ("globalrandk", True)])
def test_who_shares_a_choice(name: str, shared: bool) -> None:
    used = codec(name, fraction=0.1)
    mine = places_of(used, 5000, Address(1, 2, 0, Domain.UPDATE))
    assert mine.size == 500
    other = places_of(used, 5000, Address(1, 2, 1, Domain.UPDATE))
    assert np.array_equal(mine, other) == shared
    for address in (Address(1, 3, 0, Domain.UPDATE), Address(1, 2, 0, Domain.UPDATE, attempt=1)):
        assert not np.array_equal(mine, places_of(used, 5000, address))
    assert used.summable == shared


UNBIASED: list[tuple[str, dict[str, Any]]] = [
    ("randk", {"fraction": 0.3}),
    ("randk", {"fraction": 0.3, "values": "bf16"}),
    ("globalrandk", {"fraction": 0.3, "bits": 0}),
    ("globalrandk", {"fraction": 0.3, "bits": 2}),
    ("globalrandk", {"coordinates": 700, "bits": 8}),
]


@pytest.mark.parametrize(("name", "options"), UNBIASED, ids=str)
def test_decoding_is_unbiased_over_rounds(name: str, options: dict[str, Any]) -> None:
    n, rounds = 1000, 1500
    used = codec(name, **options)
    x = gaussian(n, 5)
    x += 0.5 * x.sign()  # so that no value is so small that chance hardly ever takes it
    total, squares = np.zeros(n), np.zeros(n)
    for round_ in range(rounds):
        address = Address(1, round_, 0, Domain.UPDATE)
        error = used.decode(used.encode(x, address), address).double().numpy() - x.double().numpy()
        total += error
        squares += error**2
    deviation = total / np.sqrt(np.maximum(squares, 1e-9))
    # Every coordinate within what 1000 Gaussians reach, and all together within four standard errors.
    assert np.abs(deviation).max() < 5
    assert abs(deviation.mean()) < 4 / math.sqrt(n)
    assert 0.5 < deviation.std() < 1.2


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_error_is_as_large_as_theory_says(fraction: float) -> None:
    n = 1 << 18
    x = gaussian(n).double()
    for used in (codec("randk", fraction=fraction), codec("globalrandk", fraction=fraction, bits=0)):
        encoded = used.encode(x, ADDRESS)
        error = used.decode(encoded, ADDRESS).double() - x
        nmse = float((error**2).sum() / (x**2).sum())
        k = share(fraction, n)
        # (n/k)^2 of a mean of k squares of Gaussians, each of variance 2.
        assert abs(nmse - (n / k - 1)) < 4 * math.sqrt(2 / k) * n / k + k / (4 * n)
        assert encoded.nbytes == HEADER.size + 4 * k


def test_the_quantizer_adds_its_error_times_the_scale() -> None:
    n, k = 1 << 16, 1 << 14
    x = gaussian(n).double()
    used = codec("globalrandk", coordinates=k, bits=4)
    encoded = used.encode(x, ADDRESS)
    exact = codec("globalrandk", coordinates=k, bits=0)
    added = used.decode(encoded, ADDRESS).double() - exact.decode(exact.encode(x, ADDRESS), ADDRESS).double()
    places, _ = choice(ADDRESS, SERVER, n, k)
    values = x.float().double().numpy()[places]
    step = np.abs(values).max() / 15
    p = np.mod(values / step, 1)
    squared = (added.numpy()[places] / 4) ** 2
    assert abs((squared - step**2 * p * (1 - p)).mean()) < 4 * squared.std() / math.sqrt(k)
    # 31 symbols, nine in 48 bits.
    assert encoded.bits_per_coordinate == pytest.approx(16 / 3 / 4, abs=0.02)


def test_payloads_of_workers_add() -> None:
    used = codec("globalrandk", fraction=0.2, bits=0)
    addresses = [Address(1, 2, sender, Domain.UPDATE) for sender in range(3)]
    payloads = [used.encode(gaussian(5000, a.sender), a) for a in addresses]
    total = np.sum([p.data[HEADER.size :].view(np.float32) for p in payloads], axis=0, dtype=np.float64)
    separately = torch.stack([used.decode(p, a) for p, a in zip(payloads, addresses, strict=True)]).double().sum(0)
    np.testing.assert_allclose(total * 5, separately.numpy()[np.flatnonzero(separately.numpy())], rtol=1e-5, atol=1e-5)


def test_rounding_to_bf16_is_exactly_unbiased() -> None:
    """Over all 65536 lanes, each value goes up as often as its lower half says."""
    lanes = np.arange(65536, dtype=np.int64)
    for word in (0x3F800001, 0x3F808000, 0x40FFFFFF, 0x00000001, 0xBF812345):
        up = ((word + lanes) >> 16) - (word >> 16)
        assert up.sum() == word & 0xFFFF
