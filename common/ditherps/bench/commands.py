"""`ditherps bench`: the commands; what they measure loads when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ditherps import options
from ditherps.errors import OptionError

bench = typer.Typer(no_args_is_help=True, help="Measure codecs and rounds on this machine.")


@bench.command()
def codecs(
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec", help="NAME or NAME:option=value,..., repeatable (default: a selection).", show_default=False
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="gaussian, laplace, student-t3, sparse, or a file that `bench gradients` made; repeatable "
            "(default: gaussian).",
            show_default=False,
        ),
    ] = None,
    coordinates: Annotated[int, typer.Option(help="Length of the vectors; files are taken as they are.")] = 1 << 24,
    repeats: Annotated[int, typer.Option(help="Timings of each step; their median is shown.")] = 9,
    rounds: Annotated[int, typer.Option(help="Rounds of independent dither, for errors and bias.")] = 16,
    threads: Annotated[int, typer.Option(help="More than 1: also what these gain over one.")] = 1,
    nmse: Annotated[
        float | None,
        typer.Option(
            help="Instead: the bits of each codec at this squared error over squared norm, set by its own knob.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG to write: error against bits, a panel a source.", show_default=False)
    ] = None,
    avx2: Annotated[
        bool, typer.Option("--avx2", help="The same for AVX2 alone beside it, in another process.")
    ] = False,
    json_: options.Json = False,
) -> None:
    """Bits, error, bias and speed of codecs, beside Shannon's limit and a plain copy of the same vector in one run.

    A figure at equal error on real gradients:

        ditherps bench gradients --task mnist --rounds 200 --out mnist-200.safetensors

        ditherps bench codecs --source mnist-200.safetensors --nmse 0.1
    """
    from rich.console import Console

    from ditherps.bench import equal
    from ditherps.bench.codecs import DEFAULT_CODECS, DEFAULT_SOURCES, run, run_avx2, table

    sources = source or list(DEFAULT_SOURCES)
    if nmse is not None:
        if avx2 or threads > 1:
            raise OptionError("nmse", nmse, "only without --avx2 and --threads: it measures no speed")
        records = equal.run(nmse, codec, sources=sources, coordinates=coordinates, rounds=rounds)
        Console().print(equal.table(records))
    else:
        chosen = codec or list(DEFAULT_CODECS)
        records = run(chosen, coordinates, repeats, sources=sources, threads=threads, rounds=rounds)
        if avx2:
            records += run_avx2(chosen, coordinates, repeats, sources=sources, threads=threads, rounds=rounds)
        Console().print(table(records))
    if plot is not None:
        from ditherps.bench.plots import plot_rate_distortion

        print(plot_rate_distortion(records, plot))
    if json_:
        print(json.dumps(records), flush=True)


@bench.command()
def gradients(
    out: Annotated[Path, typer.Option(help="Safetensors file to write.", show_default=False)],
    task: options.Task = None,
    model: options.Model = None,
    workers: options.Workers = None,
    rounds: Annotated[int, typer.Option("--rounds", "-r", min=0, help="Rounds before the update is taken.")] = 200,
    seed: options.Seed = None,
    set_: options.Set = None,
    data_dir: options.DataDir = None,
) -> None:
    """Train without compression in this process, and save the next update of a worker, for `bench codecs --source`."""
    from ditherps.bench.gradients import save_gradient
    from ditherps.job import resolve_job

    flags = options.job_flags(task, model, workers, None, "none", None, None, None, seed, set_)
    job = resolve_job(flags)
    metadata = save_gradient(job.config, job.task, data_dir, rounds, out)
    print(", ".join([str(out), *(f"{key} {value}" for key, value in metadata.items())]))


@bench.command()
def rounds(
    codecs: Annotated[
        list[str] | None,
        typer.Argument(
            help="UP or UP/DOWN, each NAME or NAME:option=value,...; DOWN is the codec of the model's way to the "
            "workers, by default the uplink's (default: none, dqsg).",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 4,
    rounds: Annotated[int, typer.Option(min=5, help="Rounds of each codec.")] = 20,
    coordinates: Annotated[int, typer.Option(min=1, help="Parameters of the model.")] = 11_173_962,
    json_: options.Json = False,
) -> None:
    """Seconds a round takes through the real service on this machine's loopback, without any computation."""
    from ditherps.bench.rounds import measure, print_table

    records = [measure(codec, workers, rounds, coordinates) for codec in codecs or ["none", "dqsg"]]
    print_table(records)
    if json_:
        print(json.dumps(records), flush=True)
