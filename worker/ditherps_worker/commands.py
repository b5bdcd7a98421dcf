"""`ditherps worker`, and the benchmark that needs many of them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ditherps import options
from ditherps.bench.commands import bench


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(worker)
    bench.command()(fleet)


def worker(
    server: options.Server = None,
    name: options.Name = None,
    task: options.Task = None,
    device: options.Device = None,
    allow_data: options.AllowData = None,
    max_data_level: options.MaxDataLevel = None,
    config: options.Config = None,
    data_dir: options.DataDir = None,
    state_dir: options.StateDir = None,
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
    from ditherps.errors import OptionError
    from ditherps.logs import log_to_stderr

    file = read_job_file(config) if config is not None else {}
    given: dict[str, Any] = {
        "server": server, "name": name, "task": task if task is not None else file.get("task"), "device": device,
        "allow_data": allow_data,
        "max_data_level": max_data_level,
        "data_dir": data_dir, "state_dir": state_dir, "metrics_host": metrics_host, "metrics_port": metrics_port,
        "certs": certs, "token": token, "insecure": insecure, "log_format": log_format,
    }  # fmt: skip
    flags = {key: value for key, value in given.items() if value is not None}
    in_file = file.get("worker", {})
    if "allow_data" in in_file:
        # The file may be the server's too: whose samples they are says it here.
        raise OptionError("worker.allow_data", in_file["allow_data"], "only on the command line: --allow-data")
    settings = validated(WorkerConfig, merged(in_file, flags))
    log_to_stderr(verbose=verbose, form=settings.log_format)

    from ditherps_worker.app import run_worker, warm_for

    warm_for(file)
    raise typer.Exit(run_worker(settings))


def fleet(
    workers: Annotated[
        list[int] | None,
        typer.Option("--workers", "-w", min=1, help="Repeatable (default: 4, 32, 128).", show_default=False),
    ] = None,
    parameters: Annotated[int, typer.Option(min=1, help="Parameters of the model.")] = 11_173_962,
    codec: Annotated[str, typer.Option("--codec", "-c", help="UP or UP/DOWN.")] = "dqsg:levels=1/dqsg:levels=1",
    rounds: Annotated[int, typer.Option(min=5, help="Rounds of each run.")] = 10,
    json_: options.Json = False,
) -> None:
    """Seconds a round, processor time and memory of one server with many workers, each with a channel of its own.

    The workers live in this process and compute nothing: they push in every round what they encoded before.

        ditherps bench fleet --workers 500 --parameters 1000000
    """
    from ditherps_worker.bench import measure, print_table

    records = [measure(codec, count, rounds, parameters) for count in workers or [4, 32, 128]]
    print_table(records)
    if json_:
        print(json.dumps(records), flush=True)
