"""Entropy-coded payloads against a reference written from proto/FORMAT.md: every form, model and reconstruction."""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray

from ditherps import Address, Domain, codec
from ditherps.codecs.base import HEADER
from ditherps.entropy.family import SCALES, SHAPES, SPIKES, family
from ditherps.kernels import reference, tables
from ditherps.kernels import reference_coded as coded

ADDRESS = Address(seed=12345, round=7, sender=3, domain=Domain.UPDATE)
Floats = NDArray[np.float32]


class Case(NamedTuple):
    """One payload: a codec (with `coder = rans`), a source, and where its dither lies."""

    source: str
    n: int = 9000
    name: str = "dqsg"
    start: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join((self.name, self.source, str(self.n), str(self.start), *(f"{k}={v}" for k, v in self.options)))


def case(source: str, n: int = 9000, name: str = "dqsg", start: int = 0, **options: Any) -> Case:
    return Case(source, n, name, start, tuple(options.items()))


def vector(source: str, n: int) -> Floats:
    """Values of a source, by its name."""
    rng = np.random.default_rng(len(source) * 1000 + n)
    if source == "gaussian":
        x = rng.standard_normal(n)
    elif source == "laplace":
        x = rng.laplace(size=n)
    elif source == "t3":
        x = rng.standard_t(3, n)
    elif source == "t1":
        x = rng.standard_t(1, n)
    elif source.startswith("sparse"):
        x = rng.standard_normal(n) * (rng.random(n) < float(source[6:]))
    elif source == "integers":
        x = rng.choice([-2, -1, 0, 1, 2, 5], n, p=[0.05, 0.1, 0.6, 0.1, 0.1, 0.05])
        x[0] = 5
    elif source.startswith("even"):
        reach = int(source[4:])
        x = rng.integers(-reach, reach + 1, n).astype(np.float64)
        x[:1] = reach
    elif source == "range":
        x = np.exp(rng.uniform(-60, 60, n))
    elif source == "holes":
        x = rng.standard_normal(n)
        x[4096:8192] = 0
        x[8300:8600] = 0
    elif source == "tails":
        x = rng.standard_normal(n)
        x[::1000] *= 1e5
    else:
        x = np.zeros(n)
    return x.astype(np.float32)


CASES = [
    *(case("gaussian", name=name, bits=bits) for name in ("dqsg", "qsgd") for bits in (0.5, 1, 2, 3, 4, 6, 8, 12)),
    *(case(source) for source in ("laplace", "t3", "sparse0.1", "sparse0.01", "zeros", "holes")),
    *(case("t3", resolution=resolution) for resolution in (0.1, 0.5, 3.0)),
    case("t1", resolution=0.01),
    case("tails", resolution=0.001),
    case("tails", bits=8, name="qsgd"),
    case("laplace", name="qsgd", step="l2", levels=30),
    case("sparse0.5", name="qsgd", step="max", levels=3),
    *(case("gaussian", name="maxnorm", bits=bits) for bits in (1, 2, 4, 8, 12)),
    *(case("integers", name=name, step="max", levels=5) for name in ("dqsg", "qsgd")),
    *(case("integers", name=name, step="max", levels=500) for name in ("dqsg", "qsgd")),
    *(case("integers", n=n, name="maxnorm", bits=4) for n in (500, 8191)),
    case("even2", n=300, name="qsgd", step="max", levels=2),
    case("even127", name="qsgd", step="max", levels=127),
    case("even255", n=5000, name="qsgd", step="max", levels=255),
    case("even2000", n=5000, name="dqsg", step="max", levels=2000),
    case("range", resolution=2.0**-20),
    case("range", resolution=1e-5),
    case("gaussian", resolution=2.0**-20),
    *(case("gaussian", n=n) for n in (0, 1, 2, 3, 100, 4095, 4096, 4097, 8191, 8192)),
    *(case("holes", start=start, bits=2) for start in (1, 4095, 12345, 2**34)),
    *(case("holes", name=name, bucket=bucket) for name in ("dqsg", "qsgd") for bucket in (64, 2048, 4096, 8192)),
    *(case("holes", step="max", levels=1.5, bucket=bucket) for bucket in (64, 4096)),
    case("sparse0.3", n=262144 + 5000, nmse=0.3, bucket=4096, start=77),
    *(case("sparse0.6", nmse=nmse, reconstruct="matched") for nmse in (0.01, 0.03, 0.1, 0.3)),
    *(case("gaussian", bits=bits, reconstruct="matched") for bits in (1, 2, 3, 4, 6)),
    case("sparse0.05", n=7000, nmse=0.1, reconstruct="matched", start=9),
    case("holes", bucket=64, reconstruct="matched"),
    case("tails", resolution=0.001, reconstruct="matched"),
    case("tails", resolution=0.5, reconstruct="matched"),
    case("range", resolution=2.0**-20, reconstruct="matched"),
]


