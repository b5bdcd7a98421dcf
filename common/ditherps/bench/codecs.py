"""`ditherps bench codecs`: size, error, bias and speed of codecs, beside what Shannon allows.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ditherps.bench.limits import shannon_bits
from ditherps.bench.quality import quality, round_address
from ditherps.bench.sources import Source, source
from ditherps.bench.threads import gains, timed
from ditherps.codecs import Codec, parse
from ditherps.errors import OptionError, UserError
from ditherps.kernels import warm

DEFAULT_CODECS = (
    "none",
    "bf16",
    "dqsg:levels=1",
    "dqsg:levels=1.5",
    "dqsg:levels=3",
    "dqsg:levels=7.5",
    "dqsg:bits=4",
    "dqsg:coder=rans,bits=1",
    "dqsg:coder=rans,bits=1.5",
    "dqsg:coder=rans,bits=2",
    "dqsg:coder=rans,bits=3",
    "dqsg:coder=rans,bits=4",
    "dqsg:coder=rans,resolution=1.6,reconstruct=matched",
    "ndqsg:levels=3,ratio=3",
    "qsgd:levels=1",
    "qsgd:levels=7,coder=rans",
    "terngrad",
    "maxnorm:bits=4",
    "maxnorm-multiscale:low=2,high=6",
    "rotated:inner=(dqsg:levels=7)",
    "eden:bits=1",
    "eden:bits=2",
    "eden:bits=4",
    "signsgd",
    "topk:fraction=0.01,values=bf16",
    "randk:fraction=0.01",
    "globalrandk:fraction=0.01",
    "natural",
)
DEFAULT_SOURCES = ("gaussian",)
AVX2_CPU = "x86-64-v3"
AVX2_FEATURES = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2,+xsave"
_SIDE_NOISE = 0.1  # standard deviation of the side information around the source, in units of the source's
_FOOTNOTE = (
    "limit: fewest bits of any code at this error, unbiased where the codec is; Shannon's lower bound for laplace and "
    "student-t3, a computed one for sparse, - for gradients and codecs with side information. gap: bits less limit. "
    "bias z: within about 4 for an unbiased codec. encode, acc.: speed, 1 is a copy."
)


def _cpu() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def label(used: Codec) -> str:
    """A codec as `ditherps.codecs.parse` reads it, with the options that it was given."""
    given = used.options.model_dump(exclude_unset=True)
    texts = {key: str(value).removesuffix(".0") for key, value in given.items()}
    values = [f"{key}=({text})" if "," in text else f"{key}={text}" for key, text in texts.items()]
    return ":".join(filter(None, (used.name, ",".join(values))))


def measure(
    used: Codec, from_: Source, side: torch.Tensor, repeats: int, threads: int = 1, rounds: int = 16
) -> dict[str, Any]:
    """One record for a codec on a source; `side` stands for what the server knows. Times are seconds' medians."""
    x = from_.x
    n = x.numel()
    warm(used)
    measured = quality(used, x, side, rounds)
    energy = float(x.double().square().mean())
    limit = None  # side information lowers it, by how much depends on the server
    if from_.known and not used.needs_side_information:
        limit = shannon_bits(from_.name, measured.nmse, unbiased=used.unbiased, energy=energy)
    address = round_address(0)
    encoded = used.encode(x, address)
    known = side if used.needs_side_information else None
    into, values, target = torch.zeros(n), x.numpy(), np.zeros(n, np.float32)
    copies, encodes, accumulates = [], [], []
    for _ in range(repeats):
        copies.append(timed(lambda: np.copyto(target, values)))
        encodes.append(timed(lambda: used.encode(x, address)))
        accumulates.append(timed(lambda: used.accumulate(encoded, address, into, 0.5, side_information=known)))
    copy, encode, accumulate = (statistics.median(times) for times in (copies, encodes, accumulates))
    return {
        "codec": used.name,
        "options": used.options.model_dump(),
        "spec": label(used),
        "source": from_.name,
        "coordinates": n,
        **measured._asdict(),
        "unbiased": used.unbiased,
        "shannon_bits": limit,
        "gap_bits": None if limit is None else measured.bits_per_coordinate - limit,
        "encode_ratio": copy / encode,
        "accumulate_ratio": copy / accumulate,
        "encode_coordinates_per_second": n / encode,
        "accumulate_coordinates_per_second": n / accumulate,
        "copy_coordinates_per_second": n / copy,
        **(gains(used, x, encoded, side, threads, repeats) if threads > 1 else {"threads": 1}),
        "cpu": _cpu(),
        "instructions": "avx2" if os.environ.get("NUMBA_CPU_NAME") == AVX2_CPU else "native",
    }


