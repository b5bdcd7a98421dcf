"""`coder = rans` under every codec: identities, errors, sizes, threads, and payloads from strangers."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs import Codec
from ditherps.codecs.base import HEADER
from ditherps.errors import ContextMismatchError, EncodingError, NonFiniteError, PayloadError
from ditherps.kernels.coder import CHUNK, CODED, EXPLICIT, HEAD, PACKED, PLAIN
from tests.sealing import sealed

ADDRESS = Address(seed=31, round=2, sender=1, domain=Domain.UPDATE, start=5)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("dqsg", {}),
    ("dqsg", {"resolution": 3}),
    ("dqsg", {"resolution": 0.01}),
    ("dqsg", {"resolution": 1e-5}),
    ("dqsg", {"bucket": 64}),
    ("dqsg", {"bucket": 4096, "resolution": 0.3}),
    ("dqsg", {"bucket": 8192, "nmse": 0.1}),
    ("dqsg", {"bucket": 2 * CHUNK, "step": "l2", "levels": 60}),
    ("dqsg", {"bits": 1.5}),
    ("dqsg", {"step": "max", "levels": 3}),
    ("dqsg", {"reconstruct": "matched"}),
    ("dqsg", {"reconstruct": "matched", "bucket": 64, "resolution": 2}),
    ("qsgd", {}),
    ("qsgd", {"step": "max", "levels": 1, "bucket": 64}),
    ("qsgd", {"step": "l2", "levels": 90, "bucket": 4096}),
    ("terngrad", {"clip": 0}),
    ("maxnorm", {"bits": 4}),
    ("maxnorm", {"bits": 12}),
]
SOURCES = [
    "gaussian", "laplace", "student", "sparse", "rare", "uniform", "zeros", "constant", "two", "spike", "subnormal",
    "huge", "range",
]  # fmt: skip


def make(name: str, options: dict[str, Any]) -> Codec:
    return codec(name, coder="rans", **options)


def source(kind: str, n: int) -> Tensor:
    rng = np.random.default_rng(n + len(kind))
    gaussian = rng.standard_normal(n)
    makers: dict[str, Callable[[], NDArray[np.float64]]] = {
        "gaussian": lambda: gaussian,
        "laplace": lambda: rng.laplace(size=n),
        "student": lambda: rng.standard_t(3, n),
        "sparse": lambda: gaussian * (rng.random(n) < 0.02),
        "rare": lambda: gaussian * (rng.random(n) < 0.001),
        "uniform": lambda: rng.uniform(-1, 1, n),
        "zeros": lambda: np.zeros(n),
        "constant": lambda: np.full(n, -0.3),
        "two": lambda: np.where(rng.random(n) < 0.3, 0.7, -0.1),
        "spike": lambda: np.where(np.arange(n) == n // 2, 5.0, 0.0),
        "subnormal": lambda: gaussian * 1e-41,
        "huge": lambda: gaussian * 1e30,
        "range": lambda: gaussian * 10.0 ** rng.uniform(-30, 0, n),
    }
    x = torch.from_numpy(makers[kind]().astype(np.float32))
    x[4096:8192] = 0
    return x


def steps_of(used: Codec, encoded: Encoded) -> NDArray[np.float64]:
    """The step of each coordinate."""
    n = encoded.coordinates
    bucket = used.options.model_dump().get("bucket") or max(n, 1)
    steps = encoded.data[HEADER.size : HEADER.size + 4 * -(-n // bucket)].view(np.float32).astype(np.float64)
    return np.repeat(steps, bucket)[:n]


def forms(used: Codec, encoded: Encoded) -> list[int]:
    """The form of each chunk."""
    n = encoded.coordinates
    chunks = -(-n // CHUNK)
    at = HEADER.size + 4 * -(-n // (used.options.model_dump().get("bucket") or n)) + 8 * chunks
    sizes = encoded.data[at - 8 * chunks : at].view(np.uint32)[::2].tolist()
    return [int(encoded.data[at + sum(sizes[:i]) + 3]) for i in range(chunks)]


def reach_of_error(used: Codec) -> float:
    """Steps that an error may have at most."""
    if used.options.model_dump().get("reconstruct") == "matched":
        return 1.5
    return 0.5 if used.name == "dqsg" else 1.0


def check(used: Codec, x: Tensor, address: Address = ADDRESS) -> Tensor:
    """Encode, read, decode; what must hold for every vector."""
    n = x.numel()
    encoded = Encoded.from_bytes(used.encode(x, address).to_bytes())
    used.validate(encoded, n)
    assert encoded.nbytes <= used.max_nbytes(n)
    decoded = used.decode(encoded, address)
    error = np.abs(decoded.double().numpy() - x.double().numpy())
    assert np.all(error <= steps_of(used, encoded) * (reach_of_error(used) + 1e-4) + np.abs(x.numpy()) * 2.0**-23)
    return decoded


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_decoding_inverts_encoding_for_every_source(name: str, options: dict[str, Any], kind: str) -> None:
    used = make(name, options)
    for n in (12345, 8192 + 17, 5000):
        x = source(kind, n)
        decoded = check(used, x)
        # A tile, or a bucket, of zeros is exact.
        bucket = used.options.model_dump().get("bucket")
        if used.name != "dqsg" or kind == "zeros" or bucket in (64, 4096):
            assert torch.count_nonzero(decoded[4096:8192]) == 0


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_a_few_coordinates(name: str, options: dict[str, Any]) -> None:
    used = make(name, options)
    for n in range(71):
        for kind in ("gaussian", "sparse", "range"):
            check(used, source(kind, n))


@pytest.mark.parametrize("n", [4095, 4096, 4097, 8191, 8192, 8193, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 8192])
def test_sizes_around_tiles_and_chunks(n: int) -> None:
    for name, options in (OPTIONS[0], OPTIONS[4], OPTIONS[12]):
        for kind in ("gaussian", "sparse"):
            check(make(name, options), source(kind, n))


@pytest.mark.parametrize("bucket", [0, 64, 4096, 8192, CHUNK, 3 * 4096, 2 * CHUNK])
@pytest.mark.parametrize(("name", "rule"), [("dqsg", "rms"), ("dqsg", "max"), ("qsgd", "l2")])
def test_spans_threads_and_sums(bucket: int, name: str, rule: str) -> None:
    """All that may not depend on how the work is cut."""
    used = make(name, {"bucket": bucket, "step": rule})
    n = 2 * CHUNK + 5000
    x = source("laplace", n)
    x[CHUNK - 9000 : CHUNK + 9000] = 0
    encoded = used.encode(x, ADDRESS)
    with ThreadPoolExecutor(2) as pool:
        assert used.encode(x, ADDRESS, pool=pool).to_bytes() == encoded.to_bytes()
    assert used.encode(x.double(), ADDRESS).to_bytes() == encoded.to_bytes()
    whole = used.decode(encoded, ADDRESS)
    assert used.chunk_coordinates == CHUNK
    for lo in (0, CHUNK, 2 * CHUNK):
        for hi in (lo, lo + CHUNK, n):
            if hi <= n:
                assert torch.equal(used.decode(encoded, ADDRESS, span=(lo, hi)), whole[lo:hi])
    before = source("gaussian", n)
    into = before.clone()
    report = used.accumulate(encoded, ADDRESS, into, 0.3)
    np.testing.assert_array_equal(into.numpy(), before.numpy() + np.float32(0.3) * whole.numpy())
    assert (report.coordinates, report.tiles, report.failed_tiles) == (n, -(-n // 4096), 0)


@pytest.mark.parametrize("bucket", [64, 4096, 8192, 2 * CHUNK, 0])
@pytest.mark.parametrize(
    "options", [{"step": "max", "levels": 2}, {"step": "l2", "levels": 9}, {"step": "rms"}], ids=str
)
def test_steps_follow_their_rule(options: dict[str, Any], bucket: int) -> None:
    used = make("dqsg", {**options, "bucket": bucket})
    n = 2 * CHUNK + 5000
    x = source("gaussian", n)
    steps = steps_of(used, used.encode(x, ADDRESS))
    width = bucket or n
    for lo in (0, width, n // width // 2 * width, n // width * width):
        if lo >= n:
            continue
        part = x[lo : lo + width].double()
        exact = {
            "max": float(part.abs().max()) / 2,
            "l2": float(part.norm()) / 9,
            "rms": float(part.square().mean().sqrt()),
        }[options["step"]]
        if exact == 0:
            assert steps[lo] == 0
        else:
            assert -1e-12 < steps[lo] / exact - 1 < 2**-22


def test_start_shifts_the_dither_only() -> None:
    used = make("dqsg", {})
    x = source("gaussian", 20000)
    encoded, moved = (used.encode(x, Address(3, 1, 1, Domain.UPDATE, start=s)) for s in (0, 4096 + 77))
    assert np.array_equal(steps_of(used, encoded), steps_of(used, moved))
    assert abs(encoded.nbytes / moved.nbytes - 1) < 0.01
    check(used, x, Address(3, 1, 1, Domain.UPDATE, start=4096 + 77))


@pytest.mark.parametrize("resolution", [3.0, 1.0, 0.3, 0.02, 1e-4])
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student", "sparse", "two"])
def test_dithered_error_is_uniform_and_independent(kind: str, resolution: float) -> None:
    used = make("dqsg", {"resolution": resolution})
    n = 1 << 17
    x = source(kind, n)
    x[4096:8192] = source(kind, 4096)
    x[x == 0] = 1e-6  # no tile of exact zeros, which would have no error
    encoded = used.encode(x, ADDRESS)
    error = (used.decode(encoded, ADDRESS).double() - x.double()).numpy() / steps_of(used, encoded)
    assert stats.kstest(error, stats.uniform(-0.5, 1).cdf).pvalue > 1e-3
    assert abs(error.var() * 12 - 1) < 0.01
    assert abs(error.mean()) < 4 / np.sqrt(12 * n)
    values = x.double().numpy()
    for other in (values, np.abs(values)):
        assert abs(np.corrcoef(error, other)[0, 1]) < 4 / np.sqrt(n)
    assert (
        abs(
            used.expected_squared_error(encoded)
            / float((error * steps_of(used, encoded)) @ error)
            / steps_of(used, encoded)[0]
            - 1
        )
        < 0.02
    )


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "sparse", "range"])
def test_unbiased_over_rounds(name: str, options: dict[str, Any], kind: str) -> None:
    used = make(name, options)
    assert used.unbiased
    n, rounds = 5000, 120
    x = source(kind, n)
    exact = x.double()
    sums = []
    for round_ in range(rounds):
        address = Address(9, round_, 0, Domain.UPDATE)
        error = used.decode(used.encode(x, address), address).double() - exact
        sums.append([float(error.sum()), float((error * exact.sign()).sum())])
    mean, deviation = np.mean(sums, 0), np.std(sums, 0) / np.sqrt(rounds)
    assert np.all(np.abs(mean) <= 4 * deviation + 1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student", "sparse"])
@pytest.mark.parametrize("resolution", [0.5, 1.0, 2.0, 4.0])
def test_matched_reconstruction_costs_no_bits_and_errs_less(kind: str, resolution: float) -> None:
    x = source(kind, 1 << 17)
    dithered, matched = (make("dqsg", {"resolution": resolution, "reconstruct": how}) for how in ("dither", "matched"))
    one, other = dithered.encode(x, ADDRESS), matched.encode(x, ADDRESS)
    assert abs(other.nbytes / one.nbytes - 1) < 0.03
    errors = [
        float((used.decode(e, ADDRESS) - x).double().square().sum()) for used, e in ((dithered, one), (matched, other))
    ]
    assert errors[1] < errors[0] * 1.01
    if kind == "sparse" and resolution >= 1:  # finer steps have no classes of the dither, so nothing to match
        assert errors[1] < 0.7 * errors[0]
    assert np.isnan(matched.expected_squared_error(other))


BARS = [(0.560, 1.0), (0.0986, 2.0), (0.0230, 3.0), (0.00565, 4.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("nmse", "bits"), BARS)
def test_bits_on_a_unit_gaussian(nmse: float, bits: float) -> None:
    """Issue 3, bars 1 and 2, on a quarter of the coordinates."""
    n = 1 << 22
    x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    used = make("dqsg", {"nmse": nmse})
    encoded = used.encode(x, ADDRESS)
    assert encoded.bits_per_coordinate <= bits
    error = used.decode(encoded, ADDRESS).double() - x.double()
    assert float(error.square().sum() / x.double().square().sum()) <= nmse * 1.002
    assert abs(float(error.mean())) < 4 * float(error.std()) / np.sqrt(n)


@pytest.mark.parametrize(("nmse", "bits"), BARS)
def test_bits_of_a_few_chunks_of_a_unit_gaussian(nmse: float, bits: float) -> None:
    x = torch.randn(1 << 19, generator=torch.Generator().manual_seed(1))
    assert make("dqsg", {"nmse": nmse}).encode(x, ADDRESS).bits_per_coordinate <= bits * 1.005


@pytest.mark.parametrize("resolution", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["laplace", "student", "sparse", "rare", "two", "spike"])
def test_bits_are_near_the_entropy_of_the_indices(kind: str, resolution: float) -> None:
    """Without the dither's help: of what is coded with `qsgd`, whose coder does not use it either."""
    used = make("qsgd", {"resolution": resolution})
    x = source(kind, 1 << 18)
    encoded = used.encode(x, ADDRESS)
    q = np.rint(used.decode(encoded, ADDRESS).double().numpy() / steps_of(used, encoded))
    counts = np.unique(q, return_counts=True)[1] / q.size
    entropy = float(-np.sum(counts * np.log2(counts)))
    # One in a thousand travels as an escape, in some 28 bits; 0.005 bits a coordinate are parameters and states.
    assert encoded.bits_per_coordinate < (1.7 if kind == "rare" else 1.13) * entropy + 0.01


