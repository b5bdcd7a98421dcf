"""`ditherps bench`: the commands; what they measure loads when it is asked for."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ditherps import options

bench = typer.Typer(no_args_is_help=True, help="Measure codecs and rounds on this machine.")


@bench.command()
def rounds(
    codecs: Annotated[list[str] | None, typer.Argument(help="Codecs [none, dqsg].", show_default=False)] = None,
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
