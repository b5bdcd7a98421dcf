"""Handwritten digits that come with scikit-learn: 1,797 images of 8x8 pixels; nothing to download."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditherps.tasks import models
from ditherps.tasks.base import Keys, ModelSpec, Recipe, Samples, Task
from ditherps.tasks.features import Features

_TEST_EVERY = 5


def _unit(features: Tensor, keys: Keys | None) -> Tensor:
    """(N, 8, 8) uint8 in 0..16 to (N, 1, 8, 8) in 0..1; never augmented."""
    return features.unsqueeze(1).to(torch.float32) / 16.0


_MODELS = {
    "mlp": ModelSpec(
        partial(models.mlp, 64, 256, 10),
        _unit,
        Recipe(200, 32, {"name": "sgd", "lr": 0.2, "momentum": 0.9}, {"name": "cosine"}),
    ),
    "cnn": ModelSpec(
        models.digits_cnn,
        _unit,
        Recipe(200, 32, {"name": "sgd", "lr": 0.05, "momentum": 0.9}, {"name": "cosine"}),
    ),
}


class Digits(Task):
    """UCI optical digits (Alpaydin and Kaynak 1998), as scikit-learn embeds them.

    Every fifth image of each class is for testing: 1,442 for training and 355 for testing.
    """

    name = "digits"
    classes = 10
    models = _MODELS
    features = Features((8, 8), high=(16,))
    training_samples = 1_442

    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        """The images as (N, 8, 8) uint8 in 0..16; `data_dir` is not looked at."""
        from sklearn.datasets import load_digits  # more than a second to import, so only who needs it waits

        pixels, labels = load_digits(return_X_y=True)
        rank = np.empty(len(labels), np.int64)  # of each image within its class
        for label in range(self.classes):
            members = np.flatnonzero(labels == label)
            rank[members] = np.arange(len(members))
        chosen = np.flatnonzero((rank % _TEST_EVERY == _TEST_EVERY - 1) != train)
        return Samples(
            torch.from_numpy(pixels[chosen].astype(np.uint8).reshape(-1, 8, 8)),
            torch.from_numpy(labels[chosen].astype(np.int64)),
        )
