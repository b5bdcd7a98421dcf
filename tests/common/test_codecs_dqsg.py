"""dqsg: the statistics of its error, exact identities, sizes, degenerate input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs.base import HEADER
from ditherps.codecs.steps import levels_for
from ditherps.kernels import reference

ADDRESS = Address(seed=12345, round=7, sender=3, domain=Domain.UPDATE)


def gaussian(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def steps_of(encoded: Encoded, buckets: int) -> NDArray[np.float64]:
    return encoded.data[HEADER.size : HEADER.size + 4 * buckets].view(np.float32).astype(np.float64)


STATISTICS: list[dict[str, Any]] = [
    {"levels": 0.5},
    {"levels": 1},
    {"levels": 1.5},
    {"levels": 2},
    {"levels": 3},
    {"levels": 7.5},
    {"levels": 200},
    {"step": "rms", "levels": 1.5, "resolution": 1.0},
    {"step": "rms", "levels": 4, "resolution": 0.5},
    {"step": "rms", "resolution": 0.1},
]


@pytest.mark.parametrize("options", STATISTICS, ids=str)
def test_error_is_uniform_and_independent_of_the_vector(options: dict[str, Any]) -> None:
    n = 1 << 18
    used = codec("dqsg", bucket=0, **options)
    x = gaussian(n)
    encoded = used.encode(x, ADDRESS)
    step = steps_of(encoded, 1)[0]
    error = (used.decode(encoded, ADDRESS).double() - x.double()).numpy() / step
    assert np.abs(error).max() <= 0.5 + 1e-4
    assert stats.kstest(error, stats.uniform(-0.5, 1).cdf).pvalue > 1e-3
    assert abs(error.var() * 12 - 1) < 0.01
    assert abs(error.mean()) < 4 / np.sqrt(12 * n)
    values = x.double().numpy()
    for source in (values, np.abs(values), values**2):
        assert abs(np.corrcoef(error, source)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize(
    "options", [{"levels": 1}, {"levels": 1.5}, {"step": "rms", "levels": 1, "resolution": 1.5}], ids=str
)
def test_decoding_is_unbiased_over_rounds(options: dict[str, Any]) -> None:
    used = codec("dqsg", **options)
    x = gaussian(1000, 5)
    rounds = 400
    total = torch.zeros(1000, dtype=torch.float64)
    for round_ in range(rounds):
        address = Address(1, round_, 0, Domain.UPDATE)
        total += used.decode(used.encode(x, address), address).double()
    step = steps_of(used.encode(x, ADDRESS), 1)[0]
    deviation = (total / rounds - x.double()).numpy() / (step / np.sqrt(12 * rounds))
    # Every coordinate within what 1000 Gaussians reach, and all together within four standard errors.
    assert np.abs(deviation).max() < 5
    assert abs(deviation.mean()) < 4 / np.sqrt(1000)


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 10000])
@pytest.mark.parametrize("options", [{}, {"levels": 1.5, "bucket": 64}, {"step": "rms", "bucket": 0}], ids=str)
def test_sizes(n: int, options: dict[str, Any]) -> None:
    used = codec("dqsg", **options)
    x = gaussian(n)
    encoded = Encoded.from_bytes(used.encode(x, ADDRESS).to_bytes())
    used.validate(encoded, n)
    assert encoded.nbytes <= used.max_nbytes(n)
    decoded = used.decode(encoded, ADDRESS)
    assert decoded.shape == (n,)
    bucket = used.options.model_dump()["bucket"] or max(n, 1)
    steps = np.repeat(steps_of(encoded, -(-n // bucket)), bucket)[:n]
    assert np.all((decoded.double() - x.double()).abs().numpy() <= steps * (0.5 + 1e-4))


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 100001])
@pytest.mark.parametrize("options", [{}, {"bucket": 128}, {"step": "rms", "levels": 1.5}, {"bucket": 0}], ids=str)
def test_any_span_equals_the_part_of_the_whole(options: dict[str, Any], start: int) -> None:
    used = codec("dqsg", **options)
    n = 5 * 4096 + 77
    x = gaussian(n)
    x[4096:8192] = 0
    x[9000:9500] = 0
    address = Address(3, 1, 1, Domain.UPDATE, start=start)
    encoded = used.encode(x, address)
    whole = used.decode(encoded, address)
    for lo in range(0, n, 4096):
        for hi in {*range(lo, n, 4096), n}:
            assert torch.equal(used.decode(encoded, address, span=(lo, hi)), whole[lo:hi])


def test_start_shifts_only_the_dither() -> None:
    used = codec("dqsg", bucket=0)
    x = gaussian(3 * 4096)
    u = reference.dither_at(Address(3, 1, 1, Domain.UPDATE, start=1234), np.arange(x.numel()))
    address = Address(3, 1, 1, Domain.UPDATE, start=1234)
    encoded = used.encode(x, address)
    step = steps_of(encoded, 1)[0]
    q = used.decode(encoded, address).double().numpy() / step + u
    assert np.abs(q - np.rint(q)).max() < 1e-6
    assert set(np.rint(q)) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("levels", [1, 1.5, 7.5, 63, 300])
def test_reconstruction_is_the_one_rounding(levels: float) -> None:
    """Every digit with every lane that occurs, against the reference's single formula."""
    used = codec("dqsg", levels=levels, bucket=0)
    x = gaussian(8192)
    encoded = used.encode(x, ADDRESS)
    step = np.float32(steps_of(encoded, 1)[0])
    u = reference.dither_at(ADDRESS, np.arange(8192))
    decoded = used.decode(encoded, ADDRESS).numpy()
    digits = np.rint(decoded.astype(np.float64) / float(step) + u + levels)
    expected = [reference.reconstruct(d, v, levels, step) for d, v in zip(digits, u, strict=True)]
    np.testing.assert_array_equal(decoded, np.array(expected, np.float32))


