"""eden: its codebooks, its error as published, unbiasedness, exact sizes, a slow counterpart of its bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs.base import HEADER, header_check
from ditherps.codecs.rotation import signs_of
from ditherps.dither import TILE, lanes
from ditherps.errors import EncodingError, NonFiniteError, OptionError, PayloadError, Reason
from ditherps.kernels import cpu, eden, hadamard, reference

ADDRESS = Address(seed=12345, round=7, sender=3, domain=Domain.UPDATE)
DISTORTION = {bits: book.distortion for bits, book in eden.CODEBOOKS.items()}


def gaussian(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def student(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, n).astype(np.float32))


def theory(bits: float) -> float:
    """NMSE for Gaussian coordinates: D / (1 - D), D the mean distortion; (1 + that of one bit) / bits - 1 below one."""
    if bits < 1:
        return 1 / (bits * (1 - DISTORTION[1])) - 1
    low, part = int(bits), bits - int(bits)
    mean = (1 - part) * DISTORTION[low] + (part * DISTORTION[low + 1] if part else 0.0)
    return mean / (1 - mean)


def chosen_of(address: Address, count: int, chosen: int) -> NDArray[np.int32]:
    places, work = np.empty(count, np.int32), cpu.workspace()
    stream = dataclasses.replace(address, domain=Domain.COORDINATES).stream(count)
    eden.choose(stream, 0, count, chosen, work.lanes, work.scratch, np.empty(0, np.float32), places)
    return places


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codebooks_are_those_of_lloyd_and_max(bits: int) -> None:
    book = eden.CODEBOOKS[bits]
    levels = book.levels.astype(np.float64)
    assert levels.size == 2**bits
    np.testing.assert_array_equal(levels, -levels[::-1])
    edges = np.array([-np.inf, *book.cuts, np.inf])
    mass = np.diff(stats.norm.cdf(edges))
    means = -np.diff(stats.norm.pdf(edges)) / mass
    np.testing.assert_allclose(levels, means, atol=2e-7)
    np.testing.assert_allclose(book.cuts, (levels[1:] + levels[:-1]) / 2, atol=2e-7)
    assert abs(1 - np.sum(mass * means**2) - book.distortion) < 1e-9


@pytest.mark.parametrize(("bits", "published"), [(1, 0.571), (2, 0.1331), (3, 0.03578), (4, 0.00959)])
@pytest.mark.parametrize("source", ["gaussian", "student"])
def test_error_is_as_published(bits: int, published: float, source: str) -> None:
    n = 1 << 19
    x = gaussian(n) if source == "gaussian" else student(n)
    used = codec("eden", bits=bits)
    encoded = used.encode(x, ADDRESS)
    energy = float(x.double().square().sum())
    error = float((used.decode(encoded, ADDRESS).double() - x.double()).square().sum())
    # Squared errors of single coordinates spread as their mean or less.
    assert abs(error / energy / published - 1) < 0.002 + 4 * np.sqrt(2 / n)
    assert abs(used.expected_squared_error(encoded) / error - 1) < 0.01
    assert encoded.nbytes == HEADER.size + n // 65536 * (4 + 8192 * bits)
    assert abs(theory(bits) / published - 1) < 0.001


@pytest.mark.parametrize("bits", [0.1, 0.5, 0.9, 1.25, 1.5, 2.5, 3.9])
def test_fractions_of_bits_cost_what_they_say(bits: float) -> None:
    n = 1 << 19
    used, x = codec("eden", bits=bits), gaussian(n)
    encoded = used.encode(x, ADDRESS)
    error = float((used.decode(encoded, ADDRESS).double() - x.double()).square().sum())
    nmse = error / float(x.double().square().sum())
    tolerance = 0.005 if bits >= 1 else 5 / np.sqrt(bits * n)  # which coordinates travel matters too
    assert abs(nmse / theory(bits) - 1) < tolerance
    assert abs(used.expected_squared_error(encoded) / error - 1) < 2 * tolerance
    assert bits <= encoded.bits_per_coordinate < bits + 0.003
    assert encoded.nbytes == used.max_nbytes(n)


@pytest.mark.parametrize("bits", [0.3, 1, 1.5, 3])
def test_decoding_is_unbiased_over_rounds(bits: float) -> None:
    n, rounds = 5000, 300
    used, x = codec("eden", bits=bits, block=4096), gaussian(n, 1)
    total, squares = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for round_ in range(rounds):
        address = Address(1, round_, 0, Domain.UPDATE)
        error = used.decode(used.encode(x, address), address).double() - x.double()
        total, squares = total + error, squares + error.square()
    # The squares of the means are what independent rounds leave, to four standard errors.
    deviation = (total / squares.sqrt()).numpy()
    assert abs((deviation**2).mean() - 1) < 4 * np.sqrt(2 / n)
    assert np.abs(deviation).max() < 5
    for direction in (x.double(), x.double().sign(), torch.ones(n, dtype=torch.float64)):
        spread = float((squares * direction.square()).sum().sqrt())
        assert abs(float((total * direction).sum())) < 4 * spread


def test_a_coordinate_that_matters_is_biased_as_documented() -> None:
    """The price of the Hadamard transform: a third of the coordinate's share of the square."""
    share, rounds = 0.3, 300
    used, x = codec("eden", bits=1, block=4096), gaussian(4096)
    x[7] = float((x.square().sum() * share / (1 - share)).sqrt())
    total = 0.0
    for round_ in range(rounds):
        address = Address(1, round_, 0, Domain.UPDATE)
        total += float(used.decode(used.encode(x, address), address)[7] / x[7])
    assert abs(total / rounds - 1 - share / 3) < 0.015


