"""`scaled`: the factor is the best one, decoding multiplies by it, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs import parse
from ditherps.codecs.base import HEADER, header_check
from ditherps.codecs.dqsg import DqsgCodec
from ditherps.errors import NonFiniteError, OptionError, PayloadError, Reason

ADDRESS = Address(seed=1, round=2, sender=3, domain=Domain.UPDATE)
INNER = "dqsg:levels=1,bucket=64"


def gaussian(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def spike(n: int) -> Tensor:
    """One large coordinate of n: the inner codec's error is far larger than the vector."""
    x = torch.zeros(n)
    x[n // 2] = 1.0
    return x


def factor_of(encoded: Encoded) -> np.float32:
    factor: np.float32 = encoded.data[HEADER.size : HEADER.size + 4].view(np.float32)[0]
    return factor


def inner_of(encoded: Encoded) -> Encoded:
    return Encoded.from_bytes(encoded.data[HEADER.size + 4 :])


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 200_000])
def test_a_payload_is_the_factor_and_the_inner_payload(n: int) -> None:
    used, inner, x = codec("scaled", inner=INNER), parse(INNER), gaussian(n)
    encoded = used.encode(x, ADDRESS)
    payload = inner.encode(x, ADDRESS)
    assert encoded.to_bytes() == used.encode(x.double(), ADDRESS).to_bytes()
    assert inner_of(encoded).to_bytes() == payload.to_bytes()
    assert encoded.nbytes == HEADER.size + 4 + payload.nbytes <= used.max_nbytes(n)
    energy = float((x.double() ** 2).sum())
    omega = inner.expected_squared_error(payload) / energy if energy else 0.0
    assert factor_of(encoded) == pytest.approx(1 / (1 + omega), rel=1e-7)
    assert torch.equal(used.decode(encoded, ADDRESS), inner.decode(payload, ADDRESS) * float(factor_of(encoded)))


def test_accumulate_rounds_the_product_of_weight_and_factor_once() -> None:
    used, inner, x = codec("scaled", inner=INNER), parse(INNER), gaussian(5000)
    encoded = used.encode(x, ADDRESS)
    into, expected = gaussian(5000), gaussian(5000)
    used.accumulate(encoded, ADDRESS, into, 0.3)
    inner.accumulate(inner.encode(x, ADDRESS), ADDRESS, expected, float(np.float32(0.3) * factor_of(encoded)))
    assert torch.equal(into, expected)


def test_spans_are_parts_of_the_whole() -> None:
    used = codec("scaled", inner=INNER)
    encoded = used.encode(gaussian(10_000), ADDRESS)
    whole = used.decode(encoded, ADDRESS)
    for span in ((0, 4096), (4096, 8192), (8192, 10_000), (4096, 4096)):
        assert torch.equal(used.decode(encoded, ADDRESS, span), whole[slice(*span)])


@pytest.mark.parametrize("make", [gaussian, spike], ids=["gaussian", "spike"])
@pytest.mark.parametrize("n", [64, 5000])
def test_the_error_is_omega_over_one_plus_omega(make: Callable[[int], Tensor], n: int) -> None:
    """The mean over 200 dithers, within four standard errors; never more than the vector itself in the mean."""
    used, inner, x = codec("scaled", inner="dqsg:levels=0.5,bucket=0"), parse("dqsg:levels=0.5,bucket=0"), make(n)
    energy = float((x.double() ** 2).sum())
    errors = []
    for round_ in range(200):
        address = Address(seed=1, round=round_, sender=0, domain=Domain.UPDATE)
        encoded = used.encode(x, address)
        errors.append(float(((used.decode(encoded, address) - x).double() ** 2).sum()) / energy)
    omega = inner.expected_squared_error(inner_of(encoded)) / energy
    assert used.expected_squared_error(encoded) / energy == pytest.approx(omega / (1 + omega), rel=1e-6)
    mean, deviation = float(np.mean(errors)), float(np.std(errors)) / math.sqrt(len(errors))
    assert abs(mean - omega / (1 + omega)) < 4 * deviation + 1e-6
    assert mean < 1
    if make is spike:
        assert omega > 4  # the inner codec alone would make the vector worse


def test_an_error_that_the_inner_codec_does_not_know_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    used, inner, n = codec("scaled", inner=INNER), parse(INNER), 200_001
    x = gaussian(n)
    known = factor_of(used.encode(x, ADDRESS))
    monkeypatch.setattr(DqsgCodec, "expected_squared_error", lambda self, encoded: math.nan)
    error = float(((inner.decode(inner.encode(x, ADDRESS), ADDRESS) - x).double() ** 2).sum())
    encoded = used.encode(x, ADDRESS)
    assert factor_of(encoded) == pytest.approx(1 / (1 + error / float((x.double() ** 2).sum())), rel=1e-6)
    assert factor_of(encoded) != known
    assert factor_of(encoded) == pytest.approx(known, rel=0.01)
    assert math.isnan(used.expected_squared_error(encoded))


def test_zeros_and_the_smallest_values() -> None:
    used = codec("scaled", inner=INNER)
    zero = used.encode(torch.zeros(5000), ADDRESS)
    assert factor_of(zero) == 1
    assert not used.decode(zero, ADDRESS).any()
    assert used.expected_squared_error(zero) == 0
    small = used.encode(torch.full((5000,), 1e-45), ADDRESS)
    assert 0 < factor_of(small) < 1e-20
    assert bool(torch.isfinite(used.decode(small, ADDRESS)).all())


def test_what_is_lossless_stays_so() -> None:
    used, x = codec("scaled", inner="none"), gaussian(5000)
    encoded = used.encode(x, ADDRESS)
    assert factor_of(encoded) == 1
    assert torch.equal(used.decode(encoded, ADDRESS), x)


def test_non_finite_values_are_named() -> None:
    x = gaussian(5000)
    x[4500] = math.nan
    with pytest.raises(NonFiniteError, match=r"layer: coordinate 4500 is nan"):
        codec("scaled", inner=INNER).encode(x, ADDRESS, name="layer")


def test_it_is_contractive_and_not_unbiased() -> None:
    used = parse(f"scaled:inner=({INNER})")
    assert used == codec("scaled", inner="dqsg:bucket=64")
    assert (used.unbiased, used.contractive) == (False, True)
    assert not parse(INNER).contractive


@pytest.mark.parametrize("inner", ["bf16", "ndqsg", "scaled:inner=(dqsg)", "dqsg:levels=0.3", "nothing"])
def test_inner_codecs_that_cannot_be_scaled(inner: str) -> None:
    with pytest.raises(OptionError):
        codec("scaled", inner=inner)


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.5, math.nan, math.inf])
def test_factors_of_a_stranger_are_refused(factor: float) -> None:
    used = codec("scaled", inner=INNER)
    payload = bytearray(used.encode(gaussian(100), ADDRESS).to_bytes())
    payload[HEADER.size : HEADER.size + 4] = np.float32(factor).tobytes()
    check = header_check(np.frombuffer(payload, np.uint8), HEADER.size + 4)
    payload[HEADER.size - 4 : HEADER.size] = check.to_bytes(4, "little")
    with pytest.raises(PayloadError, match="factor") as caught:
        used.validate(Encoded.from_bytes(payload))
    assert caught.value.reason is Reason.NON_FINITE
