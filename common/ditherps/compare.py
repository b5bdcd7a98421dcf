"""`ditherps compare`: one task under several codecs, everything else equal, one run after another."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ditherps.codecs import parse
from ditherps.config import merged
from ditherps.errors import DitherpsError, ExitCode, OptionError
from ditherps.job import ResolvedJob, resolve_job
from ditherps.local import run_local

_KEPT = (
    "test_accuracy", "test_loss", "uplink_bytes", "downlink_bytes", "uplink_bits_per_coordinate",
    "compression_vs_float32", "seconds", "rounds", "workers", "reason", "model_sha256",
)  # fmt: skip


def resolve(specs: Sequence[str], flags: Mapping[str, Any], config: Path | None = None) -> list[ResolvedJob]:
    """The jobs to compare, all checked before the first begins.

    Args:
        specs: codecs as `ditherps.codecs.parse` reads them.
        flags: the job without its codec, as `ditherps.job.resolve_job` takes it.
        config: a job file; what it says of a codec's options holds where that codec is compared.

    Raises:
        OptionError: no codec, one twice, or anything that is not allowed.
    """
    if not specs or len(set(specs)) < len(specs):
        raise OptionError("--codec", ", ".join(specs), "each once: --codec none --codec dqsg")
    jobs = []
    for spec in specs:
        used = parse(spec)
        given = used.options.model_dump(mode="json", exclude_unset=True)
        jobs.append(resolve_job(merged(flags, {"codec": used.name, "codec_options": given}), config))
    return jobs


def compare(
    specs: Sequence[str], jobs: Sequence[ResolvedJob], run_dir: Path, data_dir: Path | None, *, verbose: bool = False
) -> tuple[dict[str, Any], int]:
    """Run the jobs into folders of their own in `run_dir`; write `compare.json` and two plots there.

    Args:
        specs: names of the jobs, and
        jobs: what they are, as `resolve` makes them.
        run_dir: folder of the comparison.
        data_dir: where datasets are.
        verbose: log more.

    Returns:
        What `compare.json` holds: `task`, `runs` (one a codec, with its `codec`, `run_dir`, `exit_code`, `failure` or
        null, and figures of its result), `plots`. And the exit code of the first run that failed, or 0. A failure
        leaves the others alone; an interrupt ends all.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for place, (spec, job) in enumerate(zip(specs, jobs, strict=True), 1):
        folder = run_dir / f"{place}-{re.sub('[^A-Za-z0-9.]+', '-', spec).strip('-')}"
        print(f"run {place} of {len(specs)}: {spec}", file=sys.stderr, flush=True)
        failure: str | None = None
        try:
            result, code = run_local(job, folder, data_dir, verbose=verbose)
        except DitherpsError as error:
            result, code, failure = None, int(error.exit_code), str(error)
        if code and failure is None:
            failure = str(result["reason"]) if result else f"exit code {code}; see {folder / 'server.log'}"
        figures = {key: result.get(key) if result else None for key in _KEPT}
        rows.append({"codec": spec, "run_dir": str(folder), "exit_code": int(code), "failure": failure, **figures})
        if code == ExitCode.INTERRUPTED:
            break
    comparison = {"task": jobs[0].config.task, "runs": rows, "plots": [str(path) for path in _plots(rows, run_dir)]}
    (run_dir / "compare.json").write_text(json.dumps(comparison, indent=1) + "\n")
    return comparison, next((row["exit_code"] for row in rows if row["exit_code"]), int(ExitCode.OK))


def _plots(rows: Sequence[Mapping[str, Any]], run_dir: Path) -> list[Path]:
    """Accuracy against bits and against time, of the runs that ended well and were evaluated."""
    from ditherps.plots import plot_comparison

    shown = [row for row in rows if not row["failure"] and row["test_accuracy"] is not None]
    if not shown:
        return []
    folders, labels = [Path(row["run_dir"]) for row in shown], [row["codec"] for row in shown]
    return [
        plot_comparison(folders, run_dir / "accuracy_bits.png", labels=labels),
        plot_comparison(folders, run_dir / "accuracy_time.png", labels=labels, against="seconds"),
    ]


def table(comparison: Mapping[str, Any]) -> Table:
    """The comparison for people."""
    rows = comparison["runs"]
    well = next((row for row in rows if row["rounds"] is not None), None)
    about = f", {well['rounds']} rounds, {well['workers']} workers" if well else ""
    result = Table(title=f"{comparison['task']}{about}", padding=(0, 1, 0, 0))
    result.caption = "up, down: all workers; bits: uplink, a coordinate; below: how many times less than float32"
    result.add_column("codec", overflow="fold", min_width=14)
    for column in ("accuracy", "loss", "up Mbit", "bits", "below", "seconds", "down Mbit"):
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["failure"]:
            result.add_row(Text(f"{row['codec']}: failed: {row['failure']}"), *["-"] * 7)
            continue
        cells = (
            row["codec"],
            _number(row["test_accuracy"], ".4f"),
            _number(row["test_loss"], ".4f"),
            f"{8e-6 * row['uplink_bytes']:,.2f}",
            _number(row["uplink_bits_per_coordinate"], ".3f"),
            _number(row["compression_vs_float32"], ".1f"),
            f"{row['seconds']:.1f}",
            f"{8e-6 * row['downlink_bytes']:,.2f}",
        )
        result.add_row(*map(Text, cells))
    return result


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_table(comparison: Mapping[str, Any]) -> None:
    """Print the table, and where the plots are, on standard output."""
    Console().print(table(comparison))
    for path in comparison["plots"]:
        print(path)
