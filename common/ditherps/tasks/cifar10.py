"""CIFAR-10: 50,000 and 10,000 colour images of 32x32 pixels (Krizhevsky 2009)."""

from __future__ import annotations

import csv
import lzma
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditherps.errors import DataMissingError
from ditherps.tasks import models
from ditherps.tasks.augment import center_crop, random_crop_flip
from ditherps.tasks.base import Keys, ModelSpec, Recipe, Samples, Task
from ditherps.tasks.features import Features
from ditherps.tasks.files import find_or_download

_BATCHES: Final = {True: [f"data_batch_{number}" for number in range(1, 6)], False: ["test_batch"]}
_STANDARD_FOLDER: Final = "cifar-10-batches-py"
_INDEX: Final = "index.tsv.xz"
_SIDE: Final = 32
_MEAN: Final = (0.4914, 0.4822, 0.4465)
_DEVIATION: Final = (0.2470, 0.2435, 0.2616)


def _standard(images: Tensor) -> Tensor:
    """uint8 to float32 with channels of mean 0 and variance 1 (over the training images)."""
    mean, deviation = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    return (images.to(torch.float32) / 255.0 - mean) / deviation


def _cropped(features: Tensor, keys: Keys | None, *, size: int, pad: int) -> Tensor:
    """(N, 3, 32, 32) uint8 to (N, 3, size, size): a random crop, perhaps mirrored; the middle for evaluation."""
    return _standard(center_crop(features, size) if keys is None else random_crop_flip(features, keys, size, pad))


_MODELS: Final = {
    "cifarnet": ModelSpec(
        models.cifarnet,
        partial(_cropped, size=24, pad=0),
        Recipe(8000, 32, {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}, {"name": "cosine"}),
    ),
    "resnet18": ModelSpec(
        models.resnet18,
        partial(_cropped, size=_SIDE, pad=4),
        Recipe(12000, 32, {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}, {"name": "cosine"}),
    ),
}


class Cifar10(Task):
    """CIFAR-10, in the form that its authors publish or as lossless sheets.

    Looked for in `DIR/cifar10` and `DIR`: the folder `cifar-10-batches-py`, or one 3200x3200 WebP sheet for each batch
    (100x100 images, row by row) with `index.tsv.xz` (batch, label and file name of all images in order).
    """

    name = "cifar10"
    classes = 10
    models = _MODELS
    features = Features((3, _SIDE, _SIDE))
    training_samples = 50_000

    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        """The images as (N, 3, 32, 32) uint8.

        Raises:
            DataMissingError: the files are missing or damaged.
        """
        root = find_or_download(
            "CIFAR10",
            self.name,
            data_dir,
            lambda root: _has_batches(root) or (root / _INDEX).is_file(),
            f"{_STANDARD_FOLDER}/ or {_INDEX} and *.webp",
        )
        images, labels = (_read_batches if _has_batches(root) else _read_sheets)(root, train)
        return Samples(torch.from_numpy(images), torch.from_numpy(labels))


def _has_batches(root: Path) -> bool:
    names = [*_BATCHES[True], *_BATCHES[False], "batches.meta"]
    return all((root / _STANDARD_FOLDER / name).is_file() for name in names)


def _read_batches(root: Path, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The authors' form, through torchvision, which checks the files' sums before it opens them."""
    from torchvision.datasets import CIFAR10  # seconds to import, so only who needs it waits

    try:
        dataset = CIFAR10(root, train=train)
    except RuntimeError as error:
        raise DataMissingError(f"{root / _STANDARD_FOLDER} is not complete or damaged; replace it") from error
    return np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2)), np.array(dataset.targets, np.int64)


def _read_sheets(root: Path, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The packed form."""
    from PIL import Image

    labels: dict[str, list[int]] = {}
    images = []
    try:
        with lzma.open(root / _INDEX, "rt", newline="") as index:
            for batch, label, _ in csv.reader(index, delimiter="\t"):
                labels.setdefault(batch, []).append(int(label))
        for batch in _BATCHES[train]:
            with Image.open(root / f"{batch}.webp", formats=["WEBP"]) as sheet:
                pixels = np.asarray(sheet.convert("RGB"))
            rows, columns = (side // _SIDE for side in pixels.shape[:2])
            tiles = pixels.reshape(rows, _SIDE, columns, _SIDE, 3).transpose(0, 2, 4, 1, 3)
            images.append(tiles.reshape(len(labels[batch]), 3, _SIDE, _SIDE))
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError) as error:
        raise DataMissingError(f"{root}: the packed images cannot be read ({error}); replace them") from error
    return np.concatenate(images), np.array([label for batch in _BATCHES[train] for label in labels[batch]], np.int64)
