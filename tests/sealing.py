"""Payloads with the checksums that belong to them: what a hostile sender would write."""

from __future__ import annotations

import numpy as np

from ditherps import Encoded
from ditherps.codecs import Codec
from ditherps.codecs.base import HEADER, Header, checksum, header_check
from ditherps.codecs.coded import CodedLayout
from ditherps.errors import PayloadError
from ditherps.kernels.coder import CHUNK


def sealed(used: Codec, payload: bytes | bytearray) -> bytes:
    """The payload with its header's and its chunks' checksums."""
    payload = _chunks_sealed(used, payload)
    try:
        covered = used._sealed_bytes(Encoded.from_bytes(payload))
    except PayloadError:
        covered = len(payload)
    check = header_check(np.frombuffer(payload, np.uint8), covered)
    return bytes(payload[: HEADER.size - 4]) + check.to_bytes(4, "little") + bytes(payload[HEADER.size :])


def _chunks_sealed(used: Codec, payload: bytes | bytearray) -> bytes:
    """With the checksums of its chunks, as far as its directory describes chunks that are there."""
    out = bytearray(payload)
    layout = getattr(used, "_layout", None)
    if not isinstance(layout, CodedLayout) or len(out) < HEADER.size:
        return bytes(out)
    n = Header(*HEADER.unpack_from(out)).coordinates
    at = begin = layout._front(n)
    for entry in range(begin - 8 * -(-n // CHUNK), begin, 8):
        if at > len(out):
            break
        size = int.from_bytes(out[entry : entry + 4], "little")
        out[entry + 4 : entry + 8] = checksum(np.frombuffer(bytes(out[at : at + size]), np.uint8)).to_bytes(4, "little")
        at += size
    return bytes(out)
