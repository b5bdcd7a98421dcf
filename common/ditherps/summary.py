"""The end of a run, as a person reads it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ditherps.view import bits


def print_summary(result: Mapping[str, Any]) -> None:
    """Print what a run reached and what it cost, from its `result.json`, on standard output."""
    table = Table(
        title=f"{result['task']} with {result['codec']}: {result['reason']}", show_header=False, title_justify="left"
    )
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    up, down = result["uplink_bits_per_coordinate"], result["downlink_bits_per_coordinate"]
    rows = {
        "rounds": f"{result['rounds']} with {result['workers']} workers in {result['seconds']:.1f} s",
        "test accuracy": _number(result["test_accuracy"], ".4f"),
        "test loss": _number(result["test_loss"], ".4f"),
        "uplink": f"{bits(result['uplink_bytes'])}, "
        f"{_number(result['uplink_kbit_per_worker_round'], '.1f')} kbit a worker and round",
        "downlink": f"{bits(result['downlink_bytes'])}, {_sent(result)}",
        "bits a coordinate": f"{_number(up, '.3f')} up + {_number(down, '.3f')} down "
        f"= {_number(result['total_bits_per_coordinate'], '.3f')}",
        "times below float32": f"{_number(result['compression_vs_float32'], '.1f')} up, "
        f"{_number(32 / down if down else None, '.1f')} down, "
        f"{_number(result['total_compression_vs_float32'], '.1f')} both",
        "model_sha256": result["model_sha256"],
        "run folder": result["run_dir"],
    }
    if result["nested_tiles"]:
        failed, tiles = result["nested_failed_tiles"], result["nested_tiles"]
        rows["nested tiles"] = f"{failed} of {tiles} failed to decode ({100 * failed / tiles:.2f} %)"
    if result["digest_mismatches"]:
        rows["wrong models"] = f"{result['digest_mismatches']} times a worker held another, and got a snapshot"
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def print_wide(table: Table) -> None:
    """Print a table on standard output: as wide as the terminal, 100 columns where there is none."""
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _sent(result: Mapping[str, Any]) -> str:
    """What went down."""
    whole = f"{result['downlink_snapshots']} whole models"
    if result["downlink_codec"] == "none":
        return f"{whole} in float32"
    return f"{result['downlink_steps']} steps with {result['downlink_codec']}, {whole}"


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)
