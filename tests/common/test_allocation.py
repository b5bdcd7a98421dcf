"""Bit allocation: the fills against brute force and theory, and `tensors`, which spreads one error over tensors."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ditherps import Address, Context, Domain, Encoded, codec
from ditherps.codecs import parse
from ditherps.codecs.allocation import unbiased_fill, water_fill
from ditherps.codecs.base import HEADER, Codec, header_check
from ditherps.codecs.suited import suited_half
from ditherps.codecs.tensors import TINY, TensorsCodec, groups_of, notch_below, notch_value
from ditherps.dither import lanes
from ditherps.errors import ContextMismatchError, EncodingError, NonFiniteError, OptionError, PayloadError
from ditherps.layout import Layout

ADDRESS = Address(seed=11, round=5, sender=2, domain=Domain.UPDATE, start=77)
SIZES = (3000, 10, 5000, 1000, 1024, 300, 20000)
SCALES = (30.0, 5.0, 1.0, 0.2, 0.01, 3.0, 0.3)

sources = st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 10000)), min_size=1, max_size=8)


def vector(sizes: tuple[int, ...] = SIZES, scales: tuple[float, ...] = SCALES, seed: int = 0) -> Tensor:
    """Gaussian tensors of these sizes and standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(n, generator=generator) * s for n, s in zip(sizes, scales, strict=True)])


def tensors(inner: str = "dqsg:nmse=0.1,bucket=0", sizes: tuple[int, ...] = SIZES) -> TensorsCodec:
    used = codec("tensors", inner=inner, sizes=sizes)
    assert isinstance(used, TensorsCodec)
    return used


def tensors_apart(x: Tensor, sizes: tuple[int, ...], spec: str) -> int:
    """Bytes of all tensors, each encoded alone."""
    ends = list(itertools.accumulate(sizes))
    return sum(parse(spec).encode(x[end - size : end], ADDRESS).nbytes for size, end in zip(sizes, ends, strict=True))


def bits_of(s: NDArray[np.float64], n: NDArray[np.float64], d: NDArray[np.float64]) -> float:
    return float(np.sum(n * np.maximum(np.log2(s / d), 0)) / 2)


def unbiased_bits(s: NDArray[np.float64], n: NDArray[np.float64], d: NDArray[np.float64]) -> float:
    return float(np.sum(n * np.log2(1 + s / d)) / 2)


@settings(deadline=None)
@given(tensors=sources, nmse=st.floats(1e-6, 2))
def test_water_meets_the_error_and_covers_all_beds(tensors: list[tuple[float, int]], nmse: float) -> None:
    rms, sizes = (list(part) for part in zip(*tensors, strict=True))
    s, n = np.square(rms), np.array(sizes, float)
    d = water_fill(rms, sizes, nmse=nmse)
    assert np.sum(n * d) == pytest.approx(min(nmse, 1) * np.sum(n * s), rel=1e-12)
    theta = d.max()
    assert np.array_equal(d, np.minimum(theta, s))


@settings(deadline=None)
@given(tensors=sources, bits=st.floats(0, 12))
def test_water_meets_the_rate(tensors: list[tuple[float, int]], bits: float) -> None:
    rms, sizes = (list(part) for part in zip(*tensors, strict=True))
    s, n = np.square(rms), np.array(sizes, float)
    d = water_fill(rms, sizes, bits=bits)
    assert bits_of(s, n, d) == pytest.approx(bits * n.sum(), rel=1e-9, abs=1e-9)
    assert np.allclose(d, np.minimum(d.max(), s), rtol=1e-15)


def test_both_budgets_mean_the_same_water() -> None:
    rms, sizes = [3.0, 1.0, 0.2, 0.0], [100, 1000, 5000, 10]
    d = water_fill(rms, sizes, nmse=0.05)
    n, s = np.array(sizes[:3], float), np.square(rms[:3])
    again = water_fill(rms, sizes, bits=bits_of(s, n, d[:3]) / sum(sizes))
    assert np.allclose(again, d, rtol=1e-12)
    assert d[3] == again[3] == 0


