"""The server's state in one file: written beside the last one, synced, then renamed, so that one is always whole.

It is a safetensors file, which any reader of that format opens: tensors as they are (`x`, `w` where it is not x,
`optimizer.NAME`: float32; `buffers`: bytes), and three texts as metadata: `format`, a version; `values`, everything
else as JSON; and `digest`, since the format has no checksum of its own. The digest is XXH3-128 (hex) of

    n as 8 bytes, little-endian, where n is the length of the next part
    JSON of [format, values, [[name, dtype, shape] of each tensor, by name]], without spaces, in ASCII
    content of each tensor, by name, little-endian

so that nothing can change, be cut or change places unnoticed. It tells damage, not malice: nothing in the file is
executed, and everything is checked again for what it claims to be.

JSON of `values` is Python's: floats come back as they were, bit by bit, NaN and the infinities as `NaN`, `Infinity`
and `-Infinity`, which stricter readers of JSON refuse.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from ditherps.config import JobConfig, option_error
from ditherps.errors import UserError
from ditherps.files import replacing
from ditherps.wire import digest_of
from ditherps_server.tensorfile import Stored, front

FORMAT = 2
LARGEST_HEADER_BYTES = 64 << 20
"""Of what is not a tensor; 100,000 members with leases take about 25 MB."""
LARGEST_TENSORS = 64
_OPTIMIZER = "optimizer."
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
_AGAIN = "put back a good copy of it, or begin anew without --resume"


@dataclass(frozen=True, slots=True)
class Entered:
    """A round that contributions entered."""

    round: int
    attempt: int
    version: int
    """Of the model after it."""
    members: int
    """How many entered."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that the next round depends on."""

    job: JobConfig
    job_id: str
    server_epoch: int
    """Of the server that wrote it."""
    version: int
    """Of the model: the rounds that have been applied."""
    x: Tensor
    """float32, flat."""
    w: Tensor | None
    """float32, flat. None: w is x."""
    buffers: bytes
    layout_digest: bytes
    initial_digest: bytes
    """Of w and the buffers at version 0."""
    optimizer_tensors: Mapping[str, Tensor]
    """float32."""
    optimizer_values: Mapping[str, Any]
    """Plain JSON."""
    leases: Mapping[int, bytes]
    """By member's index, the key of who joined last."""
    entered: Mapping[int, Entered]
    """By member's index, the last round that its contribution entered."""
    totals: Mapping[str, Any]
    """What the run has added up to, as plain JSON."""
    logged: bool
    """Whether a redo log goes on from here."""


