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
from ditherps.codecs.base import HEADER, TAGS, Header, header_check
from ditherps.errors import ContextMismatchError, PayloadError, Reason

ADDRESS = Address(seed=1, round=2, sender=3, domain=Domain.UPDATE)
CODECS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("bf16", {}),
    ("dqsg", {}),
    ("dqsg", {"levels": 3, "bucket": 64}),
    ("dqsg", {"step": "rms", "levels": 1, "bucket": 0}),
    ("ndqsg", {}),
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
    ("globalrandk", {}),
    ("globalrandk", {"fraction": 0.3, "bits": 2}),
    ("globalrandk", {"coordinates": 100, "bits": 0}),
]


def gaussian(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def sealed(used: Codec, payload: bytes | bytearray) -> bytes:
    """The payload with the checksum that belongs to it: what a hostile sender would write."""
    try:
        covered = used._sealed_bytes(Encoded.from_bytes(payload))
    except PayloadError:
        covered = len(payload)
    check = header_check(np.frombuffer(payload, np.uint8), covered)
    return bytes(payload[: HEADER.size - 4]) + check.to_bytes(4, "little") + bytes(payload[HEADER.size :])


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


EXCEPTIONS = [
    b"\x00",  # no value
    b"\x80",  # no end
    b"\x80" * 10 + b"\x00\x00",  # too long
    b"\x90\x4e\x00",  # coordinate 5000 of 100
    b"\xc8\x01\x00",  # coordinate 100 of 100
    b"\x00\xff\xff\xff\xff\x7f",  # index beyond int32
    b"\x01\x00\x00\xc0\x7f",  # NaN
    b"\x01\x00\x00\x00",  # short value
]


@pytest.mark.parametrize("exceptions", EXCEPTIONS)
def test_malformed_exceptions_are_refused(exceptions: bytes) -> None:
    used = codec("dqsg", step="rms", levels=30)
    encoded = used.encode(gaussian(100), ADDRESS)
    assert encoded.header.tail_bytes == 0
    payload = changed(used, encoded, exceptions, tail_bytes=len(exceptions))
    with pytest.raises(PayloadError, match="exceptions"):
        used.validate(Encoded.from_bytes(payload))


def test_exceptions_where_there_are_none_are_refused() -> None:
    for name in ("none", "dqsg", "ndqsg"):
        used = codec(name)
        encoded = used.encode(gaussian(100), ADDRESS)
        with pytest.raises(PayloadError):
            used.validate(Encoded.from_bytes(changed(used, encoded, b"\x00\x00", tail_bytes=2)))


def test_the_bound_of_size_holds_for_the_worst_vectors() -> None:
    used = codec("dqsg", step="rms", levels=1, resolution=0.1, bucket=0)
    n = 20000
    for spikes in (1, 10, 1000, n // 2, n):
        x = torch.full((n,), 1e-3)
        x[:: n // spikes] = 1.0
        assert used.encode(x, ADDRESS).nbytes <= used.max_nbytes(n)


def test_header_is_as_documented() -> None:
    encoded = codec("none").encode(gaussian(3), ADDRESS)
    check = header_check(encoded.data, encoded.nbytes)
    assert encoded.header == Header(2, 1, 0, codec("none").digest, 0, 0, 3, check)
    assert (encoded.coordinates, encoded.codec, encoded.nbytes) == (3, "none", 44)
    assert encoded.bits_per_coordinate == 8 * 44 / 3
