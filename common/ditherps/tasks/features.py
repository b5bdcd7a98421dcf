"""What data mode must know of a task's stored features: their shape, and the range of each channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditherps.errors import OptionError, UserError

FLOAT_SPAN: Final = 1 << 24
"""Integers by which a float feature is stored: far finer than any level."""

_MOST_SPAN: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Features:
    """Shape, kind and range of a task's stored features.

    Attributes:
        shape: of one sample's features, as stored: (columns,), (rows, columns) or (channels, rows, columns).
        low: the smallest value, one for all or one a channel.
        high: the largest.
        integer: whether they are integers; these are lossless at the deepest level.

    Raises:
        OptionError: ranges do not fit the shape, are empty, or not whole where features are integers.
    """

    shape: tuple[int, ...]
    low: tuple[float, ...] = (0,)
    high: tuple[float, ...] = (255,)
    integer: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise OptionError("features.shape", self.shape, "one to three positive sizes: channels, rows, columns")
        if len(self.low) != len(self.high) or len(self.low) not in (1, self.planes[0]):
            allowed = f"one number, or {self.planes[0]}: one a channel"
            raise OptionError("features.low, features.high", (self.low, self.high), allowed)
        for low, high in zip(self.low, self.high, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise OptionError("features.low, features.high", (low, high), "finite numbers, the first one smaller")
            if self.integer and not (float(low).is_integer() and float(high).is_integer() and high - low < _MOST_SPAN):
                raise OptionError("features.low, features.high", (low, high), f"integers, less than {_MOST_SPAN} apart")

    @property
    def count(self) -> int:
        """Features of a sample."""
        return math.prod(self.shape)

    @property
    def planes(self) -> tuple[int, int, int]:
        """Channels, rows and columns."""
        channels, rows, columns = (1, 1, *self.shape)[-3:]
        return channels, rows, columns

    @property
    def span(self) -> int:
        """Integers x = 0 .. span - 1 that a feature is stored as."""
        if not self.integer:
            return FLOAT_SPAN
        return max(int(high - low) for low, high in zip(self.low, self.high, strict=True)) + 1

    @property
    def scale(self) -> NDArray[np.float64]:
        """What x = 1 stands for in each channel."""
        low, high = np.array(self.low, np.float64), np.array(self.high, np.float64)
        return np.ones_like(low) if self.integer else (high - low) / (FLOAT_SPAN - 1)

    def integers(self, features: Tensor) -> NDArray[np.int32]:
        """Stored features (n, *shape) as x: (n, count).

        Raises:
            UserError: another shape, integers that are none, or a value out of the declared range.
        """
        if tuple(features.shape[1:]) != self.shape:
            raise UserError(f"features have shape {tuple(features.shape[1:])}, but the task declares {self.shape}")
        values = features.detach().cpu().to(torch.float64).numpy()
        values = values.reshape(len(features), len(self.low), self.count // len(self.low))
        low, high = (np.array(side, np.float64)[:, None] for side in (self.low, self.high))
        outside = ~((values >= low) & (values <= high))  # also where they are NaN
        if outside.any():
            raise UserError(
                f"a feature is {values[outside][0]}, out of the range {self.low} to {self.high} that the task declares"
            )
        x = np.rint((values - low) / self.scale[:, None])
        if self.integer and not np.array_equal(x, values - low):
            raise UserError("features are not whole numbers, but the task declares integers")
        return x.astype(np.int32).reshape(len(features), self.count)