class Known(NamedTuple):
    payload: bytes
    decoded: Floats
    address: Address
    scheme: coded.Scheme
    chunks: list[coded.Chunk]


@functools.cache
def known(of: Case) -> Known:
    """The payload that this project writes, decoded by it, and what the reference reads in its chunks."""
    used = codec(of.name, coder="rans", **dict(of.options))
    options = used.options.model_dump()
    address = Address(12345, 7, 3, Domain.UPDATE, start=of.start)
    encoded = used.encode(torch.from_numpy(vector(of.source, of.n)), address)
    scheme = coded.Scheme(options.get("bucket") or 0, of.name == "dqsg", options.get("reconstruct") == "matched")
    payload = encoded.to_bytes()
    read = coded.sections(payload, address, scheme)
    chunks = [
        coded.read_chunk(data, lanes, scheme.subtract) for data, lanes in zip(read.chunks, read.lanes, strict=True)
    ]
    return Known(payload, used.decode(encoded, address).numpy(), address, scheme, chunks)


@pytest.mark.parametrize("of", CASES, ids=str)
def test_reference_decodes_the_same_values(of: Case) -> None:
    found = known(of)
    expected = coded.decode(found.payload, found.address, found.scheme)
    np.testing.assert_array_equal(found.decoded.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("of", CASES, ids=str)
def test_reference_encodes_the_same_bytes(of: Case) -> None:
    found = known(of)
    body = coded.encode(vector(of.source, of.n), found.payload, found.address, found.scheme)
    assert body == found.payload[HEADER.size :]


@pytest.mark.parametrize("of", CASES, ids=str)
def test_values_are_within_a_step(of: Case) -> None:
    """So the reference has not only the same values, but the right ones."""
    found = known(of)
    x = vector(of.source, of.n).astype(np.float64)
    options = codec(of.name, coder="rans", **dict(of.options)).options.model_dump()
    bucket = options.get("bucket") or max(of.n, 1)
    steps = np.frombuffer(found.payload, "<f4", -(-of.n // bucket), HEADER.size)
    step = np.repeat(steps.astype(np.float64), bucket)[: of.n]
    bound = 0.5 if found.scheme.subtract and not found.scheme.matched else 1.0
    slack = 1.5 if found.scheme.matched else 1.0
    assert np.all(np.abs(found.decoded - x) <= bound * slack * step * (1 + 1e-4) + np.abs(x) * 2.0**-23)


def test_every_form_and_model_occurs() -> None:
    """Or the comparisons above would say less than they seem to."""
    chunks = [chunk for of in CASES for chunk in known(of).chunks]
    # A plain chunk takes 2^22 coordinates, too many for the reference: test_codecs_coded.py has one.
    assert {chunk.form for chunk in chunks} == {coded.OWN, coded.PACKED, coded.EXPLICIT}
    for form, fewest in ((coded.OWN, 5), (coded.EXPLICIT, 3)):
        models = {(m.class_bits, m.low_bits) for c in chunks if c.form == form for m in c.models if m is not None}
        assert len(models) >= fewest
        if form == coded.OWN:
            assert {class_bits for class_bits, _ in models} == {0, 1, 2, 3, 4}
            assert len({low_bits for _, low_bits in models if low_bits}) >= 3
        else:
            assert max(low_bits for _, low_bits in models) > 0
            assert max(class_bits for class_bits, _ in models) > 0
    for form in (coded.OWN, coded.EXPLICIT):
        assert any(c.escapes for c in chunks if c.form == form)
    assert any(None in c.models and c.indices.any() for c in chunks)
    assert any(m is not None and m.low_bits and c.escapes for c in chunks for m in c.models)
    packed = [int(np.abs(c.indices).max()) for c in chunks if c.form == coded.PACKED]
    assert min(packed) < 128 <= max(packed)
    matched = [p for of in CASES if known(of).scheme.matched for c in known(of).chunks for p in c.parameters]
    offsets = [(coded.bits_of(p, True)[0], p.spike > 0) for p in matched if p.shape < SHAPES]
    assert {(4, False), (3, True), (2, True), (2, False), (0, False)} <= set(offsets)


def test_the_header_is_as_documented() -> None:
    found = known(CASES[0])
    fields = struct.unpack("<BBHIIQQI", found.payload[:32])
    assert fields[:3] == (2, 3, 0)
    assert fields[4:7] == (0, 0, 9000)
    front = 32 + 4 + 8  # one step, one chunk: what has no checksum of its own
    assert fields[7] == xxhash.xxh3_64_intdigest(found.payload[:28] + found.payload[32:front]) & 0xFFFFFFFF


def test_the_models_of_all_parameters_are_the_reference_s() -> None:
    rng = np.random.default_rng(1)
    cumulative, offsets = np.empty(tables.CELLS + 2, np.int64), np.empty(64, np.int32)
    corners = [(scale, shape, spike) for scale in (0, 96, 255) for shape in (0, 7) for spike in (0, 31, 32, 47)]
    drawn = [(int(rng.integers(SCALES)), int(rng.integers(SHAPES)), int(rng.integers(SPIKES))) for _ in range(1500)]
    for place, (scale, shape, spike) in enumerate(corners + drawn):
        subtract = place % 3 > 0
        model = coded.own_model(coded.Parameters(scale, shape, spike), subtract)
        bits = tables.resolution_of(scale, shape, subtract, family())
        assert bits == (model.class_bits, model.low_bits)
        bottom = tables.fill_cumulative(scale, shape, spike, *bits, subtract, family(), cumulative)
        assert bottom == model.bottom
        assert cumulative[:257].tolist() == model.places
        if model.offsets is not None:
            tables.fill_offsets(scale, shape, spike, bits[0], family(), offsets)
            np.testing.assert_array_equal(offsets, model.offsets)


def test_every_class_of_a_model_has_all_slots() -> None:
    """Each slot but that of the escape belongs to one symbol of each class, or a decoder would meet a hole."""
    for scale in range(0, SCALES, 3):
        for shape in range(SHAPES):
            model = coded.own_model(coded.Parameters(scale, shape, scale % SPIKES), True)
            for dither_class in range(1 << model.class_bits):
                lane = dither_class << (16 - model.class_bits)
                intervals = sorted(model.interval(lane, h) for h in range(-128, 129))
                taken = [(start, start + size) for start, size in intervals if start]
                assert [start for start, _ in taken] == [1, *(end for _, end in taken[:-1])]
                assert taken[-1][1] == 4096


def test_malformed_chunks_are_refused_by_the_reference() -> None:
    """Whatever is left over or missing, it says so: that it reads all cases means that nothing is."""
    found = known(case("gaussian", bits=2))
    (data,) = coded.sections(found.payload, found.address, found.scheme).chunks
    lanes = reference.lanes_at(found.address, np.arange(9000)).tolist()
    with pytest.raises((ValueError, IndexError, struct.error)):
        coded.read_chunk(data[:-2], lanes, True)
    with pytest.raises(ValueError, match="escapes"):
        coded.read_chunk(data + b"\0", lanes, True)
    with pytest.raises((ValueError, IndexError)):
        coded.read_chunk(data, lanes[::-1], True)


# How well the encoder chooses


def code_length(q: NDArray[np.int64], lanes: NDArray[np.int64], model: coded.Model) -> float:
    """Bits of the symbols, low bits and escapes of a tile."""
    places = np.array(model.places)
    classes, half = 1 << model.class_bits, 128 >> model.class_bits
    h = q >> model.low_bits
    place = np.where(np.abs(h) < half, classes * (h + half) - (lanes >> (16 - model.class_bits)), 0)
    size = places[np.minimum(place + classes, 256)] - places[place]
    coded_ = (place > model.bottom) & (place < 257 - classes - model.bottom) & (size > 0)
    folded = np.where(q >= 0, 2 * q, -2 * q - 1)
    escape = 12 + 4 * np.ceil(np.maximum(np.log2(folded + 1.0), 1) / 3)
    symbols = np.where(coded_, 12 - np.log2(np.maximum(size, 1)), escape)
    return float(symbols.sum()) + model.low_bits * q.size


@pytest.mark.parametrize(
    "of",
    [
        *(case("gaussian", bits=bits) for bits in (0.5, 1, 2, 4)),
        case("gaussian", name="qsgd", bits=2),
        case("laplace"),
        case("t3"),
        case("sparse0.1"),
        case("sparse0.6", nmse=0.1, reconstruct="matched"),
    ],
    ids=str,
)
def test_parameters_are_nearly_the_best(of: Case) -> None:
    """No scale, shape and spike around those of the encoder code the first tile in clearly fewer bits."""
    found = known(of)
    (chunk,) = found.chunks
    q = chunk.indices[:4096]
    lanes = reference.lanes_at(found.address, np.arange(4096)).astype(np.int64)
    first = chunk.parameters[0]

    def cost(parameters: coded.Parameters) -> float:
        return code_length(q, lanes, coded.own_model(parameters, found.scheme.subtract))

    candidates = [
        coded.Parameters(scale, shape, spike)
        for scale in range(max(first.scale - 8, 0), first.scale + 9, 2)
        for shape in range(SHAPES)
        for spike in {0, *range(max(first.spike - 4, 0), min(first.spike + 5, SPIKES), 2)}
    ]
    best = min(cost(candidate) for candidate in candidates)
    assert cost(first) < 1.01 * best


# The matched reconstruction


def test_matched_offsets_are_odd_and_grow() -> None:
    """Their mean over all lanes is exactly zero, whatever the model, so that the reconstruction is unbiased."""
    lanes = np.arange(65536)
    met = 0
    for scale in range(0, SCALES, 5):
        for shape in range(SHAPES):
            for spike in (0, 1, 13, 31, 47):
                offsets = coded.own_model(coded.Parameters(scale, shape, spike), True).offsets
                if offsets is None:
                    continue
                met += 1
                assert offsets[lanes >> 10].sum() == 0
                np.testing.assert_array_equal(offsets, -offsets[::-1])
                assert np.all(np.diff(offsets) >= 0)
    assert met > 200


def mixture(n: int, zeros: float, seed: int = 0) -> Floats:
    """Gaussian, with a share of exact zeros and another of small values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n)
    kind = rng.random(n)
    x[kind < zeros] = 0
    small = (kind >= zeros) & (kind < zeros + 0.2)
    x[small] *= 0.02
    return x.astype(np.float32)


@pytest.mark.parametrize(("zeros", "nmse"), [(0.0, 0.3), (0.0, 0.1), (0.4, 0.1), (0.4, 0.02), (0.8, 0.1)])
def test_matched_reconstruction_is_unbiased(zeros: float, nmse: float) -> None:
    used = codec("dqsg", coder="rans", nmse=nmse, reconstruct="matched")
    n, rounds = 400, 1000
    x = mixture(n, zeros)
    scheme = coded.Scheme(0, True, True)
    total = np.zeros(n)
    seen: set[tuple[coded.Parameters, ...]] = set()
    for round_ in range(rounds):
        address = Address(1, round_, 0, Domain.UPDATE)
        encoded = used.encode(torch.from_numpy(x), address)
        total += used.decode(encoded, address).numpy()
        if round_ < 20:
            read = coded.sections(encoded.to_bytes(), address, scheme)
            seen.add(tuple(coded.read_chunk(read.chunks[0], read.lanes[0], True).parameters))
    assert len(seen) == 1  # a model that depended on the dither would bring a bias
    ((parameters,),) = seen
    step = float(read.steps[0])
    offsets = coded.own_model(parameters, True).offsets
    assert offsets is not None
    # The exact mean and variance over all lanes, coordinate by coordinate.
    lanes = np.arange(65536)
    shift = offsets[lanes >> 10] / 2.0**17
    variance = np.empty(n)
    for i, value in enumerate(x.astype(np.float64) / step):
        error = np.floor(value + (lanes + 0.5) / 65536) - shift - value
        assert abs(error.mean()) <= 2.0**-17 + 1e-9
        variance[i] = error.var()
    deviation = (total / rounds - x) / step / np.sqrt(variance / rounds)
    assert np.abs(deviation).max() < 4
    for part in (x == 0, (x != 0) & (np.abs(x) < 0.05), x != 0, np.ones(n, bool)):
        if part.any():
            assert abs(deviation[part].mean()) < 4 / np.sqrt(part.sum())


def relative_error(x: Floats, reconstruct: str, **options: Any) -> float:
    used = codec("dqsg", coder="rans", reconstruct=reconstruct, **options)
    decoded = used.decode(used.encode(torch.from_numpy(x), ADDRESS), ADDRESS).numpy().astype(np.float64)
    return float(np.sum((decoded - x) ** 2) / np.sum(x.astype(np.float64) ** 2))


@pytest.mark.parametrize("bits", [0.5, 1, 1.5, 2, 3, 4, 6])
def test_matched_reconstruction_is_never_worse_on_a_gaussian(bits: float) -> None:
    x = vector("gaussian", 1 << 18)
    assert relative_error(x, "matched", bits=bits) <= 1.001 * relative_error(x, "dither", bits=bits)


def test_matched_reconstruction_is_much_better_where_zeros_are_many() -> None:
    x = mixture(1 << 18, 0.4)
    plain = relative_error(x, "dither", nmse=0.1)
    assert abs(plain - 0.1) < 0.002
    assert relative_error(x, "matched", nmse=0.1) < 0.8 * plain


def test_matched_reconstruction_takes_the_same_bytes() -> None:
    """It is another way to read the same indices; only the digest of the options differs, and what covers it."""
    x = mixture(20000, 0.4)
    one, other = (
        codec("dqsg", coder="rans", nmse=0.1, reconstruct=reconstruct).encode(torch.from_numpy(x), ADDRESS).to_bytes()
        for reconstruct in ("dither", "matched")
    )
    assert one[HEADER.size :] == other[HEADER.size :]
    assert one[:4] == other[:4]