def test_forms_that_suit_the_values() -> None:
    n = 100_000
    rng = np.random.default_rng(0)
    uniform = torch.from_numpy(rng.uniform(-1, 1, n).astype(np.float32))
    for used, x, expected in (
        (make("dqsg", {}), source("gaussian", n), {CODED}),
        (make("dqsg", {}), source("spike", n), {CODED, EXPLICIT}),
        (make("dqsg", {"step": "max", "levels": 7}), uniform, {CODED, EXPLICIT, PACKED}),
        (make("maxnorm", {"bits": 15}), uniform, {CODED, EXPLICIT, PACKED}),
        (make("dqsg", {}), torch.tensor([0.5, -1.0, 0.2]), {PACKED, CODED}),
    ):
        encoded = used.encode(x, ADDRESS)
        assert set(forms(used, encoded)) <= expected
        assert encoded.nbytes <= used.max_nbytes(x.numel())
        check(used, x)
    assert make("maxnorm", {"bits": 7}).encode(uniform, ADDRESS).bits_per_coordinate <= 8.01
    # Three ternary digits and their framing.
    few = make("dqsg", {"step": "max", "levels": 1}).encode(torch.tensor([1.0, -1.0, 1.0]), ADDRESS)
    assert few.nbytes <= HEADER.size + 4 + 8 + HEAD + 2


