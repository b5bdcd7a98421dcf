"""The sample codec: levels by their definition, payloads by the reference, and refusal of all else."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ditherps.dither import Address, Domain, lanes
from ditherps.errors import OptionError, PayloadError, Reason, UserError
from ditherps.kernels import reference_samples
from ditherps.kernels.samples import coarsen, quantize, reconstruct
from ditherps.samples.codec import NOTHING, Batch, SampleCodec
from ditherps.tasks import Features, load_task

GOLDEN = Path(__file__).parent / "golden" / "samples_v1.json"
IMAGES = Features((3, 5, 4))
FORMS = {
    "images": IMAGES,
    "grey": Features((6, 5), high=(16,)),
    "list": Features((7,), low=(-3,), high=(1000,)),
    "float": Features((4, 3), low=(-2.0,), high=(5.0,), integer=False),
    "channels": Features((2, 3, 2), low=(-1.0, 0.0), high=(1.0, 100.0), integer=False),
    "bits": Features((2, 9), high=(1,)),
}
CLASSES = 5
pytestmark = pytest.mark.timeout(600)  # the first use of the kernels compiles them


def codec(form: Features, seed: int = 11, sender: int = 2, classes: int = CLASSES) -> SampleCodec:
    return SampleCodec(form, classes, seed, sender)


def smooth(form: Features, count: int, seed: int = 0) -> torch.Tensor:
    """Stored features that resemble their neighbours, at both ends of the range too."""
    rng = np.random.default_rng(seed)
    walk = rng.normal(size=(count, len(form.low), form.count // len(form.low))).cumsum(2) * 0.15 + 0.3
    low, high = (np.array(side)[None, :, None] for side in (form.low, form.high))
    values = low + np.clip(walk, 0, 1) * (high - low)
    if form.integer:
        return torch.from_numpy(np.rint(values).astype(np.int64)).reshape(count, *form.shape)
    return torch.from_numpy(values.astype(np.float32)).clamp(min(form.low), max(form.high)).reshape(count, *form.shape)


def named(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, CLASSES, count))


def empty(form: Features, count: int) -> Batch:
    return Batch(np.full(count, -7), np.full((count, form.count), 9, np.uint16))


def nothing(count: int) -> NDArray[np.int64]:
    return np.full(count, NOTHING)


def indices_by_definition(form: Features, features: torch.Tensor, ids: Sequence[int], level: int) -> NDArray[np.int64]:
    """What each index must be, in fractions, from the addresses alone."""
    rows = []
    for id_, row in zip(ids, form.integers(features), strict=True):
        dithers = lanes(Address(11, id_, 2, Domain.SAMPLE), form.count)
        rows.append(
            [reference_samples.index(int(x), int(u), level, form.span) for x, u in zip(row, dithers, strict=True)]
        )
    return np.array(rows)


class TestLevels:
    @pytest.mark.parametrize("form", FORMS)
    def test_indices_and_values_are_those_of_the_definition(self, form: str) -> None:
        made = codec(FORMS[form])
        features, ids = smooth(FORMS[form], 3), np.array([0, 8, 2**32 - 1])
        low = np.array(FORMS[form].low)
        for level in range(made.deepest + 1):
            indices = made.quantized(ids, features, level)
            np.testing.assert_array_equal(indices, indices_by_definition(FORMS[form], features, ids.tolist(), level))
            if FORMS[form].integer and 1 << level >= FORMS[form].span:
                continue
            values = made.values(ids, indices, level).double().numpy().reshape(3, len(low), -1)
            units = ((values - low[:, None]) / FORMS[form].scale[:, None]).reshape(3, -1)
            for row, index_row, lane_row in zip(units, indices, made.lanes(ids), strict=True):
                for unit, index, lane in zip(row, index_row, lane_row, strict=True):
                    exact = reference_samples.value(int(index), int(lane), level, FORMS[form].span)
                    assert unit == pytest.approx(float(exact), abs=2e-6 * FORMS[form].span)

    def test_level_0_is_the_dither_streams_own_quantizer(self) -> None:
        features, ids = smooth(IMAGES, 4), np.arange(4)
        made = codec(IMAGES)
        for id_, x, index, value in zip(
            ids,
            IMAGES.integers(features),
            made.quantized(ids, features, 0),
            made.values(ids, made.quantized(ids, features, 0), 0).reshape(4, -1).numpy(),
            strict=True,
        ):
            u = (lanes(Address(11, int(id_), 2, Domain.SAMPLE), IMAGES.count) + 0.5) / 65536 - 0.5
            q = np.floor(x / 256 + u + 0.5)
            np.testing.assert_array_equal(index, q)
            np.testing.assert_array_equal(value, ((q - u) * 256).astype(np.float32))

    @pytest.mark.parametrize("level", [0, 1, 3, 6, 8])
    @pytest.mark.parametrize("x", [0, 1, 77, 128, 255])
    def test_over_all_dithers_the_error_is_uniform_and_its_mean_exactly_zero(self, x: int, level: int) -> None:
        every = np.arange(65536, dtype=np.uint16)
        indices, values = np.empty(65536, np.uint16), np.empty(65536, np.float32)
        quantize(np.full(65536, x, np.int32), every, level, 256, indices)
        reconstruct(indices, every, level, 256, False, np.zeros(1), np.ones(1), values)
        error, step = values.astype(np.float64) - x, 256 / 2**level
        assert error.sum() == 0
        assert np.abs(error).max() < step / 2
        assert (error**2).mean() == pytest.approx(step**2 / 12, rel=1e-4)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_coarser_level_follows_from_a_finer_one(self, form: str) -> None:
        made, features, ids = codec(FORMS[form]), smooth(FORMS[form], 5), np.arange(5) + 3
        finer = np.array([made.deepest, 2, 1, made.deepest, 1]).clip(max=made.deepest)
        held = np.stack([made.quantized(ids, features, int(level))[row] for row, level in enumerate(finer)])
        for level in range(2):
            coarse = made.coarser(ids, held, finer, level)
            np.testing.assert_array_equal(coarse, made.quantized(ids, features, level))

    @pytest.mark.parametrize("form", ["images", "grey", "list", "bits"])
    def test_integers_are_lossless_at_the_deepest_level(self, form: str) -> None:
        made, features, ids = codec(FORMS[form]), smooth(FORMS[form], 6), np.arange(6)
        values = made.values(ids, made.quantized(ids, features, made.deepest), made.deepest)
        assert values.dtype == torch.float32
        assert torch.equal(values, features.to(torch.float32))
        assert made.deepest == {"images": 8, "grey": 5, "list": 10, "bits": 1}[form]

    def test_every_8_bit_value_under_every_dither_is_lossless_at_8_bits(self) -> None:
        every = np.arange(65536, dtype=np.uint16)
        indices, values = np.empty(65536, np.uint16), np.empty(65536, np.float32)
        for x in range(256):
            quantize(np.full(65536, x, np.int32), every, 8, 256, indices)
            reconstruct(indices, every, 8, 256, True, np.zeros(1), np.ones(1), values)
            assert (values == x).all()

    def test_zero_is_index_zero_at_every_level(self) -> None:
        every = np.arange(65536, dtype=np.uint16)
        indices = np.empty(65536, np.uint16)
        for level in range(16):
            quantize(np.zeros(65536, np.int32), every, level, 1 << 24, indices)
            assert not indices.any()

    def test_coarsening_a_level_to_itself_changes_nothing(self) -> None:
        some = np.arange(100, dtype=np.uint16)
        coarsen(some, np.arange(100, dtype=np.uint16) * 600, 5, 5)
        np.testing.assert_array_equal(some, np.arange(100))


@st.composite
def journeys(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A form, and levels that a sample is brought to one after another."""
    form = draw(st.sampled_from(sorted(FORMS)))
    deepest = codec(FORMS[form]).deepest
    return form, sorted(draw(st.sets(st.integers(0, deepest), min_size=1, max_size=4)))


