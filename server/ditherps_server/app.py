"""Starts a server, runs one job, and stops: gRPC, health, metrics, signals, the run folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2

import ditherps
from ditherps import kernels, wire
from ditherps.codecs import Codec, Role
from ditherps.config import JobConfig, LimitsConfig, ServerConfig
from ditherps.downlink import downlink_codec
from ditherps.errors import OptionError, Reason, RunFailedError, UserError
from ditherps.files import claimed
from ditherps.gradient import make_deterministic, pick_device
from ditherps.kernels import robust
from ditherps.lag import watch_lag
from ditherps.metrics import ServerMetrics
from ditherps.network import is_loopback
from ditherps.samples.mode import check_mode, features_of, update_codec
from ditherps.security.credentials import Files, ServerFiles
from ditherps.security.tokens import TokenFile
from ditherps.signals import on_first_signal
from ditherps.tasks import Task
from ditherps_server.accounts import Accounts
from ditherps_server.admission import Patience
from ditherps_server.broadcast import Broadcast
from ditherps_server.cache import FileRows, SampleCache
from ditherps_server.coordinator import Coordinator
from ditherps_server.evaluation import Evaluator
from ditherps_server.gate import Gate
from ditherps_server.health import Health
from ditherps_server.interceptor import ErrorInterceptor
from ditherps_server.members import Members
from ditherps_server.model import ServerModel
from ditherps_server.records import Recorder, RunResult, finished
from ditherps_server.redo import NoLog, RedoLog
from ditherps_server.replay import Restored, begin_log, replay
from ditherps_server.rounds import Rules
from ditherps_server.rpcs import RpcMeter
from ditherps_server.rule import check_rule
from ditherps_server.sampled import SampledUpdates
from ditherps_server.samplefiles import SampleFiles, wipe
from ditherps_server.saving import REDO_FILE, Saver, resumed
from ditherps_server.service import ParameterServerService
from ditherps_server.tensorboard import Board
from ditherps_server.updater import Updater
from ditherps_server.updates import EncodedUpdates

log = logging.getLogger(__name__)

DRAIN_SECONDS = 5.0
UNARY_SECONDS = 10.0
"""For how long the server waits for the message of a unary RPC, and until its answer has been sent."""
UNARY_AT_ONCE = 96
"""For how many it waits with each."""
MOST_AT_ONCE = 8
"""Batches whose gradients are computed at once in mode `data`: each takes three times the model's memory."""


async def serve(
    job: JobConfig,
    config: ServerConfig,
    task: Task,
    on_round: Callable[[dict[str, Any]], None] | None = None,
    on_started: Callable[[], None] | None = None,
) -> RunResult:
    """`serve_in` a run folder that no other server has; with `resume`, the result of a job that is over already."""
    with claimed(config.run_dir):
        if config.resume and (result := finished(config.run_dir, job)) is not None:
            log.info("the job in %s is over: nothing to go on with", config.run_dir)
            wipe(config.run_dir, kept=config.keep_cache)  # a server that was killed at its end could not
            return result
        return await serve_in(job, config, task, on_round, on_started)