def test_an_own_payload_is_never_refused_for_its_range() -> None:
    """Escapes are checked against the largest step of all buckets: far ones beside huge steps travel as values."""
    for resolution, bucket, size in (
        (1e-6, 2048, 3e37),
        (1e-4, CHUNK, 1e36),
        (2.0**-20, 64, 1e37),
        (1e-3, CHUNK, 1e35),
    ):
        used = make("dqsg", {"resolution": resolution, "bucket": bucket})
        x = torch.zeros(2 * CHUNK)
        x[5] = 1e-3
        x[CHUNK:] = source("gaussian", CHUNK) * size
        check(used, x)


def test_plain_chunks_decode_to_the_values_themselves() -> None:
    used = make("dqsg", {"resolution": 2.0**-20})
    x = torch.zeros(32 * CHUNK)
    x[-CHUNK + 7] = 1.2345  # 2^31.5 steps of 2^-20 rms
    x[-1] = -1e-9
    x[3] = 1e-4
    encoded = used.encode(x, ADDRESS)
    assert forms(used, encoded)[31] == PLAIN
    assert PLAIN not in forms(used, encoded)[:31]
    span = (31 * CHUNK, 32 * CHUNK)
    assert torch.equal(used.decode(encoded, ADDRESS, span=span), x[span[0] :])
    check(used, x)
    payload = bytearray(encoded.to_bytes())
    payload[-4:] = np.float32(np.nan).tobytes()
    with pytest.raises(PayloadError):
        used.validate(Encoded.from_bytes(sealed(used, payload)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"bucket": 64}, {"bits": 2}, {"step": "max"}], ids=str)
