"""The metrics are those that are documented, and say what the records say."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from ditherps import wire
from ditherps.config import JobConfig, ServerConfig, WorkerConfig
from ditherps.errors import Reason
from ditherps.gradient import make_deterministic
from ditherps.lag import INTERVAL_SECONDS, watch_lag
from ditherps.metrics import LARGEST_NAMED, WorkerMetrics
from ditherps_server.app import serve
from ditherps_worker.client import Client
from ditherps_worker.compute import Computer
from ditherps_worker.loop import Loop
from tests.deploy.metrics_table import DEPLOY, Metric, documented, exported, server_metrics, worker_metrics
from tests.service.inprocess import Peer, Refused, serving
from tests.tiny import Tiny

HANDLED = "grpc_server_handled_total"
Sample: TypeAlias = "tuple[str, tuple[tuple[str, str], ...]]"


def kinds(metrics: dict[str, Metric]) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {name: (metric.kind, metric.labels) for name, metric in metrics.items()}


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    server, worker = kinds(exported(server_metrics().registry)), kinds(exported(worker_metrics().registry))
    both = kinds(documented("Both ends"))
    assert both == {name: server[name] for name in server.keys() & worker.keys()}
    assert kinds(documented("Server")) == {name: server[name] for name in server.keys() - worker.keys()}
    assert kinds(documented("Worker")) == {name: worker[name] for name in worker.keys() - server.keys()}


def test_every_label_is_documented_and_a_round_is_none() -> None:
    text = (DEPLOY / "METRICS.md").read_text()
    everything = exported(server_metrics().registry) | exported(worker_metrics().registry)
    ours = {name: metric for name, metric in everything.items() if not name.startswith("python_")}
    for label in {label for metric in ours.values() for label in metric.labels}:
        assert f"`{label}`" in text.partition("## Both ends")[0], label
    assert not any("round" in label for metric in everything.values() for label in metric.labels)


def scraped(port: int) -> dict[Sample, float]:
    """Samples of /metrics, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


async def test_round_bits_are_those_of_every_record(tmp_path: Path) -> None:
    """Compared when a record is written, while nothing else runs in the server's loop."""
    make_deterministic(1)
    job = JobConfig(task="tiny", workers=2, rounds=6, codec="ndqsg", batch_size=8)
    config = ServerConfig(run_dir=tmp_path, port=0, metrics_port=0, threads=1)
    compared: list[int] = []
    last: dict[Sample, float] = {}

    def on_round(record: dict[str, Any]) -> None:
        last.update(scraped(json.loads((tmp_path / "server.json").read_text())["metrics_port"]))
        for direction, field in (("up", "uplink_bytes"), ("down", "downlink_bytes")):
            assert last["ditherps_round_bits", (("direction", direction),)] == 8 * record[field]
        assert last["ditherps_round_contributions", ()] == len(record["workers"])
        compared.append(record["round"])

    async def worker(address: str) -> None:
        worker_config = WorkerConfig(server=address, task="tiny")
        client = Client(worker_config, wire.WireMeter())

        def computer(job: JobConfig, index: int) -> Computer:
            return Computer(job, index, Tiny(), None, torch.device("cpu"))

        try:
            await Loop(worker_config, client, computer, WorkerMetrics("test")).run()
        finally:
            await client.close()

    running = asyncio.create_task(serve(job, config, Tiny(), on_round))
    while not (tmp_path / "server.json").exists():
        assert not (await asyncio.wait([running], timeout=0.01))[0]
    address = json.loads((tmp_path / "server.json").read_text())["address"]
    await asyncio.gather(worker(address), worker(address))
    await running
    assert compared == list(range(6))
    # Each of the two was heard of, in each round, and in no RPC more than gRPC said.
    for name in ("worker-0", "worker-1"):
        assert last["ditherps_worker_contributions_total", (("worker", name),)] == 6
        assert 0 < last["ditherps_worker_latency_seconds", (("worker", name),)] < 60
    ok = {method: last[HANDLED, (("grpc_code", "OK"), ("grpc_method", method))] for method in ("Join", "Push", "Leave")}
    assert ok == {"Join": 2, "Push": 12, "Leave": 0}
    assert last["ditherps_job_info", (("codec", "ndqsg"), ("downlink_codec", downlink(last)), ("mode", "gradient"),
                                      ("task", "tiny"))] == 1  # fmt: skip


def downlink(samples: dict[Sample, float]) -> str:
    """The way down's codec, as the job's information has it."""
    (labels,) = [dict(labels) for name, labels in samples if name == "ditherps_job_info"]
    assert labels["downlink_codec"].startswith("dqsg")
    return labels["downlink_codec"]


async def test_a_call_that_is_refused_counts_under_its_code(tmp_path: Path) -> None:
    async with serving(tmp_path, metrics=True) as served, Peer(served.address) as peer:
        with pytest.raises(Refused):
            await peer.join("nobody")
        found = await asyncio.to_thread(scraped, served.metrics_port or 0)
    assert found[HANDLED, (("grpc_code", "FAILED_PRECONDITION"), ("grpc_method", "Join"))] == 1
    assert found["ditherps_refused_rpcs_total", (("reason", Reason.UNKNOWN_MEMBER.value),)] == 1


async def test_a_large_job_has_no_series_by_worker(tmp_path: Path) -> None:
    async with serving(tmp_path, metrics=True, workers=LARGEST_NAMED + 1) as served, Peer(served.address) as peer:
        await peer.join()
        await peer.status()
        found = await asyncio.to_thread(scraped, served.metrics_port or 0)
    assert found["ditherps_job_workers", ()] == LARGEST_NAMED + 1
    assert not [labels for _, labels in found if "worker" in dict(labels)]


async def test_a_late_loop_is_seen() -> None:
    seen: list[float] = []
    watching = asyncio.create_task(watch_lag(seen.append))
    await asyncio.sleep(0)
    time.sleep(INTERVAL_SECONDS + 0.3)  # noqa: ASYNC251
    await asyncio.sleep(INTERVAL_SECONDS)
    watching.cancel()
    assert seen[0] >= 0.25