def write(path: Path, checkpoint: Checkpoint) -> int:
    """Replace the checkpoint at `path`, and return its bytes; until it is whole and on disk, the last one stays.

    Tensors are written from where they are, without a copy: nothing may change them meanwhile; leases may be added.
    There must be room for the new checkpoint beside the last one. What a writer that was killed has left behind is
    removed first. Only its owner can read the file, for it holds the workers' lease keys.

    Raises:
        OSError: no room, no permission. The last checkpoint is there, and no part of the new one; if only the folder
            could not be synced, the new one is there whole.
        TypeError, ValueError: what is to be saved is not of the kinds that `Checkpoint` names, or has too large values.
    """
    tensors = _tensors(checkpoint)
    header = _header(json.dumps(_values(checkpoint), sort_keys=True), tensors)
    with replacing(path) as file:
        file.write(header)
        for name in _in_file(tensors):
            file.write(_content(tensors[name]))
        return file.tell()


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`.

    Its tensors are the file's own pages, read as they are used and private: copy them to where they shall stay. That a
    tensor has the size of the model is for the caller to check, by `layout_digest`.

    Raises:
        UserError: there is none, it cannot be read, is damaged, or of another version of this program.
    """
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            names = file.keys()
            if len(names) > LARGEST_TENSORS:
                raise ValueError(f"{len(names)} tensors")
            tensors = {name: file.get_tensor(name) for name in names}
        _check_tensors(tensors)
        if metadata.get("digest") != _digest(metadata["values"], tensors):
            raise ValueError("its content does not have its digest")
        loaded = json.loads(metadata["values"])
    except UserError:
        raise
    except Exception as error:  # whatever safetensors and torch may find wrong with it
        raise UserError(f"{path} is damaged ({_shown(error)}): {_AGAIN}") from None
    try:
        values = _Values.model_validate(loaded)
    except ValidationError as error:
        found = _shown(option_error(error, allowed_options=_Values))
        raise UserError(
            f"{path} is not what this version of ditherps writes ({found}): resume with the version that wrote it"
        ) from None
    return Checkpoint(
        job=values.job, job_id=values.job_id, server_epoch=values.server_epoch, version=values.version,
        x=tensors["x"], w=tensors.get("w"), buffers=bytes(_content(tensors["buffers"])),
        layout_digest=values.layout_digest, initial_digest=values.initial_digest,
        optimizer_tensors={
            name.removeprefix(_OPTIMIZER): tensor for name, tensor in tensors.items() if name.startswith(_OPTIMIZER)
        },
        optimizer_values=values.optimizer, leases=values.leases, entered=values.entered,
        totals=values.totals, logged=values.logged,
    )  # fmt: skip


def differences(then: JobConfig, now: JobConfig) -> list[str]:
    """What a job says otherwise than another, one option each: `optimizer.lr: 0.1 then, 0.2 now`.

    Of a list, the first item that differs stands for all.
    """
    return _differences("", then.model_dump(mode="json"), now.model_dump(mode="json"))


_ABSENT = object()


def _differences(name: str, then: Any, now: Any) -> list[str]:
    if then == now:
        return []
    if isinstance(then, dict) and isinstance(now, dict):
        found = []
        for key in sorted(then.keys() | now.keys()):
            inner = f"{name}.{key}" if name else key
            found += _differences(inner, then.get(key, _ABSENT), now.get(key, _ABSENT))
        return found
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        changed = [index for index, pair in enumerate(zip(then, now, strict=True)) if pair[0] != pair[1]]
        first = _differences(f"{name}[{changed[0]}]", then[changed[0]], now[changed[0]])[0]
        return [first + (f" (and {len(changed) - 1} more of {name})" if changed[1:] else "")]
    return [f"{name}: {_said(then)} then, {_said(now)} now"]


def _said(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    if isinstance(value, list) and len(value) > 4:
        return f"a list of {len(value)}"
    return _shortened(json.dumps(value))


def _unhexed(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError("hexadecimal digits")
    return bytes.fromhex(value)


_Hex = Annotated[bytes, BeforeValidator(_unhexed)]
_Index = Annotated[int, Field(ge=0)]


class _Values(BaseModel):
    """All of a checkpoint that is not a tensor."""

    model_config = ConfigDict(extra="forbid")

    job: JobConfig
    job_id: str
    server_epoch: int = Field(ge=0, lt=2**63)
    version: int = Field(ge=0, lt=2**32)
    layout_digest: _Hex
    initial_digest: _Hex
    optimizer: dict[str, Any]
    leases: dict[_Index, _Hex]
    entered: dict[_Index, Entered]
    totals: dict[str, Any]
    logged: bool


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `_Values` reads."""
    given = {"optimizer": dict(checkpoint.optimizer_values), "totals": dict(checkpoint.totals)}
    _check_keys(given)
    return given | {
        "job": checkpoint.job.model_dump(),
        "job_id": checkpoint.job_id,
        "server_epoch": checkpoint.server_epoch,
        "version": checkpoint.version,
        "logged": checkpoint.logged,
        "layout_digest": checkpoint.layout_digest.hex(),
        "initial_digest": checkpoint.initial_digest.hex(),
        "leases": {str(index): key.hex() for index, key in dict(checkpoint.leases).items()},
        "entered": {str(index): asdict(entered) for index, entered in dict(checkpoint.entered).items()},
    }


def _check_keys(value: Any) -> None:
    """JSON would turn another key into text, and say nothing."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"values with the key {key!r}, which is not text, cannot be saved")
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = {"x": checkpoint.x} | ({} if checkpoint.w is None else {"w": checkpoint.w})
    tensors |= {_OPTIMIZER + name: tensor for name, tensor in checkpoint.optimizer_tensors.items()}
    tensors["buffers"] = torch.from_numpy(np.frombuffer(bytearray(checkpoint.buffers), dtype=np.uint8))
    _check_tensors(tensors)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` unless these are a checkpoint's tensors."""
    if missing := {"x", "buffers"} - tensors.keys():
        raise ValueError(f"tensor {min(missing)} is missing")
    if len(tensors) > LARGEST_TENSORS:
        raise ValueError(f"{len(tensors)} tensors; at most {LARGEST_TENSORS}")
    for name, tensor in tensors.items():
        if name not in ("x", "w", "buffers") and not name.startswith(_OPTIMIZER):
            raise ValueError(f"there is no tensor {name!r} in a checkpoint")
        dtype = torch.uint8 if name == "buffers" else torch.float32
        if tensor.dtype != dtype:
            raise ValueError(f"tensor {name!r} is of {tensor.dtype}, not {dtype}")
        if tensor.dim() != 1 and not name.startswith(_OPTIMIZER):
            raise ValueError(f"tensor {name!r} is not flat")
    if "w" in tensors and tensors["w"].shape != tensors["x"].shape:
        raise ValueError(f"w has {tensors['w'].numel()} coordinates, x {tensors['x'].numel()}")


