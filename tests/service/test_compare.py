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
from ditherps.job import ResolvedJob
from ditherps.local import run_local
from ditherps.plots import read_records
from tests.service.test_local import job_of

SPECS = ("none", "bf16", "dqsg:levels=1.5,bucket=512")


class Compared(NamedTuple):
    folder: Path
    code: int
    output: str
    error: str


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """One comparison of three codecs, whose second run never comes about."""

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
        plain, failed, dithered = comparison["runs"]
        assert failed["failure"] == "worker-0 ended with exit code 6: it fell over"
        assert (failed["exit_code"], failed["test_accuracy"]) == (ExitCode.UNREACHABLE, None)
        for run in (plain, dithered):
            assert (run["exit_code"], run["failure"], run["rounds"]) == (0, None, 6)
            result = json.loads((Path(run["run_dir"]) / "result.json").read_text())
            assert all(
                run[key] == result[key] for key in ("test_accuracy", "uplink_bytes", "downlink_bytes", "seconds")
            )
        assert 8 < plain["uplink_bytes"] / dithered["uplink_bytes"] < 16

    def test_everything_but_the_codec_is_equal(self, compared: Compared) -> None:
        jobs = [job_of(compared.folder / name) for name in ("1-none", "3-dqsg-levels-1.5-bucket-512")]
        assert [job.codec for job in jobs] == ["none", "dqsg"]
        assert jobs[1].codec_options == {"levels": 1.5, "bucket": 512}
        bare = [job.model_copy(update={"codec": "", "codec_options": {}}) for job in jobs]
        assert bare[0] == bare[1]
        assert bare[0].seed == 7
        first = [read_records(compared.folder / name)[0] for name in ("1-none", "3-dqsg-levels-1.5-bucket-512")]
        assert first[0]["train_loss"] == first[1]["train_loss"]  # the same model and the same batches

    def test_what_a_person_sees(self, compared: Compared) -> None:
        lines = compared.output.splitlines()
        assert any("failed: worker-0" in " ".join(line.split()) or "bf16: failed" in line for line in lines)
        for said in ("digits, 6 rounds, 2 workers", "accuracy", "down Mbit", "accuracy_bits.png", "accuracy_time.png"):
            assert said in compared.output
        assert [f"run {n} of 3: {spec}" in compared.error for n, spec in enumerate(SPECS, 1)] == [True] * 3
        for name in ("accuracy_bits.png", "accuracy_time.png"):
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
    ],
)
def test_wrong_codecs_are_refused_before_anything_starts(specs: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        comparing.resolve(specs, {"task": "digits"})


def test_a_wrapper_keeps_what_it_wraps() -> None:
    [job] = comparing.resolve(["scaled:inner=(dqsg:levels=7,bucket=0)"], {"task": "digits"})
    assert job.config.codec_options == {"inner": "dqsg:levels=7,bucket=0"}
