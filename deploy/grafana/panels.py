"""What the dashboards show: rows of panels, each a question that somebody asks of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the name of its lines."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel: `unit` is Grafana's name of one, `width` in 24ths of the screen."""

    title: str
    unit: str
    description: str
    queries: tuple[Query, ...]
    kind: Literal["line", "stat"] = "line"
    width: int = 8
    stacked: bool = False
    logarithmic: bool = False
    decimals: int | None = None


@dataclass(frozen=True)
class Board:
    """One dashboard; `rows` are titles and their panels."""

    uid: str
    title: str
    description: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]


def line(
    title: str, unit: str, description: str, *queries: Query, width: int = 8, stacked: bool = False,
    logarithmic: bool = False,
) -> Panel:  # fmt: skip
    """Lines over time."""
    return Panel(title, unit, description, queries, "line", width, stacked, logarithmic)


def stat(
    title: str, unit: str, description: str, expr: str, legend: str = "", width: int = 4, decimals: int | None = None
) -> Panel:
    """One present value, large."""
    return Panel(title, unit, description, (Query(expr, legend),), "stat", width, decimals=decimals)


def quantiles(metric: str, by: str = "", selector: str = "") -> tuple[Query, Query]:
    """Median and 95th percentile of a histogram, by a label where one is named."""
    group = ", ".join(filter(None, (by, "le")))
    rate = f"sum by ({group}) (rate({metric}_bucket{selector}{RATE}))"
    name = f"{{{{{by}}}}} " if by else ""
    return tuple(
        Query(f"histogram_quantile({share}, {rate})", f"{name}{text}")
        for share, text in ((0.5, "median"), (0.95, "95 %"))
    )  # type: ignore[return-value]


def by_reason(metric: str) -> Query:
    """What was counted in ten minutes, of all reasons and by those that there were: most of the list never come up."""
    counted = f"increase({metric}[10m])"
    everything = f'label_replace(sum({counted}), "reason", "all", "", "")'
    return Query(f"sum by (reason) ({counted}) > 0 or {everything}", "{{reason}}")


NAMED = " * on (job, instance) group_left (worker) ditherps_worker_info"
"""Gives a worker's own series the name that it has in the job."""

BY_CODEC = 'sum by (direction, codec) (rate(ditherps_{}_total{{job="ditherps-server"}}[1m]))'

OVERVIEW = Board(
    "ditherps-overview",
    "ditherps / Overview",
    "How far a run is, how good its model is, what it has cost in bits, and whom it waits for.",
    (
        (
            "Now",
            (
                stat("Round", "none", "The round that is open now. A round is one update of the model: every worker "
                     "sends one contribution to it.", 'ditherps_round{job="ditherps-server"}'),
                stat("Done", "percentunit", "Share of the job's rounds that have been closed.",
                     "ditherps_round / ditherps_job_rounds", decimals=1),
                stat("Test accuracy", "percentunit", "Share of the test set that the last evaluated model got right.",
                     "ditherps_test_accuracy", decimals=2),
                stat("Below float32, both ways", "suffix: x",
                     "How many times fewer bits travelled in the last minute, up and down "
                     "together, than the same numbers take as plain 32-bit floats.",
                     "ditherps:compression_ratio_both:rate1m", decimals=1),
                stat("Workers here", "none", "Workers that have joined and are not silent.",
                     'ditherps_round_workers{state="present"}'),
                stat("Rounds a minute", "none", "How many rounds were closed a minute, over the last minute.",
                     "ditherps:rounds_per_minute:rate1m", decimals=1),
            ),
        ),
        (
            "Learning",
            (
                line("Loss", "none", "What training makes smaller. Train: mean over the workers' batches of the last "
                     "round, noisy. Test: of the whole test set, at the last evaluation.",
                     Query('ditherps_train_loss{job="ditherps-server"}', "train"),
                     Query("ditherps_test_loss", "test"),
                     width=12),
                line("Accuracy", "percentunit", "Share of the test set that the model gets right. Evaluated about 30 "
                     "times in a run, so it moves in steps.", Query("ditherps_test_accuracy", "test"), width=12),
            ),
        ),
        (
            "Bits",
            (
                line("Bits a round", "decbits", "All bits that a round took on the wire, of all workers, framing and "
                     "control included. Up: from the workers; down: to them. It is what rounds.jsonl records.",
                     Query("ditherps:round_bits", "{{direction}}"), logarithmic=True),
                line("Times below float32", "suffix: x",
                     "How many times fewer bits than 32 a number, by direction, over the "
                     "last minute. Higher is better.", Query("ditherps:compression_ratio:rate1m", "{{direction}}")),
                line("Traffic", "bps", "Bits a second through the server's link.",
                     Query(f'8 * sum by (direction) (rate(ditherps_wire_bytes_total{{job="ditherps-server"}}{RATE}))',
                           "{{direction}}")),
            ),
        ),
        (
            "Workers",
            (
                line("Workers by state", "none", "Present: joined and heard of. Invited: expected to send to the open "
                     "round. Delivered: have done so. Absent: members of the job that are not here.",
                     Query("ditherps_round_workers", "{{state}}")),
                line("Waiting for whom", "none", "A bar for each worker whose contribution the open round waits for. "
                     "One that stands out is slower than the others.",
                     Query("avg_over_time(ditherps_worker_awaited[30s])", "{{worker}}"), stacked=True),
                line("Waiting", "s", "How long the server has been waiting for what it waits for now: workers to join, "
                     "or contributions. A saw-tooth is a run that goes on; a ramp is one that stands still.",
                     Query("ditherps_waiting_seconds", "{{awaited}}")),
            ),
        ),
    ),
)  # fmt: skip

