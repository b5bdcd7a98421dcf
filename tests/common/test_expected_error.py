"""The error that a codec expects against the error that decoding makes."""

from __future__ import annotations

import math

import pytest
import torch

import ditherps
from ditherps.codecs import Role


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dqsg", {"levels": 1, "bucket": 4096}),
        ("dqsg", {"levels": 3, "bucket": 512}),
        ("dqsg", {"levels": 7.5, "bucket": 0}),
        ("dqsg", {"step": "rms", "resolution": 1.0}),
        ("ndqsg", {"levels": 3}),
        ("none", {}),
    ],
)
@pytest.mark.parametrize("coordinates", [0, 1000, 4096 * 20 + 17])
def test_expected_error_is_the_measured_one(name: str, options: dict[str, object], coordinates: int) -> None:
    codec = ditherps.codec(name, **options).for_role(Role.SOURCE)
    x = torch.randn(coordinates, generator=torch.Generator().manual_seed(1))
    address = ditherps.Address(seed=3, round=5, sender=2, domain=ditherps.Domain.UPDATE)
    encoded = codec.encode(x, address)
    measured = float(((codec.decode(encoded, address) - x).double() ** 2).sum())
    # The square of a uniform error has a relative standard deviation of sqrt(4/5) a coordinate.
    tolerance = 4 * math.sqrt(0.8 / max(coordinates, 1))
    assert codec.expected_squared_error(encoded) == pytest.approx(measured, rel=tolerance, abs=1e-12)


def test_nested_indices_are_as_fine_as_the_sources() -> None:
    codec = ditherps.codec("ndqsg")
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    address = ditherps.Address(seed=3, round=5, sender=2, domain=ditherps.Domain.UPDATE)
    expected = [codec.for_role(role).expected_squared_error(codec.for_role(role).encode(x, address)) for role in Role]
    assert expected[0] == expected[1] > 0
