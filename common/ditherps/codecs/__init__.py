"""Codecs by name: `codec("dqsg", levels=1.5)`. One scheme a file; `base` holds the interface."""

from __future__ import annotations

from typing import Any

from ditherps.codecs.base import Codec, Context, DecodeReport, Encoded, Role
from ditherps.codecs.bf16 import Bf16Codec
from ditherps.codecs.dqsg import DqsgCodec
from ditherps.codecs.ndqsg import NdqsgCodec
from ditherps.codecs.none import NoneCodec
from ditherps.errors import OptionError

__all__ = ["Codec", "Context", "DecodeReport", "Encoded", "Role", "codec", "codec_names"]

_REGISTRY: dict[str, type[Codec]] = {c.name: c for c in (NoneCodec, Bf16Codec, DqsgCodec, NdqsgCodec)}


def codec_names() -> list[str]:
    """The names that `codec` knows."""
    return list(_REGISTRY)


def codec(name: str, **options: Any) -> Codec:
    """The codec `name` with validated options; strings as a command line gives them ("3", "0.5") are accepted.

    Raises:
        OptionError: unknown codec or option, or a value that is not allowed; it says which and what is.
    """
    if name not in _REGISTRY:
        raise OptionError("codec", name, _REGISTRY)
    return _REGISTRY[name](**options)
