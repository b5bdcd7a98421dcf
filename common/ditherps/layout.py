"""The order in which a model's tensors stand in one flat vector, and the model bound to such a vector.

Everything that travels or is summed is one flat float32 vector: parameters in the order of `Module.named_parameters`.
Buffers (batch-norm statistics and other state without gradient) travel apart, uncompressed, in the order of
`Module.named_buffers`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from ditherps.errors import PayloadError, Reason, UserError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model: its name, shape and dtype (as torch writes it without the prefix, e.g. `float32`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        """The spec of `tensor` under `name`."""
        return cls(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.count * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Names, shapes and dtypes of a model's parameters and buffers, in flat order."""

    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The layout of `module`; raises `UserError` if a parameter is not float32."""
        parameters = tuple(TensorSpec.of(name, tensor) for name, tensor in module.named_parameters())
        for spec in parameters:
            if spec.dtype != "float32":
                raise UserError(
                    f"parameter {spec.name} is {spec.dtype}; parameters must be float32: call model.float()"
                )
        return cls(parameters, tuple(TensorSpec.of(name, tensor) for name, tensor in module.named_buffers()))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First flat coordinate of each parameter, then the number of all coordinates."""
        return tuple(int(n) for n in np.cumsum([0, *(spec.count for spec in self.parameters)]))

    @property
    def coordinates(self) -> int:
        """Number of parameters of the model."""
        return self.starts[-1]

    @cached_property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(spec.nbytes for spec in self.buffers)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of names, shapes and dtypes: equal on both ends, or a worker is not let in."""
        specs = [[[s.name, s.shape, s.dtype] for s in part] for part in (self.parameters, self.buffers)]
        return hashlib.sha256(json.dumps(specs, separators=(",", ":")).encode()).digest()

    def name_at(self, coordinate: int) -> str:
        """Name of the parameter that holds a flat coordinate."""
        return self.parameters[bisect.bisect_right(self.starts, coordinate) - 1].name


class FlatModel:
    """A module whose parameters and gradients are views into two flat float32 vectors.

    `flat` and `gradient` have `layout.coordinates` elements on the module's device: what is written into `flat` is in
    the model, what `backward` computes is in `gradient`, and nothing is copied.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu", *, gradient: bool = True) -> None:
        self.module = module.to(device)
        self.layout = Layout.of(module)
        self.flat = torch.empty(self.layout.coordinates, dtype=torch.float32, device=device)
        self.gradient = torch.zeros_like(self.flat) if gradient else self.flat.new_empty(0)
        starts = self.layout.starts
        with torch.no_grad():
            for parameter, start, end in zip(self.module.parameters(), starts, starts[1:], strict=False):
                view = self.flat[start:end].view(parameter.shape)
                view.copy_(parameter)
                parameter.data = view
                if gradient and parameter.requires_grad:
                    parameter.grad = self.gradient[start:end].view(parameter.shape)

    @property
    def device(self) -> torch.device:
        """Where the flat vectors live."""
        return self.flat.device

    def buffers(self) -> bytes:
        """All buffers, little-endian, in layout order."""
        return pack_buffers([buffer for _, buffer in self.module.named_buffers()])

    def load_buffers(self, data: bytes | memoryview) -> None:
        """Set all buffers from what `buffers` wrote; raises `PayloadError` on a wrong size."""
        values = unpack_buffers(self.layout, data)
        with torch.no_grad():
            for (_, buffer), value in zip(self.module.named_buffers(), values, strict=True):
                buffer.copy_(value)


def pack_buffers(tensors: Sequence[torch.Tensor]) -> bytes:
    """Little-endian bytes of the tensors, one after another."""
    parts = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors if tensor.numel())
    return b"".join(part.numpy().tobytes() for part in parts)


def unpack_buffers(layout: Layout, data: bytes | bytearray | memoryview) -> list[torch.Tensor]:
    """Tensors of the layout's buffers from `pack_buffers`; raises `PayloadError` on a wrong size."""
    if len(data) != layout.buffer_bytes:
        raise PayloadError(f"buffers take {layout.buffer_bytes} bytes, not {len(data)}", Reason.SIZE)
    tensors, at = [], 0
    for spec in layout.buffers:
        part = torch.empty(spec.shape, dtype=spec.torch_dtype)
        if spec.nbytes:
            source = np.frombuffer(data, dtype=np.uint8, count=spec.nbytes, offset=at)
            part.reshape(-1).view(torch.uint8).numpy()[:] = source
        tensors.append(part)
        at += spec.nbytes
    return tensors


def model_sha256(flat: torch.Tensor, buffers: bytes) -> str:
    """SHA-256 (hex) of parameters, then buffers, in layout order, little-endian.

    `flat`: float32, any device.
    """
    digest = hashlib.sha256(flat.detach().cpu().contiguous().numpy().data)
    digest.update(buffers)
    return digest.hexdigest()
