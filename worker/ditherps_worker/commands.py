"""`ditherps worker`."""

from __future__ import annotations

from typing import Any

import typer

from ditherps import options


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(worker)


def worker(
    server: options.Server = None,
    name: options.Name = None,
    task: options.Task = None,
    device: options.Device = None,
    config: options.Config = None,
    data_dir: options.DataDir = None,
    metrics_host: options.MetricsHost = None,
    metrics_port: options.MetricsPort = None,
    certs: options.Certs = None,
    token: options.Token = None,
    tls13: options.Tls13 = None,
    insecure: options.Insecure = None,
    log_format: options.LogFormat = None,
    verbose: options.Verbose = False,
) -> None:
    """Take part in a job: pull the model, compute on local data, push quantized updates."""
    from ditherps.security.versions import only_tls13

    if tls13:
        only_tls13()
    from ditherps.config import WorkerConfig, merged, read_job_file, validated
    from ditherps.logs import log_to_stderr

    file = read_job_file(config) if config is not None else {}
    given: dict[str, Any] = {
        "server": server, "name": name, "task": task if task is not None else file.get("task"), "device": device,
        "data_dir": data_dir, "metrics_host": metrics_host, "metrics_port": metrics_port, "certs": certs,
        "token": token, "insecure": insecure, "log_format": log_format,
    }  # fmt: skip
    flags = {key: value for key, value in given.items() if value is not None}
    settings = validated(WorkerConfig, merged(file.get("worker", {}), flags))
    log_to_stderr(verbose=verbose, form=settings.log_format)

    from ditherps_worker.app import run_worker

    raise typer.Exit(run_worker(settings))
