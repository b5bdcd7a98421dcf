"""Prometheus metrics of both ends: one object each, on its own registry, served at /metrics.

Base units (seconds, bytes), `_total` on counters, closed sets of label values, and never a round as a label.
`deploy/METRICS.md` is the table of all of them; tests/deploy holds it to what is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import start_http_server

from ditherps.config import JobConfig
from ditherps.errors import Reason, UserError

UP, DOWN = "up", "down"
_ROUND_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_RPC_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_CODEC_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


LARGEST_NAMED = 256
"""Most workers of a job that has series of its own for each of them; a larger one has none."""


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
        self.event_loop_lag_seconds = self._histogram(
            "event_loop_lag_seconds", "How much later than asked the event loop woke a timer.", _LAG_SECONDS
        )
        self.certificate_expiry_timestamp_seconds = self._gauge(
            "certificate_expiry_timestamp_seconds", "When a certificate of this end ends: ca, or its own.",
            "certificate",
        )  # fmt: skip

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
        self.samples = self._counter(
            "samples", "Mode data: samples of closed rounds, by how much of them was held: new, finer, held.", "kind"
        )
        self.cached_samples = self._gauge("cached_samples", "Mode data: samples that the server keeps.")
        self.sample_cache_bytes = self._gauge("sample_cache_bytes", "Mode data: what they take of data.cache_bytes.")
        self.gradient_seconds = self._histogram(
            "gradient_seconds", "Mode data: computing the gradients of all workers of a round.", _ROUND_SECONDS
        )
        self.probe_cosine = self._gauge(
            "probe_cosine", "Mode data: cosine of a worker's gradient and the server's, the worst of the last probe."
        )
        self.probe_relative_error = self._gauge(
            "probe_relative_error", "Mode data: their difference over the server's norm; data.probe_limit bounds it."
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
        self.waiting_seconds = self._gauge(
            "waiting_seconds",
            "How long the server has been waiting for what it waits for; 0: not for that.",
            "awaited",
        )
        self.worker_last_seen_timestamp_seconds = self._gauge(
            "worker_last_seen_timestamp_seconds", "When a worker last gave a sign of life.", "worker"
        )
        self.worker_awaited = self._gauge("worker_awaited", "1: the open round waits for this worker.", "worker")
        self.worker_contributions = self._counter(
            "worker_contributions", "Contributions of a worker that entered a round.", "worker"
        )
        self.worker_absences = self._counter("worker_absences", "Closed rounds without a worker.", "worker")
        self.worker_latency_seconds = self._gauge(
            "worker_latency_seconds", "From the opening of a round to a worker's contribution, the last one.", "worker"
        )
        self.absences = self._counter("absences", "Contributions that closed rounds went without, by why.", "reason")
        self.round_contributions = self._gauge("round_contributions", "Contributions in the last closed round.")
        self.round_closed_timestamp_seconds = self._gauge(
            "round_closed_timestamp_seconds", "When a round was last closed; before the first: when the server started."
        )
        # The names of go-grpc-prometheus, which ready-made dashboards know.
        self.rpcs = Counter(
            "grpc_server_handled", "RPCs that ended, by how.", ["grpc_method", "grpc_code"], registry=self.registry
        )
        self.rpc_seconds = Histogram(
            "grpc_server_handling_seconds", "How long RPCs took; a Watch lasts as long as its worker is there.",
            ["grpc_method"], buckets=_RPC_SECONDS, registry=self.registry,
        )  # fmt: skip
        for direction in (UP, DOWN):
            self.wire_bytes.labels(direction)
            self.round_bits.labels(direction)
        for kind in ("snapshot", "steps", "check"):
            self.pulls.labels(kind)
        for kind in ("new", "finer", "held"):
            self.samples.labels(kind)
        for result in ("applied", "abandoned"):
            self.rounds.labels(result)
        for reason in Reason:
            self.rejected_updates.labels(reason.value)
            self.refused_rpcs.labels(reason.value)
        for reason in (Reason.DEADLINE, Reason.SILENT, Reason.LEFT):
            self.absences.labels(reason.value)

    def describe(self, job: JobConfig, downlink_codec: str, coordinates: int) -> None:
        """Export what the job is: what alerts and ratios are measured by."""
        info = self._gauge("job_info", "What is trained, and how; always 1.", "task", "mode", "codec", "downlink_codec")
        info.labels(job.task, job.mode, job.uplink, downlink_codec).set(1)
        for name, text, value in (
            ("job_rounds", "Rounds of the job.", job.rounds),
            ("job_workers", "Workers of the job.", job.workers),
            ("round_deadline_seconds", "How long a round waits for contributions.", job.round_deadline_seconds),
            ("nested_failure_limit", "Share of failed nested tiles that the job bears.", job.nested_failure_limit),
            ("model_coordinates", "Parameters of the model.", coordinates),
        ):
            self._gauge(name, text).set(value)
        self.round_closed_timestamp_seconds.set_to_current_time()


class WorkerMetrics(_Metrics):
    """What a worker exports."""

    def __init__(self, version: str) -> None:
        super().__init__("worker", version)
        self.compute_seconds = self._histogram("compute_seconds", "Gradient or local steps of a round.", _ROUND_SECONDS)
        self.encode_seconds = self._histogram("encode_seconds", "Encoding an update.", _CODEC_SECONDS)
        self.push_seconds = self._histogram("push_seconds", "Sending an update until it is accepted.", _ROUND_SECONDS)
        self.pull_seconds = self._histogram("pull_seconds", "Receiving the model.", _ROUND_SECONDS)
        self.train_loss = self._gauge("train_loss", "Training loss of the last contribution.")
        self.update_nmse = self._gauge(
            "update_nmse", "Expected squared error of the last update over its squared norm."
        )
        self.update_norm = self._gauge("update_norm", "L2 norm of the last update, before it was encoded.")
        self.update_step = self._gauge(
            "update_step", "Quantization step of the last update: that of the uniform quantizer with the same error."
        )
        self.reconnects = self._counter("reconnects", "Times that the connection was made anew.")
        self.gpu_memory_bytes = self._gauge(
            "gpu_memory_bytes", "This process's memory on its GPU, as torch says; 0 without one.", "kind"
        )
        self._info = self._gauge("worker_info", "Name of this worker in the job; always 1.", "worker")
        for kind in ("allocated", "reserved"):
            self.gpu_memory_bytes.labels(kind)
        for direction in (UP, DOWN):
            self.wire_bytes.labels(direction)

    def joined(self, name: str) -> None:
        """This worker is `name` in its job from now on."""
        self._info.clear()
        self._info.labels(name).set(1)

    def watch_gpu(self, allocated: Callable[[], float], reserved: Callable[[], float]) -> None:
        """Export a GPU's memory, as these say at each scrape."""
        self.gpu_memory_bytes.labels("allocated").set_function(allocated)
        self.gpu_memory_bytes.labels("reserved").set_function(reserved)