@pytest.mark.parametrize("nmse", [0.01, 0.1, 0.3, 0.9])
def test_no_other_errors_take_fewer_bits(nmse: float) -> None:
    """Brute force: all errors of a grid for two of three tensors, the third takes what is left of the budget."""
    rms, sizes = [2.0, 1.0, 0.3], [50, 200, 1000]
    s, n = np.square(rms), np.array(sizes, float)
    budget = nmse * np.sum(n * s)
    factors = np.geomspace(1e-4, 30, 500)
    first, second = (part.ravel() for part in np.meshgrid(s[0] * factors, s[1] * factors))
    third = (budget - n[0] * first - n[1] * second) / n[2]
    d = np.array([first, second, third])[:, third > 0]
    ratios, counts = s[:, None] / d, n[:, None]
    least = float(np.min(np.sum(counts * np.maximum(np.log2(ratios), 0), axis=0))) / 2
    least_unbiased = float(np.min(np.sum(counts * np.log2(1 + ratios), axis=0))) / 2
    water, fill = water_fill(rms, sizes, nmse=nmse), unbiased_fill(rms, sizes, nmse=nmse)
    assert bits_of(s, n, water) <= least <= bits_of(s, n, water) * 1.01 + 2  # a grid of 2.6 % comes near
    assert unbiased_bits(s, n, fill) <= least_unbiased <= unbiased_bits(s, n, fill) * 1.002


@settings(deadline=None)
@given(tensors=sources, nmse=st.floats(1e-9, 100))
def test_the_unbiased_fill_meets_its_budget_and_its_condition(tensors: list[tuple[float, int]], nmse: float) -> None:
    rms, sizes = (list(part) for part in zip(*tensors, strict=True))
    s, n = np.square(rms), np.array(sizes, float)
    d = unbiased_fill(rms, sizes, nmse=nmse)
    assert np.sum(n * d) == pytest.approx(nmse * np.sum(n * s), rel=1e-12)
    assert np.sum(n * d) <= nmse * np.sum(n * s) * (1 + 1e-15)
    c = d * (d + s) / s
    assert np.allclose(c, c[0], rtol=1e-9)


def test_fills_of_nothing() -> None:
    assert water_fill([], [], nmse=0.1).size == unbiased_fill([], [], nmse=0.1).size == 0
    assert not water_fill([0.0, 0.0], [4, 5], bits=1).any()
    assert not unbiased_fill([0.0, 1.0], [4, 0], nmse=0.1).any()
    assert not unbiased_fill([1.0], [4], nmse=0).any()
    assert np.array_equal(water_fill([2.0, 1.0], [4, 4], nmse=1.5), [4.0, 1.0])
    assert np.array_equal(water_fill([2.0, 1.0], [4, 4], bits=0), [4.0, 1.0])


@pytest.mark.parametrize(
    ("rms", "sizes", "budget", "named"),
    [
        ([1.0], [1, 2], {"nmse": 0.1}, "sizes"),
        ([-1.0], [1], {"nmse": 0.1}, "rms"),
        ([math.nan], [1], {"nmse": 0.1}, "rms"),
        ([1.0], [-1], {"nmse": 0.1}, "sizes"),
        ([1.0], [1], {"nmse": -0.1}, "nmse"),
        ([1.0], [1], {"bits": math.inf}, "bits"),
        ([1.0], [1], {}, "nmse, bits"),
        ([1.0], [1], {"nmse": 1.0, "bits": 1.0}, "nmse, bits"),
    ],
)
def test_wrong_arguments_are_named(rms: list[float], sizes: list[int], budget: dict[str, float], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        water_fill(rms, sizes, **budget)


@pytest.mark.parametrize("nmse", [0.001, 0.01, 0.1])
def test_with_an_entropy_coder_one_step_is_as_good_as_any(nmse: float) -> None:
    """One step takes at most log2(2 pi e / 12) / 2 = 0.254 bits more than the limit (Ziv 1985; Zamir and Feder 1992).

    And errors that differ take hardly fewer, or many more, so that one step is the default.
    """
    sizes, scales = (65536, 262144, 131072, 524288), (8.0, 2.0, 1.0, 0.6)
    x, n = vector(sizes, scales), sum(sizes)
    s, counts = np.square(scales), np.array(sizes, float)
    bits = codec("dqsg", coder="rans", nmse=nmse).encode(x, ADDRESS).bits_per_coordinate
    even = np.full(4, nmse * np.sum(counts * s) / n)
    assert bits < 1.01 * (unbiased_bits(s, counts, even) / n + 0.2546)
    limit = bits_of(s, counts, water_fill(scales, sizes, nmse=nmse)) / n
    assert bits > limit
    if nmse == 0.001:  # where all errors are small, the two limits are one
        assert bits < 1.01 * (limit + 0.2546)
    spread = tensors(f"dqsg:nmse={nmse},coder=rans", sizes).encode(x, ADDRESS).bits_per_coordinate
    assert abs(spread / bits - 1) < 0.02
    assert 8 * tensors_apart(x, sizes, f"dqsg:coder=rans,nmse={nmse}") / n > 1.25 * bits  # equal NMSE in each


@pytest.mark.parametrize(("nmse", "gain"), [(0.01, 0.10), (0.1, 0.06), (0.3, 0.03)])
def test_at_fixed_width_an_alphabet_a_tensor_pays(nmse: float, gain: float) -> None:
    sizes = (4800, 102400, 400000, 73728)
    x = vector(sizes, (20.0, 1.7, 0.3, 1.2))
    used = tensors(f"dqsg:nmse={nmse},bucket=0", sizes)
    others = [codec("dqsg", nmse=nmse, bucket=0, levels=half / 2) for half in range(1, 16)]
    one = min(others, key=lambda other: other.encode(x, ADDRESS).nbytes)  # the best alphabet for all tensors
    mine, other = used.encode(x, ADDRESS), one.encode(x, ADDRESS)
    assert mine.nbytes < (1 - gain) * other.nbytes
    energy = float(x.double().square().sum())
    for codec_, encoded in ((used, mine), (one, other)):
        error = float((codec_.decode(encoded, ADDRESS).double() - x.double()).square().sum())
        assert error / energy == pytest.approx(nmse, rel=0.015)
        assert codec_.expected_squared_error(encoded) == pytest.approx(nmse * energy, rel=0.003)
        assert codec_.expected_squared_error(encoded) <= nmse * energy * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("resolution", [0.05, 0.35, 1.1, 4.0])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "sparse"])
