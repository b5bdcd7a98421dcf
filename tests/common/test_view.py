"""What a person sees of a run while it goes on, of its end, and of a server."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from ditherps.bench import rounds as bench_rounds
from ditherps.config import JobConfig
from ditherps.status import print_status
from ditherps.summary import print_summary
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps.view import LiveView, PlainView, Progress

COORDINATES, WORKERS = 1000, 2
FLOAT32 = 4 * COORDINATES * WORKERS


def record(version: int, up: int = FLOAT32 // 20, down: int = FLOAT32 // 5, before: int = 0) -> dict[str, Any]:
    """The record of a round in which so many bytes went up and down, as in each before it."""
    return {
        "version": before + version, "workers": [0, 1], "absent": {"3": "silent"},
        "coordinates": COORDINATES, "elapsed_seconds": float(version),
        "train_loss": 0.5, "test_accuracy": 0.75, "nested_tiles": 0, "nested_failed_tiles": 0,
        "uplink_bytes": up, "downlink_bytes": down, "step_lag_rounds": 0.3,
        "uplink_total_bytes": (before + version) * up, "downlink_total_bytes": (before + version) * down,
    }  # fmt: skip


def job(**options: Any) -> JobConfig:
    return JobConfig.model_validate({"workers": WORKERS, "rounds": 4, "codec": "dqsg", **options})


class TestProgress:
    def test_both_directions_over_float32(self) -> None:
        progress = Progress(job())
        assert progress.below_float32 == ("?", "?", "?")
        for version in (1, 2, 3):
            progress.add(record(version))
            # 1/20 and 1/5 of float32: 2 over 1/20 + 1/5 is 8.
            assert progress.below_float32 == ("20.0", "5.0", "8.0")

    def test_all_rounds_count_and_not_the_last_alone(self) -> None:
        progress = Progress(job())
        progress.add(record(1, up=FLOAT32, down=FLOAT32))
        progress.add(record(2, up=FLOAT32 // 2, down=0))
        assert progress.below_float32 == ("1.3", "2.0", "1.6")

    def test_a_run_that_goes_on_is_judged_by_what_was_seen(self) -> None:
        progress = Progress(job(rounds=2000))
        progress.add(record(1, before=1000))
        assert progress.below_float32 == ("20.0", "5.0", "8.0")


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView(job()) as shown:
        for version in (1, 2):
            shown.show(record(version))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "round 1/4 loss 0.5000 accuracy 0.7500 up 3.2 kbit (1/20.0) down 12.8 kbit (1/5.0) both 1/8.0 of float32, "
        "left ?",
        "round 2/4 loss 0.5000 accuracy 0.7500 up 6.4 kbit (1/20.0) down 25.6 kbit (1/5.0) both 1/8.0 of float32, "
        "left 0:02",
    ]


def test_a_warning_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView(job()) as shown:
        for version, lag in ((1, 0.9), (2, 2.5), (3, 2.6), (4, None)):
            shown.show(record(version) | {"step_lag_rounds": lag})
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "2.5 rounds behind" in warnings[0]
    assert "--downlink-codec" in warnings[0]


@pytest.mark.parametrize(("options", "codecs"), [({}, "dqsg"), ({"downlink": {"codec": "none"}}, "dqsg/none")])
def test_the_panel(options: dict[str, Any], codecs: str) -> None:
    console = Console(width=100, record=True, quiet=True)
    shown = LiveView(job(**options), console)
    shown.show(record(1))
    shown.show(record(2))
    with console.capture() as capture:
        console.quiet = False
        console.print(shown._render())
    text = capture.get()
    assert f"digits  ·  {codecs}  ·  round 2/4" in text
    for said in ("6.4 kbit  (3.2 kbit a round)", "25.6 kbit  (12.8 kbit a round)", "20.0 up, 5.0 down, 8.0 both"):
        assert said in text
    assert "…" not in text


def result(**more: Any) -> dict[str, Any]:
    return {
        "task": "digits", "codec": "dqsg", "reason": "finished", "rounds": 4, "workers": 2, "seconds": 1.5,
        "test_accuracy": 0.9, "test_loss": 0.25, "uplink_bytes": 1600, "downlink_bytes": 6400,
        "uplink_kbit_per_worker_round": 1.6, "uplink_bits_per_coordinate": 1.6, "downlink_bits_per_coordinate": 6.4,
        "total_bits_per_coordinate": 8.0, "compression_vs_float32": 20.0, "total_compression_vs_float32": 8.0,
        "downlink_codec": "dqsg:levels=3", "downlink_steps": 6, "downlink_snapshots": 2, "digest_mismatches": 0,
        "nested_tiles": 0, "nested_failed_tiles": 0, "model_sha256": "ab" * 32, "run_dir": "runs/x", **more,
    }  # fmt: skip


class TestSummary:
    def printed(self, capsys: pytest.CaptureFixture[str], **more: Any) -> str:
        print_summary(result(**more))
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    def test_both_directions(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = self.printed(capsys)
        assert "uplink 12.8 kbit, 1.6 kbit a worker and round" in text
        assert "downlink 51.2 kbit, 6 steps with dqsg:levels=3, 2 whole models" in text
        assert "bits a coordinate 1.600 up + 6.400 down = 8.000" in text
        assert "times below float32 20.0 up, 5.0 down, 8.0 both" in text
        assert "wrong models" not in text

    def test_a_model_in_float32_and_workers_that_held_another(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = self.printed(capsys, downlink_codec="none", downlink_steps=0, downlink_snapshots=8, digest_mismatches=3)
        assert "downlink 51.2 kbit, 8 whole models in float32" in text
        assert "wrong models 3 times" in text

    def test_a_run_without_contributions(self, capsys: pytest.CaptureFixture[str]) -> None:
        unknown = (
            "test_accuracy", "test_loss", "uplink_kbit_per_worker_round", "uplink_bits_per_coordinate",
            "downlink_bits_per_coordinate", "total_bits_per_coordinate", "compression_vs_float32",
            "total_compression_vs_float32",
        )  # fmt: skip
        text = self.printed(capsys, **dict.fromkeys(unknown))
        assert "bits a coordinate ? up + ? down = ?" in text
        assert "times below float32 ? up, ? down, ? both" in text


def test_the_status_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    status = pb.StatusResponse(
        task="digits", codec="ndqsg", downlink_codec="dqsg", phase=types_pb2.PHASE_OPEN, round=3, rounds=10,
        uplink_bytes=1000, downlink_bytes=2000, uptime_seconds=5, waiting_for="workers",
    )  # fmt: skip
    print_status(status, as_json=False)
    text = " ".join(capsys.readouterr().out.split())
    assert "digits with ndqsg: round 3 of 10" in text
    assert "uplink 8 kbit, downlink 16 kbit with dqsg, both 24 kbit; running for 5 s" in text


def test_the_rounds_table_fits_in_100_columns_and_names_both_codecs(capsys: pytest.CaptureFixture[str]) -> None:
    one = {
        "codec": "dqsg:coder=rans,resolution=3/dqsg", "uplink_codec": "dqsg:coder=rans,resolution=3",
        "downlink_codec": "dqsg", "coordinates": 11_173_962, "workers": 4, "cores": 2,
        "seconds_median": 0.25, "seconds_min": 0.2, "seconds_max": 0.3, "uplink_bytes": 178_000_000,
        "downlink_bytes": 9_000_000, "decode_seconds": 0.01, "step_encode_seconds": 0.0234,
    }  # fmt: skip
    bench_rounds.print_table([one])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for said in ("up kbit", "down kbit", "step s", "1,424,000", "72,000", "0.0234"):
        assert said in text
