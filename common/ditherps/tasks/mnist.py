"""MNIST, and Fashion-MNIST which has the same form: 60,000 and 10,000 grey images of 28x28 pixels."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditherps.errors import DataMissingError
from ditherps.tasks import models
from ditherps.tasks.base import Keys, ModelSpec, Recipe, Samples, Task
from ditherps.tasks.features import Features
from ditherps.tasks.files import Source, find_or_download

_KINDS: Final = ("images-idx3-ubyte", "labels-idx1-ubyte")
_PARTS: Final = {True: "train", False: "t10k"}
_TYPES: Final = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _unit(features: Tensor, keys: Keys | None) -> Tensor:
    """(N, 28, 28) uint8 to (N, 1, 28, 28) in 0..1; never augmented.

    Black stays 0, not the -0.42 of a standardised image: most pixels are black, and noise that quantization puts on the
    weights of a pixel that is 0 does no harm.
    """
    return features.unsqueeze(1).to(torch.float32) / 255.0


# Each rate is half of one at which training on ternary updates, whose noise is up to ten times the signal, diverges.
_MODELS: Final = {
    "fc": ModelSpec(
        models.fc300, _unit, Recipe(1000, 64, {"name": "sgd", "lr": 0.1, "momentum": 0.9}, {"name": "cosine"})
    ),
    "lenet": ModelSpec(
        models.lenet, _unit, Recipe(1000, 64, {"name": "sgd", "lr": 0.05, "momentum": 0.9}, {"name": "cosine"})
    ),
}


class IdxTask(Task):
    """A dataset of grey images in the four IDX files of MNIST (LeCun, Cortes, Burges 1998), packed with gzip or not.

    They are looked for as `DIR/<name>/<source>/raw/*` and as torchvision keeps them, `DIR/<source>/raw/*`.
    """

    classes = 10
    models = _MODELS
    features = Features((28, 28))
    training_samples = 60_000

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self._source = source

    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        """The images as (N, 28, 28) uint8; groups are the writers where the files of QMNIST lie beside them.

        Raises:
            DataMissingError: the files are missing or damaged.
        """
        raw = Path(self._source, "raw")
        root = find_or_download(
            self._source,
            self.name,
            data_dir,
            lambda root: all(_find(root / raw / f"{part}-{kind}") for part in _PARTS.values() for kind in _KINDS),
            f"{raw}/{{train,t10k}}-{{{','.join(_KINDS)}}}[.gz]",
        )
        images, labels = (_read(root / raw / f"{_PARTS[train]}-{kind}") for kind in _KINDS)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataMissingError(
                f"{root / raw}: {labels.shape} labels do not fit {images.shape} images; replace them"
            )
        return Samples(
            torch.from_numpy(images.astype(np.uint8)),
            torch.from_numpy(labels.astype(np.int64)),
            self._writers(root, train, len(labels)),
        )

    def _writers(self, root: Path, train: bool, count: int) -> Tensor | None:
        """Who wrote each digit: column 2 of QMNIST's extended labels (Yadav and Bottou 2019)."""
        path = root / "writers" / f"qmnist-{'train' if train else 'test'}-labels-idx2-int"
        if self._source != "MNIST" or not _find(path):
            return None
        # Rows beyond the first 10,000 of the test file are digits that MNIST does not have.
        return torch.from_numpy(_read(path)[:count, 2].astype(np.int64))


def _find(path: Path) -> Path | None:
    """The file as it is, or packed."""
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    return None


def _read(path: Path) -> NDArray[np.generic]:
    """The array in an IDX file, packed with gzip or not.

    Raises:
        DataMissingError: the file is missing or damaged.
    """
    found = _find(path) or path
    try:
        data = found.read_bytes()
        if found.suffix == ".gz":
            data = gzip.decompress(data)
        zeros, kind, dimensions = data[0:2], data[2], data[3]
        shape = np.frombuffer(data, ">u4", dimensions, 4)
        if zeros != b"\0\0":
            raise ValueError("not an IDX file")
        return np.frombuffer(data, _TYPES[kind], offset=4 + 4 * dimensions).reshape(shape.tolist())
    except (OSError, EOFError, zlib.error, ValueError, IndexError, KeyError) as error:
        raise DataMissingError(f"{found} cannot be read ({error}); replace it") from error


def mnist() -> Task:
    """Handwritten digits; groups are their writers where they are known."""
    return IdxTask("mnist", "MNIST")


def fashion_mnist() -> Task:
    """Pictures of clothes (Xiao, Rasul, Vollgraf 2017)."""
    return IdxTask("fashion-mnist", "FashionMNIST")
