"""qsgd, terngrad, maxnorm: the indices of dqsg, errors of stochastic rounding, the schemes' published figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import integrate, stats
from torch import Tensor

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs import Codec
from ditherps.codecs.base import HEADER
from ditherps.errors import EncodingError, NonFiniteError, OptionError
from ditherps.kernels import reference

ADDRESS = Address(seed=77, round=5, sender=1, domain=Domain.UPDATE, start=100)
BOTH: list[dict[str, Any]] = [{"coder": "fixed"}, {"coder": "rans"}]
ALL: list[tuple[str, dict[str, Any]]] = [
    ("qsgd", {}),
    ("qsgd", {"levels": 2, "bucket": 64}),
    ("qsgd", {"step": "l2", "levels": 8, "bucket": 512}),
    ("qsgd", {"step": "rms", "resolution": 0.3}),
    ("qsgd", {"levels": 1.5}),
    ("qsgd", {"coder": "rans"}),
    ("qsgd", {"coder": "rans", "step": "l2", "levels": 8, "bucket": 512}),
    ("terngrad", {"clip": 0}),
    ("terngrad", {"clip": 0, "coder": "rans"}),
    ("maxnorm", {}),
    ("maxnorm", {"bits": 8}),
    ("maxnorm", {"coder": "rans"}),
]


def gaussian(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def steps_of(used: Codec, encoded: Encoded) -> NDArray[np.float64]:
    """The step of each coordinate."""
    n = encoded.coordinates
    options = used.options.model_dump()
    bucket = options.get("bucket") or max(n, 1)
    count = -(-n // bucket)
    steps = encoded.data[HEADER.size : HEADER.size + 4 * count].view(np.float32).astype(np.float64)
    return np.repeat(steps, bucket)[:n]


@pytest.mark.parametrize("coder", ["fixed", "rans"])
@pytest.mark.parametrize(
    "options",
    [{"step": "max", "levels": 1}, {"step": "max", "levels": 7}, {"step": "l2", "levels": 90}, {"step": "rms"}],
    ids=str,
)
def test_indices_are_those_of_dqsg(coder: str, options: dict[str, Any]) -> None:
    plain, dithered = (codec(name, coder=coder, bucket=4096, **options) for name in ("qsgd", "dqsg"))
    x = gaussian(10000)
    mine, theirs = plain.encode(x, ADDRESS), dithered.encode(x, ADDRESS)
    steps = steps_of(plain, mine)
    np.testing.assert_array_equal(steps, steps_of(dithered, theirs))
    u = reference.dither_at(ADDRESS, np.arange(10000))
    q = plain.decode(mine, ADDRESS).double().numpy() / steps
    np.testing.assert_allclose(q, np.rint(q), atol=1e-5)
    np.testing.assert_array_equal(np.rint(q), np.rint(dithered.decode(theirs, ADDRESS).double().numpy() / steps + u))


def above_grid(used: Codec, x: Tensor, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of x to the next lower value that can be decoded, in steps; these are half-integers for such levels."""
    levels = used._rule.levels  # type: ignore[attr-defined]
    shifted = x.double().numpy() / steps + (levels or 0) % 1
    return np.asarray(shifted - np.floor(shifted))


def expected_error(used: Codec, x: Tensor, steps: NDArray[np.float64]) -> tuple[float, float]:
    """Sum of d (1 - d) step^2, d as above, and its standard deviation."""
    d = above_grid(used, x, steps)
    return float(np.sum(d * (1 - d) * steps**2)), float(np.sqrt(np.sum(d * (1 - d) * (1 - 2 * d) ** 2 * steps**4)))


@pytest.mark.parametrize(("name", "options"), [c for c in ALL if c[1] != {"bits": 8}], ids=str)
def test_squared_error_is_that_of_stochastic_rounding(name: str, options: dict[str, Any]) -> None:
    used = codec(name, **options)
    x = gaussian(1 << 16)
    total = expected = variance = 0.0
    for round_ in range(4):
        address = Address(1, round_, 0, Domain.UPDATE)
        encoded = used.encode(x, address)
        steps = steps_of(used, encoded)
        error = (used.decode(encoded, address).double() - x.double()).numpy()
        assert np.all(np.abs(error) < steps * (1 + 1e-5))
        total += float(np.sum(error**2))
        mean, deviation = expected_error(used, x, steps)
        expected += mean
        variance += deviation**2
    assert abs(total - expected) < 4 * np.sqrt(variance)
    assert np.sqrt(variance) < 0.02 * expected


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_unbiased_over_rounds(name: str, options: dict[str, Any]) -> None:
    used = codec(name, **options)
    assert used.unbiased
    n, rounds = 2000, 300
    x = gaussian(n, 3)
    x[::5] *= 0.01
    total = torch.zeros(n, dtype=torch.float64)
    for round_ in range(rounds):
        address = Address(9, round_, 0, Domain.UPDATE)
        total += used.decode(used.encode(x, address), address).double()
    steps = steps_of(used, used.encode(x, ADDRESS))
    d = above_grid(used, x, steps)
    deviation = (total.numpy() / rounds - x.double().numpy()) / steps
    error = np.sqrt(np.sum(d * (1 - d)) / rounds)
    assert abs(np.sum(deviation)) < 4 * error
    # Against the vector's sign too: a shrinking quantizer has no mean error, but this one.
    assert abs(np.sum(deviation * np.sign(x.numpy()))) < 4 * error
    wide = d * (1 - d) > 0.1
    assert np.abs(deviation[wide] / np.sqrt((d * (1 - d))[wide] / rounds)).max() < 5