def test_the_alphabet_that_suits_takes_the_fewest_bits(kind: str, resolution: float, scale: float) -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal(40960)
    if kind == "heavy":
        x = x**3
    elif kind == "sparse":
        x *= random.random(40960) < 0.02
    values = (x * scale).astype(np.float32)
    step = resolution * math.sqrt(float(np.mean(values.astype(np.float64) ** 2)))
    half = suited_half((values[:1000], values[1000:]), step)

    def nbytes(levels: float) -> int:
        used = codec("dqsg", step="rms", resolution=resolution, bucket=0, levels=levels)
        return used.encode(torch.from_numpy(values), ADDRESS).nbytes

    assert nbytes(half / 2) <= 1.01 * min(nbytes(other / 2) for other in range(1, 255, 1 if resolution > 1 else 3))


def test_alphabets_at_the_ends() -> None:
    assert suited_half((), 1.0) == suited_half((np.zeros(10, np.float32),), 1.0) == 1
    assert suited_half((np.full(100, 2.0, np.float32),), 1.0) == 4
    assert suited_half((np.full(100, 1e30, np.float32),), 1e-30) == 1  # all escaped whatever it is


def test_groups() -> None:
    groups = groups_of(SIZES, sum(SIZES) + 2000)
    assert [group.size for group in groups] == [3000, 5000, 1024, 20000, 2000, 1310]
    assert [group.start for group in groups] == list(itertools.accumulate([0, 3000, 5000, 1024, 20000, 2000]))
    seen = np.zeros(sum(SIZES) + 2000, np.int64)
    for group in groups:
        for segment in group.segments:
            seen[segment.start : segment.start + segment.size] += 1
    assert (seen == 1).all()
    assert groups_of(SIZES, 0) == ()
    assert [group.size for group in groups_of(SIZES, 3005)] == [3000, 5]
    assert [group.size for group in groups_of((0, 0), 5)] == [5]


def test_each_group_is_the_payload_of_its_coordinates() -> None:
    used, x = tensors(), vector()
    encoded = used.encode(x, ADDRESS)
    seen = []
    for part in used._indexed(encoded, None):
        values = torch.from_numpy(part.group.of(x.numpy()))
        own = Address(11, 5, 2, Domain.UPDATE, start=77 + part.group.start)
        assert part.codec.encode(values, own).to_bytes() == part.payload.to_bytes()
        decoded = torch.from_numpy(part.group.of(used.decode(encoded, ADDRESS).numpy()))
        assert torch.equal(part.codec.decode(part.payload, own), decoded)
        seen.append(lanes(own, part.group.size))
    # The groups' dithers are those of the vector's coordinates, each once.
    assert np.array_equal(np.concatenate(seen), lanes(ADDRESS, x.numel()))


@pytest.mark.parametrize("inner", ["dqsg:nmse=0.1,bucket=0", "dqsg:nmse=0.03,bucket=64", "dqsg:nmse=0.2,coder=rans"])
@pytest.mark.parametrize("n", [0, 1, 3000, 4095, 4096, 4097, 30334, 70000])
def test_lengths(inner: str, n: int) -> None:
    used = tensors(inner)
    x = torch.cat((vector(), vector(seed=1), vector(seed=2)))[:n]
    encoded = used.encode(x.double(), ADDRESS)
    assert encoded.to_bytes() == used.encode(x, ADDRESS).to_bytes()
    assert encoded.nbytes <= used.max_nbytes(n)
    assert used.decode(encoded, ADDRESS).shape == (n,)
    used.validate(Encoded.from_bytes(encoded.to_bytes()), n)