@pytest.mark.parametrize("bits", [1, 2, 2.7, 4])
def test_the_part_along_the_vector_is_exact(bits: float) -> None:
    """S = ||x||^2 / <c, Rx>, block by block."""
    used, x = codec("eden", bits=bits, block=4096), student(3 * 4096 + 777)
    decoded = used.decode(used.encode(x, ADDRESS), ADDRESS)
    for lo in range(0, x.numel(), 4096):
        a, b = x[lo : lo + 4096].double(), decoded[lo : lo + 4096].double()
        assert abs(float((a * b).sum() / (a * a).sum()) - 1) < 1e-6


@pytest.mark.parametrize(("count", "chosen"), [(1, 0), (1, 1), (10, 3), (4096, 4096), (5000, 0), (9999, 1234)])
def test_choice_is_an_ordered_partition(count: int, chosen: int) -> None:
    places = chosen_of(ADDRESS, count, chosen)
    assert sorted(places) == list(range(count))
    others = places[: count - chosen]
    assert np.all(np.diff(others) > 0)
    assert np.all(np.diff(places[count - chosen :]) > 0)
    lane, wanted = lanes(dataclasses.replace(ADDRESS, domain=Domain.COORDINATES), count).astype(np.int64), chosen
    mask = np.zeros(count, bool)
    mask[places[count - chosen :]] = True
    for i in range(count):
        assert mask[i] == ((2 * int(lane[i]) + 1) * (count - i) < 2**17 * wanted)
        wanted -= int(mask[i])
    assert wanted == 0


def test_choice_is_uniform() -> None:
    count, chosen, rounds = 50, 15, 4000
    hits = np.zeros(count)
    both = 0
    for round_ in range(rounds):
        places = chosen_of(Address(2, round_, 0, Domain.UPDATE), count, chosen)[count - chosen :]
        hits[places] += 1
        both += {0, 1} <= set(places.tolist())
    p = chosen / count
    deviation = (hits / rounds - p) / np.sqrt(p * (1 - p) / rounds)
    assert np.abs(deviation).max() < 4
    pair = p * (chosen - 1) / (count - 1)
    assert abs(both / rounds - pair) < 4 * np.sqrt(pair * (1 - pair) / rounds)


