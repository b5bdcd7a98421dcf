"""The server's model: the exact x, the model w that workers hold, buffers, and a version."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from ditherps import downlink
from ditherps.errors import UserError
from ditherps.files import replacing
from ditherps.layout import FlatModel, Layout, model_sha256


class ServerModel:
    """Parameters and buffers with a version that grows by one with each applied round.

    `x` is exact and belongs to the optimizer; `w` is what workers hold. They are one and the same memory as long as the
    downlink is lossless: until `part_w`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._model = FlatModel(module, gradient=False)
        self._buffers = self._model.buffers()
        self.w = self._model.flat
        """The parameters that workers hold (float32, flat)."""
        self.version = 0
        self.digest = downlink.digest(self.w, self._buffers)
        """XXH3-128 of w, then the buffers."""

    @property
    def layout(self) -> Layout:
        """Names, shapes and dtypes."""
        return self._model.layout

    @property
    def x(self) -> torch.Tensor:
        """The exact parameters (float32, flat)."""
        return self._model.flat

    @property
    def buffers(self) -> bytes:
        """The buffers, in layout order."""
        return self._buffers

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the exact model."""
        return model_sha256(self.x, self._buffers)

    def part_w(self) -> None:
        """From now on w is a vector of its own, which begins as x."""
        self.w = self.x.clone()

    def advance(self, buffers: bytes) -> None:
        """x and w have moved on: the next version."""
        self._buffers = buffers
        self.digest = downlink.digest(self.w, buffers)
        self.version += 1

    def load(self, path: Path) -> None:
        """Take parameters (and buffers, where the file has them) from a safetensors file; w becomes x.

        Raises `UserError` if the file cannot be read, a parameter is missing, a tensor has another shape or holds NaN.
        """
        try:
            tensors = load_file(path)
        except Exception as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from None
        for spec in (*self.layout.parameters, *self.layout.buffers):
            given = tensors.get(spec.name)
            if given is None and spec in self.layout.buffers:
                continue
            if given is None or tuple(given.shape) != spec.shape:
                found = "is missing" if given is None else f"has shape {tuple(given.shape)}, not {spec.shape}"
                raise UserError(f"{path}: {spec.name} {found}")
            if not bool(torch.isfinite(given).all()):
                raise UserError(f"{path}: {spec.name} holds NaN or infinity")
        places = dict(self._model.module.named_parameters()) | dict(self._model.module.named_buffers())
        if unknown := tensors.keys() - places.keys():
            raise UserError(f"{path}: the model has no tensor {min(unknown)}")
        with torch.no_grad():
            for name, given in tensors.items():
                places[name].copy_(given)
        self.restore(self.x, None, self._model.buffers(), self.version)

    def restore(self, x: torch.Tensor, w: torch.Tensor | None, buffers: bytes, version: int) -> None:
        """Become what was saved; `w` None: it is x. Raises `PayloadError` for buffers of another size."""
        self._model.load_buffers(buffers)
        with torch.no_grad():
            self.x.copy_(x)
            if self.w is not self.x:
                self.w.copy_(x if w is None else w)
        self._buffers, self.version = buffers, version
        self.digest = downlink.digest(self.w, buffers)

    def save(self, path: Path) -> None:
        """Write the exact parameters and buffers as safetensors, with the version and SHA-256 in the metadata."""
        self._model.load_buffers(self._buffers)
        tensors = {name: tensor.detach().clone() for name, tensor in self._model.module.named_parameters()}
        tensors |= {name: tensor.detach().clone() for name, tensor in self._model.module.named_buffers()}
        metadata = {"version": str(self.version), "model_sha256": self.sha256}
        with replacing(path, 0o666) as file:
            file.write(save(tensors, metadata=metadata))

    def copy_into(self, other: FlatModel) -> None:
        """Set another model of the same layout to the exact one."""
        with torch.no_grad():
            other.flat.copy_(self.x)
        other.load_buffers(self._buffers)
