"""What a task is: its data, its models and how one sample becomes a model's input.

Both ends load the task by name. A worker trains it, and whoever evaluates needs its test data. A model is more than a
module: the crop that its input needs and the recipe that trains it belong to it, so they travel as one `ModelSpec`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ditherps.errors import OptionError, UserError
from ditherps.tasks.features import Features

Keys = NDArray[np.uint64]
"""One 64-bit word a sample, from the AUGMENTATION domain of the dither stream."""

Transform = Callable[[Tensor, Keys | None], Tensor]
"""Stored features (N, ...) to a float32 model input on the same device; keys augment, None is for evaluation.

In mode `data` the features are float32 in the units of the stored ones, whatever their own dtype, and may lie out of
their range by half a step.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Part of a dataset, in memory on the CPU; a sample's id is its row.

    Attributes:
        features: (N, ...) as stored: uint8 images or float32.
        labels: (N,) int64 class numbers.
        groups: (N,) int64, whom a sample came from (a writer, a user), or None where the dataset does not say.

    Raises:
        UserError: rows or dtypes do not fit together.
    """

    features: Tensor
    labels: Tensor
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        for what, column in (("labels", self.labels), ("groups", self.groups)):
            if column is None:
                continue
            if column.shape != self.features.shape[:1] or column.dtype != torch.int64:
                raise UserError(
                    f"samples: {what} must be int64 of shape ({len(self.features)},) to fit the features, "
                    f"not {column.dtype} of shape {tuple(column.shape)}"
                )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What trains a model well by default, with the mean of four workers' gradients.

    Attributes:
        rounds: rounds of a run.
        batch_size: samples of one worker in one round.
        optimizer: the server optimizer: its name (`sgd`, `adam`, `adamw`) and options of the same name in torch.optim.
        schedule: of the learning rate: its name (`constant`, `cosine`, `step`, `exponential`) and options.
    """

    rounds: int
    batch_size: int
    optimizer: Mapping[str, str | float]
    schedule: Mapping[str, str | float]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model of a task.

    Attributes:
        factory: makes the module, with random parameters from torch's global CPU generator.
        transform: makes the module's input from stored features.
        recipe: what trains it well.
    """

    factory: Callable[[], nn.Module]
    transform: Transform
    recipe: Recipe


class Task(ABC):
    """A dataset with the models that are trained on it.

    To add one, subclass it, set the three attributes, write `load`, and name `module:attribute` on the command line of
    each end. Override `loss` and `correct` for anything but classification.

    Attributes:
        name: how it is known in messages and logs; both ends must agree on it.
        classes: number of classes, labels are 0 to classes - 1.
        models: its models by name; the first is the default.
        features: shape and range of its stored features, which mode `data` needs; None: there is no such mode for it.
        training_samples: how many there are at most, 0: not known. In mode `data` no worker may have others, and
            `mode = auto` judges by it how often they come again.
    """

    name: str
    classes: int
    models: Mapping[str, ModelSpec]
    features: Features | None = None
    training_samples: int = 0

    @abstractmethod
    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        """Read the training or the test part.

        Args:
            data_dir: where the user keeps datasets; None: nowhere in particular.
            train: the training part, otherwise the test part.

        Raises:
            DataMissingError: the data is not there; one line that says what to do.
        """

    def model(self, name: str | None = None) -> ModelSpec:
        """A model by name; None is the default.

        Raises:
            OptionError: there is no such model.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise OptionError(f"model of task {self.name}", name, self.models)
        return self.models[name]

    def recipe(self, model: str | None = None) -> Recipe:
        """What trains a model well; OptionError when there is no such model."""
        return self.model(model).recipe

    def build(self, model: str | None, seed: int) -> nn.Module:
        """A module on the CPU with initial parameters that depend on the seed alone.

        The state of torch's global generators is afterwards what it was before.

        Args:
            model: its name; None is the default.
            seed: the 64-bit job seed, 0 to 2**64 - 1.

        Raises:
            OptionError: there is no such model.
        """
        factory = self.model(model).factory
        # Only the CPU generator is seeded: torch.manual_seed would also reseed every GPU.
        generator = torch.default_generator
        before = generator.get_state()
        # torch's Mersenne Twister takes 32 bits of a seed; fold, so that the high half counts too.
        generator.manual_seed((seed ^ (seed >> 32)) & 0xFFFFFFFF)
        try:
            with torch.device("cpu"):
                return factory()
        finally:
            generator.set_state(before)

    def inputs(self, model: str | None, features: Tensor, keys: Keys | None) -> Tensor:
        """The float32 input of a model.

        Args:
            model: its name; None is the default.
            features: (N, ...) rows of `Samples.features`, on any device; the result is on the same.
            keys: (N,) uint64 to augment with (see `ditherps.sampling.augmentation_keys`); None: evaluation.

        Raises:
            OptionError: there is no such model.
        """
        return self.model(model).transform(features, keys)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of outputs (N, classes) against labels (N,)."""
        return F.cross_entropy(outputs, labels)

    def correct(self, outputs: Tensor, labels: Tensor) -> int:
        """How many of outputs (N, classes) are largest at the label (N,)."""
        return int((outputs.argmax(1) == labels).sum())