def slow_payload(x: NDArray[np.float32], bits: float, block: int) -> bytes:
    """The sections behind the header, from the documented formulas; only the rotation is the kernel's."""
    work, n = cpu.workspace(), x.size
    tools = (work.lanes, work.word, work.word_bits)
    scales, digits = b"", b""
    for lo in range(0, n, block):
        part = x[lo : lo + block]
        m = part.size
        sparse, share = bits < 1, bits if bits < 1 else bits - int(bits)
        k = max(int(share * m + 0.5), int(sparse))
        lane = lanes(dataclasses.replace(ADDRESS, domain=Domain.COORDINATES, start=lo), m).astype(np.int64)
        mask, wanted = np.zeros(m, bool), k
        for i in range(m):
            mask[i] = (2 * lane[i] + 1) * (m - i) < 2**17 * wanted
            wanted -= int(mask[i])
        given = np.ascontiguousarray(part[mask] if sparse else part)
        v = np.empty_like(given)
        hadamard.rotate(given, 0, given.size, signs_of(ADDRESS, n), lo, *tools, v, 0)
        runs = [(v, 1)] if sparse else [(v[~mask], int(bits)), (v[mask], int(bits) + 1)]
        square = float(np.sum(v.astype(np.float64) ** 2))
        if square == 0:
            scales += np.float32(0).tobytes()
            continue
        sigma, product = np.sqrt(square / v.size), 0.0
        for values, b in runs:
            if not values.size:
                continue
            book = eden.CODEBOOKS[b]
            levels = book.levels.astype(np.float64)
            nearest = np.abs(values[:, None] / sigma - levels).argmin(axis=1)
            product += float(levels[nearest] @ values)
            for begin in range(0, values.size, TILE):
                digits += reference.pack(nearest[begin : begin + TILE], 2**b)
        scales += np.float32(square / product * (m / v.size)).tobytes()
    return scales + digits


