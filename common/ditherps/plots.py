"""PNG plots of run folders: accuracy against bits sent, bits per round, runs beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ditherps.errors import UserError

mpl.use("Agg")

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SIZE = (7.0, 4.2)

Record = dict[str, Any]


def read_records(run_dir: Path) -> list[Record]:
    """The records of `rounds.jsonl`, oldest first."""
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def plot_run(run_dir: Path) -> list[Path]:
    """Draw the plots of a finished run into its folder, and return their paths."""
    records, result = read_records(run_dir), _read_result(run_dir)
    if not records:
        return []
    title = f"{result['task']}, {result['codec']}, {result['workers']} workers"
    paths = [_round_bits(run_dir, records, title)]
    points = _evaluations(records, result)
    if not points:
        return paths
    accuracy = [point[2] for point in points]
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.subplots()
    up, both = [8e-6 * up for up, _, _ in points], [8e-6 * (up + down) for up, down, _ in points]
    axes.plot(up, accuracy, "o-", ms=3, color=_COLORS[0], label="uplink")
    axes.plot(both, accuracy, "o-", ms=3, color=_COLORS[1], label="uplink + downlink")
    _accuracy_axes(axes, title, "bits sent by then (Mbit)", first=up[min(1, len(up) - 1)])
    return [_save(figure, run_dir / "accuracy_bits.png"), *paths]


def plot_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Draw test accuracy against uplink bits of several runs of one task, and return `path`.

    Raises `UserError` for a folder that does not hold a finished run.
    """
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.subplots()
    first, task = float("inf"), ""
    for place, run_dir in enumerate(run_dirs):
        if not (run_dir / "result.json").exists():
            raise UserError(f"{run_dir} does not hold a finished run (no result.json)")
        records, result = read_records(run_dir), _read_result(run_dir)
        points = _evaluations(records, result)[1:]
        if not points:
            raise UserError(f"{run_dir} holds no evaluation after its first round")
        bits, task = [8e-6 * up for up, _, _ in points], str(result["task"])
        axes.plot(bits, [p[2] for p in points], "o-", ms=3, color=_COLORS[place % len(_COLORS)], label=_label(result))
        first = min(first, bits[0])
    _accuracy_axes(axes, task, "uplink bits of all workers (Mbit)", first)
    axes.set_xscale("log")
    return _save(figure, path)


def _label(result: Record) -> str:
    options = ", ".join(f"{key}={value}" for key, value in result["codec_options"].items())
    return f"{result['codec']} {options}".strip()


def _read_result(run_dir: Path) -> Record:
    result: Record = json.loads((run_dir / "result.json").read_text())
    return result


def _evaluations(records: list[Record], result: Record) -> list[tuple[int, int, float]]:
    """Bytes sent up and down before each evaluation, and its accuracy."""
    # A record evaluates the model before its round: that cost what had been sent up to the round before.
    sent = [(0, 0), *((r["uplink_total_bytes"], r["downlink_total_bytes"]) for r in records)]
    points = [(*sent[i], r["test_accuracy"]) for i, r in enumerate(records) if r["test_accuracy"] is not None]
    if result["test_accuracy"] is not None:
        points.append((*sent[-1], result["test_accuracy"]))
    return points


def _accuracy_axes(axes: Any, title: str, x_label: str, first: float) -> None:
    axes.set(xlabel=x_label, ylabel="test accuracy", title=title)
    axes.set_xscale("symlog", linthresh=max(first, 1e-6))
    axes.set_ylim(top=1.0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _round_bits(run_dir: Path, records: list[Record], title: str) -> Path:
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.subplots()
    rounds = [r["round"] for r in records]
    for label, color, key in (("uplink", _COLORS[0], "uplink_bytes"), ("downlink", _COLORS[1], "downlink_bytes")):
        axes.plot(rounds, [8e-3 * r[key] for r in records], color=color, label=label)
    float32 = 32e-3 * records[0]["coordinates"] * len(records[0]["workers"])
    axes.axhline(float32, color="grey", ls="--", lw=1, label="float32, one way")
    axes.set(xlabel="round", ylabel="wire bits of the round (kbit)", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, run_dir / "round_bits.png")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path