CODEC = Board(
    "ditherps-codec",
    "ditherps / Codec",
    "What quantization saves, what it loses, and what it takes to compute.",
    (
        (
            "Size",
            (
                line("Bits a coordinate, wire", "none", "Bits on the wire for each number (coordinate) of updates and "
                     "model steps, framing and control included; float32 takes 32.",
                     Query("ditherps:bits_per_value:rate1m", "{{direction}}")),
                line("Bits a coordinate, by codec", "none",
                     "The same of the encoded content alone, for each codec that "
                     "carried it. `none` is a model that travels whole in float32.",
                     Query(f"8 * {BY_CODEC.format('payload_bytes')} / ({BY_CODEC.format('values')} > 0)",
                           "{{direction}} {{codec}}")),
                line("Size of a model step", "bytes", "Bytes of the encoded step that every worker gets after a round. "
                     "0: the model travels in float32.", Query("ditherps_step_bytes", "step")),
            ),
        ),
        (
            "Error",
            (
                line("NMSE of updates", "none", "Expected squared error of encoded updates over their squared length, "
                     "mean over the workers. 0: nothing is lost. Above 1 the noise of one worker is longer than its "
                     "update, and only the mean over many workers and rounds is useful.",
                     Query('ditherps_update_nmse{job="ditherps-server"}', "mean")),
                line("NMSE of model steps", "none", "The same of the way down: what a step loses comes back with the "
                     "next ones.", Query("ditherps_step_nmse", "step")),
                line("Lag of the workers' model", "none", "By about how many rounds the model that workers compute at "
                     "is behind the server's exact one. Above one round, momentum may not bear it.",
                     Query("ditherps_step_lag_rounds", "rounds")),
                line("Step size", "none", "The width of the quantizer's steps in each worker's last update (that of a "
                     "uniform quantizer with the same error). It shrinks as gradients do.",
                     Query("ditherps_update_step" + NAMED, "{{worker}}"), logarithmic=True),
                line("Length of updates", "none", "L2 norm of each worker's last update before encoding. One that is "
                     "much longer than the others is suspicious.",
                     Query("ditherps_update_norm" + NAMED, "{{worker}}"), logarithmic=True),
                line("Share of a step that is taken", "percentunit", "How much of a decoded step the workers' model "
                     "moves by. Below 1 where the codec is so coarse that a whole step would do harm.",
                     Query("ditherps_step_rate", "rate")),
            ),
        ),
        (
            "Nested decoding",
            (
                line("Failed tiles", "percentunit", "Share of nested tiles (4,096 coordinates) in which at least one "
                     "coordinate was decoded to a neighbour's value, since the run began, and the limit from which it "
                     "is an alert. 0 without nested codecs.",
                     Query("ditherps_nested_failure_ratio", "failed"), Query("ditherps_nested_failure_limit", "limit"),
                     width=12),
                line("Nested tiles", "cps", "Nested tiles decoded a second, and those of them that failed.",
                     Query(f"rate(ditherps_decode_tiles_total{RATE})", "decoded"),
                     Query(f"rate(ditherps_decode_ambiguities_total{RATE})", "failed"), width=12),
            ),
        ),
        (
            "Samples (mode data)",
            (
                line("Samples", "cps", "Samples that rounds took, a second: new ones travel whole, finer ones their "
                     "next digits, held ones not at all. Nothing in other modes.",
                     Query(f"rate(ditherps_samples_total{RATE})", "{{kind}}")),
                line("Kept samples", "bytes", "What the server keeps of samples, so that they need not be sent again.",
                     Query("ditherps_sample_cache_bytes", "bytes")),
                line("Disagreement", "percentunit", "How far a worker's gradient is from the server's at the same "
                     "quantized samples, the worst of the last probe. It enters the refined estimate as a bias.",
                     Query("ditherps_probe_relative_error", "relative error")),
            ),
        ),
        (
            "Time",
            (
                line("Encoding an update", "s", "How long a worker takes to encode its update.",
                     *quantiles("ditherps_encode_seconds")),
                line("Decoding a round", "s", "How long the server takes to decode and sum all contributions of a "
                     "round.", *quantiles("ditherps_decode_seconds")),
                line("Encoding a step", "s", "How long the server takes to encode the model's step, once for all "
                     "workers.", *quantiles("ditherps_step_encode_seconds")),
            ),
        ),
    ),
)  # fmt: skip