def test_bad_values_are_named(options: dict[str, Any], bad: float) -> None:
    x = source("gaussian", CHUNK + 1000)
    x[CHUNK + 3] = bad
    with pytest.raises(NonFiniteError, match=rf"conv\.weight: coordinate {CHUNK + 3}"):
        make("dqsg", options).encode(x, ADDRESS, name="conv.weight")
    y = source("gaussian", 100).double()
    y[3] = 1e39
    with pytest.raises(EncodingError, match=r"coordinate 3 .* float32"):
        make("dqsg", options).encode(y, ADDRESS)
    with pytest.raises(EncodingError, match="too large"):
        make("dqsg", {"step": "max", "levels": 1}).encode(torch.tensor([3e38, 0.0]), ADDRESS)


any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
some_options = st.sampled_from([*OPTIONS, ("dqsg", {"resolution": 2.0**-20}), ("dqsg", {"resolution": 2.0**20})])


@settings(max_examples=150)
@given(
    hnp.arrays(np.float32, st.integers(0, 500), elements=any_float),
    some_options,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**30),
    st.integers(-60, 0),
)
def test_any_vector_decodes_within_its_step_or_is_refused(
    x: NDArray[np.float32], how: tuple[str, dict[str, Any]], seed: int, start: int, exponent: int
) -> None:
    used = make(*how)
    address = Address(seed, 3, 4, Domain.UPDATE, start=start)
    scaled = (x * np.float32(2.0**exponent)).astype(np.float32)
    try:
        check(used, torch.from_numpy(scaled), address)
    except EncodingError as error:
        assert "too large" in str(error)  # noqa: PT017
        assert np.abs(scaled).max() > 2.0**80