def side_information(from_: Source, seed: int) -> torch.Tensor:
    """A vector near the source's, as a server may know one."""
    generator = torch.Generator().manual_seed(seed + 1)
    scale = _SIDE_NOISE * float(from_.x.double().square().mean().sqrt())
    return from_.x + scale * torch.randn(from_.x.numel(), generator=generator)


def run(
    codecs: Sequence[str | Codec] = DEFAULT_CODECS,
    coordinates: int = 1 << 24,
    repeats: int = 9,
    seed: int = 0,
    *,
    sources: Sequence[str] = DEFAULT_SOURCES,
    threads: int = 1,
    rounds: int = 16,
) -> list[dict[str, Any]]:
    """One record for each source and codec, as `measure` makes it.

    Args:
        codecs: as `ditherps.codecs.parse` reads them.
        coordinates: length of the vectors; files are taken as they are.
        repeats: of each timing.
        seed: of the vectors.
        sources: as `ditherps.bench.sources.source` reads them.
        threads: more than 1: also what they gain over one.
        rounds: of independent dither, over which error and bias are measured.

    Raises:
        OptionError: a codec, a source or a number is not allowed.
        UserError: a file cannot be read.
    """
    if coordinates < 2 or repeats < 1:
        raise OptionError("coordinates, repeats", (coordinates, repeats), "at least 2 coordinates and 1 repeat")
    if threads < 1 or rounds < 2:
        raise OptionError("threads, rounds", (threads, rounds), "at least 1 thread and 2 rounds")
    chosen = [parse(c) if isinstance(c, str) else c for c in codecs]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    records = []
    try:
        for name in sources:
            from_ = source(name, coordinates, seed)
            side = side_information(from_, seed)
            records += [measure(used, from_, side, repeats, threads, rounds) for used in chosen]
    finally:
        torch.set_num_threads(before)
    return records


def table(records: Sequence[dict[str, Any]]) -> Group:
    """The records for people, a table a source; speeds as ratios to the copy."""
    names = list(dict.fromkeys(record["source"] for record in records))
    parts = [_source_table([record for record in records if record["source"] == name]) for name in names]
    return Group(*parts, Text(_FOOTNOTE, style="dim"))


def _source_table(records: Sequence[dict[str, Any]]) -> Table:
    first = records[0]
    copies = statistics.median(record["copy_coordinates_per_second"] for record in records)
    result = Table(
        title=f"{first['source']}, {first['coordinates']:,} coordinates; copy: {copies / 1e9:.2f} G/s; {first['cpu']}",
        padding=(0, 1, 0, 0),
    )
    several, kinds = first["threads"] > 1, {record["instructions"] for record in records}
    result.add_column("codec", overflow="fold")
    columns = ["bits", "NMSE", "bias z", "limit", "gap", "encode", "acc."]
    columns += [f"enc. x{first['threads']}", f"acc. x{first['threads']}"] if several else []
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for record in records:
        cells = [
            record["spec"] + (f" [{record['instructions']}]" if len(kinds) > 1 else ""),
            f"{record['bits_per_coordinate']:.3f}",
            f"{record['nmse']:.4g}",
            f"{record['bias_z']:+.1f}",
            _number(record["shannon_bits"], ".3f"),
            _number(record["gap_bits"], ".3f"),
            f"{record['encode_ratio']:.2f}",
            f"{record['accumulate_ratio']:.2f}",
        ]
        cells += [f"{record[key]:.2f}" for key in ("encode_gain", "accumulate_gain")] if several else []
        result.add_row(*map(Text, cells))
    if several:
        gain = statistics.median(record["compute_gain"] for record in records)
        result.caption = f"{first['threads']} threads gain over one; a loop that only computes gains {gain:.2f}"
    return result


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def run_avx2(
    codecs: Sequence[str],
    coordinates: int,
    repeats: int,
    *,
    sources: Sequence[str] = DEFAULT_SOURCES,
    threads: int = 1,
    rounds: int = 16,
) -> list[dict[str, Any]]:
    """The records of `run` in a process whose kernels are compiled for AVX2 alone (x86-64-v3).

    Raises `UserError` where that process fails, as on a processor of another kind.
    """
    with tempfile.TemporaryDirectory(prefix="ditherps-avx2-") as cache:
        names = [argument for spec in codecs for argument in ("--codec", spec)]
        names += [argument for name in sources for argument in ("--source", name)]
        numbers = ["--coordinates", str(coordinates), "--repeats", str(repeats), "--threads", str(threads)]
        numbers += ["--rounds", str(rounds)]
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
