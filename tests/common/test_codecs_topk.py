"""topk: exactly the k largest, found without sorting; the code of their places."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs.base import HEADER, header_check
from ditherps.errors import EncodingError, PayloadError
from ditherps.kernels import largest

ADDRESS = Address(seed=1, round=2, sender=3, domain=Domain.UPDATE)
CHUNK = 262144


def gaussian(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def largest_places(x: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Places of the k largest magnitudes, of equal ones the first, ascending: by sorting."""
    return np.sort(np.argsort(-np.abs(x.astype(np.float64)), kind="stable")[:k])


def code(places: list[int], rice: int) -> bytes:
    """Rice-coded gaps, slowly (proto/FORMAT.md)."""
    bits, last = "", -1
    for place in places:
        gap = place - last - 1
        last = place
        bits += "0" * (gap >> rice) + "1" + "".join(str(gap >> i & 1) for i in range(rice))
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


def best_code(places: list[int]) -> tuple[int, bytes]:
    """The lowest Rice parameter of the fewest bits, and its code."""

    def cost(rice: int) -> int:
        return sum((b - a - 1 >> rice) + 1 + rice for a, b in zip([-1, *places], places, strict=False))

    rice = min(range(19), key=cost)
    return rice, code(places, rice)


def documented(x: NDArray[np.float32], k: int) -> bytes:
    """The sections behind the header for float32 values."""
    places = largest_places(x, k)
    directory, codes = b"", b""
    for lo in range(0, x.size, CHUNK):
        inside = [int(p) - lo for p in places if lo <= p < lo + CHUNK]
        rice, part = best_code(inside)
        directory += (len(inside) | rice << 24).to_bytes(4, "little") + len(part).to_bytes(4, "little")
        codes += part
    return directory + x[places].tobytes() + codes


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.01), (100, 0.07), (4097, 0.5), (3000, 1.0), (5000, 1e-9)])
def test_payload_is_as_documented(n: int, fraction: float) -> None:
    x = gaussian(n).numpy()
    used = codec("topk", fraction=fraction)
    k = {1: 1, 100: 7, 4097: 2049, 3000: 3000, 5000: 1}[n]
    assert used.encode(torch.from_numpy(x), ADDRESS).to_bytes()[HEADER.size :] == documented(x, k)


def test_payload_of_several_chunks_is_as_documented() -> None:
    x = gaussian(2 * CHUNK + 999).numpy()
    x[:CHUNK] *= 0.1  # nothing of the first chunk travels
    used = codec("topk", fraction=0.002)
    encoded = used.encode(torch.from_numpy(x), ADDRESS)
    assert encoded.to_bytes()[HEADER.size :] == documented(x, math.ceil(0.002 * x.size))
    assert torch.count_nonzero(used.decode(encoded, ADDRESS, span=(0, CHUNK))) == 0


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.one_of(
            st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45])
        ),
    ),
    st.floats(1e-6, 1.0),
)
def test_the_largest_travel_and_the_others_are_zero(x: NDArray[np.float32], fraction: float) -> None:
    used = codec("topk", fraction=fraction)
    encoded = Encoded.from_bytes(used.encode(torch.from_numpy(x), ADDRESS).to_bytes())
    assert encoded.nbytes <= used.max_nbytes(x.size)
    k = used.chosen(x.size)  # type: ignore[attr-defined]
    expected = np.zeros_like(x)
    places = largest_places(x, k)
    expected[places] = x[places]
    np.testing.assert_array_equal(used.decode(encoded, ADDRESS).numpy(), expected)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros(9000),
        np.full(9000, -2.5),
        np.random.default_rng(0).integers(-3, 4, 9000),
        np.random.default_rng(1).standard_t(1, 9000),
        np.random.default_rng(2).standard_normal(9000) * 1e-42,
        1 + np.random.default_rng(3).integers(0, 50, 9000) * 2.0**-23,  # differ in the last bits only
    ],
    ids=["zeros", "equal", "ties", "cauchy", "denormal", "near"],
)
@pytest.mark.parametrize("k", [1, 2, 90, 4500, 8999, 9000])
def test_selection_equals_sorting(x: NDArray[np.float64], k: int) -> None:
    values = x.astype(np.float32)
    least, ties = largest.threshold(values.view(np.uint32), k, np.empty(largest.SELECT_COUNTS, np.int64))
    magnitudes = np.sort(np.abs(values).view(np.uint32))[::-1]
    assert least == magnitudes[k - 1]
    assert ties == k - np.count_nonzero(magnitudes > least)