def forged_is_harmless(used: Codec, payload: bytes | bytearray, n: int) -> None:
    """Refused, or decoded to finite values; never more memory than the payload and its vector take."""
    tracemalloc.start()
    try:
        encoded = Encoded.from_bytes(sealed(used, payload))
        used.validate(encoded, n)
        values = used.decode(encoded, ADDRESS)
    except (PayloadError, ContextMismatchError):
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 * len(payload) + 20 * n + 200_000
    assert bool(torch.isfinite(values).all())


@pytest.mark.parametrize("kind", ["gaussian", "sparse", "two", "range"])
@pytest.mark.parametrize(("name", "options"), [OPTIONS[i] for i in (0, 3, 4, 10, 12, 17)], ids=str)
@settings(max_examples=40)
@given(data=st.data())
def test_forged_chunks_are_harmless(name: str, options: dict[str, Any], kind: str, data: st.DataObject) -> None:
    used = make(name, options)
    n = data.draw(st.sampled_from([1, 50, 700, 9000]))
    payload = bytearray(used.encode(source(kind, n), ADDRESS).to_bytes())
    front = used._layout._front(n)  # type: ignore[attr-defined]
    for _ in range(data.draw(st.integers(1, 5))):
        # Mostly where chunks describe themselves.
        place = data.draw(
            st.one_of(st.integers(front, min(front + 40, len(payload) - 1)), st.integers(HEADER.size, len(payload) - 1))
        )
        payload[place] = data.draw(st.integers(0, 255))
    forged_is_harmless(used, payload, n)


