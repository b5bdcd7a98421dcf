"""`ditherps bench codecs`: size, error and speed of codecs on a Gaussian vector.

Speeds are of one thread, statistics included, as medians; ratios are to a plain copy of the same vector (numpy, float32
to float32, memory touched before) in the same run: an absolute speed says little on a machine that others share.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ditherps.codecs import Codec, codec, parse
from ditherps.dither import Address, Domain
from ditherps.errors import OptionError, UserError
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
AVX2_CPU = "x86-64-v3"
AVX2_FEATURES = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2,+xsave"
_ADDRESS = Address(seed=2024, round=1, sender=0, domain=Domain.UPDATE)
_SIDE_NOISE = 0.1  # standard deviation of the side information around the source, of unit variance


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
        "instructions": "avx2" if os.environ.get("NUMBA_CPU_NAME") == AVX2_CPU else "native",
    }


def run(
    codecs: Sequence[str | Codec] = DEFAULT_CODECS, coordinates: int = 1 << 24, repeats: int = 9, seed: int = 0
) -> list[dict[str, Any]]:
    """One record a codec, as `measure` makes it.

    Args:
        codecs: as `ditherps.codecs.parse` reads them.
        coordinates: length of the vector.
        repeats: of each timing.
        seed: of the vector.

    Raises:
        OptionError: a codec or a number is not allowed.
    """
    if coordinates < 2 or repeats < 1:
        raise OptionError("coordinates, repeats", (coordinates, repeats), "at least 2 coordinates and 1 repeat")
    chosen = [parse(c) if isinstance(c, str) else c for c in codecs]
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
    """The records for people; speeds as ratios to the copy."""
    first = records[0]
    result = Table(title=f"{first['coordinates']:,} Gaussian coordinates, one thread, {first['cpu']}")
    for column in ("codec", "kernels"):
        result.add_column(column)
    for column in ("bits", "NMSE", "bias z", "encode", "accumulate", "copy, G/s"):
        result.add_column(column, justify="right", no_wrap=True)
    for record in records:
        result.add_row(
            _label(record["codec"], record["options"]),
            record["instructions"],
            f"{record['bits_per_coordinate']:.3f}",
            f"{record['nmse']:.4g}",
            f"{record['bias_z']:+.1f}",
            f"{record['encode_ratio']:.2f}",
            f"{record['accumulate_ratio']:.2f}",
            f"{record['copy_coordinates_per_second'] / 1e9:.2f}",
        )
    return result


def _label(name: str, options: dict[str, Any]) -> str:
    """A codec with the options that are not its defaults."""
    usual = codec(name).options.model_dump()
    return " ".join([name, *(f"{key}={value}" for key, value in options.items() if value != usual[key])])


def run_avx2(codecs: Sequence[str], coordinates: int, repeats: int) -> list[dict[str, Any]]:
    """The records of `run` in a process whose kernels are compiled for AVX2 alone (x86-64-v3).

    Raises `UserError` where that process fails, as on a processor of another kind.
    """
    with tempfile.TemporaryDirectory(prefix="ditherps-avx2-") as cache:
        names = [argument for spec in codecs for argument in ("--codec", spec)]
        numbers = ["--coordinates", str(coordinates), "--repeats", str(repeats)]
        # Naming the processor alone would leave the features of this one switched on.
        limited = {"NUMBA_CPU_NAME": AVX2_CPU, "NUMBA_CPU_FEATURES": AVX2_FEATURES, "NUMBA_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-m", "ditherps", "bench", "codecs", "--json", *names, *numbers],
            env=os.environ | limited, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise UserError(f"the AVX2 benchmark failed: {done.stderr.strip().rsplit(chr(10), 1)[-1]}")
    records: list[dict[str, Any]] = json.loads(done.stdout.rstrip().rsplit("\n", 1)[-1])
    return records