@pytest.mark.parametrize(("fraction", "nmse"), [(0.01, 0.9155), (0.05, 0.721), (0.1, 0.561)])
def test_error_and_size_on_a_gaussian(fraction: float, nmse: float) -> None:
    n = 1 << 20
    x = gaussian(n)
    used = codec("topk", fraction=fraction, values="bf16")
    encoded = used.encode(x, ADDRESS)
    error = used.decode(encoded, ADDRESS).double() - x.double()
    assert float((error**2).sum() / (x.double() ** 2).sum()) == pytest.approx(nmse, abs=0.001)
    entropy = -fraction * math.log2(fraction) - (1 - fraction) * math.log2(1 - fraction)
    assert encoded.bits_per_coordinate <= 16 * fraction + 1.02 * entropy + 0.001
    if fraction == 0.01:
        assert encoded.bits_per_coordinate < 0.2425


def test_no_density_costs_much_more_than_its_entropy() -> None:
    rng = np.random.default_rng(0)
    for p in (0.5, 0.4, 0.3, 0.24, 0.13, 0.06, 0.003):
        places = np.flatnonzero(rng.random(CHUNK) < p).astype(np.uint32)
        directory = np.array([places.size, 0], np.uint32)
        written = largest.encode_places(places, directory, np.empty(CHUNK, np.uint8))
        q = places.size / CHUNK
        assert 8 * written <= 1.04 * CHUNK * -(q * math.log2(q) + (1 - q) * math.log2(1 - q)) + 8


@pytest.mark.parametrize("values", ["float32", "bf16"])
def test_values_are_kept_or_rounded_to_nearest(values: str) -> None:
    x = gaussian(2000)
    used = codec("topk", fraction=1, values=values)
    decoded = used.decode(used.encode(x, ADDRESS), ADDRESS)
    assert torch.equal(decoded, x if values == "float32" else x.bfloat16().float())


def test_values_that_round_to_infinity_are_refused() -> None:
    with pytest.raises(EncodingError, match="bfloat16"):
        codec("topk", values="bf16").encode(torch.tensor([1.0, 3.4e38]), ADDRESS)


@pytest.mark.parametrize("fraction", [0.01, 0.37, 0.9])
def test_the_bound_of_size_holds_for_the_worst_places(fraction: float) -> None:
    n = CHUNK + 5000
    used = codec("topk", fraction=fraction)
    k = math.ceil(fraction * n)
    for spread in (n // k, 1, 2):
        x = torch.zeros(n)
        x[torch.arange(k) * spread % n] = 1.0
        assert used.encode(x, ADDRESS).nbytes <= used.max_nbytes(n)
        assert used.encode(x.flip(0), ADDRESS).nbytes <= used.max_nbytes(n)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_it_is_a_contraction(fraction: float) -> None:
    rng = np.random.default_rng(0)
    for x in (rng.standard_t(1.2, 5000), rng.laplace(size=300), np.full(777, -3.0)):
        values = torch.from_numpy(x.astype(np.float32))
        used = codec("topk", fraction=fraction)
        error = used.decode(used.encode(values, ADDRESS), ADDRESS).double() - values.double()
        kept = math.ceil(fraction * values.numel() - 1e-9) / values.numel()
        assert float((error**2).sum()) <= (1 - kept) * float((values.double() ** 2).sum()) * (1 + 1e-9)
    assert codec("topk").contractive
    assert not codec("topk").unbiased


def test_the_share_is_that_of_the_decimal_number() -> None:
    assert 0.07 * 100 > 7
    assert codec("topk", fraction=0.07).chosen(100) == 7  # type: ignore[attr-defined]
    assert codec("topk", fraction=0.07).chosen(101) == 8  # type: ignore[attr-defined]


DIRECTORIES: list[dict[str, Any]] = [
    {"count": 4},  # not all values
    {"count": 6},
    {"count": 0xFFFFFF},
    {"rice": 19},
    {"rice": 255},
    {"size": 0},
    {"size": 2**32 - 1},
    {"code": b"\x00" * 9},  # no end
    {"code": code([0, 1, 2, 3], 0)},  # one place too few
    {"code": code([0, 1, 2, 3, 4], 0) + b"\x00"},  # a byte too many
    {"code": code([0, 1, 2, 3, 500], 0)},  # beyond the vector
    {"code": code([0, 1, 2, 3, 4], 3)[:-1], "rice": 3},  # cut off
]


@pytest.mark.parametrize("wrong", DIRECTORIES, ids=str)
def test_a_forged_directory_is_refused(wrong: dict[str, Any]) -> None:
    used = codec("topk")
    x = torch.zeros(500)
    encoded = used.encode(x, ADDRESS)  # of zeros, the first five travel

    def forged(count: int = 5, rice: int = 0, size: int | None = None, code: bytes = b"\x1f") -> Encoded:
        size = len(code) if size is None else size
        payload = bytearray(encoded.to_bytes()[: HEADER.size])
        payload += (count | rice << 24).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(20) + code
        payload[28:32] = header_check(np.frombuffer(payload, np.uint8), len(payload)).to_bytes(4, "little")
        return Encoded.from_bytes(bytes(payload))

    assert forged().to_bytes() == encoded.to_bytes()
    with pytest.raises(PayloadError):
        used.validate(forged(**wrong))
