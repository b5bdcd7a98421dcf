"""Commands that belong to neither end: local, compare, status, health, plot, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ditherps import options
from ditherps.bench.commands import bench
from ditherps.security.commands import certs as certificates


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(local)
    app.command()(compare)
    app.command()(status)
    app.command()(health)
    app.command()(plot)
    app.add_typer(bench, name="bench")
    app.add_typer(certificates, name="certs")


def local(
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
    json_: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Train on this machine: a server and its workers, each a process of its own."""
    from ditherps.job import resolve_job
    from ditherps.local import run_local

    flags = options.job_flags(task, model, workers, rounds, codec, codec_option, downlink_codec, mode, seed, set_)
    job = resolve_job(flags, config)
    folder = run_dir or options.default_run_dir(job.config.task, job.config.uplink)
    result, exit_code = run_local(job, folder, data_dir, verbose=verbose)
    if json_ and result is not None:
        print(json.dumps(result), flush=True)
    raise typer.Exit(exit_code)


def compare(
    codec: Annotated[
        list[str],
        typer.Option(
            "--codec",
            "-c",
            help="UP or UP/DOWN, each NAME or NAME:option=value,...; repeat it for each run. DOWN is the codec of the "
            "model's way to the workers (default: --downlink-codec, else as UP); with none it travels in float32. "
            "data:level=BITS,... in the place of UP sends samples, data:...+CODEC their gradient's refinement too.",
            show_default=False,
        ),
    ],
    downlink_codec: options.DownlinkCodec = None,
    task: options.Task = None,
    model: options.Model = None,
    workers: options.Workers = None,
    rounds: options.Rounds = None,
    mode: options.Mode = None,
    seed: options.Seed = None,
    set_: options.Set = None,
    config: options.Config = None,
    data_dir: options.DataDir = None,
    run_dir: options.RunDir = None,
    json_: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Train one task under several codecs on this machine, one after another, and compare what it cost.

    Float32 both ways, one codec both ways, and the same with a model that travels down in float32:

        ditherps compare --codec none --codec dqsg --codec dqsg/none

    Samples of two bits a feature instead of gradients, and the same with what makes the estimate unbiased:

        ditherps compare --codec dqsg --codec data:level=2 --codec data:level=2+dqsg:coder=rans,resolution=8
    """
    from ditherps import compare as comparing

    flags = options.job_flags(task, model, workers, rounds, None, None, downlink_codec, mode, seed, set_)
    jobs = comparing.resolve(codec, flags, config)
    folder = run_dir or options.default_run_dir(jobs[0].config.task, "compare")
    comparison, exit_code = comparing.compare(codec, jobs, folder, data_dir, verbose=verbose)
    comparing.print_table(comparison)
    if json_:
        print(json.dumps(comparison), flush=True)
    raise typer.Exit(exit_code)


def status(
    server: Annotated[str, typer.Argument(help="HOST:PORT of the server.")] = "127.0.0.1:50051",
    certs: options.Certs = None,
    token: options.Token = None,
    json_: options.Json = False,
) -> None:
    """What a server does, and what it waits for."""
    from ditherps.status import fetch_status, print_status

    response = fetch_status(server, certs, token or "")
    print_status(response, as_json=json_)


def health(
    address: Annotated[
        str, typer.Argument(help="HOST:PORT or unix:PATH of a server, or http://HOST:PORT/metrics of either end.")
    ] = "127.0.0.1:50051",
    certs: options.Certs = None,
) -> None:
    """Exit with 0 if a process is well: for the health checks of containers."""
    from ditherps.health import check_health

    check_health(address, certs)


def plot(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run folders of one task.")],
    value: Annotated[str, typer.Option(help="accuracy, or loss (the test's, or training's without it).")] = "accuracy",
    against: Annotated[str, typer.Option(help="bits (of both directions), or seconds.")] = "bits",
    out: Annotated[
        Path | None,
        typer.Option(help="PNG to write (default: accuracy_bits.png, loss_time.png, ...).", show_default=False),
    ] = None,
) -> None:
    """Draw what several runs reached against what they cost, beside each other."""
    from ditherps.plots import plot_comparison, plot_name

    print(plot_comparison(run_dirs, out or Path(plot_name(value, against)), value=value, against=against))
