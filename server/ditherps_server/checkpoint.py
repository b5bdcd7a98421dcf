"""The server's state in one file: written beside the last one, synced, then renamed, so that one is always whole.

A safetensors file: tensors as they are, everything else as JSON in its metadata, and a digest over both, which
safetensors lacks. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ditherps.config import JobConfig
from ditherps.errors import UserError
from ditherps.wire import digest_of

FORMAT = 1
_OPTIMIZER = "optimizer."


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that the next round depends on."""

    job: JobConfig
    job_id: str
    server_epoch: int
    """Of the server that wrote it."""
    version: int
    """Of the model: the rounds that have been applied."""
    x: torch.Tensor
    w: torch.Tensor | None
    """None: w is x."""
    buffers: bytes
    layout_digest: bytes
    initial_digest: bytes
    """Of w and the buffers at version 0."""
    optimizer_tensors: Mapping[str, torch.Tensor]
    optimizer_values: Mapping[str, Any]
    leases: Mapping[int, bytes]
    """By member's index, the key of who joined last."""
    totals: Mapping[str, Any]
    """What the run has added up to."""


def write(path: Path, checkpoint: Checkpoint) -> int:
    """Replace the checkpoint at `path`, and return its bytes; until it is whole, the last one stays.

    Raises `OSError` where there is no room.
    """
    tensors = {"x": checkpoint.x, **({} if checkpoint.w is None else {"w": checkpoint.w})}
    tensors |= {_OPTIMIZER + name: tensor for name, tensor in checkpoint.optimizer_tensors.items()}
    values = json.dumps(_values(checkpoint), sort_keys=True)
    metadata = {"format": str(FORMAT), "values": values, "digest": _digest(values, tensors)}
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, part, metadata)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path.stat().st_size


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`; raises `UserError` when it is damaged, or of another version of this program."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {error}") from None
    if metadata.get("format") != str(FORMAT):
        raise UserError(f"{path} has checkpoint format {metadata.get('format')}, this is format {FORMAT}")
    if metadata.get("digest") != _digest(metadata.get("values", ""), tensors):
        raise UserError(f"{path} is damaged: it does not match its digest")
    values = json.loads(metadata["values"])
    optimizer = {
        name.removeprefix(_OPTIMIZER): tensor for name, tensor in tensors.items() if name.startswith(_OPTIMIZER)
    }
    return Checkpoint(
        job=JobConfig.model_validate(values["job"]), job_id=values["job_id"], server_epoch=values["server_epoch"],
        version=values["version"], x=tensors["x"], w=tensors.get("w"), buffers=bytes.fromhex(values["buffers"]),
        layout_digest=bytes.fromhex(values["layout_digest"]), initial_digest=bytes.fromhex(values["initial_digest"]),
        optimizer_tensors=optimizer, optimizer_values=values["optimizer"],
        leases={int(index): bytes.fromhex(key) for index, key in values["leases"].items()}, totals=values["totals"],
    )  # fmt: skip


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "job": checkpoint.job.model_dump(mode="json"), "job_id": checkpoint.job_id,
        "server_epoch": checkpoint.server_epoch, "version": checkpoint.version, "buffers": checkpoint.buffers.hex(),
        "layout_digest": checkpoint.layout_digest.hex(), "initial_digest": checkpoint.initial_digest.hex(),
        "optimizer": dict(checkpoint.optimizer_values), "totals": dict(checkpoint.totals),
        "leases": {str(index): key.hex() for index, key in checkpoint.leases.items()},
    }  # fmt: skip


def _digest(values: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """XXH3-128 (hex) of the values' JSON, then name and content of each tensor, by name."""
    parts: list[bytes | memoryview] = [values.encode()]
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().contiguous().reshape(-1)
        parts += [name.encode(), flat.numpy().data.cast("B") if flat.numel() else b""]
    return digest_of(*parts).hex()


def differences(then: JobConfig, now: JobConfig) -> list[str]:
    """What a job says otherwise than another: `optimizer.lr: 0.1 then, 0.2 now`."""
    return _differences("", then.model_dump(mode="json"), now.model_dump(mode="json"))


def _differences(prefix: str, then: Any, now: Any) -> list[str]:
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [] if then == now else [f"{prefix}: {then!r} then, {now!r} now"]
    found = []
    for key in sorted(then.keys() | now.keys()):
        found += _differences(f"{prefix}.{key}" if prefix else key, then.get(key), now.get(key))
    return found
