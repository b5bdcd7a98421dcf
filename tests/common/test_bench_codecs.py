"""`ditherps bench codecs`: its records and its JSON."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from ditherps.bench import codecs as bench
from ditherps.bench.commands import bench as commands
from ditherps.errors import OptionError

KEYS = {
    "codec",
    "options",
    "source",
    "coordinates",
    "bits_per_coordinate",
    "nmse",
    "bias_z",
    "encode_ratio",
    "accumulate_ratio",
    "encode_coordinates_per_second",
    "accumulate_coordinates_per_second",
    "copy_coordinates_per_second",
    "cpu",
    "instructions",
}


def test_records_hold_what_they_promise() -> None:
    records = bench.run(coordinates=1 << 15, repeats=1)
    assert [r["codec"] for r in records] == [spec.partition(":")[0] for spec in bench.DEFAULT_CODECS]
    for record in records:
        assert set(record) >= KEYS
        assert abs(record["bias_z"]) < 5
    ternary = records[2]
    assert ternary["options"]["levels"] == 1.0
    assert ternary["bits_per_coordinate"] <= 1.62
    assert 0.5 < ternary["nmse"] < 2.5
    assert records[0]["nmse"] == 0


def test_json_is_the_last_line() -> None:
    result = CliRunner().invoke(
        commands, ["codecs", "--codec", "dqsg:levels=3", "--coordinates", "5000", "--repeats", "1", "--json"]
    )
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout.strip().splitlines()[-1])
    assert records[0]["options"]["levels"] == 3.0


@pytest.mark.parametrize("spec", ["dqsg:levels", "nope", "dqsg:levels=x"])
def test_wrong_codecs_are_named(spec: str) -> None:
    with pytest.raises(OptionError):
        bench.run([spec], coordinates=100, repeats=1)
