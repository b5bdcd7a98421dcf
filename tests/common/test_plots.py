"""Plots of runs: which lines they hold, against what, and where they go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ditherps import plots
from ditherps.cli import main
from ditherps.errors import ExitCode, OptionError, UserError
from ditherps.plots import plot_comparison, plot_name, plot_run

UP, DOWN = 1000, 3000
"""Bytes of a round."""


def write_run(folder: Path, *, rounds: int = 4, evaluate: bool = True, downlink: str = "none", **more: Any) -> Path:
    """A finished run: after r rounds the accuracy is r / 10, the test loss 1 / (1 + r)."""
    folder.mkdir()
    lines = []
    for r in range(rounds):
        record = {
            "round": r, "workers": [0, 1], "coordinates": 500, "elapsed_seconds": 5.0 + 2 * r,
            "train_loss": 4.0 / (1 + r), "test_accuracy": r / 10 if evaluate else None,
            "test_loss": 1 / (1 + r) if evaluate else None,
            "uplink_bytes": UP, "downlink_bytes": DOWN,
            "uplink_total_bytes": UP * (r + 1), "downlink_total_bytes": DOWN * (r + 1),
        }  # fmt: skip
        lines.append(json.dumps(record) + "\n")
    (folder / "rounds.jsonl").write_text("".join(lines))
    result = {
        "task": "tiny", "codec": "dqsg", "codec_options": {"levels": 1.5}, "downlink_codec": downlink, "workers": 2,
        "test_accuracy": rounds / 10 if evaluate else None, "test_loss": 1 / (1 + rounds) if evaluate else None, **more,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Axes]:
    """The axes of every plot that was written, by file name."""
    found: dict[str, Axes] = {}
    write = plots.save

    def keep(figure: Figure, path: Path) -> Path:
        [found[path.name]] = figure.axes
        return write(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    return found


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    found = {}
    for line in axes.get_lines():
        x, y = np.asarray(line.get_xdata(), np.float64), np.asarray(line.get_ydata(), np.float64)
        found[str(line.get_label())] = list(zip(x.tolist(), y.tolist(), strict=True))
    return found


def near(points: list[tuple[float, float]]) -> list[Any]:
    return [pytest.approx(point) for point in points]


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        image.verify()
        return min(image.size) > 300


class TestRun:
    def test_accuracy_and_loss_against_the_uplink_and_the_sum(self, tmp_path: Path, drawn: dict[str, Axes]) -> None:
        paths = plot_run(write_run(tmp_path / "run"))
        assert {path.name for path in paths} == {"accuracy_bits.png", "loss_bits.png", "round_bits.png"}
        assert all(path.parent == tmp_path / "run" and is_picture(path) for path in paths)
        for name, label, values in (
            ("accuracy_bits.png", "test accuracy", [0.1, 0.2, 0.3, 0.4]),
            ("loss_bits.png", "test loss", [1 / 2, 1 / 3, 1 / 4, 1 / 5]),
        ):
            axes = drawn[name]
            assert axes.get_ylabel() == label
            assert axes.get_xlabel() == "bits of all workers by then (Mbit)"
            assert axes.get_title() == "tiny, dqsg:levels=1.5/none, 2 workers"
            found = lines(axes)
            assert set(found) == {"uplink", "uplink + downlink"}
            # What a model after r rounds cost is what r rounds cost.
            assert found["uplink"] == near([(8e-6 * UP * r, value) for r, value in enumerate(values, 1)])
            both = [(8e-6 * (UP + DOWN) * r, value) for r, value in enumerate(values, 1)]
            assert found["uplink + downlink"] == near(both)

    def test_bits_of_each_round(self, tmp_path: Path, drawn: dict[str, Axes]) -> None:
        plot_run(write_run(tmp_path / "run"))
        found = lines(drawn["round_bits.png"])
        assert found["uplink"] == near([(r, 8e-3 * UP) for r in range(4)])
        assert found["downlink"] == near([(r, 8e-3 * DOWN) for r in range(4)])
        assert {y for _, y in found["float32, one way"]} == {32e-3 * 500 * 2}

    def test_without_evaluation_the_loss_is_that_of_training(self, tmp_path: Path, drawn: dict[str, Axes]) -> None:
        paths = plot_run(write_run(tmp_path / "run", evaluate=False))
        assert {path.name for path in paths} == {"loss_bits.png", "round_bits.png"}
        axes = drawn["loss_bits.png"]
        assert axes.get_ylabel() == "training loss"
        assert lines(axes)["uplink"] == near([(8e-6 * UP * r, 4 / (1 + r)) for r in (1, 2, 3)])

    def test_a_run_without_rounds_has_none(self, tmp_path: Path) -> None:
        assert plot_run(write_run(tmp_path / "run", rounds=0)) == []

    def test_a_loss_that_is_not_positive_everywhere(self, tmp_path: Path, drawn: dict[str, Axes]) -> None:
        plot_run(write_run(tmp_path / "positive"))
        assert drawn["loss_bits.png"].get_yscale() == "log"
        plot_run(write_run(tmp_path / "negative", test_loss=-0.5))
        assert drawn["loss_bits.png"].get_yscale() == "linear"
        plot_run(write_run(tmp_path / "diverged", test_loss=float("nan")))
        assert drawn["loss_bits.png"].get_yscale() == "log"


class TestComparison:
    def test_every_quantity_against_every_cost(self, tmp_path: Path, drawn: dict[str, Axes]) -> None:
        runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", rounds=6, downlink="dqsg:levels=3")]
        value_of = {"accuracy": lambda r: r / 10, "loss": lambda r: 1 / (1 + r)}
        cost_of = {"bits": lambda r: 8e-6 * (UP + DOWN) * r, "seconds": lambda r: 2.0 * (r - 1)}
        for value in ("accuracy", "loss"):
            for against in ("bits", "seconds"):
                path = tmp_path / f"{value}-{against}.png"
                assert plot_comparison(runs, path, value=value, against=against) == path
                assert is_picture(path)
                axes = drawn[path.name]
                assert axes.get_ylabel() == f"test {value}"
                assert axes.get_xlabel() == plots.AGAINST[against]
                assert axes.get_xscale() == ("log" if against == "bits" else "linear")
                found = lines(axes)
                assert list(found) == ["dqsg:levels=1.5/none", "dqsg:levels=1.5/dqsg:levels=3"]
                for points, rounds in zip(found.values(), (4, 6), strict=True):
                    expected = [(cost_of[against](r), value_of[value](r)) for r in range(1, rounds + 1)]
                    assert points == near(expected)

    def test_one_kind_of_loss_for_all(self, tmp_path: Path, drawn: dict[str, Axes]) -> None:
        runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", evaluate=False)]
        plot_comparison(runs, tmp_path / "loss.png", value="loss", labels=["A", "B"])
        axes = drawn["loss.png"]
        assert axes.get_ylabel() == "training loss"
        assert lines(axes)["A"] == lines(axes)["B"]
        with pytest.raises(UserError, match="b holds no accuracy after its first round"):
            plot_comparison(runs, tmp_path / "accuracy.png")

    def test_more_runs_than_colours_stay_apart(self, tmp_path: Path, drawn: dict[str, Axes]) -> None:
        run = write_run(tmp_path / "a")
        count = len(plots.COLORS) + 3
        plot_comparison([run] * count, tmp_path / "many.png", labels=[f"{n}-{'x' * 60}" for n in range(count)])
        found = drawn["many.png"].get_lines()
        assert len({(line.get_color(), line.get_linestyle()) for line in found}) == count
        assert all(len(str(line.get_label())) == 48 for line in found)

    @pytest.mark.parametrize(
        ("option", "given", "allowed"), [("value", "losses", "accuracy, loss"), ("against", "time", "bits, seconds")]
    )
    def test_what_else_could_be_meant_is_told(self, tmp_path: Path, option: str, given: str, allowed: str) -> None:
        run = write_run(tmp_path / "a")
        with pytest.raises(OptionError, match=f"{option} = '{given}' is not allowed; allowed: {allowed}"):
            plot_comparison([run], tmp_path / "x.png", **{option: given})
        assert not (tmp_path / "x.png").exists()

    @pytest.mark.parametrize("value", plots.VALUES)
    def test_folders_without_a_run(self, tmp_path: Path, value: str) -> None:
        with pytest.raises(UserError, match=r"does not hold a finished run \(no result.json\)"):
            plot_comparison([tmp_path], tmp_path / "x.png", value=value)
        with pytest.raises(UserError, match=f"holds no {value} after its first round"):
            plot_comparison([write_run(tmp_path / "empty", rounds=0)], tmp_path / "x.png", value=value)


def test_the_command_names_the_file_by_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(run), "--value", "loss", "--against", "seconds"]) == ExitCode.OK
    assert capsys.readouterr().out == "loss_time.png\n"
    assert is_picture(tmp_path / "loss_time.png")
    assert main(["plot", str(run), "--out", "mine.png"]) == ExitCode.OK
    assert is_picture(tmp_path / "mine.png")
    assert main(["plot", str(run), "--value", "speed"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "error: value = 'speed' is not allowed; allowed: accuracy, loss\n"
    names = [plot_name("accuracy", against) for against in plots.AGAINST]
    assert names == ["accuracy_bits.png", "accuracy_time.png"]
