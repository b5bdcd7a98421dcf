"""The sample cache against a plain dictionary: whatever happens, it holds what it should."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from numpy.typing import NDArray

from ditherps.errors import OptionError, PayloadError
from ditherps.samples.codec import NOTHING, SampleCodec
from ditherps.tasks import Features
from ditherps_server.cache import ENTRY_BYTES, Change, FileRows, SampleCache

FORM = Features((2, 3), high=(15,))
WIDE = Features((5,), low=(0.0,), high=(1.0,), integer=False)
CLASSES = 3
SAMPLES = 12
pytestmark = pytest.mark.timeout(600)  # the first use of the kernels compiles them


def codec(worker: int, form: Features = FORM) -> SampleCodec:
    return SampleCodec(form, CLASSES, 5, worker)


def data(worker: int, form: Features = FORM) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of a worker: features and labels."""
    rng = np.random.default_rng(worker)
    low, high = form.low[0], form.high[0]
    values = rng.integers(0, 16, (SAMPLES, *form.shape)) / 15 * (high - low) + low
    return torch.from_numpy(values).round(decimals=3), torch.from_numpy(rng.integers(0, CLASSES, SAMPLES))


def completed(cache: SampleCache, worker: int, ids: list[int], level: int, form: Features = FORM) -> Change:
    """A change with what the worker sends for it."""
    made = codec(worker, form)
    change = cache.begin(made, worker, np.array(ids, np.int64), level)
    rows = np.flatnonzero(change.need.lacking)
    features, labels = data(worker, form)
    wanted = change.ids[rows]
    change.complete(made, made.encode(wanted, features[wanted], labels[wanted], change.need.held[rows], level))
    return change


def stored(cache: SampleCache, worker: int) -> NDArray[np.int64]:
    return cache.held(worker, np.arange(SAMPLES))


class Machine(RuleBasedStateMachine):
    """Two workers, changes that are open at the same time, and a budget for five samples."""

    changes: Bundle[Change] = Bundle("changes")

    def __init__(self) -> None:
        super().__init__()
        self.room = 5
        self.cache = SampleCache(FORM, self.room * (ENTRY_BYTES + 6) + 100)
        self.model: OrderedDict[tuple[int, int], int] = OrderedDict()
        self.versions: dict[int, bytes] = {}
        self.path = Path()

    @rule(
        target=changes,
        worker=st.integers(0, 1),
        ids=st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=7),
        level=st.integers(0, 4),
    )
    def prepare(self, worker: int, ids: list[int], level: int) -> Change:
        """Looking up and decoding change nothing, and give the direct encoding whatever was held."""
        change = completed(self.cache, worker, ids, level)
        held = [min(self.model.get((worker, id_), NOTHING), level) for id_ in sorted(set(ids))]
        assert change.need.held.tolist() == held
        made, (features, labels) = codec(worker), data(worker)
        np.testing.assert_array_equal(change.batch.indices, made.quantized(change.ids, features[change.ids], level))
        values, names = change.samples(made)
        batch = np.array(ids)
        assert torch.equal(names, labels[batch])
        assert torch.equal(values, made.values(batch, made.quantized(batch, features[batch], level), level))
        return change

    @rule(change=consumes(changes))
    def commit(self, change: Change) -> None:
        self.cache.commit(change)
        if self.versions.get(change.worker, b"") != change.version:
            return
        for id_ in change.ids.tolist():
            key = (change.worker, id_)
            self.model[key] = max(self.model.get(key, NOTHING), change.need.level)
            self.model.move_to_end(key)
            while len(self.model) > self.room:
                self.model.popitem(last=False)

    @rule(change=consumes(changes))
    def roll_back(self, change: Change) -> None:
        """Nothing is to be done: what never was committed never was there."""

    @rule(worker=st.integers(0, 1), version=st.sampled_from([b"1", b"2"]))
    def come_with_a_version(self, worker: int, version: bytes) -> None:
        self.cache.admit(worker, version)
        if self.versions.get(worker) != version:
            self.versions[worker] = version
            for key in [key for key in self.model if key[0] == worker]:
                del self.model[key]

    @rule()
    def wipe(self) -> None:
        self.cache.wipe()
        self.model.clear()
        self.versions.clear()

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        for worker in range(2):
            expected = [self.model.get((worker, id_), NOTHING) for id_ in range(SAMPLES)]
            assert stored(self.cache, worker).tolist() == expected
        assert len(self.cache) == len(self.model)
        assert self.cache.nbytes <= self.room * (ENTRY_BYTES + 6) + 100


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAgainstADictionary = Machine.TestCase


