"""The importance gate: unbiased, no worse than uniform sampling, and nothing that a message could make up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditherps.dither import Address, Domain
from ditherps.errors import OptionError, PayloadError
from ditherps.gradient import backward
from ditherps.layout import FlatModel
from ditherps.samples.importance import FLOOR, UNITS, Selection, probabilities, scores
from ditherps.tasks import Samples, load_task

BATCH = 24
TOSSES = 1000


def coins(round_: int, worker: int = 0) -> Address:
    return Address(3, round_, worker, Domain.IMPORTANCE)


@pytest.fixture(scope="module")
def half_trained() -> tuple[FlatModel, Samples]:
    """The digits' MLP after 60 steps, when most samples are easy, and a batch."""
    task = load_task("digits")
    samples = task.load(None, train=True)
    model = FlatModel(task.build("mlp", 1))
    for step in range(60):
        part = slice(step * 20, step * 20 + 20)
        backward(task, "mlp", model, samples.features[part], samples.labels[part], None)
        with torch.no_grad():
            model.flat -= 0.2 * model.gradient
    return model, Samples(samples.features[1300 : 1300 + BATCH], samples.labels[1300 : 1300 + BATCH])


def sample_gradients(model: FlatModel, batch: Samples) -> torch.Tensor:
    """That of each sample alone: (BATCH, coordinates)."""
    found = []
    for row in range(BATCH):
        part = slice(row, row + 1)
        backward(load_task("digits"), "mlp", model, batch.features[part], batch.labels[part], None)
        found.append(model.gradient.double())
    return torch.stack(found)


def weighted(model: FlatModel, batch: Samples, selection: Selection) -> torch.Tensor:
    kept = torch.from_numpy(selection.kept)
    weights = torch.from_numpy(selection.weights).float()
    backward(load_task("digits"), "mlp", model, batch.features[kept], batch.labels[kept], None, weights)
    return model.gradient.clone()


def test_a_weighted_gradient_is_the_sum_of_those_of_the_samples(half_trained: tuple[FlatModel, Samples]) -> None:
    model, batch = half_trained
    each = sample_gradients(model, batch)
    for round_ in range(5):
        selection = Selection.toss(np.full(BATCH, 100), coins(round_))
        expected = torch.from_numpy(selection.weights) @ each[torch.from_numpy(selection.kept)]
        torch.testing.assert_close(weighted(model, batch, selection).double(), expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_unbiased_and_varies_no_more_than_with_uniform_chances(
    half_trained: tuple[FlatModel, Samples],
) -> None:
    model, batch = half_trained
    each = sample_gradients(model, batch)
    true = each.mean(0)
    chances = probabilities(scores(load_task("digits"), "mlp", model, batch.features, batch.labels, None), 0.5)
    generator = torch.Generator().manual_seed(1)
    directions = torch.cat([true[None], torch.randn(16, len(true), generator=generator, dtype=torch.float64)])
    errors = {}
    for name, used in (("gate", chances), ("uniform", np.full(BATCH, UNITS // 2))):
        shares = torch.zeros(TOSSES, BATCH, dtype=torch.float64)
        for round_, share in enumerate(shares):
            selection = Selection.toss(used, coins(round_))
            share[torch.from_numpy(selection.kept)] = torch.from_numpy(selection.weights)
        found = shares @ each
        # Along the gradient itself and sixteen random directions the mean is within four standard errors.
        along = (found - true) @ directions.T
        assert (along.mean(0).abs() < 4 * along.std(0) / TOSSES**0.5).all()
        errors[name] = float(((found - true) ** 2).sum(1).mean())
    assert errors["gate"] < 0.7 * errors["uniform"]


def test_the_scores_are_those_of_the_last_layer(half_trained: tuple[FlatModel, Samples]) -> None:
    model, batch = half_trained
    before = model.flat.clone(), model.buffers(), model.module.training
    found = scores(load_task("digits"), "mlp", model, batch.features, batch.labels, None)
    outputs = model.module(load_task("digits").inputs("mlp", batch.features, None))
    error = outputs.softmax(1) - torch.nn.functional.one_hot(batch.labels, 10)
    np.testing.assert_allclose(found, error.norm(dim=1).detach().numpy(), rtol=1e-4, atol=1e-7)
    assert torch.equal(before[0], model.flat)
    assert before[1:] == (model.buffers(), model.module.training)


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=60),
    st.floats(FLOOR / UNITS, 1),
)
def test_chances(values: list[float], keep: float) -> None:
    found = probabilities(np.array(values), keep)
    assert ((found >= FLOOR) & (found <= UNITS)).all()
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()  # who has a higher score is not kept less often
    most = (np.array(values) > 0).mean()
    if not most:
        assert len(set(found.tolist())) == 1
    # Those without a score stay at the floor.
    within = min(keep, most + (1 - most) * FLOOR / UNITS) if most else keep
    assert found.mean() / UNITS == pytest.approx(within, abs=0.5 / UNITS + 1e-9)


def test_everybody_is_kept_at_one() -> None:
    chances = probabilities(np.array([0.3, 4.0, 1e-9]), 1.0)
    selection = Selection.toss(chances, coins(0))
    assert selection.kept.all()
    np.testing.assert_allclose(selection.weights, 1 / 3)


@pytest.mark.parametrize("keep", [0, 0.06, 1.01, float("nan")])
def test_a_fraction_out_of_range_is_named(keep: float) -> None:
    with pytest.raises(OptionError, match="keep"):
        probabilities(np.ones(3), keep)


def test_a_chance_is_exactly_that_of_the_coin() -> None:
    chances = np.array([16, 100, 255, 256])
    kept = np.array([Selection.toss(np.full(4096, chance), coins(9)).kept.mean() for chance in chances])
    exact = chances / UNITS
    assert (np.abs(kept - exact) <= 4 * np.sqrt(exact * (1 - exact) / 4096)).all()


class TestMessages:
    @given(st.lists(st.integers(FLOOR, UNITS), max_size=50), st.integers(0, 1000))
    def test_a_selection_arrives(self, chances: list[int], round_: int) -> None:
        sent = Selection.toss(np.array(chances, np.int64), coins(round_))
        again = Selection.from_bytes(sent.to_bytes(), len(chances), coins(round_))
        np.testing.assert_array_equal(again.kept, sent.kept)
        np.testing.assert_array_equal(again.chances, sent.chances)

    def test_nobody_counts_for_more_than_the_coins_allow(self) -> None:
        sent = Selection.toss(np.full(20, 128), coins(1))
        assert 0 < sent.kept.sum() < 20
        data = sent.to_bytes()
        for chances in ({FLOOR - 2}, set(range(FLOOR))):  # so every kept sample would count for many
            for chance in chances:
                forged = data[:3] + bytes([chance]) * (len(data) - 3)
                with pytest.raises(PayloadError, match="coins"):
                    Selection.from_bytes(forged, 20, coins(1))
        with pytest.raises(PayloadError, match="coins"):
            Selection.from_bytes(b"\xff\xff\x0f" + bytes([127]) * 20, 20, coins(1))  # all are kept
        for forged in (data[:-1], data + b"\x7f", b"", data[:2]):
            with pytest.raises(PayloadError):
                Selection.from_bytes(forged, 20, coins(1))
        with pytest.raises(PayloadError):
            Selection.from_bytes(data[:2] + bytes([data[2] | 0x80]) + data[3:] + b"\xff", 20, coins(1))