FLEET = Board(
    "ditherps-fleet",
    "ditherps / Fleet",
    "Each worker: what it sends and receives, how long it takes, how often it is missing, what memory it holds.",
    (
        (
            "Traffic",
            (
                line("Sent", "Bps", "Bytes a second that each worker sends: its encoded updates, and control.",
                     Query(f'rate(ditherps_wire_bytes_total{{job="ditherps-worker", direction="up"}}{RATE})' + NAMED,
                           "{{worker}}"), width=12),
                line("Received", "Bps", "Bytes a second that each worker receives: the model's steps, or whole models.",
                     Query(f'rate(ditherps_wire_bytes_total{{job="ditherps-worker", direction="down"}}{RATE})' + NAMED,
                           "{{worker}}"), width=12),
            ),
        ),
        (
            "Time",
            (
                line("Latency", "s", "From the opening of a round to a worker's contribution, the last one: pull, "
                     "compute, encode, push.", Query("ditherps_worker_latency_seconds", "{{worker}}")),
                line("Computing", "s", "Mean time of a gradient or of a round's local steps, by worker.",
                     Query(f"rate(ditherps_compute_seconds_sum{RATE})"
                           f" / (rate(ditherps_compute_seconds_count{RATE}) > 0)" + NAMED, "{{worker}}")),
                line("Pushing", "s",
                     "Mean time to send an update until the server has taken it. On a slow link this is "
                     "what compression shortens.",
                     Query(f"rate(ditherps_push_seconds_sum{RATE}) / (rate(ditherps_push_seconds_count{RATE}) > 0)"
                           + NAMED, "{{worker}}")),
            ),
        ),
        (
            "Presence",
            (
                line("Absences", "none", "Rounds in the last ten minutes that were closed without a worker's "
                     "contribution.", Query("increase(ditherps_worker_absences_total[10m])", "{{worker}}")),
                line("Why contributions were missing", "none", "The same by reason: deadline (too slow), silent "
                     "(nothing was heard of it), left (it said goodbye), and others.",
                     Query("sum by (reason) (increase(ditherps_absences_total[10m]))", "{{reason}}")),
                line("Last sign of life", "s", "How long ago the server last heard of each worker.",
                     Query("time() - (ditherps_worker_last_seen_timestamp_seconds > 0)", "{{worker}}")),
                line("Reconnects", "none", "How often each worker had to make its connection anew, in the last ten "
                     "minutes.", Query("increase(ditherps_reconnects_total[10m])" + NAMED, "{{worker}}")),
                line("Wrong models", "none",
                     "How often a worker did not hold the model that it should, and was sent it "
                     "whole, in the last ten minutes. Anything but 0 is a bug or a damaged machine.",
                     Query("increase(ditherps_digest_mismatches_total[10m])", "mismatches")),
                line("Training loss", "none", "Loss of each worker's last batch. Workers with unlike data differ.",
                     Query('ditherps_train_loss{job="ditherps-worker"}' + NAMED, "{{worker}}")),
            ),
        ),
        (
            "Memory",
            (
                line("GPU memory", "bytes", "Memory that a worker's process has on its GPU: allocated for tensors, and "
                     "reserved by torch. 0 for a worker on a CPU.",
                     Query("ditherps_gpu_memory_bytes" + NAMED, "{{worker}} {{kind}}"), width=12),
                line("Memory", "bytes", "Resident memory of each worker's process.",
                     Query('process_resident_memory_bytes{job="ditherps-worker"}' + NAMED, "{{worker}}"), width=12),
            ),
        ),
    ),
)  # fmt: skip

