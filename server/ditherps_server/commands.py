"""`ditherps server`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from ditherps import options


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(server)
    app.command()(wipe)


def server(
    task: options.Task = None,
    model: options.Model = None,
    workers: options.Workers = None,
    rounds: options.Rounds = None,
    codec: options.CodecName = None,
    codec_option: options.CodecOptions = None,
    downlink_codec: options.DownlinkCodec = None,
    mode: options.Mode = None,
    seed: options.Seed = None,
    set_: options.Set = None,
    config: options.Config = None,
    data_dir: options.DataDir = None,
    run_dir: options.RunDir = None,
    host: options.Host = None,
    port: options.Port = None,
    metrics_host: options.MetricsHost = None,
    metrics_port: options.MetricsPort = None,
    init: options.Init = None,
    resume: options.Resume = None,
    checkpoint_every: options.CheckpointEvery = None,
    durability: options.Durability = None,
    on_empty: options.OnEmpty = None,
    grace_seconds: options.GraceSeconds = None,
    certs: options.Certs = None,
    token_file: options.TokenFile = None,
    tls13: options.Tls13 = None,
    insecure: options.Insecure = None,
    reflection: options.Reflection = None,
    health_socket: options.HealthSocket = None,
    tensorboard: options.TensorBoard = None,
    device: options.ServerDevice = None,
    cache_dir: options.CacheDir = None,
    keep_cache: options.KeepCache = None,
    json_: options.Json = False,
    log_format: options.LogFormat = None,
    verbose: options.Verbose = False,
) -> None:
    """Serve one job: wait for its workers, train, and leave the model in the run folder."""
    from ditherps.security.versions import only_tls13

    if tls13:
        only_tls13()
    from ditherps.config import ServerConfig, merged, validated
    from ditherps.job import resolve_job
    from ditherps.logs import log_to_stderr

    asked = options.job_flags(task, model, workers, rounds, codec, codec_option, downlink_codec, mode, seed, set_)
    job = resolve_job(asked, config)
    given: dict[str, Any] = {
        "run_dir": run_dir, "data_dir": data_dir, "host": host, "port": port, "metrics_host": metrics_host,
        "metrics_port": metrics_port, "init": init, "resume": resume, "checkpoint_every": checkpoint_every,
        "durability": durability, "on_empty": on_empty, "grace_seconds": grace_seconds,
        "certs": certs, "token_file": token_file, "insecure": insecure, "reflection": reflection,
        "health_socket": health_socket, "log_format": log_format, "tensorboard": tensorboard,
        "device": device, "cache_dir": cache_dir, "keep_cache": keep_cache,
    }  # fmt: skip
    defaults = {"run_dir": options.default_run_dir(job.config.task, job.config.uplink)}
    flags = {key: value for key, value in given.items() if value is not None}
    settings = validated(ServerConfig, merged(defaults, job.server, flags))
    log_to_stderr(verbose=verbose, form=settings.log_format)

    from ditherps_server.run import run_server

    if job.choice:
        logging.getLogger(__name__).info("%s", job.choice)
    result = run_server(job.config, settings, job.task)
    if json_:
        print(json.dumps(result), flush=True)


def wipe(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of a server that does not run.")],
) -> None:
    """Remove the workers' samples that a server has kept (mode data); the run can still be resumed."""
    from ditherps.errors import UserError
    from ditherps.files import claimed
    from ditherps_server.samplefiles import wipe as wipe_samples

    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a folder")
    with claimed(run_dir):
        print(f"{wipe_samples(run_dir)} files removed")
