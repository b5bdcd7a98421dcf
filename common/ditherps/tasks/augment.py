"""Crops and flips of stored images, decoded from 64-bit keys.

Everything happens by integer indexing on the stored bytes, so a crop is exact on every device, and whoever knows the
job's seed knows it without seeing the pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ditherps.tasks.base import Keys


def random_crop_flip(images: Tensor, keys: Keys, size: int, pad: int = 0) -> Tensor:
    """Pad each image with zeros, cut a square out of it and mirror it, as its key says.

    Bits 0-15 of a key give the top row of the square, bits 16-31 its left column, bit 63 whether it is mirrored.

    Args:
        images: (N, channels, height, width) of any dtype, on any device.
        keys: (N,) uint64.
        size: side of the square; at most height and width with both paddings.
        pad: rows and columns of zeros that are put on each side first.

    Returns:
        (N, channels, size, size), of the same dtype and device.
    """
    padded = F.pad(images, (pad, pad, pad, pad)) if pad else images
    count, channels, height, width = padded.shape
    top = _scaled(keys, height - size + 1)
    left = _scaled(keys >> np.uint64(16), width - size + 1)
    mirrored = (keys >> np.uint64(63)).astype(bool)
    along = np.arange(size)
    rows = top[:, None] + along
    columns = left[:, None] + np.where(mirrored[:, None], along[::-1], along)
    where = (
        np.arange(count).reshape(-1, 1, 1, 1),
        np.arange(channels).reshape(1, -1, 1, 1),
        rows.reshape(count, 1, size, 1),
        columns.reshape(count, 1, 1, size),
    )
    return padded[tuple(torch.from_numpy(index).to(images.device) for index in where)]


def center_crop(images: Tensor, size: int) -> Tensor:
    """The square of side `size` in the middle of (N, channels, height, width), as a view."""
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def _scaled(keys: Keys, choices: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The low 16 bits of each key as a number in 0 .. choices - 1."""
    return ((keys & np.uint64(0xFFFF)) * np.uint64(choices) >> np.uint64(16)).astype(np.int64)
