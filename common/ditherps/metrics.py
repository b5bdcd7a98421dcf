"""Prometheus metrics of both ends: one object each, on its own registry, served at /metrics.

Base units (seconds, bytes), `_total` on counters, closed sets of label values, and never a round as a label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import start_http_server

from ditherps.errors import Reason, UserError

UP, DOWN = "up", "down"
_ROUND_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_CODEC_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class _Metrics:
    """What both ends have: a registry with the process's own metrics, and who they are."""

    def __init__(self, component: str, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        info = Gauge(
            "ditherps_build_info", "Version and component of this process; always 1.", ["component", "version"],
            registry=self.registry,
        )  # fmt: skip
        info.labels(component, version).set(1)
        self.wire_bytes = self._counter(
            "wire_bytes", "Length-prefixed gRPC messages and a constant for each RPC, control included.", "direction"
        )
        self.payload_bytes = self._counter(
            "payload_bytes", "Encoded updates, models and buffers alone.", "direction", "codec"
        )
        self.values = self._counter("values", "Coordinates sent.", "direction", "codec")
        self.round = self._gauge("round", "Round that is open, or comes next.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ditherps_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"ditherps_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ditherps_{name}", text, buckets=buckets, registry=self.registry)

    def serve(self, host: str, port: int) -> int:
        """Serve /metrics from a thread and return the port; raises `UserError` if it is taken."""
        try:
            server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise UserError(
                f"metrics cannot listen on {host}:{port} ({error.strerror}); "
                "choose another --metrics-port (0: any, -1: none)"
            ) from None
        return server.server_port


class ServerMetrics(_Metrics):
    """What the server exports."""

    def __init__(self, version: str) -> None:
        super().__init__("server", version)
        self.round_bits = self._gauge("round_bits", "Wire bits of the last closed round, all workers.", "direction")
        self.round_duration_seconds = self._histogram(
            "round_duration_seconds", "From the opening of a round to its update.", _ROUND_SECONDS
        )
        self.round_workers = self._gauge("round_workers", "Workers by their state in the open round.", "state")
        self.rounds = self._counter("rounds", "Rounds that ended, by how.", "result")
        self.decode_seconds = self._histogram(
            "decode_seconds", "Decoding and summing all contributions of a round.", _CODEC_SECONDS
        )
        self.step_encode_seconds = self._histogram(
            "step_encode_seconds", "Encoding the model's step for all workers.", _CODEC_SECONDS
        )
        self.step_bytes = self._gauge("step_bytes", "Payload of the model's last encoded step; 0: it goes in float32.")
        self.step_nmse = self._gauge("step_nmse", "Expected squared error of the last step over its squared norm.")
        self.step_lag_rounds = self._gauge("step_lag_rounds", "About the rounds by which the workers' model is behind.")
        self.step_rate = self._gauge("step_rate", "What of the last decoded step the workers' model took (0 to 1).")
        self.history_bytes = self._gauge("history_bytes", "Encoded steps that are kept for workers that were away.")
        self.pulls = self._counter(
            "pulls", "Answers to pulls: snapshot, steps, or check (nothing was missing).", "kind"
        )
        self.digest_mismatches = self._counter(
            "digest_mismatches", "Workers that did not hold the model that they should, and got a snapshot."
        )
        self.contributions = self._counter("contributions", "Contributions that arrived whole.")
        self.rejected_updates = self._counter("rejected_updates", "Contributions that were refused.", "reason")
        self.refused_rpcs = self._counter("refused_rpcs", "RPCs that were refused.", "reason")
        self.decode_tiles = self._counter("decode_tiles", "Nested tiles that were decoded.")
        self.decode_ambiguities = self._counter(
            "decode_ambiguities", "Nested tiles whose checksum did not match: decoded to the wrong coset."
        )
        self.nested_failure_ratio = self._gauge(
            "nested_failure_ratio", "Share of nested tiles of this run that failed (0 to 1)."
        )
        self.train_loss = self._gauge("train_loss", "Mean training loss of the last closed round.")
        self.test_loss = self._gauge("test_loss", "Test loss of the last evaluation.")
        self.test_accuracy = self._gauge("test_accuracy", "Test accuracy (0 to 1) of the last evaluation.")
        self.update_nmse = self._gauge("update_nmse", "Expected squared error of updates over their squared norm.")
        self.learning_rate = self._gauge("learning_rate", "Learning rate of the server's optimizer.")
        self.staged_bytes = self._gauge("staged_bytes", "Bytes of contributions that are held now.")
        self.checkpoint_seconds = self._gauge("checkpoint_seconds", "How long writing the last checkpoint took.")
        self.checkpoint_failures = self._counter("checkpoint_failures", "Checkpoints that could not be written.")
        self.redo_failures = self._counter("redo_failures", "Records of the redo log that found no room on the disk.")
        self.checkpoint_timestamp_seconds = self._gauge(
            "checkpoint_timestamp_seconds", "When the last checkpoint was written."
        )
        self.certificate_expiry_timestamp_seconds = self._gauge(
            "certificate_expiry_timestamp_seconds",
            "When a certificate of the server ends: ca, or its own.",
            "certificate",
        )
        self.waiting_seconds = self._gauge(
            "waiting_seconds",
            "How long the server has been waiting for what it waits for; 0: not for that.",
            "awaited",
        )
        self.worker_last_seen_timestamp_seconds = self._gauge(
            "worker_last_seen_timestamp_seconds", "When a worker last gave a sign of life.", "worker"
        )
        for direction in (UP, DOWN):
            self.wire_bytes.labels(direction)
            self.round_bits.labels(direction)
        for kind in ("snapshot", "steps", "check"):
            self.pulls.labels(kind)
        for result in ("applied", "abandoned"):
            self.rounds.labels(result)
        for reason in Reason:
            self.rejected_updates.labels(reason.value)

    def watch_certificates(self, expiry: Callable[[], Mapping[str, float]]) -> None:
        """Export when certificates end, as `expiry` says at each scrape: they may have been renewed."""

        def ends(name: str) -> Callable[[], float]:
            def at() -> float:
                try:
                    return expiry().get(name, math.nan)
                except UserError:  # just being replaced
                    return math.nan

            return at

        for name in expiry():
            self.certificate_expiry_timestamp_seconds.labels(name).set_function(ends(name))


class WorkerMetrics(_Metrics):
    """What a worker exports."""

    def __init__(self, version: str) -> None:
        super().__init__("worker", version)
        self.compute_seconds = self._histogram("compute_seconds", "Gradient or local steps of a round.", _ROUND_SECONDS)
        self.encode_seconds = self._histogram("encode_seconds", "Encoding an update.", _CODEC_SECONDS)
        self.push_seconds = self._histogram("push_seconds", "Sending an update until it is accepted.", _ROUND_SECONDS)
        self.pull_seconds = self._histogram("pull_seconds", "Receiving the model.", _ROUND_SECONDS)
        self.train_loss = self._gauge("train_loss", "Training loss of the last contribution.")
        self.reconnects = self._counter("reconnects", "Times that the connection was made anew.")
        for direction in (UP, DOWN):
            self.wire_bytes.labels(direction)
