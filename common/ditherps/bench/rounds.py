"""`ditherps bench rounds`: seconds a round takes when nothing is computed."""

from __future__ import annotations

import os
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from ditherps.bench.idle import COORDINATES_VARIABLE
from ditherps.errors import Reason, RunFailedError
from ditherps.job import directions, job_options, resolve_job
from ditherps.local import run_local
from ditherps.plots import read_records
from ditherps.summary import print_wide

WARM_UP_ROUNDS = 3


def print_table(records: list[dict[str, Any]]) -> None:
    """Print what `measure` returned, a row a codec."""
    first = records[0]
    title = f"{first['coordinates']:,} parameters, {first['workers']} workers, {first['cores']} cores"
    table = Table(title=title, padding=(0, 1, 0, 0))
    table.caption = "a round: its seconds, kbit of all workers, decoding the updates, encoding the step of the model"
    table.add_column("up", overflow="fold", min_width=8)
    table.add_column("down", overflow="fold", min_width=8)
    for column in ("median s", "min s", "max s", "up kbit", "down kbit", "decode s", "step s"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in records:
        table.add_row(
            r["uplink_codec"], r["downlink_codec"],
            f"{r['seconds_median']:.3f}", f"{r['seconds_min']:.3f}", f"{r['seconds_max']:.3f}",
            f"{8e-3 * r['uplink_bytes']:,.0f}", f"{8e-3 * r['downlink_bytes']:,.0f}", f"{r['decode_seconds']:.4f}",
            f"{r['step_encode_seconds']:.4f}",
        )  # fmt: skip
    print_wide(table)


def measure(codec: str, workers: int, rounds: int, coordinates: int) -> dict[str, Any]:
    """One run: a server and `workers` worker processes; bytes are those of a round, all workers together.

    `codec`: UP or UP/DOWN, as `ditherps.job.directions` reads it. Raises `OptionError` for another, and
    `RunFailedError` if the run does not come to its end.
    """
    os.environ[COORDINATES_VARIABLE] = str(coordinates)
    flags = {
        "task": "ditherps.bench.idle:Idle", "workers": workers, "rounds": rounds, "evaluate_every": rounds,
        **job_options(codec),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ditherps-bench-") as folder:
        result, code = run_local(resolve_job(flags), Path(folder), None, quiet=True)
        if code or result is None:
            raise RunFailedError(Reason.INTERNAL, f"the run with {codec} ended with exit code {code}")
        closed = read_records(Path(folder))
    ends = [record["elapsed_seconds"] for record in closed]
    seconds = [after - before for before, after in pairwise(ends)][WARM_UP_ROUNDS:]
    last = closed[-1]
    return {
        "codec": codec, "uplink_codec": directions(codec)[0], "downlink_codec": result["downlink_codec"],
        "coordinates": coordinates, "workers": workers, "rounds": len(seconds),
        "seconds_median": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds),
        "uplink_bytes": last["uplink_bytes"], "downlink_bytes": last["downlink_bytes"],
        "decode_seconds": statistics.median(record["decode_seconds"] for record in closed[WARM_UP_ROUNDS:]),
        "step_encode_seconds": statistics.median(record["step_encode_seconds"] for record in closed[WARM_UP_ROUNDS:]),
        "encode_seconds": statistics.median(record["encode_seconds"] for record in closed[WARM_UP_ROUNDS:]),
        "cores": os.cpu_count(),
    }  # fmt: skip
