"""`ditherps compare`: real runs beside each other, and what is said of one that fails."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from ditherps import compare as comparing
from ditherps.cli import main
from ditherps.errors import ExitCode, OptionError, UnreachableError
from ditherps.job import ResolvedJob, resolve_job
from ditherps.local import run_local
from ditherps.plots import read_records
from tests.service.test_local import job_of

SPECS = ("none", "bf16", "dqsg:levels=1.5,bucket=512/dqsg:levels=3", "data:level=2")
FOLDERS = ("1-none", "3-dqsg-levels-1.5-bucket-512-dqsg-levels-3")
PLOTS = ("accuracy_bits.png", "loss_bits.png", "accuracy_time.png")


class Compared(NamedTuple):
    folder: Path
    code: int
    output: str
    error: str


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """One comparison of three codecs and of samples, whose second run never comes about."""

    def run_or_fail(job: ResolvedJob, *arguments: Any, **options: Any) -> tuple[dict[str, Any] | None, int]:
        if job.config.codec == "bf16":
            raise UnreachableError("worker-0 ended with exit code 6: it fell over")
        return run_local(job, *arguments, **options)

    folder = tmp_path_factory.mktemp("compare") / "runs"
    codecs = [argument for spec in SPECS for argument in ("--codec", spec)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "run_local", run_or_fail)
        output, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            code = main(["compare", "--task", "digits", *codecs, "--workers", "2", "--rounds", "6", "--seed", "7",
                         "--set", "evaluate_every=2", "--run-dir", str(folder), "--json"])  # fmt: skip
    return Compared(folder, code, output.getvalue(), error.getvalue())


@pytest.mark.slow
class TestCompared:
    def test_the_others_stand_and_the_exit_code_tells(self, compared: Compared) -> None:
        assert compared.code == ExitCode.UNREACHABLE
        comparison = json.loads(compared.output.rstrip().rsplit("\n", 1)[-1])
        assert comparison == json.loads((compared.folder / "compare.json").read_text())
        assert comparison["task"] == "digits"
        assert [run["codec"] for run in comparison["runs"]] == list(SPECS)
        plain, failed, dithered, samples = comparison["runs"]
        assert failed["failure"] == "worker-0 ended with exit code 6: it fell over"
        assert (failed["exit_code"], failed["test_accuracy"]) == (ExitCode.UNREACHABLE, None)
        assert [run["mode"] for run in (plain, dithered, samples)] == ["gradient", "gradient", "data"]
        for run in (plain, dithered, samples):
            assert (run["exit_code"], run["failure"], run["rounds"]) == (0, None, 6)
            result = json.loads((Path(run["run_dir"]) / "result.json").read_text())
            assert all(run[key] == result[key] for key in comparing._KEPT)
            both = run["uplink_bits_per_coordinate"] + run["downlink_bits_per_coordinate"]
            assert run["total_bits_per_coordinate"] == pytest.approx(both)
            assert run["total_compression_vs_float32"] == pytest.approx(64 / both)
        assert (plain["downlink_codec"], dithered["downlink_codec"]) == ("none", "dqsg:levels=3")
        assert 8 < plain["uplink_bytes"] / dithered["uplink_bytes"] < 16
        assert 5 < dithered["uplink_payload_bytes"] / samples["uplink_payload_bytes"] < 20
        assert 5 < plain["downlink_bytes"] / dithered["downlink_bytes"] < 16

    def test_everything_but_the_codec_is_equal(self, compared: Compared) -> None:
        jobs = [job_of(compared.folder / name) for name in FOLDERS]
        assert [job.codec for job in jobs] == ["none", "dqsg"]
        assert jobs[1].codec_options == {"levels": 1.5, "bucket": 512}
        assert [job.downlink.codec for job in jobs] == ["none", "dqsg:levels=3"]
        assert jobs[0].downlink == jobs[1].downlink.model_copy(update={"codec": "none"})
        bare = [job.model_copy(update={"codec": "", "codec_options": {}, "downlink": None}) for job in jobs]
        assert bare[0] == bare[1]
        assert bare[0].seed == 7
        first = [read_records(compared.folder / name)[0] for name in FOLDERS]
        assert first[0]["train_loss"] == first[1]["train_loss"]  # the same model and the same batches

    def test_what_a_person_sees(self, compared: Compared) -> None:
        lines = compared.output.splitlines()
        assert any("failed: worker-0" in " ".join(line.split()) or "bf16: failed" in line for line in lines)
        for said in ("digits, 6 rounds, 2 workers", "accuracy", "payload", *PLOTS):
            assert said in compared.output
        assert [f"run {n} of 4: {spec}" in compared.error for n, spec in enumerate(SPECS, 1)] == [True] * 4
        for name in PLOTS:
            with Image.open(compared.folder / name) as image:
                image.verify()
                assert min(image.size) > 300


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([], "--codec none --codec dqsg"),
        (["dqsg", "dqsg"], "each once"),
        (["none", "nope"], "codec = 'nope'"),
        (["none", "dqsg:levels=0.3"], "levels"),
        (["none", "dqsg/"], "UP or UP/DOWN"),
        (["none", "dqsg/nope"], "codec = 'nope'"),
        (["none", "dqsg/ndqsg"], "without side information"),
    ],
)
def test_wrong_codecs_are_refused_before_anything_starts(specs: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        comparing.resolve(specs, {"task": "digits"})


def test_a_wrapper_keeps_what_it_wraps() -> None:
    [job] = comparing.resolve(["scaled:inner=(dqsg:levels=7,bucket=0)"], {"task": "digits"})
    assert job.config.codec_options == {"inner": "dqsg:levels=7,bucket=0"}


def test_a_downlink_of_all_that_name_none() -> None:
    flags = {"task": "digits", "downlink": {"codec": "bf16", "digest_every": 3}}
    jobs = comparing.resolve(["none", "dqsg", "dqsg/none", "none/dqsg:levels=3"], flags)
    assert [job.config.codec for job in jobs] == ["none", "dqsg", "dqsg", "none"]
    assert [job.config.downlink.codec for job in jobs] == ["bf16", "bf16", "none", "dqsg:levels=3"]
    assert {job.config.downlink.digest_every for job in jobs} == {3}
    with pytest.raises(OptionError, match="codec = 'nope'"):
        comparing.resolve(["none/dqsg", "dqsg"], {"task": "digits", "downlink": {"codec": "nope"}})


def test_samples_alone_take_no_model_down() -> None:
    """A way down is encoded in mode `data` only where workers compute gradients too."""
    specs = ["data", "data:keep=0.5", "data+dqsg:coder=rans", "data/dqsg"]
    jobs = comparing.resolve(specs, {"task": "digits"})
    assert {job.config.mode for job in jobs} == {"data"}
    first, gated, refined, named = (job.config.downlink.codec for job in jobs)
    assert (first, named) == ("none", "dqsg")
    assert "step=rms" in gated
    assert "coder=rans" in refined
    assert resolve_job({"task": "digits", "mode": "auto"}).config.downlink.codec == "none"


def a_run(codec: str, **more: Any) -> dict[str, Any]:
    return {
        "codec": codec, "failure": None, "rounds": 1000, "workers": 4, "test_accuracy": 0.9756, "test_loss": 0.0812,
        "uplink_bytes": 4_265_760_000, "uplink_payload_bytes": 4_265_000_000, "downlink_bytes": 215_000_000,
        "uplink_bits_per_coordinate": 32.001,
        "downlink_bits_per_coordinate": 1.6127, "total_compression_vs_float32": 1.904, "seconds": 1234.5, **more,
    }  # fmt: skip


def test_the_table_fits_in_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = dict.fromkeys(("test_accuracy", "test_loss", "downlink_bits_per_coordinate"))
    runs = [
        a_run("dqsg:coder=rans,resolution=3,reconstruct=matched/scaled:inner=(dqsg:levels=3)"),
        a_run("none", **unknown),
        a_run("bf16", failure="worker-0 ended with exit code 6: it fell over"),
    ]
    comparing.print_table({"task": "mnist", "runs": runs, "plots": ["runs/x/accuracy_bits.png"]})
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert text.splitlines()[0].strip() == "mnist, 1000 rounds, 4 workers"
    heads = zip(*(line.split("┃")[1:-1] for line in text.splitlines()[2:4]), strict=True)
    assert [" ".join("".join(head).split()) for head in heads] == [
        "codec", "accuracy", "loss", "up Mbit", "payload Mbit", "down Mbit", "bits up", "bits down", "below", "seconds",
    ]  # fmt: skip
    first, *_ = (line.split("│")[2:-1] for line in text.splitlines() if "34,126" in line)
    assert [cell.strip() for cell in first] == [
        "0.9756", "0.0812", "34,126.08", "34,120.00", "1,720.00", "32.001", "1.613", "1.9", "1234.5",
    ]  # fmt: skip
    assert "float32 in both directions" in text
    assert text.splitlines()[-1] == "runs/x/accuracy_bits.png"
