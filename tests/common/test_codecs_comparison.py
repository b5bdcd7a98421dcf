"""What holds for every codec that one compares with: sizes, spans, weights, degenerate and hostile input."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs.base import HEADER, header_check
from ditherps.errors import EncodingError, NonFiniteError, OptionError, PayloadError
from ditherps.kernels import reference
from ditherps.kernels.alphabets import alphabet, digits_nbytes, pack_digits, unpack_digits
from ditherps.kernels.packing import DIGITS, WIDE_FIELDS

ADDRESS = Address(seed=12345, round=7, sender=3, domain=Domain.UPDATE)
CODECS: list[tuple[str, dict[str, Any]]] = [
    ("signsgd", {}),
    ("signsgd", {"bucket": 128}),
    ("natural", {}),
    ("maxnorm-multiscale", {}),
    ("maxnorm-multiscale", {"low": 8, "high": 12}),
    ("topk", {}),
    ("topk", {"fraction": 0.2, "values": "bf16"}),
    ("randk", {"fraction": 0.1}),
    ("randk", {"fraction": 0.7, "values": "bf16"}),
    ("globalrandk", {"coordinates": 5000}),
    ("globalrandk", {"fraction": 0.3, "bits": 2}),
    ("globalrandk", {"fraction": 1, "bits": 0}),
]
every_codec = pytest.mark.parametrize(("name", "options"), CODECS, ids=str)


def gaussian(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [0, 1, 2, 4095, 4096, 4097, 10000])
@every_codec
def test_sizes(name: str, options: dict[str, Any], n: int) -> None:
    used = codec(name, **options)
    encoded = Encoded.from_bytes(used.encode(gaussian(n), ADDRESS).to_bytes())
    used.validate(encoded, n)
    assert encoded.nbytes <= used.max_nbytes(n)
    decoded = used.decode(encoded, ADDRESS)
    assert decoded.shape == (n,)
    assert bool(torch.isfinite(decoded).all())
    assert n == 0 or torch.count_nonzero(decoded) > 0


@pytest.mark.parametrize("start", [0, 4095, 100001])
@every_codec
def test_any_span_equals_the_part_of_the_whole(name: str, options: dict[str, Any], start: int) -> None:
    used = codec(name, **options)
    unit = used.chunk_coordinates
    n = 3 * unit + 77
    x = gaussian(n)
    x[unit : 2 * unit] = 0
    address = Address(3, 1, 1, Domain.UPDATE, start=start)
    encoded = used.encode(x, address)
    whole = used.decode(encoded, address)
    for lo in range(0, n, unit):
        for hi in {*range(lo, n, unit), n}:
            assert torch.equal(used.decode(encoded, address, span=(lo, hi)), whole[lo:hi])


@every_codec
def test_accumulating_multiplies_then_adds(name: str, options: dict[str, Any]) -> None:
    used = codec(name, **options)
    x, before = gaussian(10000), gaussian(10000, 1)
    encoded = used.encode(x, ADDRESS)
    into = before.clone()
    used.accumulate(encoded, ADDRESS, into, -0.7)
    expected = before.numpy() + np.float32(-0.7) * used.decode(encoded, ADDRESS).numpy()
    np.testing.assert_array_equal(into.numpy(), expected)


@every_codec
def test_same_input_same_bytes(name: str, options: dict[str, Any]) -> None:
    x = gaussian(9000)
    payload = codec(name, **options).encode(x, ADDRESS).to_bytes()
    assert codec(name, **options).encode(x.double(), ADDRESS).to_bytes() == payload
    padded = torch.zeros(18000)
    padded[::2] = x
    assert codec(name, **options).encode(padded[::2], ADDRESS).to_bytes() == payload
    half = x.bfloat16()
    assert (
        codec(name, **options).encode(half, ADDRESS).to_bytes()
        == codec(name, **options).encode(half.float(), ADDRESS).to_bytes()
    )
    deterministic = name in ("signsgd", "topk")
    other = codec(name, **options).encode(x, Address(12345, 8, 3, Domain.UPDATE)).to_bytes()
    without_dither = deterministic or options.get("bits") == 0
    assert (other == payload) == without_dither


@every_codec
def test_zeros_decode_to_zeros(name: str, options: dict[str, Any]) -> None:
    used = codec(name, **options)
    encoded = used.encode(torch.zeros(5000), ADDRESS)
    used.validate(Encoded.from_bytes(encoded.to_bytes()), 5000)
    assert torch.count_nonzero(used.decode(encoded, ADDRESS)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_codec
def test_non_finite_input_names_the_tensor(name: str, options: dict[str, Any], bad: float) -> None:
    x = gaussian(10000)
    x[5000] = bad
    with pytest.raises(NonFiniteError, match=r"conv1\.weight: coordinate 5000"):
        codec(name, **options).encode(x, ADDRESS, name="conv1.weight")


@every_codec
def test_values_beyond_float32_are_refused(name: str, options: dict[str, Any]) -> None:
    x = gaussian(100).double()
    x[3] = 1e39
    with pytest.raises(EncodingError, match=r"coordinate 3 .* float32"):
        codec(name, **options).encode(x, ADDRESS)


@pytest.mark.parametrize("value", [3.4028234663852886e38, 1e37, 1.5e-45, 1e-40])
@every_codec
def test_extreme_values_are_refused_or_decode_to_finite_ones(name: str, options: dict[str, Any], value: float) -> None:
    used = codec(name, **options)
    x = torch.full((3000,), value)
    x[::3] *= -1
    try:
        encoded = used.encode(x, ADDRESS)
    except EncodingError:
        assert value > 1e36
        return
    used.validate(Encoded.from_bytes(encoded.to_bytes()))
    assert bool(torch.isfinite(used.decode(encoded, ADDRESS)).all())


@every_codec
def test_any_other_length_is_refused_before_memory_is_taken(name: str, options: dict[str, Any]) -> None:
    used = codec(name, **options)
    payload = bytearray(used.encode(gaussian(5000), ADDRESS).to_bytes())
    tracemalloc.start()
    for n in (0, 1, 4000, 6000, 2**30, 2**35):
        if name == "globalrandk" and "coordinates" in options and n >= 5000:
            continue  # as many coordinates of a longer vector are the same payload
        payload[20:28] = n.to_bytes(8, "little")
        payload[28:32] = header_check(np.frombuffer(payload, np.uint8), len(payload)).to_bytes(4, "little")
        with pytest.raises(PayloadError):
            used.validate(Encoded.from_bytes(bytes(payload)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "options", "at"),
    [
        ("signsgd", {}, 0),
        ("maxnorm-multiscale", {}, 0),
        ("topk", {}, 8),
        ("randk", {}, 4),
        ("globalrandk", {}, 0),
        ("globalrandk", {"bits": 0}, 40),
    ],
)
def test_non_finite_values_of_a_payload_are_refused(name: str, options: dict[str, Any], at: int, value: float) -> None:
    used = codec(name, **options)
    payload = bytearray(used.encode(gaussian(500), ADDRESS).to_bytes())
    payload[HEADER.size + at : HEADER.size + at + 4] = np.float32(value).tobytes()
    payload[28:32] = header_check(np.frombuffer(payload, np.uint8), len(payload)).to_bytes(4, "little")
    with pytest.raises(PayloadError):
        used.validate(Encoded.from_bytes(bytes(payload)))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("signsgd", {"bucket": 100}, "signsgd.bucket"),
        ("signsgd", {"bucket": -1}, "signsgd.bucket"),
        ("natural", {"bits": 3}, "natural.bits"),
        ("maxnorm-multiscale", {"low": 0}, "low"),
        ("maxnorm-multiscale", {"low": 6, "high": 6}, "high"),
        ("maxnorm-multiscale", {"high": 16}, "high"),
        ("topk", {"fraction": 0}, "topk.fraction"),
        ("topk", {"fraction": 1.5}, "topk.fraction"),
        ("topk", {"values": "fp8"}, "topk.values"),
        ("randk", {"fraction": -0.1}, "randk.fraction"),
        ("globalrandk", {"coordinates": 0}, "globalrandk.coordinates"),
        ("globalrandk", {"coordinates": 10, "fraction": 0.1}, "globalrandk.fraction"),
        ("globalrandk", {"bits": 16}, "globalrandk.bits"),
    ],
)
def test_options_are_named_when_wrong(name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        codec(name, **options)


@every_codec
def test_options_survive_a_dump(name: str, options: dict[str, Any]) -> None:
    used = codec(name, **options)
    again = codec(name, **used.options.model_dump())
    assert again == used
    assert again.digest == used.digest


def _parts(digits: NDArray[np.int64], base: int) -> bytes:
    """Digits packed in parts, slowly (proto/FORMAT.md)."""
    if base <= 256:
        return reference.pack(digits, base)
    return (digits % 256).astype(np.uint8).tobytes() + reference.pack(digits // 256, -(-base // 256))


@pytest.mark.parametrize("base", [2, 7, 31, 127, 256, 257, 511, 2047, 8191, 65535])
@pytest.mark.parametrize("count", [1, 13, 500])
def test_digits_in_parts_round_trip(base: int, count: int) -> None:
    form = alphabet(base)
    fields, wide, spare = np.empty(DIGITS, np.uint16), np.empty(WIDE_FIELDS, np.uint64), np.empty(DIGITS, np.uint16)
    digits = np.random.default_rng(base).integers(0, base, count)
    digits[0] = base - 1
    buffer = np.zeros(DIGITS, np.uint16)
    buffer[:count] = digits
    out = np.full(digits_nbytes(form, count) + 1, 0xA5, np.uint8)
    pack_digits(form, buffer, count, spare, fields, wide, out, 0)
    assert out[-1] == 0xA5
    assert out[:-1].tobytes() == _parts(digits, base)
    unpack_digits(form, out, 0, count, spare, fields, wide, buffer)
    np.testing.assert_array_equal(buffer[:count], digits)


@pytest.mark.parametrize("base", [31, 511, 600, 65535])
def test_any_bytes_are_digits_of_the_alphabet(base: int) -> None:
    form = alphabet(base)
    fields, wide, spare = np.empty(DIGITS, np.uint16), np.empty(WIDE_FIELDS, np.uint64), np.empty(DIGITS, np.uint16)
    digits = np.empty(DIGITS, np.uint16)
    unpack_digits(form, np.full(digits_nbytes(form, 4096), 255, np.uint8), 0, 4096, spare, fields, wide, digits)
    assert digits[:4096].max() == base - 1


def test_wide_alphabets_take_little_more_than_their_bits() -> None:
    for b in range(1, 15):
        assert 8 * digits_nbytes(alphabet(2 * (2**b - 1) + 1), 4096) / 4096 <= b + 1.4
    assert 8 * digits_nbytes(alphabet(511), 4096) / 4096 == 9
