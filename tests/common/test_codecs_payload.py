"""Payloads from strangers: every truncation and contradiction is a PayloadError, and takes no memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditherps import Address, Context, Domain, Encoded, codec
from ditherps.codecs import Codec, codec_names
from ditherps.codecs.base import HEADER, Header, header_check
from ditherps.errors import ContextMismatchError, EncodingError, PayloadError, Reason
from ditherps.kernels import reference
from ditherps.tags import TAGS
from tests.sealing import sealed

ADDRESS = Address(seed=1, round=2, sender=3, domain=Domain.UPDATE)
CODECS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("bf16", {}),
    ("dqsg", {}),
    ("dqsg", {"levels": 3, "bucket": 64}),
    ("dqsg", {"step": "rms", "levels": 1, "bucket": 0}),
    ("dqsg", {"nmse": 0.01, "levels": 1, "bucket": 64}),
    ("dqsg", {"levels": 300}),
    ("dqsg", {"coder": "rans"}),
    ("dqsg", {"coder": "rans", "reconstruct": "matched", "resolution": 2}),
    ("dqsg", {"coder": "rans", "bits": 2.5}),
    ("dqsg", {"coder": "rans", "step": "max", "levels": 1, "bucket": 64}),
    ("dqsg", {"coder": "rans", "resolution": 1e-6}),
    ("ndqsg", {}),
    ("qsgd", {}),
    ("qsgd", {"step": "l2", "levels": 4, "bucket": 128}),
    ("qsgd", {"coder": "rans", "nmse": 0.1}),
    ("terngrad", {}),
    ("terngrad", {"clip": 0, "coder": "rans"}),
    ("maxnorm", {"bits": 8}),
    ("maxnorm", {"bits": 4, "coder": "rans"}),
    ("scaled", {"inner": "dqsg:levels=1,bucket=64"}),
    ("rotated", {"inner": "dqsg:levels=7", "block": 4096}),
    ("eden", {"bits": 1, "block": 4096}),
    ("eden", {"bits": 2.3}),
    ("eden", {"bits": 0.2, "block": 4096}),
    ("signsgd", {}),
    ("signsgd", {"bucket": 64}),
    ("natural", {}),
    ("maxnorm-multiscale", {}),
    ("maxnorm-multiscale", {"low": 8, "high": 12}),
    ("topk", {}),
    ("topk", {"fraction": 0.3, "values": "bf16"}),
    ("randk", {}),
    ("randk", {"fraction": 0.3, "values": "bf16"}),
    ("tensors", {}),
    ("tensors", {"sizes": "10+2000+20+70+1500"}),
    ("tensors", {"inner": "dqsg:nmse=0.1,coder=rans", "sizes": "300+1100+200"}),
    ("globalrandk", {}),
    ("globalrandk", {"fraction": 0.3, "bits": 2}),
    ("globalrandk", {"coordinates": 100, "bits": 0}),
]


def gaussian(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def changed(used: Codec, encoded: Encoded, behind: bytes = b"", /, **fields: int) -> bytes:
    """With other fields in the header, and more behind."""
    return sealed(used, HEADER.pack(*encoded.header._replace(**fields)) + encoded.to_bytes()[HEADER.size :] + behind)


def test_tags_are_those_of_the_codecs() -> None:
    assert {codec(name).tag: name for name in codec_names()} == TAGS


@pytest.mark.parametrize(("name", "options"), CODECS, ids=str)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_truncated_or_longer_payloads_are_refused(name: str, options: dict[str, Any], data: st.DataObject) -> None:
    used = codec(name, **options)
    payload = used.encode(gaussian(data.draw(st.integers(1, 5000))), ADDRESS).to_bytes()
    cut = data.draw(st.integers(0, len(payload) - 1))
    more = data.draw(st.binary(min_size=1, max_size=9))
    for wrong in (payload[:cut], payload + more):
        for form in (wrong, sealed(used, wrong)):
            with pytest.raises(PayloadError):
                used.validate(Encoded.from_bytes(form))


@pytest.mark.parametrize(("name", "options"), CODECS, ids=str)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_and_a_forged_payload_decodes_to_finite_values(
    name: str, options: dict[str, Any], data: st.DataObject
) -> None:
    used = codec(name, **options)
    payload = bytearray(used.encode(gaussian(500), ADDRESS).to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    if payload != used.encode(gaussian(500), ADDRESS).to_bytes():
        with pytest.raises((PayloadError, ContextMismatchError)):
            used.validate(Encoded.from_bytes(payload))
    try:
        encoded = Encoded.from_bytes(sealed(used, payload))
        used.validate(encoded, 500)
    except (PayloadError, ContextMismatchError):
        return
    side = torch.zeros(500) if used.needs_side_information else None
    assert bool(torch.isfinite(used.decode(encoded, ADDRESS, side_information=side)).all())


@pytest.mark.parametrize(("name", "options"), CODECS, ids=str)
def test_hostile_lengths_take_no_memory(name: str, options: dict[str, Any]) -> None:
    used = codec(name, **options)
    encoded = used.encode(gaussian(5000), ADDRESS)
    zero = used.encode(torch.zeros(1), ADDRESS)
    hostile = [
        changed(used, encoded, coordinates=2**35),
        changed(used, encoded, coordinates=2**63),
        changed(used, encoded, tail_bytes=2**60),
        changed(used, encoded, tail_bytes=encoded.nbytes - HEADER.size),
        changed(used, zero, coordinates=2**35, tail_bytes=0),
    ]
    tracemalloc.start()
    for payload in hostile:
        try:
            used.validate(Encoded.from_bytes(payload), 5000)
        except PayloadError:
            continue
        pytest.fail("accepted")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_reading_does_not_copy() -> None:
    payload = bytearray(codec("none").encode(gaussian(100), ADDRESS).to_bytes())
    for buffer in (bytes(payload), payload, memoryview(payload), np.frombuffer(payload, np.uint8)):
        encoded = Encoded.from_bytes(buffer)
        assert np.shares_memory(encoded.data, np.frombuffer(buffer, np.uint8))
        assert encoded.to_bytes() == payload
    odd = memoryview(b"x" + bytes(payload))[1:]
    assert torch.equal(codec("none").decode(Encoded.from_bytes(odd), ADDRESS), gaussian(100))


@pytest.mark.parametrize(
    "fields", [{"format": 1}, {"tag": 99}, {"flags": 1}, {"coordinates": 2**35 + 1}], ids=lambda f: next(iter(f))
)
def test_unknown_headers_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(PayloadError):
        Encoded.from_bytes(changed(codec("dqsg"), codec("dqsg").encode(gaussian(10), ADDRESS), **fields))


def test_another_codec_or_other_options_are_refused() -> None:
    encoded = codec("dqsg").encode(gaussian(10), ADDRESS)
    others: list[Codec] = [codec("none"), codec("dqsg", levels=2), codec("dqsg", bucket=8192)]
    for other in others:
        with pytest.raises(PayloadError):
            other.validate(encoded)
        codec("dqsg").validate(encoded, 10)
        with pytest.raises(PayloadError):
            other.validate(encoded)
    with pytest.raises(PayloadError) as caught:
        codec("dqsg").validate(encoded, 11)
    assert caught.value.reason is Reason.SIZE


def test_another_context_is_refused() -> None:
    used, context = codec("dqsg"), Context(1, b"x")
    encoded = used.encode(gaussian(10), ADDRESS, context)
    assert used.decode(encoded, ADDRESS, context=context).numel() == 10
    for other in (None, Context(2, b"x"), Context(1, b"y")):
        with pytest.raises(ContextMismatchError):
            used.decode(encoded, ADDRESS, context=other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["none", "dqsg", "ndqsg"])
def test_non_finite_values_and_steps_are_refused(name: str, bad: float) -> None:
    payload = bytearray(codec(name).encode(gaussian(10), ADDRESS).to_bytes())
    payload[HEADER.size : HEADER.size + 4] = np.float32(bad).tobytes()
    with pytest.raises(PayloadError) as caught:
        codec(name).validate(Encoded.from_bytes(sealed(codec(name), payload)))
    assert caught.value.reason is Reason.NON_FINITE


def test_non_finite_bf16_is_refused() -> None:
    payload = bytearray(codec("bf16").encode(gaussian(10), ADDRESS).to_bytes())
    payload[-2:] = b"\x80\x7f"
    with pytest.raises(PayloadError, match="NaN"):
        codec("bf16").validate(Encoded.from_bytes(sealed(codec("bf16"), payload)))


@pytest.mark.parametrize("step", [-1.0, -0.5, 1e-40, 3e38])
def test_steps_out_of_range_are_refused(step: float) -> None:
    payload = bytearray(codec("dqsg").encode(gaussian(10), ADDRESS).to_bytes())
    payload[HEADER.size : HEADER.size + 4] = np.float32(step).tobytes()
    with pytest.raises(PayloadError, match="step"):
        codec("dqsg").validate(Encoded.from_bytes(sealed(codec("dqsg"), payload)))


def with_escapes(used: Codec, encoded: Encoded, size: int, escapes: bytes) -> Encoded:
    """A payload of one tile without escapes, with these: `size` bytes of them, as its own section says."""
    at = HEADER.size + 4
    header = HEADER.pack(*encoded.header._replace(tail_bytes=len(escapes)))
    body = encoded.to_bytes()
    return Encoded.from_bytes(
        sealed(used, header + body[HEADER.size : at] + size.to_bytes(2, "little") + body[at + 2 :] + escapes)
    )


def in_bytes(nibbles: list[int]) -> bytes:
    return bytes(a | b << 4 for a, b in zip(nibbles[::2], [*nibbles[1::2], 0], strict=False))


def raw(value: float) -> bytes:
    bits = int(np.float32(value).view(np.uint32))
    return in_bytes([0, *(bits >> (4 * group) & 15 for group in range(8))])


ESCAPES = [
    (2, b"\x11"),  # more announced than there are
    (1, b"\x11\x11"),  # fewer
    (0, b"\x11"),
    (5, raw(float("nan"))),
    (5, raw(float("inf"))),
    (5, raw(-float("inf"))),
    (6, in_bytes(reference._nibbles(2**32 - 3))),  # a distance beyond 2^31 - 2
    (6, in_bytes(reference._nibbles(2**33 - 1))),
    (6, b"\xff" * 6),  # no end
]


@pytest.mark.parametrize(("size", "escapes"), ESCAPES)
def test_malformed_escapes_are_refused(size: int, escapes: bytes) -> None:
    used = codec("dqsg", step="rms", levels=30)
    encoded = used.encode(gaussian(100), ADDRESS)
    assert encoded.header.tail_bytes == 0
    with pytest.raises(PayloadError, match="escapes"):
        used.validate(with_escapes(used, encoded, size, escapes))


def test_the_longest_escapes_that_are_allowed_decode_to_finite_values() -> None:
    """With the largest step distances are cut at the largest float32, and raw values stand for themselves."""
    used = codec("dqsg", step="rms", levels=1, bucket=0)
    n = 100
    encoded = used.encode(torch.linspace(-1, 1, n), ADDRESS)
    digits = reference.pack(np.full(n, 3), 4)
    step = np.float32(np.finfo(np.float32).max / 3.001)
    front = HEADER.pack(*encoded.header._replace(tail_bytes=0)) + step.tobytes() + b"\0\0"
    bare = Encoded.from_bytes(sealed(used, front + digits))
    # No escape was written for these digits: nothing is what they stand for.
    assert torch.isfinite(used.decode(bare, ADDRESS)).all()
    farthest = reference._nibbles(2**32 - 5) + reference._nibbles(2**32 - 4)
    values = used.decode(with_escapes(used, bare, 11, in_bytes(farthest)), ADDRESS)
    largest = float(np.finfo(np.float32).max)
    assert values[:2].tolist() == [-largest, largest]
    assert torch.isfinite(values).all()
    assert used.decode(with_escapes(used, bare, 5, raw(-1e-45)), ADDRESS)[0] == np.float32(-1e-45)


def test_escapes_where_there_are_none_are_refused() -> None:
    for name, options in (("none", {}), ("dqsg", {}), ("ndqsg", {"step": "rms"}), ("qsgd", {}), ("maxnorm", {})):
        used = codec(name, **options)
        encoded = used.encode(gaussian(100), ADDRESS)
        with pytest.raises(PayloadError):
            used.validate(Encoded.from_bytes(changed(used, encoded, b"\x11\x11", tail_bytes=2)))


@pytest.mark.parametrize(
    "options",
    [
        {"step": "rms", "levels": 1, "resolution": 0.1, "bucket": 0},
        {"step": "rms", "levels": 0.5, "resolution": 0.001, "bucket": 256},
        {"step": "rms", "levels": 1, "resolution": 0.5, "bucket": 4096},
        {"step": "rms", "levels": 1, "resolution": 2**-20, "bucket": 0},
        {"nmse": 0.5, "levels": 2},
        {"bits": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1e-44, 1e-3, 1.0, 1e37])
def test_the_bound_of_size_holds_for_the_worst_vectors(options: dict[str, Any], scale: float) -> None:
    used = codec("dqsg", **options)
    n = 20000
    for spikes in (1, 10, 1000, n // 4, n // 2, n):
        x = torch.full((n,), 1e-3)
        x[:: n // spikes] = 1.0
        x *= scale
        encoded = used.encode(x, ADDRESS)
        assert encoded.nbytes <= used.max_nbytes(n)
        used.validate(Encoded.from_bytes(encoded.to_bytes()), n)


def test_values_next_to_the_largest_float_are_refused_or_decode() -> None:
    """Nothing that an encoder writes may be refused by its decoder, or become infinite there."""
    largest = float(np.finfo(np.float32).max)
    accepted = 0
    for resolution in (2.0**-20, 0.1, 0.5, 1.0, 3.0):
        for levels in (0.5, 1, 3, 100):
            for bucket in (0, 64, 2048):
                used = codec("dqsg", step="rms", levels=levels, resolution=resolution, bucket=bucket)
                for size in (largest, largest / 1.5, largest / 2.5, largest / 4, largest / 6, largest / 100):
                    x = torch.full((4096,), size)
                    x[:2000:7] = 0
                    x[2048:2112] = 0
                    x[2050] = 1e-3  # one spike in a bucket of zeros, beside buckets of large steps
                    try:
                        encoded = used.encode(x, ADDRESS)
                    except EncodingError:
                        continue
                    accepted += 1
                    assert encoded.nbytes <= used.max_nbytes(4096)
                    used.validate(Encoded.from_bytes(encoded.to_bytes()), 4096)
                    steps = np.repeat(
                        encoded.data[HEADER.size :][: 4 * -(-4096 // (bucket or 4096))].view(np.float32), bucket or 4096
                    )
                    error = np.abs(used.decode(encoded, ADDRESS).double().numpy() - x.double().numpy())
                    assert np.all(error <= steps * 0.5001 + x.numpy() * 2.0**-23)
    assert accepted > 100


def test_distances_beyond_32_bits_travel_as_values() -> None:
    used = codec("dqsg", step="rms", levels=1, resolution=2.0**-20, bucket=0)
    n = 1 << 24
    x = torch.zeros(n)
    x[n // 3] = -1.2345
    encoded = used.encode(x, ADDRESS)
    assert encoded.header.tail_bytes == 5
    assert encoded.data[-5:].tobytes() == raw(-1.2345)
    lo = n // 3 // 4096 * 4096
    part = used.decode(encoded, ADDRESS, span=(lo, lo + 4096))
    assert part[n // 3 - lo] == x[n // 3]
    step = float(encoded.data[HEADER.size : HEADER.size + 4].view(np.float32)[0])
    part[n // 3 - lo] = 0
    assert part.abs().max() <= step * 0.5001


def test_header_is_as_documented() -> None:
    encoded = codec("none").encode(gaussian(3), ADDRESS)
    check = header_check(encoded.data, encoded.nbytes)
    assert encoded.header == Header(2, 1, 0, codec("none").digest, 0, 0, 3, check)
    assert (encoded.coordinates, encoded.codec, encoded.nbytes) == (3, "none", 44)
    assert encoded.bits_per_coordinate == 8 * 44 / 3
