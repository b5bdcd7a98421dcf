"""PNG plots of codecs: error against bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ditherps.bench.limits import shannon_bits
from ditherps.plots import COLORS, Record, save, shortened

_MOST_BITS = 10.0


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
        Line2D([], [], ls="", label=f"{number} {shortened(spec)}", **_marker(families.index(codec), unbiased))
        for number, (spec, codec, unbiased) in enumerate(specs, 1)
    ]
    title = "filled: unbiased, hollow: biased"
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, title=title, title_fontsize=7)
    return save(figure, path)


def _marker(family: int, unbiased: bool) -> dict[str, Any]:
    color = COLORS[family % len(COLORS)]
    shape = "osD^v"[family // len(COLORS) % 5]
    return {"marker": shape, "ms": 5, "color": color, "mfc": color if unbiased else "white"}


def _limit_curves(axes: Any, source: str, reached: Sequence[float]) -> None:
    """Shannon's limit over the errors that were reached."""
    known = shannon_bits(source, 0.5) is not None
    nmse = np.geomspace(min([0.01, *reached]) / 2, max([1.0, *reached]) * 2, 120)
    for unbiased, line in ((True, "-"), (False, "--")):
        bits = [shannon_bits(source if known else "gaussian", float(d), unbiased=unbiased) for d in nmse]
        label = f"limit{'' if known else ' of a Gaussian'}, {'unbiased' if unbiased else 'biased'}"
        axes.plot(bits, nmse, line, color="black" if known else "silver", lw=1, label=label)