@pytest.mark.parametrize("inner", ["dqsg:nmse=0.1,bucket=0", "dqsg:nmse=0.1,coder=rans"])
def test_spans_and_threads_give_the_whole(inner: str) -> None:
    sizes = (100, 5000, 40000, 7, 900000, 1023, 1500, 20, 300000)
    used, x = tensors(inner, sizes), vector(sizes, (1.0, 5.0, 2.0, 9.0, 0.5, 3.0, 1.0, 2.0, 0.1))
    n, unit = x.numel(), used.chunk_coordinates
    encoded = used.encode(x, ADDRESS)
    with ThreadPoolExecutor(2) as pool:
        assert used.encode(x, ADDRESS, pool=pool).to_bytes() == encoded.to_bytes()
    base = torch.randn(n, generator=torch.Generator().manual_seed(9))
    whole = base.clone()
    report = used.accumulate(encoded, ADDRESS, whole, -1.7)
    assert (report.coordinates, report.failed_tiles) == (n, 0)
    assert torch.equal(whole, base + used.decode(encoded, ADDRESS) * torch.tensor(-1.7))
    parts = base.clone()
    for lo in range(0, n, unit):
        hi = min(lo + unit, n)
        used.accumulate(encoded, ADDRESS, parts[lo:hi], -1.7, (lo, hi))
    assert torch.equal(parts, whole)


def test_unbiased() -> None:
    used, x = tensors(sizes=(2000, 100, 3000)), vector((2000, 100, 3000), (10.0, 3.0, 0.1))
    total, square = torch.zeros(5100, dtype=torch.float64), torch.zeros(5100, dtype=torch.float64)
    rounds = 400
    for round_ in range(rounds):
        address = Address(1, round_, 0, Domain.UPDATE)
        error = used.decode(used.encode(x, address), address).double() - x.double()
        total += error
        square += error.square()
    for lo, hi in ((0, 2000), (2000, 2100), (2100, 5100)):
        direction = x[lo:hi].double()
        standard = math.sqrt(float((direction.square() * square[lo:hi]).sum()))
        assert abs(float((direction * total[lo:hi]).sum())) < 4 * standard


def test_zeros_and_bad_values() -> None:
    used = tensors()
    x = torch.zeros(sum(SIZES))
    assert not used.decode(used.encode(x, ADDRESS), ADDRESS).any()
    assert used.encode(x, ADDRESS).nbytes < 600
    x[3005] = 1.0  # one tiny tensor is not zero
    assert used.decode(used.encode(x, ADDRESS), ADDRESS).count_nonzero() > 0
    x[9010] = math.nan
    with pytest.raises(NonFiniteError, match="update: coordinate 9010 is nan"):
        used.encode(x, ADDRESS)
    x[9010] = 0
    x[8010:] = 0
    x[3000:3010] = 3.3e38  # a tiny tensor: the group's coordinates have other places
    x[8010:9010] = 3.4e38  # and another one
    with pytest.raises(EncodingError, match=r"update: coordinate 8010 is 3\.39.*, too large"):
        used.encode(x, ADDRESS)


def test_the_bound_of_size_holds_where_one_value_is_all() -> None:
    for nmse, inner in itertools.product((1e-6, 0.1, 10.0), ("bucket=0", "bucket=64", "coder=rans")):
        used = tensors(f"dqsg:nmse={nmse},{inner}")
        for size, where in itertools.product((1e-30, 1.0, 1e6), (0, 3001, 12000)):
            x = vector()
            x[where] = size
            encoded = used.encode(x, ADDRESS)
            assert encoded.nbytes <= used.max_nbytes(x.numel())
            assert used.expected_squared_error(encoded) <= nmse * float(x.double().square().sum()) * (1 + 1e-6)


@settings(deadline=None)
@given(nmse=st.floats(1.9e-12, 5e5))
def test_notches(nmse: float) -> None:
    notch = notch_below(nmse)
    assert notch_value(notch) <= nmse < notch_value(notch + 1)
    assert notch_value(notch) == pytest.approx(2 ** (notch / 256), rel=1e-15)


def test_notches_end_where_dqsg_does() -> None:
    assert notch_below(0.0) == notch_below(1e-300) == -39 * 256
    assert notch_below(1e300) == notch_below(2.0**19) == 19 * 256
    assert [notch_value(notch) for notch in (-512, 0, 256)] == [0.25, 1.0, 2.0]
    for notch in (-39 * 256, 19 * 256):
        codec("dqsg", nmse=notch_value(notch))