@pytest.mark.parametrize("options", [{}, {"levels": 500}, {"step": "rms", "levels": 1}], ids=str)
def test_accumulate_is_multiply_then_add(options: dict[str, Any]) -> None:
    used = codec("dqsg", **options)
    x, before = gaussian(9999), gaussian(9999, 1)
    encoded = used.encode(x, ADDRESS)
    into = before.clone()
    report = used.accumulate(encoded, ADDRESS, into, 0.3)
    expected = before.numpy() + np.float32(0.3) * used.decode(encoded, ADDRESS).numpy()
    np.testing.assert_array_equal(into.numpy(), expected)
    assert (report.coordinates, report.tiles, report.failed_tiles) == (9999, 3, 0)


def test_zero_buckets_cost_their_step_and_decode_to_zero() -> None:
    used = codec("dqsg")
    x = gaussian(6 * 4096)
    full = used.encode(x, ADDRESS).nbytes
    x[4096 : 3 * 4096] = 0
    encoded = used.encode(x, ADDRESS)
    assert full - encoded.nbytes == 2 * 820
    decoded = used.decode(encoded, ADDRESS)
    assert torch.count_nonzero(decoded[4096 : 3 * 4096]) == 0
    zeros = used.encode(torch.zeros(6 * 4096), ADDRESS)
    assert zeros.nbytes == HEADER.size + 6 * 4
    assert torch.count_nonzero(used.decode(zeros, ADDRESS)) == 0


@pytest.mark.parametrize("options", [{}, {"levels": 7.5}, {"step": "rms", "levels": 2}], ids=str)
def test_denormals_decode_within_half_a_step(options: dict[str, Any]) -> None:
    used = codec("dqsg", **options)
    x = (gaussian(5000).double() * 1e-41).float()
    encoded = used.encode(x, ADDRESS)
    assert np.all(steps_of(encoded, 2) == 2.0**-100)
    decoded = used.decode(encoded, ADDRESS)
    assert (decoded.double() - x.double()).abs().max() <= 2.0**-101 * (1 + 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["none", "bf16", "dqsg", "ndqsg"])
def test_non_finite_input_names_the_tensor(name: str, bad: float) -> None:
    from ditherps.errors import NonFiniteError

    x = gaussian(10000)
    x[5000] = bad
    with pytest.raises(NonFiniteError, match=r"conv1\.weight: coordinate 5000"):
        codec(name).encode(x, ADDRESS, name="conv1.weight")
    with pytest.raises(NonFiniteError, match="second"):
        codec(name).encode(x, ADDRESS, name=lambda i: "first" if i < 5000 else "second")


@pytest.mark.parametrize("name", ["none", "dqsg", "ndqsg", "bf16"])
def test_values_beyond_float32_are_refused(name: str) -> None:
    from ditherps.errors import EncodingError, NonFiniteError

    x = gaussian(100).double()
    x[3] = 1e39
    with pytest.raises(EncodingError, match=r"coordinate 3 .* float32") as caught:
        codec(name).encode(x, ADDRESS)
    assert not isinstance(caught.value, NonFiniteError)