def test_qsgd_norm_is_the_option() -> None:
    x = gaussian(4096)
    norm = float(x.double().norm())
    for s in (1, 4, 16):
        used = codec("qsgd", step="l2", levels=s)
        step = steps_of(used, used.encode(x, ADDRESS))[0]
        assert norm / s <= step <= norm / s * (1 + 2**-22)
        error = float((used.decode(used.encode(x, ADDRESS), ADDRESS) - x).double().square().sum())
        # Alistarh et al., lemma 3.1.
        assert error <= 1.2 * min(4096 / s**2, np.sqrt(4096) / s) * norm**2
    used = codec("qsgd", step="max", levels=4)
    assert steps_of(used, used.encode(x, ADDRESS))[0] == float(x.abs().max()) / 4


def test_terngrad_has_its_published_figures() -> None:
    n = 1 << 20
    x = gaussian(n)
    used = codec("terngrad")
    assert not used.unbiased
    encoded = used.encode(x, ADDRESS)
    decoded = used.decode(encoded, ADDRESS)
    scale = steps_of(used, encoded)[0]
    rms = float(x.double().square().mean().sqrt())
    assert abs(scale / (2.5 * rms) - 1) < 1e-6
    assert set(decoded.abs().tolist()) == {0.0, float(np.float32(scale))}
    # Of a Gaussian: |v| (c - |v|) for the clipped value v, and the square of what was clipped.
    density = stats.norm.pdf
    inside = integrate.quad(lambda v: 2 * v * (2.5 - v) * density(v), 0, 2.5)[0]
    outside = integrate.quad(lambda v: 2 * (v - 2.5) ** 2 * density(v), 2.5, 12)[0]
    nmse = float((decoded - x).double().square().sum() / x.double().square().sum())
    assert abs(nmse - (inside + outside)) < 0.005
    assert abs(nmse - 1.01) < 0.01
    assert encoded.bits_per_coordinate <= 1.603
    coded = codec("terngrad", coder="rans")
    small = coded.encode(x, ADDRESS)
    assert 1.19 < small.bits_per_coordinate < 1.24
    assert torch.equal(coded.decode(small, ADDRESS), decoded)


def test_terngrad_clips_at_multiples_of_the_rms() -> None:
    x = gaussian(10000)
    x[7] = 100.0
    rms = float(x.double().square().mean().sqrt())
    for clip in (0.5, 2.5, 1000):
        used = codec("terngrad", clip=clip)
        scale = steps_of(used, used.encode(x, ADDRESS))[0]
        assert abs(scale / min(clip * rms, 100.0) - 1) < 1e-6
    for bad in (float("nan"), float("inf")):
        x[9] = bad
        with pytest.raises(NonFiniteError, match="w: coordinate 9"):
            codec("terngrad").encode(x, ADDRESS, name="w")
    with pytest.raises(OptionError, match=r"terngrad\.clip"):
        codec("terngrad", clip=-1)


