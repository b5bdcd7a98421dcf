"""Every expression that dashboards, recording rules and alerts ask of Prometheus."""

from __future__ import annotations

import json
from typing import Any

import yaml

from tests.deploy.metrics_table import DEPLOY

DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
RULES = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))


def panels_of(board: dict[str, Any]) -> list[dict[str, Any]]:
    """A dashboard's panels without the rows' headings."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def of_panels() -> dict[str, str]:
    """Expression by where it stands."""
    return {
        f"{path.stem}: {panel['title']}: {target['refId']}": target["expr"]
        for path in DASHBOARDS
        for panel in panels_of(json.loads(path.read_text()))
        for target in panel["targets"]
    }


def numbers() -> dict[str, str]:
    """Those of panels that show one number."""
    stats = {panel["title"] for path in DASHBOARDS for panel in panels_of(json.loads(path.read_text()))
             if panel["type"] == "stat"}  # fmt: skip
    return {name: expression for name, expression in of_panels().items() if name.split(": ")[1] in stats}


def rules() -> list[dict[str, Any]]:
    """All rules."""
    return [
        rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
    ]  # fmt: skip


def of_rules() -> dict[str, str]:
    """Expression by rule; of an alert each side of its comparison, which has to exist for it ever to fire."""
    found = {}
    for rule in rules():
        if "record" in rule:
            found[rule["record"]] = rule["expr"]
        else:
            for name, side in zip(("left", "right"), compared(rule["expr"]), strict=True):
                found[f"{rule['alert']}: {name}"] = side
    return found


def compared(expression: str) -> tuple[str, str]:
    """Both sides of the comparison that an alert is."""
    depth = 0
    for place in range(len(expression) - 1, -1, -1):
        character = expression[place]
        depth += (character in ")]}") - (character in "([{")
        if depth == 0 and character == ">":
            return expression[:place].strip(), expression[place + 1 :].strip()
    raise ValueError(f"{expression} compares nothing")
