"""A task without computation: it moves a model of a given size through the real service, and that is all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditherps.tasks import ModelSpec, Recipe, Samples, Task

COORDINATES_VARIABLE = "IDLE_COORDINATES"
RESNET18_COORDINATES = 11_173_962


class _FixedGradient(torch.autograd.Function):
    """A zero whose gradient is a vector that was made before."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return weights.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class IdleModel(nn.Module):
    """One parameter vector, whose gradient is the same Gaussian noise every time."""

    def __init__(self) -> None:
        super().__init__()
        count = int(os.environ.get(COORDINATES_VARIABLE, RESNET18_COORDINATES))
        self.weights = nn.Parameter(torch.zeros(count))
        self._gradient = torch.randn(count) * 1e-3

    def forward(self, features: Tensor) -> Tensor:
        """(N, 1) -> (N, 2), all zero, with the fixed gradient behind it."""
        zero: Tensor = _FixedGradient.apply(self.weights, self._gradient)
        return features.new_zeros(len(features), 2) + zero


class Idle(Task):
    """`ditherps bench rounds` names this task as `ditherps.bench.idle:Idle`."""

    name = "idle"
    classes = 2
    models = {  # noqa: RUF012
        "idle": ModelSpec(
            IdleModel,
            lambda features, keys: features,
            Recipe(rounds=10, batch_size=1, optimizer={"name": "sgd", "lr": 0.1}, schedule={"name": "constant"}),
        )
    }

    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        """Rows of zeros."""
        rows = 1024 if train else 1
        return Samples(torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean output: its gradient reaches the weights unchanged."""
        return outputs.mean()
