"""The front of a safetensors file, for who writes its tensors from where they are, without a copy of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Stored(NamedTuple):
    """A tensor of the file: its name, dtype as the format calls it (`F32`), shape, and bytes."""

    name: str
    dtype: str
    shape: Sequence[int]
    nbytes: int


def front(metadata: Mapping[str, str], tensors: Sequence[Stored]) -> bytes:
    """All of the file that stands before the contents of the tensors, which follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
