"""ndqsg: equality with dqsg, bounded failures, every failed tile counted, alpha below 1."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs import DecodeReport, Role
from ditherps.codecs.base import HEADER
from ditherps.errors import OptionError
from ditherps.kernels import reference

ADDRESS = Address(seed=4321, round=7, sender=3, domain=Domain.UPDATE)


def gaussian(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def fine_step(encoded: Encoded) -> float:
    return float(encoded.data[HEADER.size : HEADER.size + 4].view(np.float32)[0])


def fine_indices(x: Tensor, step: float, address: Address, alpha: float = 1.0) -> NDArray[np.int64]:
    """Independently of the codec, for whole levels."""
    u = reference.dither_at(address, np.arange(x.numel()))
    return np.floor(alpha * x.double().numpy() / step + u + 0.5).astype(np.int64)


@pytest.mark.parametrize("start", [0, 777])
@pytest.mark.parametrize(("levels", "ratio"), [(3, 3), (1.5, 2), (7, 5), (100, 15), (3, 256)])
@pytest.mark.parametrize("bucket", [0, 4096, 64])
def test_equals_dqsg_wherever_decoding_must_succeed(levels: float, ratio: int, bucket: int, start: int) -> None:
    address = Address(1, 2, 3, Domain.UPDATE, start=start)
    nested = codec("ndqsg", levels=levels, ratio=ratio, bucket=bucket)
    plain = nested.for_role(Role.SOURCE)
    n = 2 * 4096 + 500
    x = gaussian(n)
    encoded = Encoded.from_bytes(nested.encode(x, address).to_bytes())
    width = bucket or n
    steps = encoded.data[HEADER.size : HEADER.size + 4 * -(-n // width)].view(np.float32)
    radius = torch.from_numpy(np.repeat(steps, width)[:n] * (ratio - 1) / 2)
    y = x + (torch.rand(n, generator=torch.Generator().manual_seed(1)) * 2 - 1) * radius * 0.9999
    decoded = nested.decode(encoded, address, side_information=y)
    assert torch.equal(decoded, plain.decode(plain.encode(x, address), address))
    report = nested.accumulate(encoded, address, torch.zeros(n), 1.0, side_information=y)
    assert report == DecodeReport(n, 3, 0)
    assert encoded.nbytes <= nested.max_nbytes(n)


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_failures_are_bounded_and_counted(spread: float) -> None:
    nested = codec("ndqsg")
    n = 20 * 4096 + 123
    x = gaussian(n)
    y = x.clone()
    rng = np.random.default_rng(0)
    for tile in rng.choice(21, 9, replace=False):
        hit = tile * 4096 + rng.choice(123, 3, replace=False)
        y[hit] += torch.from_numpy(spread * rng.standard_normal(3)).float()
    encoded = nested.encode(x, ADDRESS)
    step = fine_step(encoded)
    decoded = torch.zeros(n)
    report = nested.accumulate(encoded, ADDRESS, decoded, 1.0, side_information=y)
    assert torch.all((decoded.double() - y.double()).abs() <= 1.5 * step * (1 + 1e-6))
    plain = nested.for_role(Role.SOURCE)
    wrong = (decoded != plain.decode(plain.encode(x, ADDRESS), ADDRESS)).numpy()
    expected = len({int(i) // 4096 for i in np.flatnonzero(wrong)})
    assert report.failed_tiles == expected
    if spread >= 1.0:
        assert expected > 0


def test_side_information_far_away_fails_every_tile() -> None:
    nested = codec("ndqsg")
    x = gaussian(5 * 4096)
    encoded = nested.encode(x, ADDRESS)
    report = nested.accumulate(encoded, ADDRESS, torch.zeros(5 * 4096), 1.0, side_information=x + 100)
    assert report.failed_tiles == report.tiles == 5


def test_payload_is_residues_and_zlib_checksums() -> None:
    nested = codec("ndqsg")
    x = gaussian(4096 + 10)
    encoded = nested.encode(x, ADDRESS)
    q = fine_indices(x, fine_step(encoded), ADDRESS)
    body = b""
    for lo, hi in ((0, 4096), (4096, 4106)):
        body += reference.pack(q[lo:hi] % 3, 3) + zlib.crc32(q[lo:hi].astype("<i2").tobytes()).to_bytes(4, "little")
    assert encoded.to_bytes()[HEADER.size + 4 :] == body
    assert encoded.bits_per_coordinate < 1.7


@pytest.mark.parametrize("alpha", [0.9, 0.7])
def test_alpha_below_one_has_the_predicted_error(alpha: float) -> None:
    """MSE = alpha^2 step^2 / 12 + (1 - alpha^2)^2 sigma_z^2 (algorithms.md 1.2), with no failures."""
    nested = codec("ndqsg", alpha=alpha, ratio=15)
    n = 1 << 18
    x = gaussian(n)
    sigma = 0.5
    y = x + sigma * gaussian(n, 1)
    encoded = nested.encode(x, ADDRESS)
    step = fine_step(encoded)
    decoded = torch.zeros(n)
    report = nested.accumulate(encoded, ADDRESS, decoded, 1.0, side_information=y)
    assert report.failed_tiles == 0
    predicted = alpha**2 * step**2 / 12 + (1 - alpha**2) ** 2 * sigma**2
    assert abs(float((decoded - x).double().square().mean()) / predicted - 1) < 0.01
    assert not nested.unbiased


@pytest.mark.parametrize("options", [{}, {"bucket": 64}, {"step": "rms", "resolution": 0.3}])
def test_any_span_equals_the_part_of_the_whole(options: dict[str, object]) -> None:
    nested = codec("ndqsg", **options)
    n = 4 * 4096 + 77
    x = gaussian(n)
    x[4096:8192] = 0
    y = x + 0.1 * gaussian(n, 1)
    encoded = nested.encode(x, ADDRESS)
    whole = nested.decode(encoded, ADDRESS, side_information=y)
    for lo in range(0, n, 4096):
        for hi in {*range(lo, n, 4096), n}:
            part = nested.decode(encoded, ADDRESS, span=(lo, hi), side_information=y[lo:hi])
            assert torch.equal(part, whole[lo:hi])


def test_accumulate_is_multiply_then_add() -> None:
    nested = codec("ndqsg")
    x, before = gaussian(9999), gaussian(9999, 1)
    encoded = nested.encode(x, ADDRESS)
    into = before.clone()
    nested.accumulate(encoded, ADDRESS, into, 0.3, side_information=x)
    decoded = nested.decode(encoded, ADDRESS, side_information=x)
    np.testing.assert_array_equal(into.numpy(), before.numpy() + np.float32(0.3) * decoded.numpy())


def test_zeros_decode_to_zeros_whatever_the_side_information() -> None:
    nested = codec("ndqsg")
    encoded = nested.encode(torch.zeros(5000), ADDRESS)
    assert encoded.nbytes == HEADER.size + 4
    assert torch.count_nonzero(nested.decode(encoded, ADDRESS, side_information=gaussian(5000))) == 0
    empty = nested.encode(torch.zeros(0), ADDRESS)
    assert nested.decode(empty, ADDRESS, side_information=torch.zeros(0)).numel() == 0


def test_side_information_is_required_and_checked() -> None:
    nested = codec("ndqsg")
    encoded = nested.encode(gaussian(5000), ADDRESS)
    for side in (None, torch.zeros(4999), torch.zeros(5000, dtype=torch.float64)):
        with pytest.raises(OptionError, match="side_information"):
            nested.decode(encoded, ADDRESS, side_information=side)


def test_roles() -> None:
    nested = codec("ndqsg", levels=2.5, bucket=512, side="running", side_fraction="0.25")
    assert nested.for_role(Role.NESTED) is nested
    assert nested.for_role(Role.SOURCE) == codec("dqsg", levels=2.5, bucket=512)
    assert nested.roles == (Role.SOURCE, Role.NESTED)
    assert nested.digest == codec("ndqsg", levels=2.5, bucket=512).digest
    with pytest.raises(OptionError, match="role"):
        codec("dqsg").for_role(Role.NESTED)
