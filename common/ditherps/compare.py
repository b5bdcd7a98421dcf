"""`ditherps compare`: one task under several codecs, everything else equal, one run after another."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ditherps.config import merged
from ditherps.errors import DitherpsError, ExitCode, OptionError
from ditherps.files import make
from ditherps.job import ResolvedJob, job_options, resolve_job
from ditherps.local import run_local
from ditherps.summary import print_wide

_KEPT = (
    "mode", "downlink_codec", "test_accuracy", "test_loss", "uplink_bytes", "uplink_payload_bytes", "downlink_bytes",
    "uplink_bits_per_coordinate", "downlink_bits_per_coordinate", "total_bits_per_coordinate", "compression_vs_float32",
    "total_compression_vs_float32", "seconds", "rounds", "workers", "reason", "model_sha256",
)  # fmt: skip

_COLUMNS = (
    "accuracy", "loss", "up\nMbit", "payload\nMbit", "down\nMbit", "bits\nup", "bits\ndown", "below", "seconds",
)  # fmt: skip


def resolve(specs: Sequence[str], flags: Mapping[str, Any], config: Path | None = None) -> list[ResolvedJob]:
    """The jobs to compare, all checked before the first begins.

    Args:
        specs: codecs as `ditherps.job.job_options` reads them: UP or UP/DOWN, where UP may be `data`.
        flags: the job without its codec, as `ditherps.job.resolve_job` takes it; its downlink's codec is that of the
            runs that name none.
        config: a job file; what it says of a codec's options holds where that codec is compared.

    Raises:
        OptionError: no codec, one twice, or anything that is not allowed.
    """
    if not specs or len(set(specs)) < len(specs):
        raise OptionError("--codec", ", ".join(specs), "each once: --codec none --codec dqsg --codec dqsg/none")
    return [_resolved(spec, flags, config) for spec in specs]


def _resolved(spec: str, flags: Mapping[str, Any], config: Path | None) -> ResolvedJob:
    options = job_options(spec)
    job = resolve_job(merged(flags, options), config)
    if job.config.mode == "data" and "mode" not in options:  # which the others are compared with
        job = resolve_job(merged(flags, options, {"mode": "gradient"}), config)
    return job


def compare(
    specs: Sequence[str], jobs: Sequence[ResolvedJob], run_dir: Path, data_dir: Path | None, *, verbose: bool = False
) -> tuple[dict[str, Any], int]:
    """Run the jobs into folders of their own in `run_dir`; write `compare.json` and the plots there.

    Args:
        specs: names of the jobs, and
        jobs: what they are, as `resolve` makes them.
        run_dir: folder of the comparison.
        data_dir: where datasets are.
        verbose: log more.

    Returns:
        What `compare.json` holds: `task`, `runs` (one a name, which stands in its `codec`, with `run_dir`, `exit_code`,
        `failure` or null, and figures of its result), `plots`. And the exit code of the first run that failed, or 0.
        A failure leaves the others alone; an interrupt ends all.
    """
    make(run_dir)
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
    """Accuracy and loss against the bits of both directions, accuracy against time, of the runs that ended well."""
    from ditherps.plots import plot_comparison, plot_name

    shown = [row for row in rows if not row["failure"] and row["rounds"]]
    evaluated = [row for row in shown if row["test_accuracy"] is not None]
    paths = []
    for of, value, against in (
        (evaluated, "accuracy", "bits"),
        (shown, "loss", "bits"),
        (evaluated, "accuracy", "seconds"),
    ):
        if of:
            folders, labels = [Path(row["run_dir"]) for row in of], [row["codec"] for row in of]
            path = run_dir / plot_name(value, against)
            paths.append(plot_comparison(folders, path, value=value, against=against, labels=labels))
    return paths


def table(comparison: Mapping[str, Any]) -> Table:
    """The comparison for people."""
    rows = comparison["runs"]
    well = next((row for row in rows if row["rounds"] is not None), None)
    about = f", {well['rounds']} rounds, {well['workers']} workers" if well else ""
    result = Table(title=f"{comparison['task']}{about}", padding=(0, 1, 0, 0))
    result.caption = (
        "Mbit: all workers; payload: of the way up, without framing and control; bits: of the wire, for a coordinate "
        "of the model; below: how many times less than float32 in both directions"
    )
    result.add_column("codec", overflow="fold", min_width=14)
    for column in _COLUMNS:
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["failure"]:
            result.add_row(Text(f"{row['codec']}: failed: {row['failure']}"), *["-"] * len(_COLUMNS))
            continue
        cells = (
            row["codec"],
            _number(row["test_accuracy"], ".4f"),
            _number(row["test_loss"], ".4f"),
            f"{8e-6 * row['uplink_bytes']:,.2f}",
            f"{8e-6 * row['uplink_payload_bytes']:,.2f}",
            f"{8e-6 * row['downlink_bytes']:,.2f}",
            _number(row["uplink_bits_per_coordinate"], ".3f"),
            _number(row["downlink_bits_per_coordinate"], ".3f"),
            _number(row["total_compression_vs_float32"], ".1f"),
            f"{row['seconds']:.1f}",
        )
        result.add_row(*map(Text, cells))
    return result


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_table(comparison: Mapping[str, Any]) -> None:
    """Print the table, and where the plots are, on standard output."""
    print_wide(table(comparison))
    for path in comparison["plots"]:
        print(path)