@pytest.mark.parametrize("coder", ["fixed", "rans"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_maxnorm_has_its_step_and_bits(bits: int, coder: str) -> None:
    used = codec("maxnorm", bits=bits, coder=coder)
    n = 1 << 18
    x = gaussian(n)
    encoded = used.encode(x, ADDRESS)
    norm = float(x.abs().max())
    step = steps_of(used, encoded)[0]
    assert norm / (2**bits - 1) <= step <= norm / (2**bits - 1) * (1 + 2**-22)
    assert encoded.bits_per_coordinate <= {2: 2.83, 4: 5.35, 6: 7.01, 8: 9.002}[bits]
    decoded = used.decode(encoded, ADDRESS)
    q = decoded.double().numpy() / step
    assert np.abs(q - np.rint(q)).max() < 1e-4
    assert np.abs(q).max() <= 2**bits - 1 + 1e-4
    if coder == "rans":
        counts = np.unique(np.rint(q), return_counts=True)[1] / n
        entropy = float(-np.sum(counts * np.log2(counts)))
        assert encoded.bits_per_coordinate < entropy * 1.02 + 0.01


def test_maxnorm_can_be_added_when_the_norm_is_shared() -> None:
    used = codec("maxnorm", bits=4)
    assert used.summable
    parts = [gaussian(5000, seed).clamp(-3, 3) for seed in range(3)]
    for part in parts:
        part[0] = 3.0
    encoded = [used.encode(part, Address(1, 1, i, Domain.UPDATE)) for i, part in enumerate(parts)]
    step = steps_of(used, encoded[0])[0]
    assert all(steps_of(used, one)[0] == step for one in encoded)
    into = torch.zeros(5000)
    for i, one in enumerate(encoded):
        used.accumulate(one, Address(1, 1, i, Domain.UPDATE), into, 1.0)
    q = into.double().numpy() / step
    assert np.abs(q - np.rint(q)).max() < 1e-4


@pytest.mark.parametrize("n", [0, 1, 2, 63, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_sizes_spans_and_repetition(name: str, options: dict[str, Any], n: int) -> None:
    used = codec(name, **options)
    x = gaussian(n)
    x[4096:8192] = 0
    payload = used.encode(x, ADDRESS).to_bytes()
    assert used.encode(x, ADDRESS).to_bytes() == payload
    assert used.encode(x.double(), ADDRESS).to_bytes() == payload
    encoded = Encoded.from_bytes(payload)
    used.validate(encoded, n)
    assert encoded.nbytes <= used.max_nbytes(n)
    whole = used.decode(encoded, ADDRESS)
    assert np.all((whole.double() - x.double()).abs().numpy() <= steps_of(used, encoded) * (1 + 1e-5))
    assert torch.count_nonzero(whole[x == 0]) == 0
    for lo in range(0, n, used.chunk_coordinates):
        hi = min(lo + used.chunk_coordinates, n)
        assert torch.equal(used.decode(encoded, ADDRESS, span=(lo, hi)), whole[lo:hi])
    before = gaussian(n, 1)
    into = before.clone()
    used.accumulate(encoded, ADDRESS, into, 0.7)
    np.testing.assert_array_equal(into.numpy(), before.numpy() + np.float32(0.7) * whole.numpy())


@pytest.mark.parametrize("options", BOTH, ids=str)
@pytest.mark.parametrize("name", ["qsgd", "terngrad", "maxnorm"])
def test_zeros_cost_nothing_and_bad_values_are_named(name: str, options: dict[str, Any]) -> None:
    used = codec(name, **options)
    zeros = used.encode(torch.zeros(1 << 18), ADDRESS)
    assert zeros.nbytes <= HEADER.size + 4 * 64 + 8 + 40
    assert torch.count_nonzero(used.decode(zeros, ADDRESS)) == 0
    for bad in (float("nan"), -float("inf")):
        x = gaussian(9000)
        x[8999] = bad
        with pytest.raises(NonFiniteError, match=r"fc\.bias: coordinate 8999"):
            used.encode(x, ADDRESS, name="fc.bias")
    x = torch.zeros(100, dtype=torch.float64)
    x[3] = 1e39
    with pytest.raises(EncodingError, match="coordinate 3"):
        used.encode(x, ADDRESS)


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
@settings(max_examples=25)
@given(
    hnp.arrays(np.float32, st.integers(0, 200), elements=st.floats(-(2.0**90), 2.0**90, width=32)),
    st.integers(0, 10000),
)
def test_decoding_is_within_a_step(name: str, options: dict[str, Any], x: NDArray[np.float32], start: int) -> None:
    used = codec(name, **options)
    address = Address(1, 2, 3, Domain.UPDATE, start=start)
    encoded = Encoded.from_bytes(used.encode(torch.from_numpy(x), address).to_bytes())
    error = np.abs(used.decode(encoded, address).numpy().astype(np.float64) - x)
    assert np.all(error <= steps_of(used, encoded) * (1 + 1e-4) + np.abs(x) * 2.0**-23)
    assert encoded.nbytes <= used.max_nbytes(x.size)


def test_options_are_named_when_wrong() -> None:
    for name, options, expected in (
        ("qsgd", {"levels": 0}, "levels"),
        ("qsgd", {"norm": "l2"}, r"qsgd\.norm"),
        ("terngrad", {"bucket": 0}, r"terngrad\.bucket"),
        ("terngrad", {"coder": "zip"}, r"terngrad\.coder"),
        ("maxnorm", {"bits": 0}, r"maxnorm\.bits"),
        ("maxnorm", {"bits": 16}, r"maxnorm\.bits"),
    ):
        with pytest.raises(OptionError, match=expected):
            codec(name, **options)
