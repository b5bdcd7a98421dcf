"""PNG plots: of run folders, accuracy against bits sent and time, bits per round; of codecs, error against bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ditherps.bench.limits import shannon_bits
from ditherps.errors import UserError

mpl.use("Agg")

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SIZE = (7.0, 4.2)
_MOST_BITS = 10.0
_SPENT = {"bits": "uplink bits of all workers (Mbit)", "seconds": "seconds since the first round closed"}

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
    accuracy = [point.accuracy for point in points]
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.subplots()
    up, both = [8e-6 * point.up for point in points], [8e-6 * (point.up + point.down) for point in points]
    axes.plot(up, accuracy, "o-", ms=3, color=_COLORS[0], label="uplink")
    axes.plot(both, accuracy, "o-", ms=3, color=_COLORS[1], label="uplink + downlink")
    _accuracy_axes(axes, title, "bits sent by then (Mbit)", first=up[min(1, len(up) - 1)])
    return [_save(figure, run_dir / "accuracy_bits.png"), *paths]


def plot_comparison(
    run_dirs: Sequence[Path],
    path: Path,
    *,
    against: Literal["bits", "seconds"] = "bits",
    labels: Sequence[str] | None = None,
) -> Path:
    """Draw test accuracy against uplink bits, or against time, of several runs of one task, and return `path`.

    Time is that since the first round closed: this one includes what workers load and compile before they begin.
    `labels` name the runs; default: by codec and options. Raises `UserError` for a folder that does not hold a finished
    run.
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
        began = records[0]["elapsed_seconds"]
        spent = [8e-6 * point.up if against == "bits" else point.seconds - began for point in points]
        name, task = labels[place] if labels else _label(result), str(result["task"])
        axes.plot(spent, [p.accuracy for p in points], "o-", ms=3, color=_COLORS[place % len(_COLORS)], label=name)
        first = min(first, spent[0])
    _accuracy_axes(axes, task, _SPENT[against], first)
    axes.set_xscale("log" if against == "bits" else "linear")
    return _save(figure, path)


def plot_rate_distortion(records: Sequence[Record], path: Path) -> Path:
    """Draw the error of codecs against their bits, as `ditherps.bench.codecs.run` records them, and return `path`.

    One panel a source, with the limits for unbiased and for biased codecs where they are known, else those of a
    Gaussian of the same variance. Points bear numbers, which the legend explains. Codecs without error, or with more
    than 10 bits, are left out.
    """
    shown = [record for record in records if record["nmse"] > 0 and record["bits_per_coordinate"] <= _MOST_BITS]
    sources = list(dict.fromkeys(record["source"] for record in records))
    specs = list(dict.fromkeys((record["spec"], record["codec"], record["unbiased"]) for record in shown))
    families = list(dict.fromkeys(codec for _, codec, _ in specs))
    columns = min(len(sources), 2)
    rows = -(-len(sources) // columns)
    figure = Figure((5.4 * columns + 2.6, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, source in zip(panels, sources, strict=False):
        here = [record for record in shown if record["source"] == source]
        for record in here:
            style = _marker(families.index(record["codec"]), record["unbiased"])
            point = (record["bits_per_coordinate"], record["nmse"])
            axes.plot(*point, **style)
            number = 1 + specs.index((record["spec"], record["codec"], record["unbiased"]))
            axes.annotate(str(number), point, (4, 3), textcoords="offset points", fontsize=7, color=style["color"])
        _limit_curves(axes, source, [record["nmse"] for record in here])
        axes.set(xlabel="bits a coordinate, all bytes counted", ylabel="NMSE", title=source, yscale="log")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", fontsize=7)
    for empty in figure.axes[len(sources) :]:
        empty.remove()
    handles = [
        Line2D([], [], ls="", label=f"{number} {_shortened(spec)}", **_marker(families.index(codec), unbiased))
        for number, (spec, codec, unbiased) in enumerate(specs, 1)
    ]
    title = "filled: unbiased, hollow: biased"
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, title=title, title_fontsize=7)
    return _save(figure, path)


def _marker(family: int, unbiased: bool) -> dict[str, Any]:
    color = _COLORS[family % len(_COLORS)]
    shape = "osD^v"[family // len(_COLORS) % 5]
    return {"marker": shape, "ms": 5, "color": color, "mfc": color if unbiased else "white"}


def _shortened(text: str, most: int = 48) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _limit_curves(axes: Any, source: str, reached: Sequence[float]) -> None:
    """Shannon's limit over the errors that were reached."""
    known = shannon_bits(source, 0.5) is not None
    nmse = np.geomspace(min([0.01, *reached]) / 2, max([1.0, *reached]) * 2, 120)
    for unbiased, line in ((True, "-"), (False, "--")):
        bits = [shannon_bits(source if known else "gaussian", float(d), unbiased=unbiased) for d in nmse]
        label = f"limit{'' if known else ' of a Gaussian'}, {'unbiased' if unbiased else 'biased'}"
        axes.plot(bits, nmse, line, color="black" if known else "silver", lw=1, label=label)


def _label(result: Record) -> str:
    options = ", ".join(f"{key}={value}" for key, value in result["codec_options"].items())
    return f"{result['codec']} {options}".strip()


def _read_result(run_dir: Path) -> Record:
    result: Record = json.loads((run_dir / "result.json").read_text())
    return result


class _Evaluation(NamedTuple):
    """Bytes sent up and down and seconds gone before an evaluation, and its accuracy."""

    up: int
    down: int
    seconds: float
    accuracy: float


def _evaluations(records: list[Record], result: Record) -> list[_Evaluation]:
    """The evaluations of a run, oldest first."""
    # A record evaluates the model before its round: that cost what had been spent up to the round before.
    spent = [
        (0, 0, 0.0),
        *((r["uplink_total_bytes"], r["downlink_total_bytes"], r["elapsed_seconds"]) for r in records),
    ]
    known = [(i, r["test_accuracy"]) for i, r in enumerate(records)] + [(len(records), result["test_accuracy"])]
    return [_Evaluation(*spent[i], accuracy) for i, accuracy in known if accuracy is not None]


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
