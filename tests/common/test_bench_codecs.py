"""`ditherps bench codecs`: its records, its limits, its verdict on bias, and what it draws."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console, RenderableType
from safetensors.torch import save_file
from typer.testing import CliRunner

from ditherps.bench import codecs as bench
from ditherps.bench import equal, threads
from ditherps.bench.commands import bench as commands
from ditherps.bench.limits import shannon_bits
from ditherps.bench.plots import plot_rate_distortion
from ditherps.bench.quality import quality
from ditherps.bench.sources import SOURCES, SPARSE_SHARE, source
from ditherps.codecs import Codec, Context, Encoded, codec_names, parse
from ditherps.codecs.base import HEADER, Span
from ditherps.codecs.plain import NoOptions
from ditherps.dither import Address
from ditherps.errors import OptionError, UserError

KEYS = {
    "codec",
    "options",
    "source",
    "coordinates",
    "bits_per_coordinate",
    "nmse",
    "bias_z",
    "bias_nmse",
    "shannon_bits",
    "gap_bits",
    "encode_ratio",
    "accumulate_ratio",
    "encode_coordinates_per_second",
    "accumulate_coordinates_per_second",
    "copy_coordinates_per_second",
    "threads",
    "cpu",
    "instructions",
}


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        image.verify()
        return min(image.size) > 300


def shown(what: RenderableType) -> str:
    """What a person sees of it in 100 columns."""
    console = Console(width=100, file=io.StringIO())
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_records_hold_what_they_promise() -> None:
    records = bench.run(coordinates=1 << 15, repeats=1)
    assert [r["codec"] for r in records] == [spec.partition(":")[0] for spec in bench.DEFAULT_CODECS]
    for spec, record in zip(bench.DEFAULT_CODECS, records, strict=True):
        assert set(record) >= KEYS
        assert (abs(record["bias_z"]) < 4) == parse(spec).unbiased or spec == "bf16"  # whose bias is too small to see
        assert parse(record["spec"]).options.model_dump() == record["options"]
    ternary = next(r for r in records if r["spec"] == "dqsg:levels=1")
    assert ternary["bits_per_coordinate"] <= 1.62
    assert 0.5 < ternary["nmse"] < 2.5
    assert ternary["shannon_bits"] == pytest.approx(0.5 * math.log2(1 + 1 / ternary["nmse"]))
    assert ternary["gap_bits"] == ternary["bits_per_coordinate"] - ternary["shannon_bits"]
    plain = records[0]
    assert (plain["nmse"], plain["bias_z"], plain["shannon_bits"]) == (0, 0, None)
    nested = next(r for r in records if r["codec"] == "ndqsg")
    assert nested["shannon_bits"] is None


@pytest.mark.parametrize("name", [name for name in codec_names() if name != "ndqsg"])
def test_every_codec_is_what_it_says_about_bias(name: str) -> None:
    """A codec that calls itself unbiased shows no bias on any source; the instrument runs for each that is registered.

    Biased ones are not all far off: bf16 rounds to nearest, and is right in the mean.
    """
    records = bench.run([name], coordinates=5000, repeats=1, sources=list(SOURCES))
    assert [record["source"] for record in records] == list(SOURCES)
    for record in records:
        if record["unbiased"]:
            assert abs(record["bias_z"]) < 4.5, record


class _Bent(Codec):
    """slope * x + shift with Gaussian noise; with `common` the slope varies from round to round."""

    name = "bent"
    tag = 1
    Options = NoOptions

    def __init__(self, slope: float = 1.0, shift: float = 0.0, common: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.slope, self.shift, self.common, self.seed = slope, shift, common, seed

    def max_nbytes(self, coordinates: int) -> int:
        return HEADER.size + 4 * coordinates

    def expected_squared_error(self, encoded: Encoded) -> float:
        return math.nan

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        generator = np.random.default_rng([self.seed, address.round])
        noise = generator.normal(size=x.size)
        factor = self.slope + (0.05 * generator.normal() if self.common else 0.0)
        data = np.empty(self.max_nbytes(x.size), np.uint8)
        data[HEADER.size :].view(np.float32)[:] = factor * x + self.shift + 0.5 * noise
        return self._finished(data, x.size, context)

    def _index(self, encoded: Encoded) -> Any:
        return encoded.data[HEADER.size :].view(np.float32)

    def _accumulate(
        self,
        encoded: Encoded,
        index: Any,
        address: Address,
        into: NDArray[np.float32],
        weight: np.float32,
        span: Span,
        side: NDArray[np.float32] | None,
    ) -> int:
        into += weight * index[span[0] : span[1]]
        return 0


class TestBias:
    N = 1 << 16

    def _z(self, used: Codec, rounds: int = 16) -> float:
        x = source("gaussian", self.N, seed=3).x
        return quality(used, x, x, rounds).bias_z

    def test_none_where_there_is_none(self) -> None:
        assert abs(self._z(_Bent())) < 4

    def test_a_slope_and_a_mean_are_found_and_have_their_signs(self) -> None:
        # Sixteen rounds of 65536 coordinates with noise of 0.5: the standard error of either is 0.0005.
        assert self._z(_Bent(slope=0.99)) < -5
        assert self._z(_Bent(slope=1.01)) > 5
        assert self._z(_Bent(shift=0.01)) > 5

    def test_errors_that_all_coordinates_of_a_round_share_are_no_bias(self) -> None:
        """Each round is scaled by a factor of mean 1: coordinate by coordinate that would be many standard errors."""
        assert abs(self._z(_Bent(common=True))) < 4
        assert abs(self._z(_Bent(common=True, slope=1.5), rounds=24)) > 6

    def test_deterministic_schemes_are_judged_over_the_coordinates(self) -> None:
        assert abs(self._z(parse("bf16"))) < 4
        assert self._z(parse("signsgd")) < -50
        assert self._z(parse("topk:fraction=0.1")) < -50

    def test_scores_are_normal(self) -> None:
        """Of 200 unbiased experiments with few rounds none is beyond 4, and their spread is about 1."""
        x = source("gaussian", 256, seed=1).x
        scores = [quality(_Bent(common=True, seed=seed), x, x, 4).bias_z for seed in range(200)]
        assert np.abs(scores).max() < 4
        assert 0.7 < np.std(scores) < 1.6

    def test_the_part_that_averaging_does_not_remove(self) -> None:
        x = source("gaussian", self.N).x
        signs = quality(parse("signsgd"), x, x, 4)
        assert signs.bias_nmse == pytest.approx(signs.nmse)
        assert signs.nmse == pytest.approx(1 - 2 / math.pi, rel=0.01)
        dithered = quality(parse("dqsg:step=rms,resolution=1"), x, x, 16)
        assert abs(dithered.bias_nmse) < 0.01 * dithered.nmse
        assert dithered.nmse == pytest.approx(1 / 12, rel=0.01)


class TestLimits:
    def test_gaussian(self) -> None:
        """algorithms: unbiased 1 / (2^2R - 1), biased 2^-2R."""
        for bits in (1.0, 2.0, 4.0):
            assert shannon_bits("gaussian", 1 / (4**bits - 1)) == pytest.approx(bits)
            assert shannon_bits("gaussian", 4.0**-bits, unbiased=False) == pytest.approx(bits)
        assert shannon_bits("gaussian", 2.0, unbiased=False) == 0

    def test_shannons_lower_bound(self) -> None:
        """The distance to a Gaussian is that of the entropies, known in closed form."""
        gaussian = 0.5 * math.log2(2 * math.pi * math.e)
        laplace = math.log2(2 * math.e / math.sqrt(2))
        # h(t(3)) = 2 (psi(2) - psi(3/2)) + log(sqrt(3) B(3/2, 1/2)); psi(2) - psi(3/2) = 2 log 2 - 1, B = pi / 2.
        student = (2 * (2 * math.log(2) - 1) + math.log(math.sqrt(3) * math.pi / 2)) / math.log(2) - 0.5 * math.log2(3)
        for name, entropy in (("laplace", laplace), ("student-t3", student)):
            found = shannon_bits(name, 0.001, unbiased=False)
            assert found is not None
            assert found == pytest.approx(entropy - gaussian + 0.5 * math.log2(1000), abs=1e-9)
            assert found < 0.5 * math.log2(1000)
            assert shannon_bits(name, 50.0) == 0
        # The error counts in the units of the vector that was measured.
        assert shannon_bits("laplace", 0.01, energy=2.0) == pytest.approx(
            (shannon_bits("laplace", 0.01) or 0) - 0.5, abs=1e-12
        )

    def test_sparse(self) -> None:
        """Between what a decoder needs that knows where the values are, and what telling it that costs on top."""
        where = -SPARSE_SHARE * math.log2(SPARSE_SHARE) - (1 - SPARSE_SHARE) * math.log2(1 - SPARSE_SHARE)
        before = math.inf
        for nmse in (1e-5, 1e-3, 0.0021, 0.0019, 0.01, 0.1, 0.5, 0.9, 0.99):
            values = SPARSE_SHARE * 0.5 * math.log2(1 / nmse)
            found = shannon_bits("sparse", nmse, unbiased=False)
            assert found is not None
            if nmse < 0.95:
                assert values < found < values + where
            assert found < before or nmse == 0.0019
            before = found
        near = shannon_bits("sparse", 0.00201, unbiased=False), shannon_bits("sparse", 0.00199, unbiased=False)
        assert near[0] == pytest.approx(near[1] or 0, abs=0.002)

    def test_no_limit_without_a_distribution_or_an_error(self) -> None:
        assert shannon_bits("mnist-200", 0.1) is None
        assert shannon_bits("gaussian", 0.0) is None

    def test_no_codec_is_below(self) -> None:
        """Simple codecs come near only where they should: sign bits of a Gaussian lie 0.27 bit above."""
        records = bench.run(
            ["signsgd", "dqsg:step=rms,resolution=0.5", "topk:fraction=0.1"],
            1 << 14,
            1,
            sources=list(SOURCES),
            rounds=4,
        )
        for record in records:
            assert record["nmse"] == 0 or record["gap_bits"] > 0, record
        assert records[0]["gap_bits"] == pytest.approx(1 - 0.5 * math.log2(1 / (1 - 2 / math.pi)), abs=0.03)


class TestSources:
    @pytest.mark.parametrize("name", SOURCES)
    def test_are_reproducible_and_as_described(self, name: str) -> None:
        x = source(name, 1 << 18).x
        assert torch.equal(x, source(name, 1 << 18).x)
        assert not torch.equal(x, source(name, 1 << 18, seed=1).x)
        variance, scale = float(x.square().mean()), float(x.abs().mean())
        expected = {"gaussian": (2 / math.pi) ** 0.5, "laplace": 0.5**0.5, "student-t3": 2 / math.pi, "sparse": 0.0798}
        assert scale == pytest.approx(expected[name], rel=0.02)
        if name != "student-t3":
            assert variance == pytest.approx(SPARSE_SHARE if name == "sparse" else 1.0, rel=0.02)
        assert abs(float(x.mean())) < 0.01
        zeros = float((x == 0).double().mean())
        assert zeros == (pytest.approx(1 - SPARSE_SHARE, abs=0.005) if name == "sparse" else 0.0)

    def test_files(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.safetensors"
        save_file({"a": torch.ones(2, 3), "b": torch.full((4,), 2.0, dtype=torch.float16)}, path)
        found = source(str(path), 0)
        assert (found.name, found.known) == ("mine", False)
        assert found.x.tolist() == [1.0] * 6 + [2.0] * 4
        for name, values in (("nan", [1.0, math.nan]), ("zero", [0.0, 0.0]), ("one", [1.0])):
            save_file({"a": torch.tensor(values)}, tmp_path / name)
            with pytest.raises(UserError, match="at least two values, all finite and not all zero"):
                source(str(tmp_path / name), 0)
        (tmp_path / "text").write_text("not safetensors at all")
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            source(str(tmp_path / "text"), 0)
        with pytest.raises(OptionError, match="source = 'nowhere'"):
            source("nowhere", 0)


def test_json_is_the_last_line_and_the_plot_is_there(tmp_path: Path) -> None:
    picture, file = tmp_path / "rate.png", tmp_path / "mine.safetensors"
    save_file({"update": torch.linspace(-1, 1, 4000)}, file)
    arguments = ["codecs", "--codec", "dqsg:levels=3", "--codec", "signsgd", "--codec", "none", "--coordinates", "5000"]
    arguments += ["--repeats", "1", "--rounds", "4", "--source", "sparse", "--source", str(file)]
    result = CliRunner().invoke(commands, [*arguments, "--plot", str(picture), "--json"])
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout.strip().splitlines()[-1])
    assert [(r["codec"], r["source"], r["coordinates"]) for r in records] == [
        (name, *rest) for rest in (("sparse", 5000), ("mine", 4000)) for name in ("dqsg", "signsgd", "none")
    ]
    assert records[0]["options"]["levels"] == 3.0
    assert records[3]["shannon_bits"] is None
    assert is_picture(picture)
    for said in ("sparse, 5,000 coordinates", "mine, 4,000 coordinates", "Shannon's lower bound", str(picture)):
        assert said in " ".join(result.stdout.split()) or said in result.stdout.replace("\n", "")


def test_the_table_fits_in_100_columns() -> None:
    records = bench.run(["dqsg:step=rms,resolution=0.5,levels=4.5", "bf16"], 3000, 1, threads=2, rounds=2)
    text = shown(bench.table(records))
    assert "…" not in text
    for column in ("codec", "bits", "NMSE", "bias z", "limit", "gap", "encode", "acc.", "enc. x2", "acc. x2"):
        assert column in text


def test_a_plot_without_a_single_point(tmp_path: Path) -> None:
    assert is_picture(plot_rate_distortion(bench.run(["none"], 100, 1, rounds=2), tmp_path / "none.png"))


class TestThreads:
    @pytest.mark.parametrize("spec", ["dqsg:coder=rans", "ndqsg:levels=3,ratio=3", "none"])
    def test_gains_are_measured(self, spec: str) -> None:
        record = bench.run([spec], 1 << 18, 1, threads=2, rounds=2)[0]
        assert record["threads"] == 2
        # How much is the machine's business, and that of whoever else uses it.
        assert all(0 < record[f"{what}_gain"] < math.inf for what in ("compute", "encode", "accumulate"))

    def test_spans_are_what_the_codec_decodes_alone(self) -> None:
        used = parse("dqsg")
        parts = threads.spans(used, 300_000)
        assert [lo for lo, _ in parts] == [0, *(hi for _, hi in parts[:-1])]
        assert parts[-1][1] == 300_000
        assert len(parts) == 3
        assert all(lo % used.chunk_coordinates == 0 for lo, _ in parts)


class TestEqualError:
    def test_a_continuous_knob_reaches_it(self) -> None:
        record = equal.run(0.1, ["dqsg"], sources=["gaussian"], coordinates=1 << 16, rounds=4)[0]
        assert record["reached"]
        assert record["nmse"] == pytest.approx(0.1, rel=0.005)
        # An error of step^2 / 12.
        assert record["options"]["resolution"] == pytest.approx(math.sqrt(1.2), rel=0.01)
        assert record["shannon_bits"] == pytest.approx(0.5 * math.log2(11), abs=0.01)

    def test_a_knob_with_notches_takes_the_first_that_is_good_enough(self) -> None:
        def at(low: int) -> float:
            records = bench.run([f"maxnorm-multiscale:high=12,low={low}"], 1 << 14, 1, rounds=4)
            return float(records[0]["nmse"])

        record = equal.run(0.01, ["maxnorm-multiscale"], sources=["gaussian"], coordinates=1 << 14, rounds=4)[0]
        low = record["options"]["low"]
        assert 1 < low < 11
        assert at(low) <= 0.01 < at(low - 1)

    def test_who_cannot_is_listed_at_the_nearest(self) -> None:
        specs = ["signsgd", "dqsg:step=rms,resolution=2", "topk", "natural", "dqsg:step=rms,resolution=0.01"]
        found = equal.run(1e-4, specs, sources=["laplace"], coordinates=1 << 13, rounds=2)
        records = {r["codec"]: r for r in found[:4]}
        assert not records["signsgd"]["reached"]
        assert records["dqsg"]["options"]["resolution"] == 2
        assert records["dqsg"]["nmse"] == pytest.approx(1 / 3, rel=0.05)
        assert not records["dqsg"]["reached"]
        assert records["topk"]["reached"]
        lines = [line for line in shown(equal.table(found)).splitlines() if "laplace" in line]
        assert ["dqsg" in lines[0], "topk" in lines[1]] == [True, True]
        assert ["!" in line for line in lines] == [False, False, True, True, True]

    def test_the_knobs_are_options_and_turn_the_right_way(self) -> None:
        names = {spec.partition(":")[0] for spec in equal.default_specs()}
        assert {"dqsg", "signsgd"} <= names <= set(codec_names())
        assert {"dqsg:coder=fixed", "dqsg:coder=rans"} < set(equal.default_specs())
        assert all(parse(spec).unbiased for spec in equal.default_specs() if "clip=0" in spec)
        x = source("gaussian", 1 << 12).x
        for name, knob in ((name, knob) for name, knobs in equal.KNOBS.items() for knob in knobs):
            middle = math.sqrt(knob.low * knob.high)
            values = (knob.low, knob.low + knob.notch) if knob.notch else (middle, 2 * middle)
            assert knob.option in type(parse(name).options).model_fields, name
            given = ",".join((*knob.given, ""))
            first, second = (quality(parse(f"{name}:{given}{knob.text(v)}"), x, x, 8).nmse for v in values)
            assert (second < first) == knob.finer, name

    def test_options_that_a_person_gives_choose_the_knob(self) -> None:
        specs = ["qsgd:step=l2", "qsgd:step=max,bucket=512", "qsgd:step=rms", "dqsg:step=max,levels=2"]
        found = equal.run(0.1, specs, sources=["gaussian"], coordinates=1 << 13, rounds=2)
        for record, spec in zip(found, specs, strict=True):
            assert record["options"]["step"] == spec.partition("step=")[2].partition(",")[0]
        norm, largest, root, fixed = found
        assert norm["reached"] and largest["reached"] and root["reached"] and not fixed["reached"]  # noqa: PT018
        assert norm["options"]["levels"] > 5 * largest["options"]["levels"] > 5
        assert fixed["options"]["levels"] == 2

    def test_as_a_command(self) -> None:
        result = CliRunner().invoke(
            commands, ["codecs", "--nmse", "0.1", "--codec", "dqsg", "--coordinates", "9000", "--rounds", "2", "--json"]
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout.strip().splitlines()[-1])[0]["asked_nmse"] == 0.1
        assert "bits a coordinate at NMSE 0.1" in result.stdout


@pytest.mark.parametrize("spec", ["dqsg:levels", "nope", "dqsg:levels=x"])
def test_wrong_codecs_are_named(spec: str) -> None:
    with pytest.raises(OptionError):
        bench.run([spec], coordinates=100, repeats=1)
    with pytest.raises(OptionError):
        equal.run(0.1, [spec], sources=["gaussian"])


def test_wrong_numbers_are_refused() -> None:
    for coordinates, repeats, workers, rounds in ((1, 1, 1, 2), (9, 0, 1, 2), (9, 1, 0, 2), (9, 1, 1, 1)):
        with pytest.raises(OptionError):
            bench.run(["none"], coordinates, repeats, threads=workers, rounds=rounds)
    with pytest.raises(OptionError):
        equal.run(0.0, ["dqsg"], sources=["gaussian"])
