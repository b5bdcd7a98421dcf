"""Starts a worker, takes part in one job, and stops: channel, metrics, signals, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import ditherps
from ditherps import kernels, wire
from ditherps.config import JobConfig, WorkerConfig, validated
from ditherps.downlink import downlink_codec
from ditherps.errors import ExitCode, Reason, RefusedError, UnreachableError
from ditherps.files import claimed
from ditherps.gradient import make_deterministic, pick_device
from ditherps.lag import watch_lag
from ditherps.memory import keep_freed_memory
from ditherps.metrics import DOWN, UP, WorkerMetrics
from ditherps.security.credentials import Files
from ditherps.signals import on_first_signal
from ditherps.tasks import load_task, task_names
from ditherps_worker.client import Client
from ditherps_worker.compute import Computer
from ditherps_worker.connection import check_plaintext
from ditherps_worker.loop import Loop

log = logging.getLogger(__name__)


def warm_for(file: Mapping[str, Any]) -> None:
    """Compile the kernels of the codecs that a job file names, where it names any.

    Before the server knows of this worker: rounds wait for who has joined. Raises `OptionError` for what is no codec.
    """
    named = {key: file[key] for key in ("codec", "codec_options", "downlink") if key in file}
    if "codec" in named:
        job = validated(JobConfig, named)
        codec = ditherps.codec(job.codec, **job.codec_options)
        for used in {codec, downlink_codec(job.downlink, codec) or codec}:
            kernels.warm(used)


def run_worker(config: WorkerConfig) -> ExitCode:
    """Take part in a job until it is over; raises `DitherpsError` when that cannot be."""
    import uvloop

    keep_freed_memory()
    if config.task:
        load_task(config.task)
    pick_device(config.device)
    if config.server.startswith("@"):
        address = announced(Path(config.server[1:]), config.connect_timeout_seconds)
        config = config.model_copy(update={"server": address})
    with claimed(config.state_dir) if config.state_dir else contextlib.nullcontext():
        return uvloop.run(_work(config))


def announced(path: Path, limit_seconds: float) -> str:
    """The address in a server's server.json; waits for it, and raises `UnreachableError` at the limit."""
    limit = time.monotonic() + limit_seconds
    while not path.exists():
        if time.monotonic() > limit:
            raise UnreachableError(f"no server has announced itself in {path} within {limit_seconds:g} s")
        time.sleep(0.05)
    return str(json.loads(path.read_text())["address"])


async def _work(config: WorkerConfig) -> ExitCode:
    check_plaintext(config)
    meter, metrics = wire.WireMeter(), WorkerMetrics(ditherps.__version__)
    if config.metrics_port >= 0:
        port = metrics.serve(config.metrics_host, config.metrics_port)
        log.info("metrics at http://%s:%d/metrics", config.metrics_host, port)

    def make_computer(job: JobConfig, index: int) -> Computer:
        # A task that a message names is taken only if it is built in: nothing that arrives is imported.
        if not config.task and job.task not in task_names():
            raise RefusedError(Reason.TASK_MISMATCH, f"the job's task is {job.task!r}: name it here too, with --task")
        make_deterministic(job.compute_threads)
        device = pick_device(config.device, index)
        if device.type == "cuda":
            metrics.watch_gpu(lambda: torch.cuda.memory_allocated(device), lambda: torch.cuda.memory_reserved(device))
        return Computer(job, index, load_task(config.task or job.task), config.data_dir, device)

    client = Client(config, meter)
    if config.certs is not None:
        metrics.watch_certificates(Files(config.certs).expiry)
    job = asyncio.ensure_future(Loop(config, client, make_computer, metrics).run())
    background = [
        asyncio.ensure_future(_export(meter, metrics)),
        asyncio.ensure_future(watch_lag(metrics.event_loop_lag_seconds.observe)),
    ]
    ended_by: list[signal.Signals] = []
    _cancel_on_signals(job, ended_by)
    try:
        result = await job
        log.info("job finished: version=%d model_sha256=%s", result.version, result.model_sha256)
        return ExitCode.OK
    except asyncio.CancelledError:
        if signal.SIGTERM in ended_by:
            log.info("SIGTERM: left")
            return ExitCode.OK
        log.info("interrupted")
        return ExitCode.INTERRUPTED
    finally:
        for task in background:
            task.cancel()
        await client.close()


async def _export(meter: wire.WireMeter, metrics: WorkerMetrics) -> None:
    exported = wire.Traffic()
    while True:
        traffic = meter.traffic
        grown, exported = traffic - exported, traffic
        metrics.wire_bytes.labels(UP).inc(grown.uplink_bytes)
        metrics.wire_bytes.labels(DOWN).inc(grown.downlink_bytes)
        await asyncio.sleep(1.0)


def _cancel_on_signals(job: asyncio.Future[Any], ended_by: list[signal.Signals]) -> None:
    """SIGINT and SIGTERM cancel the job, and note which it was; a second one ends the process at once."""

    def cancelled_by(name: signal.Signals) -> Callable[[], None]:
        def cancel() -> None:
            ended_by.append(name)
            job.cancel()

        return cancel

    on_first_signal({name: cancelled_by(name) for name in (signal.SIGINT, signal.SIGTERM)})