def test_sizes_come_from_the_layout() -> None:
    layout = Layout.of(torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 1)))
    used = codec("tensors").for_layout(layout)
    assert used == codec("tensors", sizes="2000+50+50+1")
    assert used == codec("tensors", sizes=(2000, 50, 50, 1)).for_layout(layout)
    assert used != codec("tensors")
    assert codec("dqsg").for_layout(layout) == codec("dqsg")
    with pytest.raises(OptionError, match=r"tensors.sizes = '3\+4'"):
        codec("tensors", sizes="3+4").for_layout(layout)


def test_spellings_of_the_inner_codec_do_not_matter() -> None:
    assert parse("tensors:inner=(dqsg:nmse=0.10,bucket=0)") == parse("tensors:inner=(dqsg:bucket=0,nmse=.1)")
    one, other = parse("tensors:inner=(dqsg:nmse=0.10,bucket=0)"), parse("tensors:inner=(dqsg:bucket=0,nmse=.1)")
    assert one.encode(vector(), ADDRESS).to_bytes() == other.encode(vector(), ADDRESS).to_bytes()


@pytest.mark.parametrize(
    "inner",
    [
        "none", "dqsg", "dqsg:bits=2", "dqsg:nmse=0.1,levels=3", "dqsg:nmse=0.1,coder=rans,reconstruct=matched",
        "qsgd", "ndqsg", "tensors", "scaled",
    ],
)  # fmt: skip
def test_what_cannot_be_spread_is_refused(inner: str) -> None:
    with pytest.raises(OptionError, match=r"tensors\.inner"):
        codec("tensors", inner=inner)


@pytest.mark.parametrize("sizes", ["a", "3+", "-1", "3+x", (1.5,), (-2,)])
def test_wrong_sizes_are_refused(sizes: object) -> None:
    with pytest.raises(OptionError, match=r"tensors\.sizes"):
        codec("tensors", sizes=sizes)


def resealed(used: Codec, payload: bytearray) -> Encoded:
    """With the checksum of header and table made right."""
    covered = used._sealed_bytes(Encoded.from_bytes(payload))
    check = header_check(np.frombuffer(payload, np.uint8), covered)
    return Encoded.from_bytes(bytes(payload[: HEADER.size - 4]) + check.to_bytes(4, "little") + payload[HEADER.size :])


@pytest.mark.parametrize(
    ("at", "value", "bytes_"),
    [
        (0, 2**64 - 1, 8), (0, 2**63, 8), (0, 0, 8), (0, 31, 8), (0, 2**32, 8), (16, 2**40, 8),
        (8, 2**31 - 1, 4), (8, 19 * 256 + 1, 4), (8, 2**32 - 39 * 256 - 1, 4), (8, 5, 4),
        (12, 0, 4), (12, 255, 4), (12, 77, 4), (12, 2**32 - 1, 4),
    ],
)  # fmt: skip
def test_forged_tables_are_refused(at: int, value: int, bytes_: int) -> None:
    used = tensors()
    payload = bytearray(used.encode(vector(), ADDRESS).to_bytes())
    payload[HEADER.size + at : HEADER.size + at + bytes_] = value.to_bytes(bytes_, "little")
    with pytest.raises(PayloadError):
        used.validate(resealed(used, payload))


def test_padding_is_zero() -> None:
    used = tensors(sizes=(5000,))
    all_encoded = [used.encode(vector()[:n], ADDRESS) for n in range(7000, 7008)]
    encoded = next(e for e in all_encoded if used._indexed(e, None)[-1].payload.nbytes % 4)
    payload = bytearray(encoded.to_bytes())
    payload[-1] = 1
    with pytest.raises(PayloadError, match="zeros"):
        used.validate(Encoded.from_bytes(payload))


def test_a_context_reaches_the_groups() -> None:
    used, context, x = tensors(), Context(1, b"x"), vector()
    encoded = used.encode(x, ADDRESS, context)
    assert torch.equal(used.decode(encoded, ADDRESS, context=context), used.decode(used.encode(x, ADDRESS), ADDRESS))
    inner = used.encode(x, ADDRESS).to_bytes()[HEADER.size :]
    header = encoded.header._replace(check=0)
    with pytest.raises(ContextMismatchError):
        used.validate(resealed(used, bytearray(HEADER.pack(*header) + inner)), context=context)


def test_tiny_is_as_documented() -> None:
    assert TINY == 1024
