"""Splits, walks, augmentation keys and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ditherps.dither import SERVER, Address, Domain, words
from ditherps.errors import OptionError, UserError
from ditherps.sampling import SplitKind, Walk, augmentation_keys, evaluate, split
from ditherps.tasks import Samples, load_task

SEEDS = st.integers(0, 2**64 - 1)


def samples(count: int, classes: int = 10, groups: int | None = None) -> Samples:
    ids = torch.arange(count)
    return Samples(torch.zeros(count, 1), ids % classes, None if groups is None else ids * 13 % groups)


class TestSplit:
    @settings(deadline=None, max_examples=60)
    @given(
        kind=st.sampled_from(get_args(SplitKind)),
        workers=st.integers(1, 12),
        extra=st.integers(0, 300),
        seed=SEEDS,
        alpha=st.floats(1e-3, 1e3),
    )
    def test_every_sample_goes_to_exactly_one_worker(
        self, kind: SplitKind, workers: int, extra: int, seed: int, alpha: float
    ) -> None:
        data = samples(workers + extra, groups=workers)
        shards = split(data, workers, seed, kind, alpha)
        assert len(shards) == workers
        assert all(len(shard) > 0 for shard in shards)
        assert all(shard.dtype == np.int64 and np.all(np.diff(shard) > 0) for shard in shards)
        assert sorted(np.concatenate(shards).tolist()) == list(range(len(data)))
        again = split(data, workers, seed, kind, alpha)
        assert all(np.array_equal(*pair) for pair in zip(shards, again, strict=True))

    @pytest.mark.parametrize("kind", get_args(SplitKind))
    def test_the_seed_matters(self, kind: SplitKind) -> None:
        data = samples(400, groups=60)
        assert any(
            not np.array_equal(*pair) for pair in zip(split(data, 4, 1, kind), split(data, 4, 2, kind), strict=True)
        )

    @settings(deadline=None)
    @given(count=st.integers(1, 200), workers=st.integers(1, 20), seed=SEEDS)
    def test_iid_shards_differ_by_one_sample_at_most(self, count: int, workers: int, seed: int) -> None:
        count = max(count, workers)
        sizes = [len(shard) for shard in split(samples(count), workers, seed)]
        assert max(sizes) - min(sizes) <= 1

    def test_skew_grows_as_alpha_falls(self) -> None:
        data = samples(6_000)

        def skew(alpha: float) -> float:
            """Mean over seeds and classes of the largest share that one worker has of a class."""
            shares = []
            for seed in range(8):
                shards = split(data, 5, seed, "dirichlet", alpha)
                counts = np.stack([np.bincount(data.labels.numpy()[shard], minlength=10) for shard in shards])
                shares.append(float((counts.max(0) / counts.sum(0)).mean()))
            return float(np.mean(shares))

        skews = [skew(alpha) for alpha in (1e-6, 0.1, 0.3, 1.0, 10.0, 1e6)]
        assert skews == sorted(skews, reverse=True)
        assert skews[0] > 0.99
        assert skews[-1] == pytest.approx(0.2, abs=0.01)

    def test_dirichlet_proportions_have_the_right_variance(self) -> None:
        # Var of a Dirichlet(a, .., a) proportion over w workers: (1/w)(1 - 1/w) / (w a + 1).
        workers, alpha = 4, 0.5
        counts = [
            len(shard) / 10_000
            for seed in range(300)
            for shard in split(samples(10_000, classes=1), workers, seed, "dirichlet", alpha)
        ]
        assert np.var(counts) == pytest.approx(0.25 * 0.75 / (workers * alpha + 1), rel=0.12)

    def test_groups_stay_whole_and_are_balanced(self) -> None:
        generator = np.random.default_rng(1)
        groups = torch.from_numpy(generator.permutation(np.repeat(np.arange(80), generator.integers(19, 132, 80))))
        data = Samples(torch.zeros(len(groups), 1), groups % 10, groups)
        shards = split(data, 6, 3, "key")
        owners = [set(groups[torch.from_numpy(shard)].tolist()) for shard in shards]
        assert sum(len(owned) for owned in owners) == 80
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 131

    def test_options_that_make_no_sense(self) -> None:
        data = samples(20, groups=3)
        with pytest.raises(OptionError, match="workers = 21 is not allowed; allowed: 1 to 20, the number of samples"):
            split(data, 21, 1)
        with pytest.raises(OptionError, match=r"workers = 4 .*1 to 3, the number of groups"):
            split(data, 4, 1, "key")
        with pytest.raises(OptionError, match="workers = 0"):
            split(data, 0, 1)
        with pytest.raises(OptionError, match=r"split = 'key' .*iid, dirichlet"):
            split(samples(20), 2, 1, "key")
        with pytest.raises(OptionError, match="split = 'sorted'"):
            split(data, 2, 1, "sorted")  # type: ignore[arg-type]
        for alpha in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(OptionError, match="alpha"):
                split(data, 2, 1, "dirichlet", alpha)


class TestWalk:
    SHARD = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29], np.int64)

    def test_each_epoch_takes_every_sample_once_in_an_order_of_its_own(self) -> None:
        ids, epochs = Walk(self.SHARD, seed=1, worker=0).take(0, 40)
        assert np.array_equal(epochs, np.repeat(np.arange(4), 10))
        orders = ids.reshape(4, 10)
        assert all(np.array_equal(np.sort(order), self.SHARD) for order in orders)
        assert len({tuple(order) for order in orders.tolist()}) == 4

    @settings(deadline=None)
    @given(seed=SEEDS, parts=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 35)), max_size=8))
    def test_any_part_at_any_time_is_a_part_of_the_whole(self, seed: int, parts: list[tuple[int, int]]) -> None:
        whole, whole_epochs = Walk(self.SHARD, seed, 3).take(0, 125)
        walk = Walk(self.SHARD, seed, 3)
        for first, count in parts:
            ids, epochs = walk.take(first, count)
            assert np.array_equal(ids, whole[first : first + count])
            assert np.array_equal(epochs, whole_epochs[first : first + count])

    def test_workers_walk_differently(self) -> None:
        walks = {tuple(Walk(self.SHARD, 1, worker).take(0, 10)[0].tolist()) for worker in range(5)}
        assert len(walks) == 5

    def test_an_empty_shard(self) -> None:
        with pytest.raises(UserError, match="worker 2 has no samples"):
            Walk(np.empty(0, np.int64), 1, 2)


class TestAugmentationKeys:
    def test_they_are_the_words_of_the_stream(self) -> None:
        epochs = np.array([4, 5, 4, 5], np.int64)
        ids = np.array([9, 9, 0, 3], np.int64)
        keys = augmentation_keys(77, epochs, ids)
        assert keys.dtype == np.uint64
        for key, epoch, sample in zip(keys, epochs.tolist(), ids, strict=True):
            assert key == words(Address(77, epoch, SERVER, Domain.AUGMENTATION), 10)[sample]
        assert len(np.unique(keys)) == 4

    def test_none(self) -> None:
        assert augmentation_keys(1, np.empty(0, np.int64), np.empty(0, np.int64)).shape == (0,)


class TestEvaluate:
    def test_it_equals_a_single_batch_and_keeps_the_mode(self) -> None:
        task = load_task("digits")
        test = task.load(Path("unused"), train=False)
        network = task.build(None, 1)
        with torch.no_grad():
            outputs = network(task.inputs(None, test.features, None))
        result = evaluate(task, None, network, test, "cpu", batch=100)
        assert result.loss == pytest.approx(float(task.loss(outputs, test.labels)), rel=1e-5)
        assert result.accuracy == task.correct(outputs, test.labels) / len(test)
        assert network.training

    def test_it_computes_in_evaluation_mode(self) -> None:
        task = load_task("digits")
        test = task.load(None, train=False)
        network = nn.Sequential(task.build(None, 1), nn.Dropout(0.5))
        assert evaluate(task, None, network, test, "cpu") == evaluate(task, None, network, test, "cpu")

    def test_nothing_to_evaluate_on(self) -> None:
        task = load_task("digits")
        empty = Samples(torch.zeros(0, 8, 8), torch.zeros(0, dtype=torch.int64))
        with pytest.raises(UserError, match="no samples"):
            evaluate(task, None, task.build(None, 1), empty, "cpu")