def _in_file(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of the file: bytes last, so that every float stands at a multiple of its size."""
    return sorted(tensors, key=lambda name: (_DTYPES[tensors[name].dtype], name))


def _header(values: str, tensors: Mapping[str, Tensor]) -> bytes:
    """All of the file that stands before the tensors."""
    metadata = {"format": str(FORMAT), "values": values, "digest": _digest(values, tensors)}
    stored = [
        Stored(name, _DTYPES[tensor.dtype], tensor.shape, tensor.numel() * tensor.element_size())
        for name, tensor in ((name, tensors[name]) for name in _in_file(tensors))
    ]
    text = front(metadata, stored)
    if len(text) > LARGEST_HEADER_BYTES:
        raise ValueError(f"{len(text)} bytes of values; at most {LARGEST_HEADER_BYTES} can be saved")
    return text


def _digest(values: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    kinds = [[name, _DTYPES[tensors[name].dtype], list(tensors[name].shape)] for name in names]
    head = json.dumps([str(FORMAT), values, kinds], separators=(",", ":")).encode()
    return digest_of(len(head).to_bytes(8, "little"), head, *(_content(tensors[name]) for name in names)).hex()


def _content(tensor: Tensor) -> memoryview:
    """The tensor's bytes, where they are."""
    return memoryview(b"") if tensor.numel() == 0 else tensor.reshape(-1).numpy().data.cast("B")


def _check_file(path: Path) -> None:
    """Raises `UserError` unless this is a file that can be read and whose header is of a size to take into memory."""
    try:
        # Opening a pipe would wait for who writes to it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a file, so not a checkpoint: move it away, or begin anew without --resume")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: begin anew without --resume") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; see to that, or begin anew without --resume"
        ) from None
    if length > LARGEST_HEADER_BYTES:
        raise UserError(f"{path} is damaged (a header of {length} bytes): {_AGAIN}")


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if "values" not in metadata or "digest" not in metadata or "format" not in metadata:
        raise UserError(f"{path} is not a checkpoint of ditherps: {_AGAIN}")
    if metadata["format"] != str(FORMAT):
        raise UserError(
            f"{path} has checkpoint format {_shown(metadata['format'])}, this version of ditherps reads {FORMAT}: "
            "resume with the version that wrote it"
        )


def _shown(error: Exception | str) -> str:
    """One short line of what may hold anything."""
    return _shortened("".join(c if c.isprintable() else " " for c in str(error)))


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
