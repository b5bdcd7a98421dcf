"""A small task of a user's own: made-up data, and models with buffers, with dropout, and of several tiles."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ditherps.tasks import Features, Keys, ModelSpec, Recipe, Samples, Task

FEATURES, CLASSES = 6, 4
_BUILDING = threading.Lock()
_RECIPE = Recipe(8, 8, {"name": "sgd", "lr": 0.1, "momentum": 0.9}, {"name": "cosine"})


def _as_stored(features: Tensor, keys: Keys | None) -> Tensor:
    return features


def _noisy(features: Tensor, keys: Keys | None) -> Tensor:
    """Augments: the key of each sample says by how much it is scaled."""
    if keys is None:
        return features
    return features * (1.0 + torch.from_numpy((keys % 7).astype("float32")).unsqueeze(1) / 10)


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, CLASSES))


def _norm() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def _wide(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, CLASSES))


class Tiny(Task):
    """Points in six dimensions, labelled by which of four random directions is nearest."""

    name = "tiny"
    classes = CLASSES
    features = Features((FEATURES,), (-8.0,), (8.0,), integer=False)
    training_samples = 100
    models = {  # noqa: RUF012
        "linear": ModelSpec(_linear, _as_stored, _RECIPE),
        "norm": ModelSpec(_norm, _noisy, _RECIPE),
        "wide": ModelSpec(partial(_wide, 1000), _noisy, _RECIPE),
        "broad": ModelSpec(partial(_wide, 50_000), _noisy, _RECIPE),
    }

    def build(self, model: str | None, seed: int) -> nn.Module:
        """As any task, but one at a time: the tests have many ends in one process, and torch one generator."""
        with _BUILDING:
            return super().build(model, seed)

    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        """100 samples for training, 50 for testing."""
        generator = torch.Generator().manual_seed(5)
        features = torch.randn(150, FEATURES, generator=generator)
        labels = (features @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
        part = slice(0, 100) if train else slice(100, 150)
        return Samples(features[part].clone(), labels[part].clone())
