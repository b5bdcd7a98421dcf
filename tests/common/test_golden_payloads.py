"""Payloads that must not change: what a worker of yesterday sends, a server of today must read.

The file holds the length and SHA-256 of each payload and of the float32 values that it decodes to, and small payloads
whole. It is rewritten only by DITHERPS_WRITE_GOLDEN=1, for a change that is meant.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs import Codec, codec_names
from ditherps.codecs.base import FORMAT_VERSION, Role
from ditherps.dither import dither, lanes
from ditherps.kernels.coder import CHUNK

GOLDEN = Path(__file__).parent / "golden" / "payloads_v2.json"
ADDRESS = Address(seed=2**40 + 3, round=5, sender=2, domain=Domain.UPDATE, start=4097)
pytestmark = pytest.mark.timeout(600)  # the first use of every kernel there is

SMALL = 300  # coordinates of the payloads that are kept whole

CODECS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("bf16", {}),
    ("dqsg", {}),
    ("dqsg", {"levels": 0.5}),
    ("dqsg", {"levels": 1.5, "bucket": 0}),
    ("dqsg", {"levels": 2, "bucket": 64}),
    ("dqsg", {"levels": 3, "step": "l2"}),
    ("dqsg", {"levels": 300}),
    ("dqsg", {"step": "rms", "levels": 1, "resolution": 0.5}),
    ("dqsg", {"nmse": 0.02, "bucket": 2048}),
    ("dqsg", {"bits": 3}),
    ("dqsg", {"coder": "rans"}),
    ("dqsg", {"coder": "rans", "nmse": 0.1}),
    ("dqsg", {"coder": "rans", "bits": 1}),
    ("dqsg", {"coder": "rans", "bits": 3.5}),
    ("dqsg", {"coder": "rans", "bits": 9}),
    ("dqsg", {"coder": "rans", "step": "max", "levels": 2, "bucket": 64}),
    ("dqsg", {"coder": "rans", "resolution": 2.0**-20}),
    ("dqsg", {"coder": "rans", "nmse": 0.1, "reconstruct": "matched"}),
    ("dqsg", {"coder": "rans", "nmse": 0.01, "reconstruct": "matched"}),
    ("ndqsg", {}),
    ("ndqsg", {"levels": 2.5, "ratio": 5, "alpha": 0.9, "bucket": 128}),
    ("qsgd", {}),
    ("qsgd", {"step": "l2", "levels": 4, "bucket": 128}),
    ("qsgd", {"coder": "rans", "nmse": 0.1}),
    ("qsgd", {"coder": "rans", "bits": 7}),
    ("qsgd", {"coder": "rans", "step": "max", "levels": 127}),
    ("terngrad", {}),
    ("terngrad", {"clip": 0, "coder": "rans"}),
    ("maxnorm", {}),
    ("maxnorm", {"bits": 8}),
    ("maxnorm", {"bits": 2, "coder": "rans"}),
    ("maxnorm-multiscale", {}),
    ("maxnorm-multiscale", {"low": 8, "high": 12}),
    ("signsgd", {}),
    ("signsgd", {"bucket": 64}),
    ("topk", {}),
    ("topk", {"fraction": 0.3, "values": "bf16"}),
    ("randk", {}),
    ("randk", {"fraction": 0.3, "values": "bf16"}),
    ("globalrandk", {}),
    ("globalrandk", {"fraction": 0.3, "bits": 2}),
    ("natural", {}),
    ("eden", {"bits": 1, "block": 4096}),
    ("eden", {"bits": 2.3}),
    ("eden", {"bits": 0.2, "block": 4096}),
    ("rotated", {"inner": "dqsg:levels=7", "block": 4096}),
    ("scaled", {"inner": "dqsg:levels=1,bucket=64"}),
    ("tensors", {"sizes": "10+2000+20+70+1500"}),
]


def gaussian(n: int) -> NDArray[np.float32]:
    """Nearly: sums of eight uniform numbers, of the dither stream, exact in float32."""
    address = Address(seed=1, round=0, sender=0, domain=Domain.DOWNLINK)
    out: NDArray[np.float32] = dither(address, 8 * n).reshape(8, n).sum(0)
    return out


def heavy(n: int) -> NDArray[np.float32]:
    """Of infinite variance, by division alone, which is the same everywhere."""
    u = dither(Address(seed=1, round=1, sender=0, domain=Domain.DOWNLINK), n).astype(np.float64)
    return (u / (0.5 - np.abs(u))).astype(np.float32)


def integers(n: int) -> NDArray[np.float32]:
    """-3 .. 3, mostly 0, and a tile of zeros where there is more than one."""
    low = lanes(Address(seed=1, round=2, sender=0, domain=Domain.DOWNLINK), n).astype(np.int64)
    x = np.where(low < 40000, 0, low % 7 - 3).astype(np.float32)
    x[:1] = 3
    x[4096:] = 0
    return x


def zeros(n: int) -> NDArray[np.float32]:
    return np.zeros(n, np.float32)


Input = tuple[Callable[[int], NDArray[np.float32]], int]
INPUTS: list[Input] = [
    *((make, 5000) for make in (gaussian, heavy, integers, zeros)),
    *((make, SMALL) for make in (gaussian, integers)),
]
LONG: Input = (gaussian, CHUNK + 9000)  # for entropy-coded payloads: two chunks, and sixteen states


def inputs_of(name: str) -> list[Input]:
    """The inputs of a codec by the text of its options."""
    return [*INPUTS, LONG] if '"coder": "rans"' in name else INPUTS


def used_codecs() -> dict[str, Codec]:
    """By the text of their options, and the codec that sources of a nested one use."""
    out = {json.dumps([name, options]): codec(name, **options) for name, options in CODECS}
    out['["ndqsg", {}, "source"]'] = codec("ndqsg").for_role(Role.SOURCE)
    return out


def side_information(used: Codec, x: NDArray[np.float32]) -> torch.Tensor | None:
    return torch.from_numpy(x * np.float32(0.9375)) if used.needs_side_information else None


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def values_of(used: Codec, payload: bytes, x: NDArray[np.float32]) -> str:
    """The digest of what a payload decodes to."""
    decoded = used.decode(Encoded.from_bytes(payload), ADDRESS, side_information=side_information(used, x))
    return sha(decoded.numpy().astype("<f4").tobytes())


def entries(name: str) -> dict[str, dict[str, Any]]:
    """What today's code writes and reads, for each input."""
    used, out = used_codecs()[name], {}
    for make, n in inputs_of(name):
        x = make(n)
        payload = used.encode(torch.from_numpy(x), ADDRESS).to_bytes()
        entry: dict[str, Any] = {"bytes": len(payload), "payload": sha(payload), "decoded": values_of(used, payload, x)}
        if n == SMALL:
            entry["hex"] = payload.hex()
        out[f"{make.__name__} {n}"] = entry
    return out


