"""PNG plots of a run folder: accuracy against bits sent, bits per round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_UP, _DOWN, _ACCURACY = "#0072b2", "#d55e00", "#009e73"


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of `rounds.jsonl`, oldest first."""
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def plot_run(run_dir: Path, title: str, final_accuracy: float | None) -> list[Path]:
    """Draw the plots of a run folder into it, and return their paths."""
    records = read_records(run_dir)
    if not records:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    return [_accuracy(run_dir, records, title, final_accuracy), _round_bits(run_dir, records, title)]


def _accuracy(run_dir: Path, records: list[dict[str, Any]], title: str, final_accuracy: float | None) -> Path:
    from matplotlib import pyplot as plt

    # A record evaluates the model before its round: that cost what had been sent up to the round before.
    sent = [(0, 0), *((r["uplink_total_bytes"], r["downlink_total_bytes"]) for r in records)]
    points = [(*sent[i], r["test_accuracy"]) for i, r in enumerate(records) if r["test_accuracy"] is not None]
    if final_accuracy is not None:
        points.append((*sent[-1], final_accuracy))
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for label, color, bytes_of in (
        ("uplink", _UP, lambda p: p[0]),
        ("uplink + downlink", _DOWN, lambda p: p[0] + p[1]),
    ):
        axes.plot([8e-6 * bytes_of(p) for p in points], [p[2] for p in points], "o-", ms=3, color=color, label=label)
    axes.set(xlabel="bits sent by all workers and the server (Mbit)", ylabel="test accuracy", title=title)
    axes.set_xscale("symlog", linthresh=max(1e-3, 8e-6 * sent[1][0]))
    axes.set_ylim(top=1.0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return _save(figure, run_dir / "accuracy_bits.png")


def _round_bits(run_dir: Path, records: list[dict[str, Any]], title: str) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rounds = [r["round"] for r in records]
    for label, color, key in (("uplink", _UP, "uplink_bytes"), ("downlink", _DOWN, "downlink_bytes")):
        axes.plot(rounds, [8e-3 * r[key] for r in records], color=color, label=label)
    float32 = 32e-3 * records[0]["coordinates"] * len(records[0]["workers"])
    axes.axhline(float32, color="grey", ls="--", lw=1, label="float32, one way")
    axes.set(xlabel="round", ylabel="wire bits of the round (kbit)", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, run_dir / "round_bits.png")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
