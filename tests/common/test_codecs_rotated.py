"""rotated: what rotation gains, that it only turns the vector, and payloads within payloads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditherps import Address, Context, Domain, Encoded, codec
from ditherps.codecs import Codec, parse
from ditherps.codecs.base import HEADER, header_check
from ditherps.codecs.rotation import signs_of
from ditherps.errors import ContextMismatchError, EncodingError, NonFiniteError, OptionError, PayloadError
from ditherps.kernels import cpu, hadamard

ADDRESS = Address(seed=12345, round=7, sender=3, domain=Domain.UPDATE)


def gaussian(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def student(n: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, n).astype(np.float32))


def turned(x: Tensor, block: int, address: Address = ADDRESS) -> Tensor:
    work, out = cpu.workspace(), torch.empty_like(x)
    stream = signs_of(address, x.numel())
    hadamard.rotate_vector(x.numpy(), block, stream, work.lanes, work.word, work.word_bits, out.numpy())
    return out


def nmse(used: Codec, x: Tensor, address: Address = ADDRESS) -> float:
    error = used.decode(used.encode(x, address), address).double() - x.double()
    return float(error.square().sum() / x.double().square().sum())


def resealed(encoded: Encoded, inner: bytes | bytearray) -> Encoded:
    """With another inner payload, whose checksum is made right."""
    covered = np.frombuffer(inner, np.uint8)
    fixed = bytes(inner[: HEADER.size - 4]) + header_check(covered, covered.size).to_bytes(4, "little")
    return Encoded.from_bytes(encoded.to_bytes()[: HEADER.size] + fixed + bytes(inner[HEADER.size :]))


def test_heavy_tails_cost_as_little_as_a_gaussian() -> None:
    plain, used = codec("dqsg", levels=7, bucket=4096), codec("rotated", inner="dqsg:levels=7,bucket=4096")
    x = student(1 << 20, 0)
    assert nmse(plain, x) > 0.5  # a few buckets hold most of it: about .8 in expectation
    assert 0.0230 < nmse(used, x) < 0.0255
    assert 0.0230 < nmse(used, gaussian(1 << 20)) < 0.0255
    encoded = used.encode(x, ADDRESS)
    assert encoded.nbytes == plain.encode(x, ADDRESS).nbytes + HEADER.size
    assert abs(used.expected_squared_error(encoded) / float(x.double().square().sum()) / nmse(used, x) - 1) < 0.01


@pytest.mark.parametrize("inner", ["none", "bf16", "dqsg", "dqsg:levels=3,bucket=0", "dqsg:step=rms,levels=1"])
def test_the_inner_payload_is_that_of_the_rotated_vector(inner: str) -> None:
    used, x = codec("rotated", inner=inner, block=4096), gaussian(3 * 4096 + 100)
    payload = used.encode(x, ADDRESS).to_bytes()
    assert payload[HEADER.size :] == parse(inner).encode(turned(x, 4096), ADDRESS).to_bytes()
    assert payload == used.encode(x, ADDRESS).to_bytes()
    assert len(payload) <= used.max_nbytes(x.numel())


def test_unquantized_values_come_back() -> None:
    x = gaussian(100_003)
    used = codec("rotated", inner="none")
    assert float((used.decode(used.encode(x, ADDRESS), ADDRESS) - x).abs().max()) < 5e-6


@pytest.mark.parametrize("inner", ["dqsg:levels=1,bucket=64", "dqsg:step=rms,levels=1"])
def test_decoding_is_unbiased_over_rounds(inner: str) -> None:
    n, rounds = 5000, 200
    used, x = codec("rotated", inner=inner, block=4096), student(5000, 1)
    total, squares = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for round_ in range(rounds):
        address = Address(1, round_, 0, Domain.UPDATE)
        error = used.decode(used.encode(x, address), address).double() - x.double()
        total, squares = total + error, squares + error.square()
    deviation = (total / squares.sqrt()).numpy()
    # Every coordinate within what 5000 Gaussians reach, and all together within four standard errors.
    assert np.abs(deviation).max() < 5
    assert abs(deviation.mean()) < 4 / np.sqrt(n)
    assert abs((deviation**2).mean() - 1) < 4 * np.sqrt(2 / n)
    along = float((total.numpy() * np.sign(x.numpy())).sum() / squares.sum().sqrt())
    assert abs(along) < 4


@pytest.mark.parametrize("n", [0, 1, 2, 63, 4095, 4096, 4097, 10000])
@pytest.mark.parametrize("options", [{}, {"inner": "dqsg:levels=7,bucket=0", "block": 4096}], ids=str)
def test_sizes(n: int, options: dict[str, Any]) -> None:
    used, x = codec("rotated", **options), gaussian(n)
    encoded = Encoded.from_bytes(used.encode(x, ADDRESS).to_bytes())
    used.validate(encoded, n)
    assert encoded.nbytes <= used.max_nbytes(n)
    decoded = used.decode(encoded, ADDRESS)
    error = float((decoded.double() - x.double()).square().sum())
    assert error <= 4 * 12 * used.expected_squared_error(encoded) + 1e-9
    assert used.encode(x.double(), ADDRESS).to_bytes() == encoded.to_bytes()


@pytest.mark.parametrize("start", [0, 1, 65536 * 2 - 5000])
@pytest.mark.parametrize("options", [{}, {"inner": "dqsg:levels=7,bucket=0"}], ids=str)
def test_any_span_equals_the_part_of_the_whole(options: dict[str, Any], start: int) -> None:
    used, n = codec("rotated", block=8192, **options), 3 * 8192 + 777
    x, address = gaussian(n), Address(3, 1, 1, Domain.UPDATE, start=start)
    x[8192:16384] = 0
    encoded = used.encode(x, address)
    whole = used.decode(encoded, address)
    assert torch.count_nonzero(whole[8192:16384]) == 0 or options
    for lo in range(0, n, 8192):
        for hi in {*range(lo, n, 8192), n}:
            assert torch.equal(used.decode(encoded, address, span=(lo, hi)), whole[lo:hi])
    with pytest.raises(OptionError, match="span"):
        used.decode(encoded, address, span=(4096, n))


def test_accumulate_is_multiply_then_add() -> None:
    used, x, before = codec("rotated", block=4096), gaussian(9999), gaussian(9999, 1)
    encoded, into = used.encode(x, ADDRESS), before.clone()
    report = used.accumulate(encoded, ADDRESS, into, 0.3)
    expected = before.numpy() + np.float32(0.3) * used.decode(encoded, ADDRESS).numpy()
    np.testing.assert_array_equal(into.numpy(), expected)
    assert (report.coordinates, report.failed_tiles) == (9999, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_names_the_coordinate(bad: float) -> None:
    x = gaussian(20000)
    x[9000] = bad
    with pytest.raises(NonFiniteError, match="second: coordinate 9000 is"):
        codec("rotated", block=4096).encode(x, ADDRESS, name=lambda i: "first" if i < 9000 else "second")


@pytest.mark.parametrize(("inner", "value"), [("dqsg", 1e30), ("dqsg:step=rms,levels=1", 1e25)])
def test_too_large_values_are_named(inner: str, value: float) -> None:
    x = torch.zeros(20000)
    x[9000] = value
    with pytest.raises(EncodingError, match=r"update: coordinate 9000 is .* too large"):
        codec("rotated", inner=inner, block=4096).encode(x, ADDRESS)


def test_the_inner_codec_counts_and_not_its_spelling() -> None:
    short, long = codec("rotated", inner="dqsg"), codec("rotated", inner="dqsg:levels=1,bucket=4096", block="65536")
    assert short == long
    assert short.digest == long.digest
    long.validate(short.encode(gaussian(100), ADDRESS))
    for other in (codec("rotated", inner="dqsg:levels=2"), codec("rotated", block=4096), codec("dqsg")):
        assert short != other
        with pytest.raises(PayloadError):
            other.validate(short.encode(gaussian(100), ADDRESS))
    assert parse("rotated:inner=(dqsg:levels=7,bucket=0),block=4096") == codec(
        "rotated", inner="dqsg:bucket=0,levels=7", block=4096
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"inner": "ndqsg"}, "rotated.inner = 'ndqsg'"),
        ({"inner": "rotated"}, "rotated.inner"),
        ({"inner": "scaled:inner=dqsg"}, "rotated.inner"),
        ({"inner": "nope"}, "codec = 'nope'"),
        ({"inner": "dqsg:levels=1.3"}, "levels = 1.3"),
        ({"block": 5000}, "block = 5000"),
        ({"block": 2048}, "block = 2048"),
        ({"block": 1 << 21}, "block"),
        ({"bits": 1}, "rotated.bits"),
    ],
    ids=str,
)
def test_options_are_named_when_wrong(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        codec("rotated", **options)


def test_what_the_inner_codec_is_shows() -> None:
    assert codec("rotated", inner="dqsg").unbiased
    assert codec("rotated", inner="dqsg").chunk_coordinates == 65536
    assert not codec("rotated", inner="dqsg").contractive
    assert codec("rotated", inner="bf16").contractive == codec("bf16").contractive


def test_contexts_reach_the_inner_payload() -> None:
    used, context = codec("rotated"), Context(1, b"x")
    encoded = used.encode(gaussian(100), ADDRESS, context)
    assert Encoded.from_bytes(encoded.data[HEADER.size :]).header.context == context.check
    assert used.decode(encoded, ADDRESS, context=context).numel() == 100
    with pytest.raises(ContextMismatchError):
        used.validate(encoded)


def test_an_inner_payload_of_something_else_is_refused() -> None:
    used = codec("rotated", block=4096)
    encoded = used.encode(gaussian(5000), ADDRESS)
    others = [
        codec("dqsg").encode(gaussian(4999), ADDRESS),
        codec("dqsg", levels=2).encode(gaussian(5000), ADDRESS),
        codec("none").encode(gaussian(5000), ADDRESS),
        encoded,
    ]
    for other in others:
        with pytest.raises(PayloadError):
            used.validate(resealed(encoded, other.to_bytes()))
    with pytest.raises(ContextMismatchError):
        used.validate(resealed(encoded, codec("dqsg").encode(gaussian(5000), ADDRESS, Context(1, b"x")).to_bytes()))


@pytest.mark.parametrize("inner", ["none", "bf16", "dqsg:bucket=64", "dqsg:step=rms,levels=1"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_forged_inner_payload_is_refused_or_decodes_to_finite_values(inner: str, data: st.DataObject) -> None:
    used = codec("rotated", inner=inner, block=4096)
    encoded = used.encode(gaussian(5000), ADDRESS)
    payload = bytearray(encoded.to_bytes()[HEADER.size :])
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        forged = resealed(encoded, payload)
        used.validate(forged, 5000)
    except (PayloadError, ContextMismatchError):
        return
    assert bool(torch.isfinite(used.decode(forged, ADDRESS)).all())


def test_the_largest_forged_values_decode_to_finite_ones() -> None:
    used = codec("rotated", inner="none", block=4096)
    encoded = used.encode(gaussian(5000), ADDRESS)
    largest = codec("none").encode(torch.full((5000,), torch.finfo(torch.float32).max), ADDRESS)
    decoded = used.decode(resealed(encoded, largest.to_bytes()), ADDRESS)
    assert bool(torch.isfinite(decoded).all())
