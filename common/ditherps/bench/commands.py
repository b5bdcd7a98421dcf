"""`ditherps bench`: the commands; what they measure loads when it is asked for."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ditherps import options

bench = typer.Typer(no_args_is_help=True, help="Measure codecs and rounds on this machine.")


@bench.command()
def codecs(
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec", help="NAME or NAME:option=value,..., repeatable (default: a selection).", show_default=False
        ),
    ] = None,
    coordinates: Annotated[int, typer.Option(help="Length of the vector.")] = 1 << 24,
    repeats: Annotated[int, typer.Option(help="Timings of each step; their median is shown.")] = 9,
    avx2: Annotated[
        bool, typer.Option("--avx2", help="The same for AVX2 alone beside it, in another process.")
    ] = False,
    json_: options.Json = False,
) -> None:
    """Bits, error and speed of codecs on one thread, beside a plain copy of the same vector in the same run."""
    from rich.console import Console

    from ditherps.bench.codecs import DEFAULT_CODECS, run, run_avx2, table

    chosen = codec or list(DEFAULT_CODECS)
    records = run(chosen, coordinates, repeats)
    if avx2:
        records += run_avx2(chosen, coordinates, repeats)
    Console().print(table(records))
    if json_:
        print(json.dumps(records), flush=True)


@bench.command()
def rounds(
    codecs: Annotated[
        list[str] | None, typer.Argument(help="Codecs (default: none, dqsg).", show_default=False)
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
