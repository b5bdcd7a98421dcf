"""The gradient at quantized samples: its bias shrinks with the level, and refinement takes it away."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ditherps
from ditherps.dither import Address, Domain
from ditherps.gradient import backward, seed_torch
from ditherps.layout import FlatModel
from ditherps.samples.agreement import Agreement, agreement, probed
from ditherps.samples.codec import SampleCodec
from ditherps.tasks import Features, Keys, ModelSpec, Recipe, Samples, Task, load_task

DITHERS = 2000
BATCH = 4
LEVELS = (1, 2, 4)
FORM = Features((8, 8), high=(16,))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _centred(features: Tensor, keys: Keys | None) -> Tensor:
    return features.unsqueeze(1).float() / 4 - 2


class Small(Task):
    """The digits with a small convolutional network."""

    name = "small"
    classes = 10
    features = FORM
    models: Mapping[str, ModelSpec] = {
        "cnn": ModelSpec(_convolutions, _centred, Recipe(1, 1, {"name": "sgd", "lr": 1.0}, {"name": "constant"}))
    }

    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        return load_task("digits").load(data_dir, train=train)


class Estimates(NamedTuple):
    """Of one level: without and with refinement, (DITHERS, coordinates) each, and the distances of the samples."""

    plain: Tensor
    refined: Tensor
    distances: Tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a network gains nothing from more, and loses much where other processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn() -> tuple[FlatModel, Tensor, Tensor]:
    """The model, and features and labels of the batch."""
    batch = Small().load(None, train=True)
    return FlatModel(Small().build("cnn", 3)), batch.features[:BATCH], batch.labels[:BATCH]


def gradient(features: Tensor) -> Tensor:
    """That of the batch at these features, as both ends compute it."""
    model, _, labels = drawn()
    backward(Small(), "cnn", model, features, labels, None)
    return model.gradient


@functools.cache
def true_gradient() -> Tensor:
    return gradient(drawn()[1])


def gradients(batches: Tensor) -> Tensor:
    """The same for many batches (n, BATCH, 8, 8) at once: (n, coordinates)."""
    model, _, labels = drawn()
    parameters = {name: parameter.detach() for name, parameter in model.module.named_parameters()}

    def loss(values: dict[str, Tensor], features: Tensor) -> Tensor:
        inputs = Small().inputs("cnn", features, None)
        return Small().loss(torch.func.functional_call(model.module, values, (inputs,)), labels)

    found = torch.func.vmap(torch.func.grad(loss), (None, 0), chunk_size=250)(parameters, batches)
    return torch.cat([found[name].flatten(1) for name in parameters], 1)


@functools.cache
def estimates(level: int) -> Estimates:
    """What the server gets under 2,000 independent dithers of samples and of the refinement."""
    _, features, _ = drawn()
    made, refining = SampleCodec(FORM, 10, 1, 0), ditherps.codec("dqsg", bucket=0)
    ids = np.arange(DITHERS * BATCH)  # each sample under an id of its own each time
    many = features.repeat(DITHERS, 1, 1)
    values = made.values(ids, made.quantized(ids, many, level), level)
    plain = gradients(values.reshape(DITHERS, BATCH, 8, 8))
    refined = plain.clone()
    for trial, found in enumerate(refined):
        address = Address(1, trial, 0, Domain.UPDATE)
        refining.accumulate(refining.encode(true_gradient() - found, address), address, found, 1.0)
    distances = (values - many).flatten(1).norm(dim=1).reshape(DITHERS, BATCH).mean(1)
    return Estimates(plain, refined, distances)


def test_many_gradients_at_once_are_those_one_by_one() -> None:
    batches = torch.rand(5, BATCH, 8, 8) * 16
    for batch, found in zip(batches, gradients(batches), strict=True):
        torch.testing.assert_close(found, gradient(batch), rtol=1e-4, atol=1e-6)


def off(found: Tensor, true: Tensor) -> tuple[float, float]:
    """||mean - true||^2 and what of it is to be expected of a mean that is true, from the variance."""
    error = found.double().mean(0) - true.double()
    return float(error @ error), float(found.double().var(0).sum() / len(found))


@pytest.mark.parametrize("level", LEVELS)
def test_the_refined_estimate_is_unbiased(level: int) -> None:
    true, found = true_gradient(), estimates(level).refined.double()
    generator = torch.Generator().manual_seed(level)
    directions = torch.cat([true[None], torch.randn(20, len(true), generator=generator)]).double()
    along = (found - true.double()) @ directions.T
    assert (along.mean(0).abs() < 4 * along.std(0) / DITHERS**0.5).all()
    # No coordinate is off either: of so many the largest is below five standard errors.
    errors = (found - true.double()).mean(0).abs() / (found.std(0) / DITHERS**0.5).clamp_min(1e-12)
    assert float(errors.max()) < 5
    squared, expected = off(found, true)
    assert squared < 2 * expected


def test_without_refinement_the_bias_shrinks_with_the_level() -> None:
    """The distance of the gradients is at most a Lipschitz constant times that of the samples, which halves with each
    level; the bias, of which the part that is odd in the dither averages out, shrinks faster still."""
    true = true_gradient()
    biases, apart, slopes = [], [], []
    for level in LEVELS:
        found = estimates(level)
        squared, expected = off(found.plain, true)
        biases.append(max(squared - expected, 0.0) ** 0.5)
        distance = (found.plain - true).norm(dim=1)
        apart.append(float(distance.mean()))
        slopes.append(float((distance / found.distances).max()))
        assert biases[-1] <= apart[-1]
        step = 17 / 2**level
        assert float(found.distances.mean()) == pytest.approx(step * (64 / 12) ** 0.5, rel=0.05)
    assert biases[0] > 5 * off(estimates(1).plain, true)[1] ** 0.5  # at one bit it is plain to see
    assert biases[0] > 2 * biases[1] > 2 * 4 * biases[2]
    # One constant holds for all levels: the gradients come together as fast as the samples do.
    assert apart[0] > 1.6 * apart[1] > 1.6 * 3 * apart[2]
    assert max(slopes[1:]) < 1.5 * slopes[0]


def test_refinement_costs_less_the_finer_the_samples() -> None:
    """Its variance is in proportion to the square of what it describes."""
    variances = [float(estimates(level).refined.double().var(0).sum()) for level in LEVELS]
    assert variances[0] > 2 * variances[1] > 2 * 8 * variances[2]


def test_at_the_deepest_level_the_gradient_is_the_workers_own() -> None:
    features = drawn()[1]
    made = SampleCodec(FORM, 10, 1, 0)
    ids = np.arange(BATCH)
    values = made.values(ids, made.quantized(ids, features, made.deepest), made.deepest)
    assert torch.equal(gradient(values), true_gradient())


def test_both_ends_draw_the_same_dropout() -> None:
    task = load_task("digits")
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    ends = [FlatModel(module)] * 2
    batch = task.load(None, train=True)
    found = []
    for place, end in enumerate(ends):
        torch.randn(place + 1)  # whatever was drawn before
        seed_torch(5, 3, 1)
        backward(task, "mlp", end, batch.features[:8], batch.labels[:8], None)
        found.append(end.gradient.clone())
    assert torch.equal(*found)
    seed_torch(5, 3, 2)
    backward(task, "mlp", ends[0], batch.features[:8], batch.labels[:8], None)
    assert not torch.equal(ends[0].gradient, found[0])


def test_weights_of_one_nth_are_the_mean() -> None:
    task = Small()
    model, features, labels = drawn()
    loss = backward(task, "cnn", model, features, labels, None, torch.full((BATCH,), 1 / BATCH))
    torch.testing.assert_close(model.gradient, true_gradient())
    plain = backward(task, "cnn", model, features, labels, None)
    torch.testing.assert_close(loss, plain)
    assert backward(task, "cnn", model, features[:0], labels[:0], None, torch.empty(0)) == 0
    assert not model.gradient.any()


class TestAgreement:
    def test_of_vectors(self) -> None:
        a = torch.tensor([3.0, 4.0])
        assert agreement(a, a) == Agreement(1, 0)
        assert agreement(-a, a) == Agreement(-1, 2)
        assert agreement(a, torch.tensor([4.0, -3.0])).cosine == 0
        assert agreement(a * 0, a * 0) == Agreement(1, 0)
        assert agreement(a * 0, a) == Agreement(0, 1)
        assert agreement(a, a * 0) == Agreement(0, float("inf"))
        assert np.isnan(agreement(a * torch.nan, a)).all()

    @pytest.mark.parametrize(("coordinates", "count"), [(1, 1), (10, 3), (10, 10), (5, 9), (1_000_003, 64), (0, 4)])
    def test_a_probe_takes_one_coordinate_of_each_part(self, coordinates: int, count: int) -> None:
        found = probed(Address(1, 2, 3, Domain.PROBE), coordinates, count)
        parts = min(coordinates, count)
        assert len(found) == parts
        borders = np.arange(parts + 1) * coordinates // max(parts, 1)
        assert ((found >= borders[:-1]) & (found < borders[1:])).all()
        if coordinates > 100:
            assert not np.array_equal(found, probed(Address(1, 3, 3, Domain.PROBE), coordinates, count))
