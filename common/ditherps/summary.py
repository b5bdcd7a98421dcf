"""The end of a run, as a person reads it."""

from __future__ import annotations

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
    rows = {
        "rounds": f"{result['rounds']} with {result['workers']} workers in {result['seconds']:.1f} s",
        "test accuracy": _number(result["test_accuracy"], ".4f"),
        "test loss": _number(result["test_loss"], ".4f"),
        "uplink": bits(result["uplink_bytes"])
        + f", {_number(result['uplink_kbit_per_worker_round'], '.1f')} kbit a worker and round",
        "downlink": bits(result["downlink_bytes"]),
        "bits a coordinate, up": f"{_number(result['uplink_bits_per_coordinate'], '.3f')} "
        f"({_number(result['compression_vs_float32'], '.1f')} times below float32)",
        "model_sha256": result["model_sha256"],
        "run folder": result["run_dir"],
    }
    if result["nested_tiles"]:
        failed, tiles = result["nested_failed_tiles"], result["nested_tiles"]
        rows["nested tiles"] = f"{failed} of {tiles} failed to decode ({100 * failed / tiles:.2f} %)"
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)