class TestPayloads:
    @given(journeys(), st.integers(0, 9))
    @settings(max_examples=60, deadline=None)
    def test_every_level_on_every_way_is_the_direct_encoding(self, journey: tuple[str, list[int]], seed: int) -> None:
        form, levels = FORMS[journey[0]], journey[1]
        made, features, labels = codec(form), smooth(form, 4, seed), named(4, seed)
        ids, held, into = np.array([5, 1, 70000, 6]), nothing(4), empty(form, 4)
        for level in levels:
            payload = made.encode(ids, features, labels, held, level)
            made.decode(payload, ids, held, level, into)
            np.testing.assert_array_equal(into.indices, made.quantized(ids, features, level))
            np.testing.assert_array_equal(into.labels, labels.numpy())
            held = np.full(4, level)

    def test_samples_may_be_held_at_different_levels(self) -> None:
        made, features, labels, ids = codec(IMAGES), smooth(IMAGES, 4), named(4), np.arange(4)
        held = np.array([2, NOTHING, 0, 4])
        into = empty(IMAGES, 4)
        for row, level in enumerate(held):
            if level >= 0:
                into.indices[row] = made.quantized(ids, features, int(level))[row]
                into.labels[row] = 3 - row  # labels of held samples do not travel
        made.decode(made.encode(ids, features, labels, held, 5), ids, held, 5, into)
        np.testing.assert_array_equal(into.indices, made.quantized(ids, features, 5))
        np.testing.assert_array_equal(into.labels, np.where(held < 0, labels.numpy(), 3 - np.arange(4)))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("held", "level"), [(NOTHING, 0), (NOTHING, 1), (NOTHING, 7), (0, 1), (2, 6)])
    def test_the_reference_reads_them(self, form: str, held: int, level: int) -> None:
        made, features, labels, ids = codec(FORMS[form]), smooth(FORMS[form], 6), named(6), np.arange(6) + 100
        level = min(level, made.deepest)
        if held >= level:
            pytest.skip("there are no such levels")
        payload = made.encode(ids, features, labels, np.full(6, held), level)
        words = list(struct.unpack(f"<{len(payload) // 2 - 12}H", payload[24:]))
        coder = reference_samples.Rans(struct.unpack_from("<I", payload, 16)[0], words)
        reader = reference_samples.Reader(coder, FORMS[form].planes, FORMS[form].span, CLASSES)
        start = made.quantized(ids, features, max(held, 0))
        for row in range(6):
            if held == NOTHING:
                assert reader.label() == labels[row]
            found = reader.sample(made.lanes(ids)[row].tolist(), held, start[row].tolist(), level)
            assert found == made.quantized(ids, features, level)[row].tolist()
        assert coder == reference_samples.Rans(1 << 15, [])

    def test_no_samples(self) -> None:
        made = codec(IMAGES)
        ids, none = np.empty(0, np.int64), smooth(IMAGES, 0)
        payload = made.encode(ids, none, named(0), nothing(0), 3)
        assert len(payload) == 24
        made.decode(payload, ids, nothing(0), 3, empty(IMAGES, 0))

    def test_they_are_a_function_of_what_they_hold(self) -> None:
        features, labels, ids = smooth(IMAGES, 4), named(4), np.arange(4)
        first = codec(IMAGES).encode(ids, features, labels, nothing(4), 3)
        assert codec(IMAGES).encode(ids, features.to(torch.uint8), labels, nothing(4), 3) == first
        assert codec(IMAGES, seed=12).encode(ids, features, labels, nothing(4), 3) != first
        assert codec(IMAGES, sender=3).encode(ids, features, labels, nothing(4), 3) != first

    @pytest.mark.parametrize("level", [0, 2, 5])
    def test_what_is_dark_costs_almost_nothing(self, level: int) -> None:
        form = Features((28, 28))
        payload = codec(form).encode(np.arange(32), torch.zeros(32, 28, 28), named(32), nothing(32), level)
        assert len(payload) * 8 < 0.01 * 32 * 784 + 32 * 3 + 192 + 32

    @pytest.mark.parametrize("classes", [1, 2, 10, 1000])
    def test_labels_cost_at_most_whole_bits(self, classes: int) -> None:
        made = codec(Features((1,), high=(1,)), classes=classes)
        ids = np.arange(512)
        labels = torch.from_numpy(np.random.default_rng(3).integers(0, classes, 512))
        dark = torch.zeros(512, 1)
        bits = 8 * len(made.encode(ids, dark, labels, nothing(512), 0))
        bits -= 8 * len(made.encode(ids, dark, labels, np.full(512, 0), 1))  # without labels
        assert bits <= 512 * (classes - 1).bit_length() + 64
        same = 8 * len(made.encode(ids, dark, torch.zeros(512, dtype=torch.int64), nothing(512), 0))
        assert classes == 1 or same < bits / 2

    def test_payloads_do_not_change(self) -> None:
        found = {}
        for name, form in FORMS.items():
            made, features, labels, ids = codec(form), smooth(form, 3), named(3), np.array([4, 5, 6])
            for held, level in ((NOTHING, 0), (NOTHING, 4), (1, 3)):
                level = min(level, made.deepest)
                if held >= level:
                    continue
                payload = made.encode(ids, features, labels, np.full(3, held), level)
                values = made.values(ids, made.quantized(ids, features, level), level).numpy().tobytes()
                found[f"{name} {held} {level}"] = {
                    "payload": base64.b64encode(payload).decode(),
                    "values": hashlib.sha256(values).hexdigest(),
                }
        if os.environ.get("DITHERPS_WRITE_GOLDEN"):
            GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        assert json.loads(GOLDEN.read_text()) == found

    @pytest.mark.data
    @pytest.mark.parametrize(("task", "level", "most"), [("mnist", 2, 0.55), ("mnist", 8, 1.6), ("cifar10", 2, 0.9)])
    def test_real_images(self, task: str, level: int, most: float) -> None:
        """Bits a feature, everything counted, of a batch of 32; raw they are `level` bits."""
        loaded = load_task(task)
        samples = loaded.load(Path(os.environ["DITHERPS_DATA"]) if "DITHERPS_DATA" in os.environ else None, train=False)
        assert loaded.features is not None
        made, ids = codec(loaded.features, classes=loaded.classes), np.arange(32)
        payload = made.encode(ids, samples.features[:32], samples.labels[:32], nothing(32), level)
        assert 8 * len(payload) / 32 / loaded.features.count < most


