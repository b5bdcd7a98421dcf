"""PNG plots of run folders: accuracy and loss against bits and time, bits per round."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ditherps.errors import OptionError, UserError

mpl.use("Agg")

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", ":")
_SIZE = (7.0, 4.2)
_MOST_MARKERS = 60

_QUANTITIES = {
    "accuracy": {"test_accuracy": "test accuracy"},
    "loss": {"test_loss": "test loss", "train_loss": "training loss"},
}
VALUES = tuple(_QUANTITIES)
"""What is drawn: test accuracy, or loss."""
AGAINST = {
    "bits": "bits of all workers by then, up and down (Mbit)",
    "seconds": "seconds since the first round closed",
}
"""What it may be drawn against, as the axis says it."""

Record = dict[str, Any]


def read_records(run_dir: Path) -> list[Record]:
    """The records of `rounds.jsonl`, oldest first."""
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def plot_name(value: str, against: str) -> str:
    """The file that a plot of one of `VALUES` against one of `AGAINST` goes to where nothing else is said."""
    return f"{value}_{'time' if against == 'seconds' else against}.png"


def plot_run(run_dir: Path) -> list[Path]:
    """Draw the plots of a finished run into its folder, and return their paths.

    `accuracy_bits.png` (of a run that was evaluated), `loss_bits.png` and `round_bits.png`.
    """
    run = _Run.read(run_dir)
    if not run.records:
        return []
    result = run.result
    title = f"{result['task']}, {_label(result)}, {result['workers']} workers"
    paths = [_round_bits(run_dir, run.records, title)]
    for value in VALUES:
        label, [points] = _curves([run], value)
        if points:
            figure, axes = _empty(title)
            drawn = [point.value for point in points]
            up, both = [8e-6 * point.up for point in points], [8e-6 * point.total for point in points]
            marker = _marker(points)
            axes.plot(up, drawn, marker=marker, ms=3, color=COLORS[0], label="uplink")
            axes.plot(both, drawn, marker=marker, ms=3, color=COLORS[1], label="uplink + downlink")
            _describe(axes, value, label, "bits of all workers by then (Mbit)", drawn)
            axes.set_xscale("log")
            paths.append(_finished(figure, axes, value, run_dir / plot_name(value, "bits")))
    return paths


def plot_comparison(
    run_dirs: Sequence[Path],
    path: Path,
    *,
    value: str = "accuracy",
    against: str = "bits",
    labels: Sequence[str] | None = None,
) -> Path:
    """Draw accuracy or loss of several runs of one task against the bits of both directions or time; return `path`.

    Args:
        run_dirs: folders of finished runs.
        path: PNG to write.
        value: one of `VALUES`. The loss is the test's where all runs were evaluated, else that of training.
        against: one of `AGAINST`. Time is that since the first round closed: this one includes what workers load and
            compile before they begin.
        labels: names of the runs; default: by codecs and options.

    Raises:
        OptionError: another `value` or `against`.
        UserError: a folder does not hold a finished run, or nothing of what is asked for.
    """
    for option, given, allowed in (("value", value, VALUES), ("against", against, AGAINST)):
        if given not in allowed:
            raise OptionError(option, given, allowed)
    runs = [_Run.read(run_dir) for run_dir in run_dirs]
    label, curves = _curves(runs, value)
    for run, points in zip(runs, curves, strict=True):
        if not points:
            raise UserError(f"{run.run_dir} holds no {value} after its first round")
    figure, axes = _empty(str(runs[0].result["task"]))
    for place, (run, points) in enumerate(zip(runs, curves, strict=True)):
        began = run.records[0]["elapsed_seconds"]
        spent = [8e-6 * point.total if against == "bits" else point.seconds - began for point in points]
        color, dash = COLORS[place % len(COLORS)], _DASHES[place // len(COLORS) % len(_DASHES)]
        name = shortened(labels[place] if labels else _label(run.result))
        drawn = [point.value for point in points]
        axes.plot(spent, drawn, marker=_marker(points), ms=3, ls=dash, color=color, label=name)
    _describe(axes, value, label, AGAINST[against], [point.value for points in curves for point in points])
    axes.set_xscale("log" if against == "bits" else "linear")
    return _finished(figure, axes, value, path)


def _curves(runs: Sequence[_Run], value: str) -> tuple[str, list[list[_Point]]]:
    """The same quantity of all runs, the first that all of them have after their first round, and what it is."""
    found = [(label, [run.points(key) for run in runs]) for key, label in _QUANTITIES[value].items()]
    return next(((label, curves) for label, curves in found if all(curves)), found[-1])


def shortened(text: str, most: int = 48) -> str:
    """A name of at most so many characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def _label(result: Record) -> str:
    options = ",".join(f"{key}={value}" for key, value in result["codec_options"].items())
    return f"{result['codec']}{':' * bool(options)}{options}/{result['downlink_codec']}"


class _Point(NamedTuple):
    """Bytes sent up and down and seconds gone before the model was what it was, and its accuracy or loss."""

    up: int
    down: int
    seconds: float
    value: float

    @property
    def total(self) -> int:
        return self.up + self.down


class _Run(NamedTuple):
    """What a finished run has left in its folder."""

    run_dir: Path
    records: list[Record]
    result: Record

    @classmethod
    def read(cls, run_dir: Path) -> _Run:
        """Raises `UserError` for a folder that does not hold a finished run."""
        if not (run_dir / "result.json").exists():
            raise UserError(f"{run_dir} does not hold a finished run (no result.json)")
        return cls(run_dir, read_records(run_dir), json.loads((run_dir / "result.json").read_text()))

    def points(self, key: str) -> list[_Point]:
        """One for each model after the first round of which the run knows `key`, oldest first."""
        if not self.records:
            return []
        # A record tells of the model before its round: that cost what had been spent up to the round before.
        spent = [(r["uplink_total_bytes"], r["downlink_total_bytes"], r["elapsed_seconds"]) for r in self.records]
        known = [*(record[key] for record in self.records[1:]), self.result.get(key)]
        return [_Point(*before, value) for before, value in zip(spent, known, strict=True) if value is not None]


def _empty(title: str) -> tuple[Figure, Axes]:
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    return figure, axes


def _marker(points: Sequence[_Point]) -> str:
    """None where they would hide the line."""
    return "o" if len(points) <= _MOST_MARKERS else ""


def _describe(axes: Axes, value: str, label: str, x_label: str, drawn: Sequence[float]) -> None:
    axes.set(xlabel=x_label, ylabel=label)
    if value == "accuracy":
        axes.set_ylim(top=1.0)
    elif all(number > 0 for number in drawn if math.isfinite(number)):
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both" if value == "loss" else "major")


def _finished(figure: Figure, axes: Axes, value: str, path: Path) -> Path:
    axes.legend(loc="lower right" if value == "accuracy" else "best", fontsize=8)
    return save(figure, path)


def _round_bits(run_dir: Path, records: list[Record], title: str) -> Path:
    figure, axes = _empty(title)
    rounds = [r["round"] for r in records]
    for label, color, key in (("uplink", COLORS[0], "uplink_bytes"), ("downlink", COLORS[1], "downlink_bytes")):
        axes.plot(rounds, [8e-3 * r[key] for r in records], color=color, label=label)
    float32 = 32e-3 * records[0]["coordinates"] * len(records[0]["workers"])
    axes.axhline(float32, color="grey", ls="--", lw=1, label="float32, one way")
    axes.set(xlabel="round", ylabel="wire bits of the round (kbit)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return save(figure, run_dir / "round_bits.png")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, and return `path`."""
    figure.savefig(path, dpi=130)
    return path
