"""A real Prometheus reads a real run: every expression of every panel and rule has an answer."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import authorities
from tests.deploy.expressions import RULES, compared, numbers, of_panels, of_rules, rules
from tests.deploy.metrics_table import DEPLOY, exported, server_metrics, worker_metrics
from tests.service.harness import Cluster, wait_until

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    not (PROMETHEUS and PROMTOOL), reason="prometheus and promtool are not installed (Debian's package prometheus)"
)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def promtool(*arguments: object) -> str:
    """What promtool says; fails where it is not content."""
    ended = subprocess.run(
        [str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_configuration_and_rules_are_valid() -> None:
    promtool("check", "config", DEPLOY / "prometheus/prometheus.yml")
    assert "SUCCESS" in promtool("check", "rules", *RULES)


def test_rules_do_what_their_tests_say() -> None:
    tests = sorted((DEPLOY / "prometheus/tests").glob("*.yml"))
    promtool("test", "rules", *tests)
    tested = yaml.safe_load(tests[0].read_text())["tests"]
    asked = {asked.get("expr") for test in tested for asked in test.get("promql_expr_test", [])}
    fired = {
        asked["alertname"] for test in tested for asked in test.get("alert_rule_test", []) if asked.get("exp_alerts")
    }
    assert {rule["record"] for rule in rules() if "record" in rule} <= asked
    assert {rule["alert"] for rule in rules() if "alert" in rule} == fired  # each has been seen to fire


def test_an_alert_is_one_comparison() -> None:
    assert compared("a - (b > 0 or c) > 3 * d") == ("a - (b > 0 or c)", "3 * d")
    assert compared('rate(a{b=">"}[1m]) > 0') == ('rate(a{b=">"}[1m])', "0")


class Prometheus:
    """A Prometheus server of the test's own."""

    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[Any]:
        """The samples that an expression has now."""
        found = self.get("query", query=expression.replace("$__rate_interval", "15s"))
        return [found["result"]] if found["resultType"] == "scalar" else list(found["result"])


@contextmanager
def prometheus(folder: Path, server_port: int, worker_ports: list[int]) -> Iterator[Prometheus]:
    """Prometheus with the committed configuration, but for where its targets are."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(path) for path in RULES]
    server, worker = config["scrape_configs"]
    assert (server["job_name"], worker["job_name"]) == ("ditherps-server", "ditherps-worker")
    del server["dns_sd_configs"], worker["dns_sd_configs"]
    server["static_configs"] = [{"targets": [f"127.0.0.1:{server_port}"]}]
    # Workers by file, as those of other machines.
    worker["file_sd_configs"] = [{"files": [str(folder / "workers.yml")]}]
    (folder / "workers.yml").write_text(yaml.safe_dump([{"targets": [f"127.0.0.1:{port}" for port in worker_ports]}]))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(PROMETHEUS), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
            ],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield Prometheus(port)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow  # a run of half a minute, since rates need time
@pytest.mark.timeout(600)
def test_every_expression_has_an_answer_and_every_metric_arrives(tmp_path: Path) -> None:
    certs = authorities.make(tmp_path / "certs")
    cluster, run_dir, ports = Cluster(tmp_path / "run"), tmp_path / "run", [free_port(), free_port()]
    run_dir.mkdir()
    try:
        cluster.server(
            "--task", "digits", "--workers", 2, "--rounds", 100_000, "--codec", "ndqsg", "--set", "evaluate_every=5",
            "--checkpoint-every", 20, "--certs", certs / "server",
        )  # fmt: skip
        for index, port in enumerate(ports):
            name = f"worker-{index}"
            cluster.worker(name, "--metrics-port", port, "--certs", certs / "workers" / name)
        with prometheus(tmp_path, cluster.metrics_port, ports) as found:
            asked = {**of_panels(), **of_rules()}
            assert len(asked) > 70

            def unanswered() -> list[str]:
                return [name for name, expression in asked.items() if not found.query(expression)]

            def reachable() -> bool:
                try:
                    return [target["health"] for target in found.get("targets")["activeTargets"]] == ["up"] * 3
                except OSError:
                    return False

            wait_until(reachable, what="Prometheus and its targets")
            try:
                wait_until(lambda: not unanswered(), 120, "an answer to every expression")
            except AssertionError:
                pytest.fail(f"no answer to {unanswered()}")
            several = [name for name, expression in numbers().items() if len(found.query(expression)) != 1]
            assert not several, "panels that show one number"
            assert not [alert for alert in found.get("alerts")["alerts"] if alert["labels"]["severity"] == "critical"]
            # What Prometheus holds of ours is what is documented.
            names = set(found.get("label/__name__/values"))
            for metrics in (server_metrics(), worker_metrics()):
                for name, metric in exported(metrics.registry).items():
                    assert (f"{name}_bucket" if metric.kind == "histogram" else name) in names, name
            last = json.loads((run_dir / "rounds.jsonl").read_text().splitlines()[-1])
            bits = {
                sample["metric"]["direction"]: float(sample["value"][1])
                for sample in found.query("ditherps:round_bits")
            }
            assert bits["up"] == pytest.approx(8 * last["uplink_bytes"], rel=0.1)
    finally:
        cluster.close()
