"""What a run leaves behind: the resolved job, one record a round, the result, the model, the plots."""

from __future__ import annotations

import errno
import json
import logging
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from ditherps.config import JobConfig
from ditherps.errors import Reason, UserError
from ditherps.files import replacing
from ditherps_server.checkpoint import differences

log = logging.getLogger(__name__)

RESULT_FILE = "result.json"


@dataclass(slots=True)
class RoundRecord:
    """One closed round, as it stands in `rounds.jsonl`. Bytes are those of this round; times are in seconds."""

    round: int
    attempt: int
    base_version: int
    version: int
    workers: list[int]
    """Indices of those whose contributions entered."""
    coordinates: int
    absent: dict[int, str]
    elapsed_seconds: float
    """Since the first round opened."""
    round_seconds: float
    samples: int
    train_loss: float | None
    learning_rate: float
    test_accuracy: float | None
    """Of the model at `base_version`; null where it was not evaluated."""
    test_loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    uplink_payload_bytes: int
    """Encoded updates and buffers alone, without framing and control."""
    downlink_payload_bytes: int
    uplink_total_bytes: int
    """Since the start of the run."""
    downlink_total_bytes: int
    nmse: float | None
    """Expected squared error of the updates over their squared norm, mean over the workers."""
    compute_seconds: float
    """Mean over the workers."""
    encode_seconds: float
    decode_seconds: float
    step_bytes: int
    """Payload of the step of w that this round's update became; 0 where w travels in float32."""
    step_nmse: float | None
    """Expected squared error of the encoded difference over its squared norm."""
    step_rate: float
    """What of the decoded step w took."""
    step_lag_rounds: float | None
    """About the rounds by which w is behind x, by the last two."""
    step_encode_seconds: float
    w_digest: str
    """XXH3-128 (hex) of w, then the buffers, after this round."""
    nested_tiles: int
    nested_failed_tiles: int
    samples_new: int
    """Mode `data`: samples of which the server held nothing."""
    samples_held: int
    """Of which it held all that it asked for."""


@dataclass(slots=True)
class RunResult:
    """A finished run: what `--json` prints and `result.json` holds."""

    task: str
    model: str
    codec: str
    codec_options: dict[str, Any]
    downlink_codec: str
    """NAME or NAME:option=value,...; `none`: float32."""
    mode: str
    workers: int
    rounds: int
    seed: int
    reason: str
    seconds: float
    """From the opening of the first round to the end of the last, evaluations included."""
    test_accuracy: float | None
    test_loss: float | None
    parameters: int
    contributions: int
    """Contributions that entered a round."""
    uplink_bytes: int
    downlink_bytes: int
    total_bytes: int
    uplink_payload_bytes: int
    downlink_payload_bytes: int
    uplink_bits_per_coordinate: float | None
    """Wire bits of the uplink over coordinates of all contributions."""
    uplink_kbit_per_worker_round: float | None
    compression_vs_float32: float | None
    """32 over `uplink_bits_per_coordinate`."""
    downlink_bits_per_coordinate: float | None
    """Wire bits of the downlink over coordinates of all contributions."""
    total_bits_per_coordinate: float | None
    """Sum of both."""
    total_compression_vs_float32: float | None
    """64 over that: what float32 takes in both directions over what this run took."""
    downlink_steps: int
    """Encoded steps of w that were sent, each counted once for each worker that got it."""
    downlink_snapshots: int
    """Whole models that were sent."""
    digest_mismatches: int
    """How often a worker did not hold the w that it should."""
    nested_tiles: int
    nested_failed_tiles: int
    model_sha256: str
    run_dir: str


