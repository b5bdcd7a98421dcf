"""`ditherps bench codecs`: size, error and speed of codecs on a Gaussian vector.

Speeds are of one thread, statistics included, as medians; ratios are to a plain copy of the same vector (numpy, float32
to float32, memory touched before) in the same run: an absolute speed says little on a machine that others share.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from ditherps.codecs import Codec, codec
from ditherps.dither import Address, Domain
from ditherps.errors import OptionError
from ditherps.kernels import warm

DEFAULT_CODECS = (
    "none",
    "bf16",
    "dqsg:levels=1",
    "dqsg:levels=1.5",
    "dqsg:levels=3",
    "dqsg:levels=7.5",
    "dqsg:step=rms,resolution=0.5",
    "ndqsg:levels=3,ratio=3",
)
_ADDRESS = Address(seed=2024, round=1, sender=0, domain=Domain.UPDATE)
_SIDE_NOISE = 0.1  # standard deviation of the side information around the source, of unit variance


def parse_codec(spec: str) -> Codec:
    """A codec from `name` or `name:option=value,option=value`. Raises OptionError."""
    name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise OptionError("codec", spec, "name:option=value,option=value")
        options[key] = value
    return codec(name, **options)


def _cpu() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(used: Codec, x: torch.Tensor, side: torch.Tensor, repeats: int) -> dict[str, Any]:
    """One record for a codec on the vector `x`; `side` stands for what the server knows. Times are seconds' medians."""
    n = x.numel()
    warm(used)
    encoded = used.encode(x, _ADDRESS)
    known = side if used.needs_side_information else None
    decoded = used.decode(encoded, _ADDRESS, side_information=known)
    error = decoded.double() - x.double()
    into, source, target = torch.zeros(n), x.numpy(), np.zeros(n, np.float32)
    copies, encodes, accumulates = [], [], []
    for _ in range(repeats):
        copies.append(_timed(lambda: np.copyto(target, source)))
        encodes.append(_timed(lambda: used.encode(x, _ADDRESS)))
        accumulates.append(_timed(lambda: used.accumulate(encoded, _ADDRESS, into, 0.5, side_information=known)))
    copy, encode, accumulate = (statistics.median(times) for times in (copies, encodes, accumulates))
    deviation = float(error.std()) / n**0.5
    return {
        "codec": used.name,
        "options": used.options.model_dump(),
        "source": "gaussian",
        "coordinates": n,
        "bits_per_coordinate": encoded.bits_per_coordinate,
        "nmse": float(error.square().sum() / x.double().square().sum()),
        "bias_z": float(error.mean()) / deviation if deviation else 0.0,
        "encode_ratio": copy / encode,
        "accumulate_ratio": copy / accumulate,
        "encode_coordinates_per_second": n / encode,
        "accumulate_coordinates_per_second": n / accumulate,
        "copy_coordinates_per_second": n / copy,
        "cpu": _cpu(),
    }


def run(
    codecs: Sequence[str | Codec] = DEFAULT_CODECS, coordinates: int = 1 << 24, repeats: int = 9, seed: int = 0
) -> list[dict[str, Any]]:
    """One record a codec, as `measure` makes it.

    Args:
        codecs: as `parse_codec` reads them.
        coordinates: length of the vector.
        repeats: of each timing.
        seed: of the vector.

    Raises:
        OptionError: a codec or a number is not allowed.
    """
    if coordinates < 2 or repeats < 1:
        raise OptionError("coordinates, repeats", (coordinates, repeats), "at least 2 coordinates and 1 repeat")
    chosen = [parse_codec(c) if isinstance(c, str) else c for c in codecs]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(coordinates, generator=generator)
    side = x + _SIDE_NOISE * torch.randn(coordinates, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [measure(used, x, side, repeats) for used in chosen]
    finally:
        torch.set_num_threads(threads)


def table(records: Sequence[dict[str, Any]]) -> Table:
    """The records for people."""
    result = Table(title=f"{records[0]['coordinates']} Gaussian coordinates, one thread, {records[0]['cpu']}")
    columns = ("codec", "options", "bits", "NMSE", "bias z", "encode", "accumulate", "Gcoord/s enc", "acc", "copy")
    for column in columns:
        result.add_column(column, justify="left" if column in ("codec", "options") else "right")
    for record in records:
        options = ", ".join(f"{k}={v}" for k, v in record["options"].items() if v is not None)
        result.add_row(
            record["codec"],
            options,
            f"{record['bits_per_coordinate']:.3f}",
            f"{record['nmse']:.4g}",
            f"{record['bias_z']:+.1f}",
            f"{record['encode_ratio']:.2f}",
            f"{record['accumulate_ratio']:.2f}",
            f"{record['encode_coordinates_per_second'] / 1e9:.2f}",
            f"{record['accumulate_coordinates_per_second'] / 1e9:.2f}",
            f"{record['copy_coordinates_per_second'] / 1e9:.2f}",
        )
    return result


def command(
    codecs: Annotated[
        list[str] | None, typer.Option("--codec", help="name or name:option=value,...; may be given several times")
    ] = None,
    coordinates: Annotated[int, typer.Option(help="length of the vector")] = 1 << 24,
    repeats: Annotated[int, typer.Option(help="timings of each step; their median is shown")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="print the records as JSON in the last line")] = False,
) -> None:
    """Measure bits, error and speed of codecs, against a plain copy of the same vector."""
    records = run(codecs or DEFAULT_CODECS, coordinates, repeats)
    Console(stderr=as_json).print(table(records))
    if as_json:
        print(json.dumps(records))
