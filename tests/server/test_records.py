"""What a run leaves behind: records survive a full disk, and a server that goes on keeps those of its rounds."""

from __future__ import annotations

import json
import resource
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ditherps.config import JobConfig
from ditherps.errors import UserError
from ditherps_server.records import RESULT_FILE, Recorder, RoundRecord, RunResult, finished

JOB = JobConfig()


def record(version: int) -> RoundRecord:
    values: dict[str, Any] = {field.name: 0 for field in fields(RoundRecord)}
    return RoundRecord(**values | {"round": version - 1, "version": version, "workers": [0], "absent": {}})


def versions(folder: Path) -> list[int]:
    return [json.loads(line)["version"] for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_what_finds_no_room_is_written_later(tmp_path: Path) -> None:
    heard: list[int] = []
    recorder = Recorder(tmp_path, [lambda values: heard.append(values["version"])])
    recorder.start(JOB)
    recorder.add(record(1))
    size = (tmp_path / "rounds.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        recorder.add(record(2))
        recorder.add(record(3))
        assert versions(tmp_path) == [1]  # and no half line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    recorder.add(record(4))
    assert versions(tmp_path) == heard == [1, 2, 3, 4]


@pytest.mark.parametrize("torn", ["", '{"round": 5, "ver'])
def test_a_server_that_goes_on_keeps_the_records_up_to_its_version(tmp_path: Path, torn: str) -> None:
    recorder = Recorder(tmp_path)
    recorder.start(JOB)
    for version in range(1, 6):
        recorder.add(record(version))
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write(torn)
    again = Recorder(tmp_path)
    again.start(JOB, 3)
    assert versions(tmp_path) == [1, 2, 3]
    again.add(record(4))
    assert versions(tmp_path) == [1, 2, 3, 4]
    Recorder(tmp_path).start(JOB)
    assert versions(tmp_path) == []


def test_damaged_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text('{"version": 1}\nwhat?\n{"version": 2}\n')
    with pytest.raises(UserError, match=r"rounds\.jsonl is damaged"):
        Recorder(tmp_path).start(JOB, 2)


def result(**changes: Any) -> RunResult:
    values: dict[str, Any] = {field.name: 0 for field in fields(RunResult)}
    return RunResult(**values | {"reason": "finished", **changes})


def test_a_finished_run_is_found_again(tmp_path: Path) -> None:
    assert finished(tmp_path, JOB) is None
    recorder = Recorder(tmp_path)
    recorder.start(JOB)
    recorder.finish(result(reason="suspended"))
    assert finished(tmp_path, JOB) is None
    recorder.finish(result(rounds=7))
    assert finished(tmp_path, JOB) == result(rounds=7)
    with pytest.raises(UserError, match=r"another job, which is over .*seed: .* then, 2 now"):
        finished(tmp_path, JOB.model_copy(update={"seed": 2}))
    (tmp_path / RESULT_FILE).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        finished(tmp_path, JOB)


def test_records_that_found_no_room_are_there_at_the_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.start(JOB)
    recorder._unwritten.append('{"version": 1}\n')
    recorder.finish(result())
    assert versions(tmp_path) == [1]
