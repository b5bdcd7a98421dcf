"""Corners of `coder = rans` that once were wrong: each test fails without its mend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs import Codec, Role
from ditherps.codecs.base import HEADER, checksum
from ditherps.kernels.coder import CHUNK, HEAD, PLAIN
from ditherps.kernels.escapes import put_nibble
from ditherps.kernels.jit import Int
from tests.sealing import sealed


def at(round_: int) -> Address:
    return Address(seed=1, round=round_, sender=0, domain=Domain.UPDATE)


def with_escapes(used: Codec, payload: bytes, nibbles: list[int]) -> bytes:
    """A payload of one chunk and one step with other escapes, and right checksums."""
    front = HEADER.size + 4 + 8
    chunk = payload[front:]
    end = HEAD + int.from_bytes(chunk[:2], "little") + 4 * chunk[2] + 2 * int.from_bytes(chunk[4:8], "little")
    forged = np.zeros(end + (len(nibbles) + 1) // 2, np.uint8)
    forged[:end] = np.frombuffer(chunk[:end], np.uint8)
    place: Int = 0
    for nibble in nibbles:
        place = put_nibble(nibble, forged[end:], place)
    directory = np.array([forged.size, checksum(forged)], "<u4").tobytes()
    return sealed(used, payload[: front - 8] + directory + forged.tobytes())


@pytest.mark.parametrize("name", ["dqsg", "qsgd"])
def test_forged_escapes_decode_to_finite_values(name: str) -> None:
    """Tiles begin on whole bytes, so a check that reads numbers one behind the other sees others than the decoder."""
    used = codec(name, coder="rans", resolution=0.9)
    x = (torch.rand(8192, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 2.4e32
    x[100] = x[5000] = 1.9e34
    payload = used.encode(x, at(0)).to_bytes()
    for nibbles in ([2, 8, *[8] * 10, 3], [2, 2, *[15] * 11, 7], [15] * 40, []):
        encoded = Encoded.from_bytes(with_escapes(used, payload, nibbles))
        used.validate(encoded, 8192)
        assert bool(torch.isfinite(used.decode(encoded, at(0))).all())


def test_a_value_next_to_the_largest_is_not_refused_by_its_own_decoder() -> None:
    used = codec("dqsg", coder="rans", resolution=2.0**-12)
    x = torch.zeros(CHUNK)
    x[0] = torch.finfo(torch.float32).max
    for round_ in range(4):
        decoded = used.decode(used.encode(x, at(round_)), at(round_))
        assert bool(torch.isfinite(decoded).all())
        assert abs(float(decoded[0]) / float(x[0]) - 1) < 1e-3


@pytest.mark.parametrize("reconstruct", ["dither", "matched"])
def test_the_form_of_a_chunk_does_not_bias(reconstruct: str) -> None:
    """Where indices straddle what one form of a chunk holds, the values must not depend on which form it is."""
    used = codec("dqsg", coder="rans", resolution=2.0**-15 / 1.0000091, reconstruct=reconstruct)
    x = torch.tensor([1.0, -1.0])
    rounds = 1500
    step = float(used.encode(x, at(0)).data[HEADER.size : HEADER.size + 4].view(np.float32)[0])
    errors = [(used.decode(used.encode(x, at(r)), at(r)).double() - x.double()).numpy() / step for r in range(rounds)]
    mean = np.mean(errors, 0)
    assert np.abs(mean).max() < 4 / np.sqrt(12 * rounds)


def test_fine_steps_are_coded_and_not_sent_plain() -> None:
    used = codec("dqsg", coder="rans", resolution=2.0**-20)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for round_ in range(4):
        encoded = used.encode(x, at(round_))
        assert encoded.data[HEADER.size + 4 + 8 + 3] != PLAIN
        assert encoded.nbytes <= used.max_nbytes(5000)


def test_the_expected_error_leaves_out_what_is_exact() -> None:
    used = codec("dqsg", coder="rans")
    x = torch.zeros(64 * 4096)
    x[:4096] = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    expected, real = [], []
    for round_ in range(8):
        encoded = used.encode(x, at(round_))
        expected.append(used.expected_squared_error(encoded))
        real.append(float((used.decode(encoded, at(round_)).double() - x.double()).square().sum()))
    assert abs(np.mean(real) / np.mean(expected) - 1) < 0.03
    assert np.isnan(codec("dqsg", coder="rans", bucket=4096).expected_squared_error(
        codec("dqsg", coder="rans", bucket=4096).encode(x, at(0))))  # fmt: skip


def test_sources_of_nested_coding_may_be_entropy_coded() -> None:
    used = codec("ndqsg", coder="rans", resolution=0.5)
    source = used.for_role(Role.SOURCE)
    assert source == codec("dqsg", coder="rans", resolution=0.5)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    side = x + 0.01 * torch.randn(5000, generator=torch.Generator().manual_seed(2))
    encoded = used.encode(x, at(0))
    plain = source.decode(source.encode(x, at(0)), at(0))
    assert torch.equal(used.decode(encoded, at(0), side_information=side), plain)
