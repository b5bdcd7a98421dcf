"""The dashboards: what Grafana takes, and what a newcomer understands."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.expressions import DASHBOARDS, panels_of
from tests.deploy.metrics_table import DEPLOY, exported, server_metrics, worker_metrics

GRAFANA = DEPLOY / "grafana"
# Units of Grafana that the panels use: https://github.com/grafana/grafana, packages/grafana-data/src/valueFormats.
UNITS = {"none", "percentunit", "s", "bytes", "decbits", "bps", "Bps", "cps", "cpm", "reqps"}


def boards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in DASHBOARDS}


def test_the_files_are_what_the_generator_writes() -> None:
    checked = subprocess.run(
        [sys.executable, GRAFANA / "generate.py", "--check"], capture_output=True, text=True, timeout=100, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_reads_back_as_grafanas_own_types(path: Path) -> None:
    """grafana-foundation-sdk is generated from Grafana's published schema: what it does not know would be lost."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    values = json.loads(path.read_text())
    again = json.loads(json.dumps(Dashboard.from_json(values), cls=JSONEncoder))
    assert again == {key: value for key, value in values.items() if key != "id"}
    assert values["id"] is None


def test_the_schema_is_that_of_the_grafana_that_compose_starts() -> None:
    image = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]["image"]
    version = importlib.metadata.version("grafana-foundation-sdk").partition("!")[2]
    assert image == f"${{GRAFANA_IMAGE:-grafana/grafana:{version}}}"
    assert f"GRAFANA_IMAGE=grafana/grafana:{version}\n" in (DEPLOY / ".env.example").read_text()


def test_uids_are_fixed_and_nothing_asks_to_be_filled_in() -> None:
    found = boards()
    assert sorted(found) == ["codec", "fleet", "overview", "service"]
    for name, board in found.items():
        assert board["uid"] == f"ditherps-{name}"
        text = json.dumps(board)
        assert "__inputs" not in board
        assert "${" not in text
        assert set(re.findall(r"\$\w+", text)) <= {"$__rate_interval"}
        uids = {panel["datasource"]["uid"] for panel in panels_of(board)}
        assert uids == {provisioned()["uid"]}


def provisioned() -> dict[str, Any]:
    """The one datasource."""
    (found,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert isinstance(found, dict)
    return found


def test_provisioning_fits_compose() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert provisioned()["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/ditherps.yaml").read_text())["providers"]
    mounts = {mount.split(":")[1] for mount in compose["services"]["grafana"]["volumes"]}
    assert provider["options"]["path"] in mounts


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_has_a_title_a_unit_and_a_description(path: Path) -> None:
    panels = panels_of(json.loads(path.read_text()))
    assert len(panels) >= 10
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert unit in UNITS or unit.startswith("suffix:"), panel["title"]
        assert len(panel["description"]) >= 40, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert all(target["expr"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    for board in boards().values():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken, (board["uid"], panel["title"])
            assert at["x"] + at["w"] <= 24
            taken |= cells


def test_every_metric_that_is_asked_for_exists() -> None:
    known = set(exported(server_metrics().registry)) | set(exported(worker_metrics().registry))
    known |= {f"{name}_{part}" for name in known for part in ("bucket", "sum", "count")}
    text = "".join(path.read_text() for path in [*DASHBOARDS, *(DEPLOY / "prometheus/rules").glob("*.yml")])
    asked = set(re.findall(r"\b(?:ditherps|grpc_server|process)_\w+", text))
    assert asked
    assert asked <= known | {"ditherps_checkpoint_failures_total"}