@pytest.mark.parametrize("n", [1, 100, 4096, 5000, 9000])
@pytest.mark.parametrize("bits", [0.3, 1, 1.5, 2, 3.25, 4])
def test_bytes_are_those_of_the_formulas(bits: float, n: int) -> None:
    x = student(n, 5)
    x[4096:8192] = 0
    used = codec("eden", bits=bits, block=4096)
    payload = used.encode(x, ADDRESS).to_bytes()[HEADER.size :]
    slow = slow_payload(x.numpy(), bits, 4096)
    blocks = 4 * -(-n // 4096)
    assert payload[blocks:] == slow[blocks:]
    np.testing.assert_allclose(
        np.frombuffer(payload[:blocks], np.float32), np.frombuffer(slow[:blocks], np.float32), rtol=1e-6
    )
    assert used.encode(x, ADDRESS).to_bytes()[HEADER.size :] == payload


@pytest.mark.parametrize("n", [0, 1, 2, 4095, 4096, 4097, 10000])
@pytest.mark.parametrize("bits", [0.01, 0.5, 1, 2.3, 4])
def test_sizes(bits: float, n: int) -> None:
    used, x = codec("eden", bits=bits, block=4096), gaussian(n)
    encoded = Encoded.from_bytes(used.encode(x, ADDRESS).to_bytes())
    used.validate(encoded, n)
    assert encoded.nbytes == used.max_nbytes(n)
    assert used.decode(encoded, ADDRESS).shape == (n,)
    assert used.encode(x.double(), ADDRESS).to_bytes() == encoded.to_bytes()


@pytest.mark.parametrize("bits", [0.4, 1, 2.5])
def test_zero_blocks_cost_their_scale(bits: float) -> None:
    used, x = codec("eden", bits=bits, block=4096), gaussian(5 * 4096)
    full = used.encode(x, ADDRESS).nbytes
    x[4096 : 3 * 4096] = 0
    encoded = used.encode(x, ADDRESS)
    assert full - encoded.nbytes == 2 * (full - HEADER.size - 20) // 5
    assert torch.count_nonzero(used.decode(encoded, ADDRESS)[4096 : 3 * 4096]) == 0
    zeros = used.encode(torch.zeros(5 * 4096), ADDRESS)
    assert zeros.nbytes == HEADER.size + 20
    assert used.expected_squared_error(zeros) == 0
    assert torch.count_nonzero(used.decode(zeros, ADDRESS)) == 0


@pytest.mark.parametrize("start", [0, 1, 65536 * 2 - 5000])
@pytest.mark.parametrize("bits", [0.4, 2, 2.5])
def test_any_span_equals_the_part_of_the_whole(bits: float, start: int) -> None:
    used, n = codec("eden", bits=bits, block=8192), 3 * 8192 + 777
    x, address = gaussian(n), Address(3, 1, 1, Domain.UPDATE, start=start)
    x[8192:16384] = 0
    encoded = used.encode(x, address)
    whole = used.decode(encoded, address)
    for lo in range(0, n, 8192):
        for hi in {*range(lo, n, 8192), n}:
            assert torch.equal(used.decode(encoded, address, span=(lo, hi)), whole[lo:hi])


@pytest.mark.parametrize("bits", [0.4, 1, 2.5])
def test_accumulate_is_multiply_then_add(bits: float) -> None:
    used, x, before = codec("eden", bits=bits, block=4096), gaussian(9999), gaussian(9999, 1)
    encoded, into = used.encode(x, ADDRESS), before.clone()
    used.accumulate(encoded, ADDRESS, into, 0.3)
    expected = before.numpy() + np.float32(0.3) * used.decode(encoded, ADDRESS).numpy()
    np.testing.assert_array_equal(into.numpy(), expected)


@pytest.mark.parametrize("bits", [0.4, 1, 2.5])
def test_bad_input_names_the_coordinate(bits: float) -> None:
    used = codec("eden", bits=bits, block=4096)
    for bad in (float("nan"), float("inf")):
        x = gaussian(20000)
        x[9000] = bad
        with pytest.raises(NonFiniteError, match="coordinate 9000 is"):
            used.encode(x, ADDRESS)
    x = gaussian(20000)
    x[9000] = 1e30
    with pytest.raises(EncodingError, match=r"coordinate 9000 is .* too large"):
        used.encode(x, ADDRESS)


@pytest.mark.parametrize("scale", [2.0**71, 1e-30, 1e-44])
@pytest.mark.parametrize("bits", [0.01, 1, 4])
def test_extreme_magnitudes(bits: float, scale: float) -> None:
    used, x = codec("eden", bits=bits, block=4096), (gaussian(9000).clamp(-2, 2).double() * scale).float()
    encoded = used.encode(x, ADDRESS)
    used.validate(encoded, 9000)
    decoded = used.decode(encoded, ADDRESS).double()
    assert bool(torch.isfinite(decoded).all())
    if bits >= 1 and scale > 1e-40:
        error = float((decoded - x.double()).square().sum() / x.double().square().sum())
        assert abs(error / theory(bits) - 1) < 0.1


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 2.0**95])
def test_scales_out_of_range_are_refused(scale: float) -> None:
    used = codec("eden", block=4096)
    payload = bytearray(used.encode(gaussian(5000), ADDRESS).to_bytes())
    payload[HEADER.size : HEADER.size + 4] = np.float32(scale).tobytes()
    check = header_check(np.frombuffer(payload, np.uint8), len(payload))
    payload[HEADER.size - 4 : HEADER.size] = check.to_bytes(4, "little")
    with pytest.raises(PayloadError, match="scale") as caught:
        used.validate(Encoded.from_bytes(payload))
    assert caught.value.reason is Reason.NON_FINITE


@pytest.mark.parametrize("bits", [0.01, 0.4, 1, 2.5, 4])
def test_the_largest_forged_scale_decodes_to_finite_values(bits: float) -> None:
    used = codec("eden", bits=bits, block=1 << 20)
    payload = bytearray(used.encode(gaussian(5000), ADDRESS).to_bytes())
    payload[HEADER.size : HEADER.size + 4] = np.float32(2.0**94).tobytes()
    payload[HEADER.size + 4 :] = b"\xff" * (len(payload) - HEADER.size - 4)
    check = header_check(np.frombuffer(payload, np.uint8), len(payload))
    payload[HEADER.size - 4 : HEADER.size] = check.to_bytes(4, "little")
    assert bool(torch.isfinite(used.decode(Encoded.from_bytes(payload), ADDRESS)).all())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 5}, "eden.bits"),
        ({"bits": 0.001}, "eden.bits"),
        ({"bits": "nan"}, "eden.bits"),
        ({"block": 5000}, "block = 5000"),
        ({"levels": 1}, "eden.levels"),
    ],
    ids=str,
)
def test_options_are_named_when_wrong(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        codec("eden", **options)
    assert codec("eden", bits="2", block="4096") == codec("eden", bits=2, block=4096)