@dataclass
class Recorder:
    """Writes a run folder as the run goes on."""

    run_dir: Path
    listeners: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    _unwritten: list[str] = field(default_factory=list)

    def start(
        self, job: JobConfig, version: int = 0, again: Sequence[RoundRecord] = (), *, nothing_lost: bool = False
    ) -> None:
        """Write the resolved job file; keep the records of the rounds up to `version`, with which the run goes on.

        `again`: records of rounds that were applied again; what is there of them stays as it is. Raises `UserError`
        for damaged records, with `nothing_lost` where later rounds have been recorded, and where the folder cannot be
        written.
        """
        try:
            self._start(job, version, again, nothing_lost=nothing_lost)
        except OSError as error:
            raise UserError(f"{self.run_dir} cannot be written: {error.strerror}: choose another --run-dir") from None

    def _start(self, job: JobConfig, version: int, again: Sequence[RoundRecord], *, nothing_lost: bool) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for leftover in (RESULT_FILE, "model.safetensors"):
            (self.run_dir / leftover).unlink(missing_ok=True)
        (self.run_dir / "job.toml").write_text(tomli_w.dumps(job.model_dump(mode="json")))
        found = self._found() if version else {}
        if nothing_lost and found and max(found) > version:
            raise UserError(
                f"{self.run_dir} has records of rounds up to version {max(found)}, but its redo log ends at {version}: "
                "it is damaged; put back a good copy, or go on from there with --durability none"
            )
        kept = {number: line for number, line in found.items() if number <= version}
        for record in again:
            line = kept.setdefault(record.version, json.dumps(asdict(record)) + "\n")
            if json.loads(line)["w_digest"] != record.w_digest:
                log.warning("round %d gave another w than before: this machine computes otherwise", record.round)
        with replacing(self.run_dir / "rounds.jsonl", mode=0o666) as file:
            file.write("".join(kept[version] for version in sorted(kept)).encode())

    def _found(self) -> dict[int, str]:
        """The lines that are there, by version; the last may be half written, and is left out then."""
        records = self.run_dir / "rounds.jsonl"
        lines = records.read_text().splitlines(keepends=True) if records.exists() else []
        try:
            return {json.loads(line)["version"]: line for line in lines if line.endswith("\n")}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{records} is damaged: move it away, or begin anew without --resume") from None

    def sync(self) -> None:
        """Returns when what has been added is on disk; raises `OSError`."""
        self._write()
        if self._unwritten:
            raise OSError(errno.ENOSPC, f"{len(self._unwritten)} records of rounds are not written")
        with (self.run_dir / "rounds.jsonl").open("rb") as file:
            os.fsync(file.fileno())

    def add(self, record: RoundRecord) -> None:
        """Append one round. The run goes on where there is no room for it: it is written with a later one."""
        values = asdict(record)
        self._unwritten.append(json.dumps(values) + "\n")
        self._write()
        for listener in self.listeners:
            listener(values)

    def _write(self) -> None:
        """Append what is not in the file yet; where there is no room, later."""
        path = self.run_dir / "rounds.jsonl"
        size = path.stat().st_size
        try:
            with path.open("a") as file:
                file.writelines(self._unwritten)
        except OSError as error:
            log.error("%d records not written yet: %s", len(self._unwritten), error)
            os.truncate(path, size)  # no half line
        else:
            self._unwritten.clear()

    def finish(self, result: RunResult) -> None:
        """Write the result; returns when it is on disk, and the records before it. Raises `OSError`."""
        self.sync()
        with replacing(self.run_dir / RESULT_FILE, 0o666) as file:
            file.write((json.dumps(asdict(result), indent=2) + "\n").encode())


def finished(run_dir: Path, job: JobConfig) -> RunResult | None:
    """The result of a job that is over, from its run folder; None where there is none, or the run can go on.

    Raises `UserError` where the folder holds another job's, or it cannot be read.
    """
    path = run_dir / RESULT_FILE
    try:
        values = json.loads(path.read_text())
        if values["reason"] != Reason.FINISHED:
            return None
        result = RunResult(**values)
        then = JobConfig.model_validate(tomllib.loads((run_dir / "job.toml").read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}, or the job.toml beside it, cannot be read ({error}): move it away") from None
    if changed := differences(then, job):
        raise UserError(
            f"{path} is of another job, which is over ({'; '.join(changed)}): choose another folder, or begin anew "
            "without --resume"
        )
    return result