@settings(max_examples=150)
@given(
    st.sampled_from([1, 64, 4096, 9000, CHUNK + 1]),
    st.sampled_from([CODED, PACKED, PLAIN, EXPLICIT, 4, 255]),
    st.integers(0, 0xFFFF),
    st.sampled_from([0, 1, 2, 16, 255]),
    st.one_of(st.integers(0, 100), st.integers(0, 0xFFFFFFFF)),
    st.binary(max_size=600),
    st.sampled_from([1e-30, 1.0, 3e32]),
    st.booleans(),
)
def test_chunks_of_any_bytes_are_harmless(
    n: int, form: int, models: int, states: int, words: int, behind: bytes, step: float, consistent: bool
) -> None:
    used = make("dqsg", {})
    encoded = used.encode(source("gaussian", n), ADDRESS)
    if consistent:  # so that more of them pass the first checks
        models = min(models, len(behind))
        words = min(words, max(len(behind) - models - 4 * states, 0) // 2)
    chunk = models.to_bytes(2, "little") + bytes([states, form]) + words.to_bytes(4, "little") + behind
    count = -(-n // CHUNK)
    front = encoded.to_bytes()[: HEADER.size] + np.float32(step).tobytes()
    directory = (len(chunk).to_bytes(4, "little") + bytes(4)) * count
    forged_is_harmless(used, front + directory + chunk * count, n)


def test_more_words_than_a_chunk_can_have_are_refused() -> None:
    used = make("dqsg", {})
    n = 10_000
    payload = bytearray(used.encode(source("gaussian", n), ADDRESS).to_bytes())
    at = used._layout._front(n)  # type: ignore[attr-defined]
    size, states = int.from_bytes(payload[at : at + 2], "little"), payload[at + 2]
    words = int.from_bytes(payload[at + 4 : at + 8], "little")
    assert payload[at + 3] == CODED
    more = 2 * CHUNK + 100
    payload[at + 4 : at + 8] = (words + more).to_bytes(4, "little")
    place = at + HEAD + size + 4 * states + 2 * words
    payload[place:place] = bytes(2 * more)
    payload[at - 8 : at - 4] = (len(payload) - at).to_bytes(4, "little")
    with pytest.raises(PayloadError, match="malformed"):
        used.validate(Encoded.from_bytes(sealed(used, payload)))


def test_directories_that_lie_are_refused() -> None:
    used = make("dqsg", {})
    n = CHUNK + 5000
    encoded = used.encode(source("gaussian", n), ADDRESS)
    at = used._layout._front(n)  # type: ignore[attr-defined]
    for first, second in ((0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (encoded.nbytes - at, 0), (5, encoded.nbytes - at - 5)):
        payload = bytearray(encoded.to_bytes())
        payload[at - 16 : at - 12] = first.to_bytes(4, "little")
        payload[at - 8 : at - 4] = second.to_bytes(4, "little")
        with pytest.raises(PayloadError):
            used.validate(Encoded.from_bytes(sealed(used, payload)))
    # Without the right checksum of a chunk too.
    payload = bytearray(encoded.to_bytes())
    payload[-1] ^= 1
    with pytest.raises(PayloadError, match="checksum"):
        used.validate(Encoded.from_bytes(payload))
    assert sealed(used, encoded.to_bytes()) == encoded.to_bytes()