def inputs() -> dict[str, str]:
    """The digest of each input."""
    return {f"{make.__name__} {n}": sha(make(n).astype("<f4").tobytes()) for make, n in [*INPUTS, LONG]}


@functools.cache
def golden() -> dict[str, Any]:
    """The file's contents, written anew where that was asked for."""
    of_file = int(GOLDEN.stem.removeprefix("payloads_v"))
    if of_file != FORMAT_VERSION:
        pytest.fail(
            f"payloads have format {FORMAT_VERSION}, {GOLDEN.name} holds those of format {of_file}: delete it, let "
            f"GOLDEN name payloads_v{FORMAT_VERSION}.json, and write that with DITHERPS_WRITE_GOLDEN=1"
        )
    if os.environ.get("DITHERPS_WRITE_GOLDEN") == "1":
        parts: dict[str, dict[str, Any]] = {"inputs": inputs(), **{name: entries(name) for name in used_codecs()}}
        lines = []
        for name, part in parts.items():
            rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in part.items())
            lines.append(f"{json.dumps(name)}: {{\n{rows}\n}}")
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    known: dict[str, Any] = json.loads(GOLDEN.read_text())
    return known


@pytest.mark.parametrize("name", used_codecs())
def test_payloads_are_the_golden_ones(name: str) -> None:
    expected = golden()[name]
    actual = entries(name)
    changed = {key: sorted(k for k in entry if entry[k] != expected[key][k]) for key, entry in actual.items()}
    changed = {key: fields for key, fields in changed.items() if fields}
    assert not changed, (
        f"{changed}: if this is meant, raise FORMAT_VERSION or write {GOLDEN.name} with DITHERPS_WRITE_GOLDEN=1"
    )


@pytest.mark.parametrize("name", used_codecs())
def test_golden_payloads_are_still_read(name: str) -> None:
    """Also where today's encoder would write other bytes."""
    used = used_codecs()[name]
    for make, n in INPUTS:
        entry = golden()[name][f"{make.__name__} {n}"]
        if n != SMALL:
            assert "hex" not in entry
            continue
        payload = bytes.fromhex(entry["hex"])
        assert (len(payload), sha(payload)) == (entry["bytes"], entry["payload"])
        assert payload[0] == FORMAT_VERSION
        assert values_of(used, payload, make(n)) == entry["decoded"]


def test_the_file_has_every_codec_and_nothing_else() -> None:
    assert list(golden()) == ["inputs", *used_codecs()]
    assert {name for name, _ in CODECS} == set(codec_names())
    assert GOLDEN.stat().st_size < 200_000


def test_inputs_are_what_they_were() -> None:
    """So that a difference lies in the codecs."""
    assert inputs() == golden()["inputs"]