def resealed(payload: bytes) -> bytes:
    """With the check that its other bytes ask for."""
    state = xxhash.xxh3_64(payload[:20])
    state.update(payload[24:])
    return payload[:20] + struct.pack("<I", state.intdigest() & 0xFFFFFFFF) + payload[24:]


class TestRefusals:
    made = codec(IMAGES)
    features, labels, ids = smooth(IMAGES, 4), named(4), np.arange(4)
    payload = made.encode(ids, features, labels, nothing(4), 3)

    def refused(self, payload: bytes, reason: Reason | None = None) -> None:
        with pytest.raises(PayloadError) as caught:
            self.made.decode(payload, self.ids, nothing(4), 3, empty(IMAGES, 4))
        assert reason is None or caught.value.reason is reason

    def test_any_flipped_bit(self) -> None:
        for place in range(8 * len(self.payload)):
            damaged = bytearray(self.payload)
            damaged[place // 8] ^= 1 << place % 8
            self.refused(bytes(damaged))

    def test_any_length_but_the_right_one(self) -> None:
        for size in range(len(self.payload)):
            self.refused(self.payload[:size])
        self.refused(self.payload + b"\0")
        self.refused(resealed(self.payload + b"\0\0"))

    @pytest.mark.parametrize(("offset", "kind", "value"), [(1, "B", 4), (2, "H", 5), (4, "I", 5), (8, "I", 61)])
    def test_sizes_that_are_not_what_was_asked_for(self, offset: int, kind: str, value: int) -> None:
        data = bytearray(self.payload)
        struct.pack_into(f"<{kind}", data, offset, value)
        self.refused(resealed(bytes(data)), Reason.SIZE)

    def test_words_of_ones_own(self) -> None:
        """Whatever stands in them, nothing impossible comes out; mostly their end gives them away."""
        rng = np.random.default_rng(1)
        refused = 0
        for _ in range(200):
            body = rng.bytes(2 * int(rng.integers(0, 60)))
            state = int(rng.integers(1 << 15, 1 << 31))
            data = resealed(self.payload[:16] + struct.pack("<II", state, 0) + body)
            into = empty(IMAGES, 4)
            try:
                self.made.decode(data, self.ids, nothing(4), 3, into)
            except PayloadError:
                refused += 1
            assert ((into.labels >= 0) & (into.labels < CLASSES)).all()
            assert into.indices.max() <= 8
        assert refused == 200

    @pytest.mark.parametrize("state", [0, (1 << 15) - 1, 1 << 31, 2**32 - 1])
    def test_an_impossible_state(self, state: int) -> None:
        self.refused(resealed(self.payload[:16] + struct.pack("<I", state) + self.payload[20:]), Reason.MALFORMED)

    def test_other_ids_another_cache_another_worker_another_task(self) -> None:
        for made, ids, held in (
            (self.made, self.ids + 1, nothing(4)),
            (self.made, self.ids[::-1].copy(), nothing(4)),
            (self.made, self.ids, np.array([NOTHING, 1, NOTHING, NOTHING])),
            (codec(IMAGES, sender=1), self.ids, nothing(4)),
            (codec(IMAGES, seed=1), self.ids, nothing(4)),
            (codec(Features((3, 5, 4), high=(256,))), self.ids, nothing(4)),
        ):
            with pytest.raises(PayloadError) as caught:
                made.decode(self.payload, ids, held, 3, empty(IMAGES, 4))
            assert caught.value.reason is Reason.CONTEXT_MISMATCH

    def test_what_cannot_be_encoded(self) -> None:
        def encode(**changed: object) -> None:
            given = {"ids": self.ids, "features": self.features, "labels": self.labels, "held": nothing(4), "level": 3}
            self.made.encode(**(given | changed))  # type: ignore[arg-type]

        for label in (-1, CLASSES):
            with pytest.raises(UserError, match=f"a label is {label}, but the task has classes 0 to 4"):
                encode(labels=torch.tensor([0, 1, label, 2]))
        with pytest.raises(UserError, match=r"shape \(3, 5, 5\)"):
            encode(features=torch.zeros(4, 3, 5, 5))
        with pytest.raises(UserError, match=r"out of the range \(0,\) to \(255,\) that the task declares"):
            encode(features=self.features + 256 * (torch.arange(4) == 1).view(-1, 1, 1, 1))
        with pytest.raises(UserError, match=r"nan.*out of the range"):
            encode(features=torch.full((4, 3, 5, 4), torch.nan))
        with pytest.raises(UserError, match="not whole numbers"):
            encode(features=torch.full((4, 3, 5, 4), 0.5))
        with pytest.raises(UserError, match="4 samples, but 3 rows"):
            encode(features=self.features[:3], labels=self.labels[:3])
        for level in (-1, 9):
            with pytest.raises(OptionError, match="level"):
                encode(level=level)
        for held in (nothing(3), nothing(4) - 1, np.full(4, 3)):
            with pytest.raises(OptionError, match="held"):
                encode(held=held)
        with pytest.raises(OptionError, match=r"address\.round"):
            encode(ids=np.array([0, 1, 2, 2**32]))


class TestDeclarations:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"shape": ()}, "one to three positive sizes"),
            ({"shape": (1, 2, 3, 4)}, "one to three positive sizes"),
            ({"shape": (0,)}, "one to three positive sizes"),
            ({"shape": (3, 2, 2), "low": (0, 0)}, "one number, or 3"),
            ({"shape": (3, 2, 2), "low": (0, 0), "high": (1, 1)}, "one number, or 3"),
            ({"shape": (2,), "low": (1,), "high": (1,)}, "the first one smaller"),
            ({"shape": (2,), "high": (float("inf"),)}, "finite"),
            ({"shape": (2,), "high": (0.5,)}, "integers"),
            ({"shape": (2,), "high": (2**24,)}, "integers"),
        ],
    )
    def test_nonsense_is_named(self, options: dict[str, tuple[float, ...]], match: str) -> None:
        with pytest.raises(OptionError, match=match):
            Features(**options)  # type: ignore[arg-type]

    @pytest.mark.parametrize("task", ["digits"])
    def test_tasks_declare_what_they_hold(self, task: str) -> None:
        loaded = load_task(task)
        assert loaded.features is not None
        for train in (True, False):
            samples = loaded.load(None, train=train)
            integers = loaded.features.integers(samples.features)
            assert integers.max() == loaded.features.span - 1
            np.testing.assert_array_equal(integers, samples.features.numpy().reshape(len(samples), -1))

    def test_integers_of_floats_are_within_their_grain(self) -> None:
        form = FORMS["channels"]
        features = smooth(form, 9)
        integers = form.integers(features).reshape(9, 2, -1)
        back = np.array(form.low)[:, None] + integers * form.scale[:, None]
        np.testing.assert_array_less(np.abs(back - features.double().numpy().reshape(9, 2, -1)).max((0, 2)), form.scale)

    def test_values_keep_to_fractions(self) -> None:
        assert reference_samples.value(1, 0, 0, 4) == Fraction(4) * (Fraction(3, 2) - Fraction(1, 1 << 17))