@pytest.mark.parametrize("form", [FORM, WIDE], ids=["bytes", "words"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_lie_in_memory_or_in_a_file(form: Features, on_disk: bool, tmp_path: Path) -> None:
    rows = FileRows(tmp_path / "rows", SampleCache.row_bytes(form)) if on_disk else None
    cache = SampleCache(form, 4 * (ENTRY_BYTES + SampleCache.row_bytes(form)), rows)
    rng = np.random.default_rng(0)
    for _ in range(60):
        level = int(rng.integers(0, 5))
        change = completed(cache, 0, rng.integers(0, SAMPLES, 3).tolist(), level, form)
        direct = codec(0, form).quantized(change.ids, data(0, form)[0][change.ids], level)
        np.testing.assert_array_equal(change.batch.indices, direct)
        cache.commit(change)
    if rows is not None:
        assert list((tmp_path / "rows").iterdir()) == []  # nobody finds it
        assert os.fstat(rows._file).st_size <= 5 * SampleCache.row_bytes(form)
        cache.wipe()
        assert os.fstat(rows._file).st_size == 0
        rows.close()


class TestSaving:
    def filled(self, budget: int = 1 << 20) -> SampleCache:
        cache = SampleCache(FORM, budget)
        cache.admit(0, b"first")
        cache.admit(1, b"other")
        for worker, ids, level in ((0, [1, 2, 3], 2), (1, [3, 4], 4), (0, [2, 5], 3)):
            cache.commit(completed(cache, worker, ids, level))
        return cache

    def test_it_becomes_what_was_saved(self, tmp_path: Path) -> None:
        cache, path = self.filled(), tmp_path / "cache"
        cache.save(path)
        again = SampleCache(FORM, 1 << 20)
        again.commit(completed(again, 0, [9], 1))  # is forgotten
        again.load(path)
        for worker in range(2):
            assert stored(again, worker).tolist() == stored(cache, worker).tolist()
        again.admit(0, b"first")  # the same version: nothing is forgotten
        change = again.begin(codec(0), 0, np.array([1, 2, 3, 5]), 2)
        assert not change.need
        features, labels = data(0)
        np.testing.assert_array_equal(change.batch.indices, codec(0).quantized(change.ids, features[change.ids], 2))
        np.testing.assert_array_equal(change.batch.labels, labels[change.ids])

    def test_the_order_of_use_survives(self, tmp_path: Path) -> None:
        """Of a smaller budget the most recent stay; what is evicted next is the same."""
        self.filled().save(tmp_path / "cache")
        entry = ENTRY_BYTES + 6
        small = SampleCache(FORM, 3 * entry)
        small.load(tmp_path / "cache")
        assert np.flatnonzero(stored(small, 0) >= 0).tolist() == [2, 5]
        assert np.flatnonzero(stored(small, 1) >= 0).tolist() == [4]
        small.commit(completed(small, 1, [0], 0))
        assert np.flatnonzero(stored(small, 1) >= 0).tolist() == [0]

    def test_any_damage_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        self.filled().save(path)
        whole = path.read_bytes()
        cache = self.filled()
        for place in range(0, len(whole), 3):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
            try:
                cache.load(path)
            except PayloadError:
                assert len(cache) == 0
            else:  # nothing that counts was in this byte, such as padding
                assert len(cache) == 6
        for size in range(0, len(whole), 7):
            path.write_bytes(whole[:size])
            with pytest.raises(PayloadError, match=r"cannot be read|damaged"):
                cache.load(path)
        path.unlink()
        with pytest.raises(PayloadError, match="cannot be read"):
            cache.load(path)

    def test_samples_of_another_task_are_refused(self, tmp_path: Path) -> None:
        self.filled().save(tmp_path / "cache")
        with pytest.raises(PayloadError, match="other features"):
            SampleCache(WIDE, 1 << 20).load(tmp_path / "cache")
        brighter = replace(FORM, high=tuple(2 * high for high in FORM.high))
        with pytest.raises(PayloadError, match="other features"):
            SampleCache(brighter, 1 << 20).load(tmp_path / "cache")

    def test_an_empty_one(self, tmp_path: Path) -> None:
        SampleCache(FORM, 100).save(tmp_path / "cache")
        cache = self.filled()
        cache.load(tmp_path / "cache")
        assert len(cache) == 0


def test_a_damaged_payload_leaves_the_change_as_it_was() -> None:
    cache, made = SampleCache(FORM, 1 << 20), codec(0)
    cache.commit(completed(cache, 0, [1, 2], 1))
    change = cache.begin(made, 0, np.array([1, 2, 3]), 3)
    before = change.batch.indices.copy()
    features, labels = data(0)
    good = made.encode(change.ids, features[change.ids], labels[change.ids], change.need.held, 3)
    for bad in (good[:-2], good[:30] + b"!" + good[31:]):
        with pytest.raises(PayloadError):
            change.complete(made, bad)
        np.testing.assert_array_equal(change.batch.indices, before)
    change.complete(made, good)
    np.testing.assert_array_equal(change.batch.indices, made.quantized(change.ids, features[change.ids], 3))


def test_refinement_digits_of_a_sample_that_is_not_held_are_refused() -> None:
    cache, made = SampleCache(FORM, 1 << 20), codec(0)
    change = cache.begin(made, 0, np.array([1, 2]), 3)
    features, labels = data(0)
    digits = made.encode(change.ids, features[change.ids], labels[change.ids], np.array([1, 1]), 3)
    with pytest.raises(PayloadError, match="another state of the cache"):
        change.complete(made, digits)


def test_a_budget_below_a_sample_keeps_none() -> None:
    cache = SampleCache(FORM, ENTRY_BYTES)
    cache.commit(completed(cache, 0, [1, 2], 1))
    assert len(cache) == 0
    with pytest.raises(OptionError, match="cache_bytes"):
        SampleCache(FORM, -1)
