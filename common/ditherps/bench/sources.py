"""What codecs are measured on: vectors of known distributions, and gradients saved by `ditherps bench gradients`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from ditherps.errors import OptionError, UserError

SPARSE_SHARE: Final = 0.1
"""Share of the coordinates of `sparse` that are Gaussian; the others are exactly zero."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A vector to measure codecs on.

    Attributes:
        name: of its distribution, or the file's name without its ending.
        x: float32, one dimension, finite, not all zero.
        known: whether its distribution is one of `SOURCES`, so that its Shannon limit is known.
    """

    name: str
    x: Tensor
    known: bool


def _gaussian(count: int, generator: Generator) -> Tensor:
    return torch.randn(count, generator=generator)


def _laplace(count: int, generator: Generator) -> Tensor:
    size = torch.empty(count).exponential_(2.0**0.5, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.5, size, -size)


def _student(count: int, generator: Generator) -> Tensor:
    squares = torch.zeros(count)
    for _ in range(3):
        squares += torch.randn(count, generator=generator).square_()
    # t(3) is a Gaussian over the root of a mean of three squares; its variance is 3.
    return torch.randn(count, generator=generator).div_(squares.sqrt_())


def _sparse(count: int, generator: Generator) -> Tensor:
    values = torch.randn(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < SPARSE_SHARE, values, 0.0)


SOURCES: Final[dict[str, Callable[[int, Generator], Tensor]]] = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "student-t3": _student,
    "sparse": _sparse,
}
"""Independent, symmetric values of unit variance; those of `sparse` have the variance `SPARSE_SHARE`."""


def source(name: str, coordinates: int, seed: int = 0) -> Source:
    """A vector by its distribution's name, or all tensors of a safetensors file, flattened, one behind the other.

    Args:
        name: one of `SOURCES`, or the path of a file.
        coordinates: length of the vector, at least 2; a file is taken as it is.
        seed: of torch's generator; the same vector every time.

    Raises:
        OptionError: neither a distribution nor a file.
        UserError: the file cannot be read, or does not hold finite values that are not all zero.
    """
    if name in SOURCES:
        return Source(name, SOURCES[name](coordinates, torch.Generator().manual_seed(seed)), known=True)
    path = Path(name)
    if not path.is_file():
        raise OptionError("source", name, [*SOURCES, "or a safetensors file (ditherps bench gradients makes one)"])
    try:
        with safe_open(path, framework="pt") as file:
            parts = [file.get_tensor(key).reshape(-1).to(torch.float32) for key in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
    x = torch.cat(parts) if parts else torch.empty(0)
    if x.numel() < 2 or not bool(torch.isfinite(x).all()) or not bool(x.any()):
        raise UserError(f"{path} must hold at least two values, all finite and not all zero")
    return Source(path.stem, x, known=False)
