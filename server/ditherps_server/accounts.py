"""What a run adds up to, in both directions: totals, the record of each round, metrics, and what is worth a warning."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ditherps.config import JobConfig
from ditherps.downlink import LAG_LIMIT, lag_rounds
from ditherps.errors import Reason
from ditherps.logs import ROUNDS
from ditherps.metrics import DOWN, LARGEST_NAMED, UP, ServerMetrics
from ditherps.wire import Traffic, WireMeter
from ditherps_server.broadcast import Answer, Broadcast
from ditherps_server.evaluation import Evaluation
from ditherps_server.model import ServerModel
from ditherps_server.records import RoundRecord, RunResult
from ditherps_server.rounds import CloseRound, Plan
from ditherps_server.staging import Announcement
from ditherps_server.updater import UpdateReport
from ditherps_server.updates import SampleReport

log = logging.getLogger(__name__)
rounds_log = logging.getLogger(ROUNDS)

_LARGEST_MEAN = 1e30
"""What is not below it, NaN too, is left out of means, which would overflow."""


@dataclass(slots=True)
class Totals:
    """What a run adds up to."""

    began: float = math.nan
    """When the first round opened, had the server been there ever since (on the coordinator's clock)."""
    finished: float = math.nan
    contributions: int = 0
    uplink_payload_bytes: int = 0
    downlink_payload_bytes: int = 0
    nested_tiles: int = 0
    nested_failed_tiles: int = 0
    downlink_steps: int = 0
    """Steps of w that were sent, each counted once for each worker that got it."""
    downlink_snapshots: int = 0
    digest_mismatches: int = 0

    def saved(self, now: float) -> dict[str, Any]:
        """As plain values, from which `restored` goes on."""
        counts = asdict(self)
        began = counts.pop("began")
        del counts["finished"]
        return counts | {"elapsed_seconds": now - began}

    @classmethod
    def restored(cls, saved: Mapping[str, Any], now: float) -> Totals:
        """From what `saved` gave, at another time."""
        counts = dict(saved)
        elapsed = counts.pop("elapsed_seconds", math.nan)
        return cls(**counts, began=now - elapsed)


@dataclass(frozen=True, slots=True)
class Spent:
    """Bytes since the run began."""

    traffic: Traffic = field(default_factory=Traffic)
    uplink_payload_bytes: int = 0
    downlink_payload_bytes: int = 0


class Accounts:
    """Counts what one job sends and takes. Not thread-safe."""

    def __init__(
        self,
        job: JobConfig,
        coordinates: int,
        broadcast: Broadcast,
        metrics: ServerMetrics,
        meter: WireMeter,
        saved: Mapping[str, Any],
        now: float,
    ) -> None:
        """`saved`: what a server before this one had added up (`saved` of its accounts), empty for a new job.

        `meter` goes on from its traffic.
        """
        self._job, self._coordinates, self._broadcast = job, coordinates, broadcast
        self._metrics, self._meter = metrics, meter
        self._warned: set[str] = set()
        self._names = job.member_table
        self._latencies: dict[int, float] = {}
        """Seconds from the opening of the round, of each contribution to it."""
        for name in self._names if self._named else ():  # so that each is 0 from the start
            metrics.worker_contributions.labels(name)
            metrics.worker_absences.labels(name)
        self.totals = Totals()
        self._recorded = Spent()
        """Up to the close of the last round that was recorded."""
        self._exported = meter.traffic
        if saved:
            self.restore(saved, now)

    @property
    def traffic(self) -> Traffic:
        """Wire bytes since the run began."""
        return self._meter.traffic

    def saved(self, now: float) -> dict[str, Any]:
        """As plain values."""
        return {
            "totals": self.totals.saved(now),
            "traffic": asdict(self.traffic),
            "recorded": asdict(self._recorded),
        }

    def restore(self, saved: Mapping[str, Any], now: float) -> bool:
        """Go on from what `saved` gave; False if that is of before, for bytes only grow."""
        traffic = Traffic(**saved["traffic"])
        if traffic.uplink_bytes + traffic.downlink_bytes < self.traffic.uplink_bytes + self.traffic.downlink_bytes:
            return False
        self.totals = Totals.restored(saved["totals"], now)
        recorded = dict(saved["recorded"])
        self._recorded = Spent(Traffic(**recorded.pop("traffic")), **recorded)
        self._meter.restore(traffic)
        self._exported = traffic
        return True

    def opened(self, plan: Plan) -> None:
        """A round is open."""
        self._latencies.clear()
        if math.isnan(self.totals.began):
            self.totals.began = plan.opened_at

    @property
    def _named(self) -> bool:
        """Whether each worker has series of its own."""
        return len(self._names) <= LARGEST_NAMED

    def seen(self, index: int) -> None:
        """A worker has given a sign of life."""
        if self._named:
            self._metrics.worker_last_seen_timestamp_seconds.labels(self._names[index]).set_to_current_time()

    def awaiting(self, indices: Collection[int]) -> None:
        """Whom the open round waits for."""
        if self._named:
            for index, name in enumerate(self._names):
                self._metrics.worker_awaited.labels(name).set(index in indices)

    def arrived(self, announcement: Announcement, latency_seconds: float) -> None:
        """A contribution is here, whole, so long after its round was opened."""
        self._latencies[announcement.index] = latency_seconds
        if self._named:
            self._metrics.worker_latency_seconds.labels(self._names[announcement.index]).set(latency_seconds)
        self._metrics.contributions.inc()
        self._metrics.payload_bytes.labels(UP, self._job.uplink).inc(announcement.content_bytes)
        self._metrics.values.labels(UP, self._job.uplink).inc(self._coordinates)

    def spent(self) -> Spent:
        """Bytes up to now."""
        return Spent(self.traffic, self.totals.uplink_payload_bytes, self.totals.downlink_payload_bytes)

    def received(self, nbytes: int) -> None:
        """So many bytes of payload are here; negative: they are not taken, and may come again."""
        self.totals.uplink_payload_bytes += nbytes

    def mismatched(self) -> None:
        """A worker does not hold the w that it should."""
        self.totals.digest_mismatches += 1
        self._metrics.digest_mismatches.inc()

    def pulled(self, answer: Answer) -> None:
        """An answer has been sent whole."""
        totals, metrics, coordinates = self.totals, self._metrics, self._coordinates
        step_codec = self._broadcast.codec_name
        totals.downlink_payload_bytes += answer.payload_bytes
        totals.downlink_steps += answer.steps
        metrics.payload_bytes.labels(DOWN, answer.snapshot or step_codec).inc(answer.buffer_bytes)
        if answer.snapshot:
            totals.downlink_snapshots += 1
            metrics.payload_bytes.labels(DOWN, answer.snapshot).inc(answer.snapshot_bytes)
            metrics.values.labels(DOWN, answer.snapshot).inc(coordinates)
        if answer.steps:
            metrics.payload_bytes.labels(DOWN, step_codec).inc(answer.step_bytes)
            metrics.values.labels(DOWN, step_codec).inc(coordinates * answer.steps)
        metrics.pulls.labels("snapshot" if answer.snapshot else "steps" if answer.steps else "check").inc()

    def export(self) -> None:
        """Bring the counters of wire bytes up to date."""
        traffic = self.traffic
        grown, self._exported = traffic - self._exported, traffic
        self._metrics.wire_bytes.labels(UP).inc(grown.uplink_bytes)
        self._metrics.wire_bytes.labels(DOWN).inc(grown.downlink_bytes)

    def applied(
        self,
        action: CloseRound,
        announcements: Sequence[Announcement],
        report: UpdateReport,
        evaluation: Evaluation | None,
        model: ServerModel,
        spent: Spent,
        now: float,
    ) -> RoundRecord:
        """A round's update is in the model: its record, which is added to the totals.

        `evaluation`: of the round's base version, where there is one. `spent`: up to the close of the round, so that
        the record is the same when the round is applied again from the redo log.
        """
        plan, totals, step, before = action.plan, self.totals, report.step, self._recorded
        traffic, self._recorded = spent.traffic - before.traffic, spent
        samples = sum(a.samples for a in announcements)
        record = RoundRecord(
            round=plan.round, attempt=plan.attempt, base_version=plan.base_version, version=model.version,
            workers=list(action.members), coordinates=model.layout.coordinates,
            absent={index: reason.value for index, reason in action.absent.items()},
            elapsed_seconds=now - totals.began, round_seconds=now - plan.opened_at, samples=samples,
            train_loss=_mean([a.loss for a in announcements], [a.samples for a in announcements]),
            learning_rate=report.learning_rate,
            test_accuracy=evaluation.accuracy if evaluation else None,
            test_loss=evaluation.loss if evaluation else None,
            uplink_bytes=traffic.uplink_bytes, downlink_bytes=traffic.downlink_bytes,
            uplink_payload_bytes=spent.uplink_payload_bytes - before.uplink_payload_bytes,
            downlink_payload_bytes=spent.downlink_payload_bytes - before.downlink_payload_bytes,
            uplink_total_bytes=spent.traffic.uplink_bytes, downlink_total_bytes=spent.traffic.downlink_bytes,
            nmse=_mean([a.nmse for a in announcements]),
            compute_seconds=_mean([a.compute_seconds for a in announcements]) or 0.0,
            encode_seconds=_mean([a.encode_seconds for a in announcements]) or 0.0,
            decode_seconds=report.decode_seconds,
            step_bytes=step.nbytes if step else 0, step_nmse=step.nmse if step else None,
            step_rate=step.rate if step else 1.0,
            step_lag_rounds=lag_rounds(step.nmse, step.rate) if step else None,
            step_encode_seconds=step.encode_seconds if step else 0.0,
            w_digest=model.digest.hex(),
            nested_tiles=report.decode.tiles, nested_failed_tiles=report.decode.failed_tiles,
            samples_new=report.samples.new if report.samples else 0,
            samples_held=report.samples.held if report.samples else 0,
        )  # fmt: skip
        totals.contributions += len(record.workers)
        totals.nested_tiles += record.nested_tiles
        totals.nested_failed_tiles += record.nested_failed_tiles
        return record

    def _log(self, record: RoundRecord, announcements: Sequence[Announcement]) -> None:
        """One line for each worker of the round: what it brought, or why it is missing."""
        for a in announcements:
            rounds_log.info(
                "contribution round=%d worker=%s role=%s bytes=%d samples=%d loss=%.6g nmse=%.4g compute_seconds=%.4f "
                "encode_seconds=%.4f latency_seconds=%.4f",
                record.round, self._names[a.index], a.role.value, a.content_bytes, a.samples, a.loss, a.nmse,
                a.compute_seconds, a.encode_seconds, self._latencies.get(a.index, math.nan),
            )  # fmt: skip
        for index, reason in record.absent.items():
            rounds_log.warning("absent round=%d worker=%s reason=%s", record.round, self._names[index], reason)
        rounds_log.info(
            "closed round=%d version=%d workers=%d loss=%.6g uplink_bytes=%d downlink_bytes=%d seconds=%.4f",
            record.round, record.version, len(record.workers),
            math.nan if record.train_loss is None else record.train_loss, record.uplink_bytes, record.downlink_bytes,
            record.round_seconds,
        )  # fmt: skip

    def show(self, record: RoundRecord, announcements: Sequence[Announcement]) -> None:
        """Bring metrics and log up to a round that was applied now, and warn of what a person should change."""
        metrics = self._metrics
        self._log(record, announcements)
        metrics.rounds.labels("applied").inc()
        metrics.round_closed_timestamp_seconds.set_to_current_time()
        metrics.round_contributions.set(len(record.workers))
        for reason in record.absent.values():
            metrics.absences.labels(reason).inc()
        if self._named:
            for index in record.workers:
                metrics.worker_contributions.labels(self._names[index]).inc()
            for index in record.absent:
                metrics.worker_absences.labels(self._names[index]).inc()
        metrics.round_bits.labels(UP).set(8 * record.uplink_bytes)
        metrics.round_bits.labels(DOWN).set(8 * record.downlink_bytes)
        metrics.round_duration_seconds.observe(record.round_seconds)
        metrics.decode_seconds.observe(record.decode_seconds)
        metrics.decode_tiles.inc(record.nested_tiles)
        metrics.decode_ambiguities.inc(record.nested_failed_tiles)
        metrics.learning_rate.set(record.learning_rate)
        metrics.step_encode_seconds.observe(record.step_encode_seconds)
        metrics.step_bytes.set(record.step_bytes)
        metrics.step_rate.set(record.step_rate)
        for gauge, value in (
            (metrics.train_loss, record.train_loss), (metrics.update_nmse, record.nmse),
            (metrics.step_nmse, record.step_nmse), (metrics.step_lag_rounds, record.step_lag_rounds),
        ):  # fmt: skip
            if value is not None:
                gauge.set(value)
        self._warn(record)

    def show_samples(self, report: SampleReport) -> None:
        """Bring metrics up to a round in mode `data`."""
        metrics = self._metrics
        for kind, count in (("new", report.new), ("finer", report.finer), ("held", report.held)):
            metrics.samples.labels(kind).inc(count)
        metrics.cached_samples.set(report.cached)
        metrics.sample_cache_bytes.set(report.cached_bytes)
        metrics.gradient_seconds.observe(report.gradient_seconds)
        if report.agreement is not None:
            metrics.probe_cosine.set(report.agreement.cosine)
            metrics.probe_relative_error.set(report.agreement.relative_error)

    def _warn(self, record: RoundRecord) -> None:
        """Say once what a person should change."""
        totals, limit = self.totals, self._job.nested_failure_limit
        share = totals.nested_failed_tiles / totals.nested_tiles if totals.nested_tiles else 0.0
        self._metrics.nested_failure_ratio.set(share)
        if share > limit and "nested" not in self._warned:
            self._warned.add("nested")
            log.warning("nested decoding fails too often: share=%.3f nested_failure_limit=%g", share, limit)
        if (record.step_lag_rounds or 0.0) > LAG_LIMIT and "lag" not in self._warned:
            self._warned.add("lag")
            log.warning(
                "w lags behind x: rounds=%.1f downlink_codec=%s", record.step_lag_rounds, self._broadcast.codec_spec,
            )  # fmt: skip

    def result(
        self, run_dir: Path, model: ServerModel, evaluation: Evaluation | None, reason: Reason, model_sha256: str
    ) -> RunResult:
        """The run, which is over; `evaluation` is the last one."""
        job, totals, traffic = self._job, self.totals, self.traffic
        if evaluation is not None and evaluation.version != model.version:
            evaluation = None  # of an older model
        sent = totals.contributions * model.layout.coordinates
        bits, bits_down = (8 * n / sent if sent else None for n in (traffic.uplink_bytes, traffic.downlink_bytes))
        both = bits + bits_down if bits is not None and bits_down is not None else None
        kbit = 8e-3 * traffic.uplink_bytes / totals.contributions if sent else None
        seconds = totals.finished - totals.began
        return RunResult(
            task=job.task, model=job.model, codec=job.uplink,
            codec_options=job.data.model_dump(exclude_defaults=True) if job.mode == "data" else job.codec_options,
            downlink_codec=self._broadcast.codec_spec, mode=job.mode, workers=job.workers,
            rounds=model.version, seed=job.seed, reason=reason.value,
            seconds=seconds if math.isfinite(seconds) else 0.0,
            test_accuracy=evaluation.accuracy if evaluation else None,
            test_loss=evaluation.loss if evaluation else None,
            parameters=model.layout.coordinates, contributions=totals.contributions,
            uplink_bytes=traffic.uplink_bytes, downlink_bytes=traffic.downlink_bytes,
            total_bytes=traffic.uplink_bytes + traffic.downlink_bytes,
            uplink_payload_bytes=totals.uplink_payload_bytes, downlink_payload_bytes=totals.downlink_payload_bytes,
            uplink_bits_per_coordinate=bits,
            uplink_kbit_per_worker_round=kbit,
            compression_vs_float32=32 / bits if bits else None,
            downlink_bits_per_coordinate=bits_down, total_bits_per_coordinate=both,
            total_compression_vs_float32=64 / both if both else None, downlink_steps=totals.downlink_steps,
            downlink_snapshots=totals.downlink_snapshots, digest_mismatches=totals.digest_mismatches,
            nested_tiles=totals.nested_tiles, nested_failed_tiles=totals.nested_failed_tiles,
            model_sha256=model_sha256, run_dir=str(run_dir),
        )  # fmt: skip


def _mean(values: list[float], weights: list[int] | None = None) -> float | None:
    """Of what workers say of themselves, as far as it can be."""
    pairs = [(v, w) for v, w in zip(values, weights or [1] * len(values), strict=True) if abs(v) < _LARGEST_MEAN]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