async def serve_in(
    job: JobConfig,
    config: ServerConfig,
    task: Task,
    on_round: Callable[[dict[str, Any]], None] | None = None,
    on_started: Callable[[], None] | None = None,
) -> RunResult:
    """Serve one job until it is over, and return its result.

    `on_round` gets each record of `rounds.jsonl`; `on_started` is called once everything is in memory, before anybody
    is let in. Raises `UserError` for what a person has to change before anything
    starts, and `RunFailedError` when the run ends without its result (what there is of it is written all the same).
    """
    tokens = TokenFile(config.token_file) if config.token_file else None
    files = ServerFiles(Files(config.certs), mutual=tokens is None) if config.certs else None
    if tokens is not None and files is None:
        raise UserError("--token-file needs --certs: a token goes over TLS only")
    if files is not None and config.insecure:
        raise UserError("--insecure and --certs exclude each other")
    model = ServerModel(task.build(job.model or None, job.seed))
    codec = update_codec(job).for_layout(model.layout)
    down = downlink_codec(job.downlink, codec)
    if config.init is not None:
        model.load(config.init)
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    broadcast = Broadcast(job.downlink, job.seed, model, down and down.for_layout(model.layout), pool)
    sampled = _sampled(job, config, task, model, codec, pool, threads) if job.mode == "data" else None
    updater = Updater(model, job, sampled or EncodedUpdates(job, codec, model.layout), broadcast, pool)
    rules = rules_of(job, codec, server_evaluates=False, waits_for_workers=config.on_empty == "wait")
    _check_staging(job, codec, rules, updater)
    check_rule(job, codec, rules)
    origin = resumed(config, job, model, updater.optimizer)
    evaluator = None
    if job.evaluator != "worker":
        must = job.evaluator == "server"
        evaluator = Evaluator.where_possible(task, job.model or None, config.data_dir, must=must)
    for used in {codec, down or codec}:
        kernels.warm(used)
    if job.aggregation.robust or job.max_norm or job.max_norm_ratio:
        robust.warm()

    board = Board(config.tensorboard, model.version) if config.tensorboard else None
    recorder = Recorder(config.run_dir, listeners=[listen for listen in (on_round, board and board.add) if listen])
    metrics, meter = ServerMetrics(ditherps.__version__), wire.WireMeter()
    metrics_port = metrics.serve(config.metrics_host, config.metrics_port) if config.metrics_port >= 0 else None
    accounts = Accounts(job, model.layout.coordinates, broadcast, metrics, meter, origin.totals, time.monotonic())
    kept = SampleFiles(config, job, sampled.cache) if sampled else None
    saver = Saver(config, job, origin, model, updater.optimizer, kept)
    redo_path = config.run_dir / REDO_FILE
    must_be_whole = origin.logged and config.durability == "round"
    restored = Restored()
    if kept is not None and not kept.load(model.version, resumed=origin.resumed):
        must_be_whole = False  # what it goes on from is not there, and is sent again
    if origin.resumed:
        restored = replay(
            redo_path, origin, model, updater, accounts, time.monotonic(), must_be_whole=must_be_whole
        )  # fmt: skip
    redo: RedoLog | NoLog = RedoLog(redo_path, origin.job_id)
    if config.durability == "none":
        redo = NoLog()
        restored.forget_plan()
    coordinator = Coordinator(
        job, replace(rules, server_evaluates=evaluator is not None), model, broadcast, updater, evaluator,
        Members(job.member_table, origin.job_id, origin.epoch, restored.leases), recorder, saver, redo, accounts,
        metrics, restored, sampled,
    )  # fmt: skip
    gate = Gate(mutual=files is not None and tokens is None, tokens=tokens)
    unary_seconds = min(UNARY_SECONDS, job.idle_timeout_seconds)
    messages = Patience("the message of an RPC", UNARY_AT_ONCE, unary_seconds)
    interceptor = ErrorInterceptor(
        meter, gate, messages, Patience("reading the answer", UNARY_AT_ONCE, unary_seconds), job.idle_timeout_seconds,
        lambda reason: metrics.refused_rpcs.labels(reason.value).inc(),
    )  # fmt: skip
    server = grpc.aio.server(
        options=[*wire.SERVER_OPTIONS, *wire.window_options(config.limits.window_bytes)],
        interceptors=[RpcMeter(metrics), interceptor],
        maximum_concurrent_rpcs=rpcs_at_once(config.limits, job.workers),
    )  # fmt: skip
    # A worker that is busy must not look silent.
    heartbeat_seconds = min(config.heartbeat_seconds, job.idle_timeout_seconds / 3)
    service = ParameterServerService(coordinator, gate, config.limits, origin.job_id, heartbeat_seconds)
    health_servicer = Health(messages)
    server.add_generic_rpc_handlers((wire.service_handler(service, meter), health_servicer.handler))
    if config.reflection:
        _add_reflection(server)
    port = _bind(server, config, files)
    if config.health_socket is not None:
        config.health_socket.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{config.health_socket}")  # the gate lets nobody speak as a worker there
    metrics.describe(job, broadcast.codec_spec, model.layout.coordinates)
    if files is not None:
        metrics.watch_certificates(files.files.expiry)
    recorder.start(job, model.version, restored.records, nothing_lost=must_be_whole and not restored.incomplete)
    if not origin.resumed:  # a checkpoint is never there without its log
        saver.set_aside()
        begin_log(redo, redo_path, restored, {})
    saver.begin(restored.leases, restored.entered, accounts.saved(time.monotonic()))
    if origin.resumed:
        begin_log(redo, redo_path, restored, sampled.stated if sampled else {})
    if on_started is not None:
        on_started()
    await server.start()
    for name in ("", wire.SERVICE.full_name):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    address = f"{config.host}:{port}"
    announced = {"address": address, "metrics_port": metrics_port, "pid": os.getpid(), "job_id": origin.job_id}
    _announce(config.run_dir, announced)
    log.info("listening on %s for %d workers; run folder %s", address, job.workers, config.run_dir)

    _heed_signals(coordinator, config.grace_seconds)
    lag = asyncio.create_task(watch_lag(metrics.event_loop_lag_seconds.observe))
    try:
        reason = await coordinator.run()
        if reason is not Reason.FINISHED and not coordinator.failure:
            # Before anything else: whoever ends this process may not wait for long.
            await asyncio.to_thread(coordinator.save)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await coordinator.drained()
    finally:
        lag.cancel()
        if board is not None:
            board.close()
        await health_servicer.enter_graceful_shutdown()
        await server.stop(1.0)
        redo.close()
        pool.shutdown(cancel_futures=True)
    result = accounts.result(config.run_dir, model, coordinator.last_evaluation, reason, coordinator.model_sha256)
    if not coordinator.failure:  # else the model may be between two versions
        model.save(config.run_dir / "model.safetensors")
    recorder.finish(result)
    if reason is Reason.FINISHED:
        saver.discard()  # all that it led to is on disk
    if reason not in (Reason.FINISHED, Reason.SUSPENDED):
        because = coordinator.failure or _EXPLAINED.get(reason, reason)
        raise RunFailedError(reason, f"the run ended at round {model.version} of {job.rounds}: {because}")
    return result


