"""Codecs by name: `codec("dqsg", levels=1.5)`. One scheme a file; `base` holds the interface."""

from __future__ import annotations

from typing import Any

from ditherps.codecs.base import Codec, Context, DecodeReport, Encoded, Role
from ditherps.codecs.bf16 import Bf16Codec
from ditherps.codecs.dqsg import DqsgCodec
from ditherps.codecs.eden import EdenCodec
from ditherps.codecs.globalrandk import GlobalRandkCodec
from ditherps.codecs.multiscale import MultiscaleCodec
from ditherps.codecs.natural import NaturalCodec
from ditherps.codecs.ndqsg import NdqsgCodec
from ditherps.codecs.none import NoneCodec
from ditherps.codecs.qsgd import MaxnormCodec, QsgdCodec, TerngradCodec
from ditherps.codecs.randk import RandkCodec
from ditherps.codecs.rotated import RotatedCodec
from ditherps.codecs.scaled import ScaledCodec
from ditherps.codecs.signsgd import SignsgdCodec
from ditherps.codecs.tensors import TensorsCodec
from ditherps.codecs.topk import TopkCodec
from ditherps.errors import OptionError

__all__ = ["Codec", "Context", "DecodeReport", "Encoded", "Role", "codec", "codec_names", "parse"]

_REGISTRY: dict[str, type[Codec]] = {
    c.name: c
    for c in (
        NoneCodec,
        Bf16Codec,
        DqsgCodec,
        NdqsgCodec,
        QsgdCodec,
        TerngradCodec,
        MaxnormCodec,
        ScaledCodec,
        RotatedCodec,
        EdenCodec,
        GlobalRandkCodec,
        MultiscaleCodec,
        NaturalCodec,
        RandkCodec,
        SignsgdCodec,
        TensorsCodec,
        TopkCodec,
    )
}


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


LARGEST_SPEC = 1 << 14
"""Characters of a codec as text."""


def parse(spec: str) -> Codec:
    """The codec that `name` or `name:option=value,option=value` describes.

    Commas and equals signs inside parentheses belong to the value: `rotated:inner=(dqsg:levels=7,bucket=0),block=4096`.

    Raises:
        OptionError: as `codec`, and where the text has another form.
    """
    if len(spec) > LARGEST_SPEC:  # a server may have written it, and it is read once for each level of parentheses
        raise OptionError("codec", spec[:80] + "...", f"at most {LARGEST_SPEC} characters")
    name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for item in _split(rest):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise OptionError("codec", spec, "name:option=value,option=value")
        options[key] = value[1:-1] if value.startswith("(") and value.endswith(")") else value
    return codec(name, **options)


def _split(text: str) -> list[str]:
    """The parts of `text` between commas that stand in no parentheses."""
    parts, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [part for part in (*parts, text[begin:]) if part]
