"""The server's model: the exact x, the model w that workers hold, and w as the messages that carry it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ditherps import wire
from ditherps.errors import UserError
from ditherps.layout import FlatModel, Layout, model_sha256
from ditherps.v1 import parameter_server_pb2 as pb


class ServerModel:
    """Parameters and buffers with a version that grows by one with each applied round.

    `x` is exact and belongs to the optimizer; `w` is what workers hold. They are equal as long as the downlink is
    lossless, and then share their memory.
    """

    def __init__(self, module: nn.Module, chunk_bytes: int = wire.CHUNK_BYTES) -> None:
        self._model = FlatModel(module, gradient=False)
        self._buffers = self._model.buffers()
        self._chunk_bytes = chunk_bytes
        self._snapshot: list[bytes] | None = None
        self.version = 0

    @property
    def layout(self) -> Layout:
        """Names, shapes and dtypes."""
        return self._model.layout

    @property
    def x(self) -> torch.Tensor:
        """The exact parameters (float32, flat)."""
        return self._model.flat

    @property
    def w(self) -> torch.Tensor:
        """The parameters that workers hold (float32, flat)."""
        return self._model.flat

    @property
    def buffers(self) -> bytes:
        """The buffers, in layout order."""
        return self._buffers

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the exact model."""
        return model_sha256(self.x, self._buffers)

    def advance(self, buffers: bytes) -> None:
        """x has moved on: the next version."""
        self._buffers = buffers
        self._snapshot = None
        self.version += 1

    @property
    def has_snapshot(self) -> bool:
        """Whether the messages of this version have been made."""
        return self._snapshot is not None

    def snapshot(self) -> list[bytes]:
        """Serialized Pull messages of w: the header, then the chunks. Made once a version, for all workers."""
        if self._snapshot is None:
            parameters = self.w.numpy().data.cast("B") if self.w.numel() else memoryview(b"")
            header = pb.PullHeader(
                to_version=self.version,
                encoding=pb.PULL_ENCODING_SNAPSHOT,
                parameter_bytes=len(parameters),
                buffer_bytes=len(self._buffers),
                digest=wire.digest_of(parameters, self._buffers),
            )
            chunks = wire.chunk_messages(pb.PullResponse, (parameters, self._buffers), self._chunk_bytes)
            self._snapshot = [pb.PullResponse(header=header).SerializeToString(), *chunks]
        return self._snapshot

    def load(self, path: Path) -> None:
        """Take parameters (and buffers, where the file has them) from a safetensors file.

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
        self._buffers = self._model.buffers()
        self._snapshot = None

    def save(self, path: Path) -> None:
        """Write parameters and buffers as safetensors, with the version and SHA-256 in the metadata."""
        self._model.load_buffers(self._buffers)
        tensors = {name: tensor.detach().clone() for name, tensor in self._model.module.named_parameters()}
        tensors |= {name: tensor.detach().clone() for name, tensor in self._model.module.named_buffers()}
        save_file(tensors, path, metadata={"version": str(self.version), "model_sha256": self.sha256})

    def copy_into(self, other: FlatModel) -> None:
        """Set another model of the same layout to w."""
        with torch.no_grad():
            other.flat.copy_(self.w)
        other.load_buffers(self._buffers)