SERVICE = Board(
    "ditherps-service",
    "ditherps / Service",
    "The server as a service: its calls, what it refuses, its memory, and whether its event loop keeps up.",
    (
        (
            "Calls",
            (
                line("RPCs", "reqps", "Calls a second, by method. Push is a contribution, Pull the model, Watch a "
                     "stream that stays open while a worker is there.",
                     Query(f"sum by (grpc_method) (rate(grpc_server_handled_total{RATE}))", "{{grpc_method}}")),
                line("RPCs by outcome", "reqps",
                     "Calls a second by gRPC's status code. CANCELLED is a worker that went; "
                     "all else but OK has a reason in the server's log.",
                     Query(f"sum by (grpc_code) (rate(grpc_server_handled_total{RATE}))", "{{grpc_code}}")),
                line("Duration of calls", "s", "95th percentile of how long calls took, by method.",
                     Query("histogram_quantile(0.95, sum by (grpc_method, le) "
                           f'(rate(grpc_server_handling_seconds_bucket{{grpc_method!="Watch"}}{RATE})))',
                           "{{grpc_method}}"), logarithmic=True),
            ),
        ),
        (
            "Refusals",
            (
                line("Updates that were refused", "none", "In the last ten minutes, by reason. `late` is a worker that "
                     "was too slow for its round; others are in the server's log with the worker's name.",
                     by_reason("ditherps_rejected_updates_total")),
                line("Calls that were refused", "none", "In the last ten minutes, by reason: strangers, wrong names, "
                     "sessions that are over.",
                     by_reason("ditherps_refused_rpcs_total")),
                line("Rounds by result", "cpm", "Rounds a minute that were applied, and that were abandoned for want "
                     "of a quorum.", Query(f"60 * sum by (result) (rate(ditherps_rounds_total{RATE}))", "{{result}}")),
            ),
        ),
        (
            "Process",
            (
                line("Memory", "bytes", "Resident memory of the server's process, and what of it are contributions and "
                     "kept steps. It must not grow with rounds.",
                     Query('process_resident_memory_bytes{job="ditherps-server"}', "resident"),
                     Query("ditherps_staged_bytes", "contributions"), Query("ditherps_history_bytes", "kept steps")),
                line("Event-loop lag", "s", "How late the server's event loop woke a timer. Above a second, heartbeats "
                     "and deadlines suffer: too little processor time, or a bug.",
                     *quantiles("ditherps_event_loop_lag_seconds", selector='{job="ditherps-server"}')),
                line("Processor", "percentunit", "Cores in use by the server (1 is one core).",
                     Query(f'rate(process_cpu_seconds_total{{job="ditherps-server"}}{RATE})', "cores")),
                line("Duration of rounds", "s", "From the opening of a round to its update.",
                     *quantiles("ditherps_round_duration_seconds")),
                line("Pulls", "reqps", "How workers got the model: in steps, whole (snapshot), or nothing was missing "
                     "(check). Snapshots are dear: one when a worker is new, none later.",
                     Query(f"sum by (kind) (rate(ditherps_pulls_total{RATE}))", "{{kind}}")),
                line("Open files", "none", "Files and sockets that the server holds open, and how many it may.",
                     Query('process_open_fds{job="ditherps-server"}', "open"),
                     Query('process_max_fds{job="ditherps-server"}', "limit"), logarithmic=True),
            ),
        ),
        (
            "Safety",
            (
                line("Age of the checkpoint", "s", "What a server that is killed now would lose, in seconds since its "
                     "last checkpoint.", Query("time() - (ditherps_checkpoint_timestamp_seconds > 0)", "age")),
                line("Writing a checkpoint", "s", "How long the last checkpoint took to write.",
                     Query("ditherps_checkpoint_seconds", "seconds")),
                line("Certificates end in", "s", "Time left of the certificates of server and workers, and of their "
                     "authority.", Query("ditherps_certificate_expiry_timestamp_seconds - time()",
                                         "{{instance}} {{certificate}}")),
            ),
        ),
    ),
)  # fmt: skip

BOARDS = (OVERVIEW, CODEC, FLEET, SERVICE)
