"""`ditherps bench fleet`: what a server with many workers takes: seconds a round, processor time, memory."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w
from rich.table import Table

from ditherps.bench.idle import COORDINATES_VARIABLE
from ditherps.bench.process import raise_open_files, reset_peak, usage
from ditherps.errors import Reason, RunFailedError
from ditherps.job import ResolvedJob, job_options, resolve_job
from ditherps.local import POLL_SECONDS, START_SECONDS, Processes
from ditherps.plots import read_records
from ditherps.summary import print_wide
from ditherps_worker.fleet import Fleet

WARM_UP_ROUNDS = 3
CONNECTION_BYTES = 2 << 20
"""What a connection may cost the server beside the contribution that it sends."""


def print_table(records: Sequence[dict[str, Any]]) -> None:
    """Print what `measure` returned, a row a number of workers; memory grows from the first row."""
    first = records[0]
    table = Table(
        title=f"{first['coordinates']:,} parameters, {first['codec']}, {first['cores']} cores", padding=(0, 1, 0, 0)
    )
    table.caption = (
        "a round: its seconds, the server's processor time, kbit of all workers; MiB: the server at its start, its "
        "peak, what that took more than in the first row, what contributions and 2 MiB a connection allow"
    )
    for column in (
        "workers",
        "median s",
        "worst s",
        "cpu s",
        "idle",
        "peak",
        "grown",
        "allowed",
        "up kbit",
        "down kbit",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for r in records:
        # Of mapped files, more or less of the same code is resident at a start: what comes on top is what workers cost.
        grown = (r["peak_bytes"] - r["idle_bytes"]) - (first["peak_bytes"] - first["idle_bytes"])
        allowed = (r["workers"] - first["workers"]) * (r["contribution_bytes"] + CONNECTION_BYTES)
        table.add_row(
            f"{r['workers']}", f"{r['seconds_median']:.3f}", f"{r['seconds_max']:.3f}", f"{r['cpu_seconds']:.3f}",
            f"{r['idle_bytes'] / 2**20:,.0f}", f"{r['peak_bytes'] / 2**20:,.0f}",
            f"{grown / 2**20:,.0f}", f"{allowed / 2**20:,.0f}",
            f"{8e-3 * r['uplink_bytes']:,.0f}", f"{8e-3 * r['downlink_bytes']:,.0f}",
        )  # fmt: skip
    print_wide(table)


def measure(codec: str, workers: int, rounds: int, coordinates: int) -> dict[str, Any]:
    """One run: a server process, and `workers` light workers in this one; bytes are those of a round, all together.

    The server's peak is that since it listens, processor time the mean of all rounds. `codec`: UP or UP/DOWN, as
    `ditherps.job.directions` reads it. Raises `OptionError` for another, and `RunFailedError` if the run does not come
    to its end with every worker in every round.
    """
    import uvloop

    os.environ[COORDINATES_VARIABLE] = str(coordinates)
    raise_open_files()
    flags = {
        "task": "ditherps.bench.idle:Idle", "workers": workers, "rounds": rounds, "evaluate_every": rounds,
        **job_options(codec),
    }  # fmt: skip
    resolved = resolve_job(flags)
    with tempfile.TemporaryDirectory(prefix="ditherps-bench-") as name, Processes(Path(name)) as processes:
        folder = Path(name)
        fleet = Fleet(resolved.config, resolved.task)
        announced = _start(resolved, folder, processes)
        pid = announced["pid"]
        reset_peak(pid)
        before, used = usage(pid), []
        try:
            uvloop.run(fleet.run(announced["address"], lambda: used.append(usage(pid))))
        except OSError as error:
            raise RunFailedError(Reason.INTERNAL, f"{workers} workers: {error}") from None
        closed = read_records(folder)
    if any(len(record["workers"]) != workers for record in closed) or len(closed) != rounds:
        raise RunFailedError(Reason.QUORUM, f"not every round closed with all {workers} workers")
    ends = [record["elapsed_seconds"] for record in closed]
    seconds = [after - before for before, after in pairwise(ends)][WARM_UP_ROUNDS:]
    last = closed[-1]
    return {
        "codec": codec, "coordinates": coordinates, "workers": workers, "rounds": len(closed),
        "seconds_median": statistics.median(seconds), "seconds_max": max(seconds),
        "cpu_seconds": (used[0].cpu_seconds - before.cpu_seconds) / rounds,
        "idle_bytes": before.peak_bytes, "peak_bytes": used[0].peak_bytes, "anonymous_bytes": used[0].anonymous_bytes,
        "contribution_bytes": last["uplink_payload_bytes"] // workers,
        "uplink_bytes": last["uplink_bytes"], "downlink_bytes": last["downlink_bytes"],
        "decode_seconds": statistics.median(record["decode_seconds"] for record in closed[WARM_UP_ROUNDS:]),
        "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip


def _start(resolved: ResolvedJob, folder: Path, processes: Processes) -> dict[str, Any]:
    """Start the server; what it announces once it listens."""
    (folder / "fleet.toml").write_text(tomli_w.dumps(resolved.config.model_dump(mode="json")))
    ports = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "-1"]
    server = processes.start(
        "server", ["server", *ports, "--run-dir", str(folder), "--config", str(folder / "fleet.toml")]
    )
    processes.server = server
    limit = time.monotonic() + START_SECONDS
    while not (folder / "server.json").exists():
        if server.poll() is not None or time.monotonic() > limit:
            raise RunFailedError(Reason.INTERNAL, f"the server did not start: {(folder / 'server.log').read_text()}")
        time.sleep(POLL_SECONDS)
    announced: dict[str, Any] = json.loads((folder / "server.json").read_text())
    return announced