def test_steps_whose_reconstruction_could_overflow_are_refused() -> None:
    from ditherps.errors import EncodingError

    with pytest.raises(EncodingError, match="too large"):
        codec("dqsg").encode(torch.tensor([0.0, 3e38]), ADDRESS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_encode_as_their_float32(dtype: torch.dtype) -> None:
    used = codec("dqsg")
    x = gaussian(5000).to(dtype)
    assert used.encode(x, ADDRESS).to_bytes() == used.encode(x.float(), ADDRESS).to_bytes()


def test_wrong_tensors_are_refused() -> None:
    from ditherps.errors import EncodingError, OptionError

    used = codec("dqsg")
    for x in (torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(EncodingError):
            used.encode(x, ADDRESS)
    encoded = used.encode(gaussian(8192), ADDRESS)
    for into in (torch.zeros(8191), torch.zeros(8192, dtype=torch.float64), torch.zeros(16384)[::2]):
        with pytest.raises(OptionError):
            used.accumulate(encoded, ADDRESS, into, 1.0)
    for span in ((0, 100), (1, 4096), (4096, 12288), (4096, 0)):
        with pytest.raises(OptionError, match="span"):
            used.decode(encoded, ADDRESS, span=span)


def test_strided_input_encodes_as_its_copy() -> None:
    used = codec("dqsg")
    x = gaussian(10000)[::2]
    assert used.encode(x, ADDRESS).to_bytes() == used.encode(x.contiguous(), ADDRESS).to_bytes()


def test_ternary_costs_what_it_should() -> None:
    encoded = codec("dqsg", levels=1).encode(gaussian(1 << 20), ADDRESS)
    assert encoded.bits_per_coordinate <= 1.62
    assert codec("dqsg", levels=1.5).encode(gaussian(1 << 20), ADDRESS).bits_per_coordinate <= 2.01


@pytest.mark.parametrize("bucket", [0, 64, 4096])
@pytest.mark.parametrize("levels", [1, 64, 300])
def test_escapes_round_trip(bucket: int, levels: float) -> None:
    used = codec("dqsg", step="rms", levels=levels, resolution=0.5 / levels, bucket=bucket)
    x = torch.from_numpy(np.random.default_rng(1).standard_t(1.5, 20000).astype(np.float32))
    encoded = Encoded.from_bytes(used.encode(x, ADDRESS).to_bytes())
    assert encoded.header.tail_bytes > 0
    assert encoded.nbytes <= used.max_nbytes(20000)
    steps = np.repeat(steps_of(encoded, -(-20000 // (bucket or 20000))), bucket or 20000)[:20000]
    error = (used.decode(encoded, ADDRESS).double() - x.double()).abs().numpy()
    assert np.all(error <= steps * (0.5 + 1e-4) + np.abs(x.numpy()) * 2.0**-23)


def test_levels_follow_from_the_resolution() -> None:
    assert codec("dqsg", step="rms").options.model_dump()["levels"] == levels_for(1.0)
    sequence = [levels_for(r) for r in (2.0, 1.0, 0.5, 0.25, 0.1, 0.01)]
    assert sequence == sorted(sequence)
    x = torch.from_numpy(np.random.default_rng(0).laplace(size=1 << 18).astype(np.float32))
    for resolution in (1.0, 0.25):
        best = codec("dqsg", step="rms", resolution=resolution).encode(x, ADDRESS).nbytes
        for levels in (0.5, 1, 2, 4, 8, 16, 32):
            other = codec("dqsg", step="rms", resolution=resolution, levels=levels).encode(x, ADDRESS).nbytes
            assert best <= other * 1.02


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.sampled_from([0.5, 1.0, 1.5, 2.0, 7.5, 63.0, 64.0, 1000.5, 32767.0]),
    st.sampled_from([0, 64, 4096]),
    st.integers(0, 10000),
)
def test_decoding_inverts_encoding_within_half_a_step(
    x: NDArray[np.float32], levels: float, bucket: int, start: int
) -> None:
    used = codec("dqsg", levels=levels, bucket=bucket)
    address = Address(1, 2, 3, Domain.UPDATE, start=start)
    encoded = Encoded.from_bytes(used.encode(torch.from_numpy(x), address).to_bytes())
    width = bucket or max(x.size, 1)
    steps = np.repeat(steps_of(encoded, -(-x.size // width)), width)[: x.size]
    error = np.abs(used.decode(encoded, address).numpy().astype(np.float64) - x)
    assert np.all(error <= steps * (0.5 + 1e-4) + np.abs(x) * 2.0**-23)


def test_options_are_named_when_wrong() -> None:
    from ditherps.errors import OptionError

    with pytest.raises(OptionError, match="codec = 'nope'"):
        codec("nope")
    for options, expected in (
        ({"levels": 1.3}, "levels"),
        ({"levels": "many"}, "dqsg.levels"),
        ({"levels": 40000}, "levels"),
        ({"step": "mean"}, "dqsg.step"),
        ({"bucket": 100}, "bucket"),
        ({"bucket": 32}, "bucket"),
        ({"step": "rms", "resolution": -1}, "dqsg.resolution"),
        ({"step": "max", "resolution": 1.0}, "resolution"),
        ({"ratio": 3}, "dqsg.ratio"),
    ):
        with pytest.raises(OptionError, match=expected):
            codec("dqsg", **options)
    assert codec("dqsg", levels="3", bucket="512") == codec("dqsg", levels=3, bucket=512)
    dumped = codec("dqsg", step="rms", resolution="0.5").options.model_dump()
    assert codec("dqsg", **dumped).options.model_dump() == dumped
