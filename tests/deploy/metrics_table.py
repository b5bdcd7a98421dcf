"""The metrics that exist, and those that `deploy/METRICS.md` documents."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from ditherps.config import JobConfig
from ditherps.metrics import ServerMetrics, WorkerMetrics

DEPLOY = Path(__file__).parents[2] / "deploy"
_ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<kind>\w+) \|(?P<labels>[^|]*)\| (?P<text>[^|]+) \|$", re.M)


@dataclass(frozen=True)
class Metric:
    """What a metric is, by its name on the wire."""

    kind: str
    labels: tuple[str, ...]
    text: str = ""


def server_metrics() -> ServerMetrics:
    """A server's metrics, as they are once it serves a job."""
    metrics = ServerMetrics("test")
    metrics.describe(JobConfig(), "dqsg", 1)
    return metrics


def worker_metrics() -> WorkerMetrics:
    """A worker's."""
    return WorkerMetrics("test")


def exported(registry: CollectorRegistry) -> dict[str, Metric]:
    """What a registry exports, by name: of a counter with its `_total`, of a histogram without its suffixes."""
    found = {}
    for family in registry.collect():
        # A metric with labels has no samples yet: prometheus_client knows their names.
        collector = registry._names_to_collectors.get(family.name)
        labels = set(getattr(collector, "_labelnames", ()))
        labels |= {label for sample in family.samples for label in sample.labels} - {"le"}
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = Metric(family.type, tuple(sorted(labels)), family.documentation)
    return found


def documented(section: str) -> dict[str, Metric]:
    """The rows of one section of `deploy/METRICS.md`."""
    text = (DEPLOY / "METRICS.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return {
        row["name"]: Metric(row["kind"], tuple(sorted(re.findall(r"`(\w+)`", row["labels"]))), row["text"])
        for row in _ROW.finditer(text)
    }