_EXPLAINED = {
    Reason.JOIN_TIMEOUT: "too few workers were here for join_timeout_seconds",
    Reason.QUORUM: "rounds were abandoned for want of a quorum at their deadline",
    Reason.DISAGREEMENT: "workers compute other gradients than the server at the same samples (data.probe_limit)",
    Reason.NON_FINITE: "the update of the contributions is not finite; a lower optimizer.lr may help",
    Reason.NORM: "too few contributions kept to the norm limit for a quorum",
    Reason.INTERRUPTED: "interrupted",
    Reason.DISK_FULL: "the redo log could not be written for a round's deadline: make room, and go on with --resume",
    Reason.NO_SIDE_INFORMATION: "no source delivered, so nested contributions could not be decoded",
}


def _sampled(
    job: JobConfig, config: ServerConfig, task: Task, model: ServerModel, codec: Codec, pool: Executor, threads: int
) -> SampledUpdates:
    """What mode `data` adds to a server; raises `UserError` where samples would travel in plaintext."""
    if config.certs is None and not is_loopback(config.host):
        raise UserError(
            "mode data takes samples over TLS only: make certificates with `ditherps certs init` and say --certs"
        )
    check_mode(job.data, task)
    make_deterministic(job.compute_threads)
    device = pick_device(config.device)
    rows = None
    if config.cache_dir is not None:
        rows = FileRows(config.cache_dir, SampleCache.row_bytes(features_of(task)))
    cache = SampleCache(features_of(task), job.data.cache_bytes, rows)
    at_once = min(max(threads // job.compute_threads, 1), MOST_AT_ONCE)
    return SampledUpdates(job, task, model, codec, cache, device, pool, at_once)


def rules_of(job: JobConfig, codec: Codec, *, server_evaluates: bool, waits_for_workers: bool = False) -> Rules:
    """The rounds' rules as the job says them."""
    nested = Role.NESTED in codec.roles
    return Rules(
        workers=job.workers,
        rounds=job.rounds,
        join_timeout_seconds=job.join_timeout_seconds,
        round_deadline_seconds=job.round_deadline_seconds,
        idle_timeout_seconds=job.idle_timeout_seconds,
        quorum=job.quorum,
        source_fraction=float(getattr(codec.options, "side_fraction", 1.0)) if nested else 1.0,
        evaluation_interval=job.evaluation_interval,
        server_evaluates=server_evaluates,
        seed=job.seed,
        sample_fraction=job.sample_fraction,
        min_workers=job.min_workers,
        waits_for_workers=waits_for_workers,
    )


def rpcs_at_once(limits: LimitsConfig, workers: int) -> int:
    """More than can be open, so that nobody can use up what others need.

    All streams of all workers, each to its limit; unary RPCs whose message or whose reader does not come; and those
    that are being served: some of each worker and of who looks on.
    """
    streams = 3 * limits.worker_streams + limits.worker_pulls  # pushes, with and without a header, and watches
    return workers * (streams + 8) + 2 * UNARY_AT_ONCE + 64


def _check_staging(job: JobConfig, codec: Codec, rules: Rules, updater: Updater) -> None:
    largest = max(updater.largest_update_bytes(role) for role in codec.roles)
    largest += updater.buffer_bytes + updater.aside_bytes
    invited = rules.invited(job.workers)
    if invited * largest > job.staging_bytes:
        raise OptionError(
            "staging_bytes", job.staging_bytes,
            f"at least {invited * largest}: {invited} workers times {largest} bytes, the largest contribution",
        )  # fmt: skip


def _bind(server: grpc.aio.Server, config: ServerConfig, files: ServerFiles | None) -> int:
    if files is None and not config.insecure and not is_loopback(config.host):
        raise UserError(
            f"--host {config.host} would serve plaintext beyond this machine: make certificates with `ditherps certs "
            f"init --host {config.host}` and say --certs certs/server, or say --insecure to allow it"
        )
    if files is None and not is_loopback(config.host):
        log.warning("INSECURE: plaintext and without authentication on %s:%d", config.host, config.port)
    try:
        address = f"{config.host}:{config.port}"
        return server.add_secure_port(address, files.credentials()) if files else server.add_insecure_port(address)
    except RuntimeError:
        raise UserError(
            f"cannot listen on {config.host}:{config.port}: is the port taken? choose another --port"
        ) from None


def _add_reflection(server: grpc.aio.Server) -> None:
    try:
        from grpc_reflection.v1alpha import reflection
    except ImportError:
        raise UserError("--reflection needs another package: pip install 'ditherps[reflection]'") from None
    reflection.enable_server_reflection((wire.SERVICE.full_name, reflection.SERVICE_NAME), server)


def _announce(run_dir: Path, values: dict[str, Any]) -> None:
    """Write where the server is, all at once: who waits for the file never reads half of it."""
    unfinished = run_dir / "server.json.part"
    unfinished.write_text(json.dumps(values) + "\n")
    unfinished.replace(run_dir / "server.json")


def _heed_signals(coordinator: Coordinator, grace_seconds: float) -> None:
    """SIGINT ends the run, SIGTERM suspends it, and a second one of either kind ends the process at once."""

    def suspend() -> None:
        log.info("SIGTERM: suspending the run within %g s; a second signal ends at once", grace_seconds)
        coordinator.suspend(grace_seconds)

    on_first_signal({signal.SIGINT: lambda: coordinator.stop(Reason.INTERRUPTED), signal.SIGTERM: suspend})
