"""Compose files and Kubernetes manifests: valid, and agreeing with the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ditherps.job import resolve_job
from tests.deploy.engine import compose_command
from tests.deploy.metrics_table import DEPLOY
from tests.service.harness import run

KUBERNETES = DEPLOY / "kubernetes/base"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifests() -> list[dict[str, Any]]:
    """All resources that the kustomization names."""
    names = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    return [document for name in names for document in documents(KUBERNETES / name)]


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=["cpu", "gpu"])
def test_compose_takes_its_files(files: list[str]) -> None:
    command = compose_command()
    if command is None:
        pytest.skip("docker compose is not installed")
    arguments = [part for name in files for part in ("-f", str(DEPLOY / name))]
    checked = subprocess.run(
        [*command, "--env-file", str(DEPLOY / ".env.example"), *arguments, "config", "--quiet"],
        env={"PATH": os.environ["PATH"], "GRAFANA_PASSWORD": "x"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_compose_waits_for_health_and_stops_gently() -> None:
    services = COMPOSE["services"]
    assert "version" not in COMPOSE
    assert services["worker"]["depends_on"]["server"]["condition"] == "service_healthy"
    assert services["grafana"]["depends_on"]["prometheus"]["condition"] == "service_healthy"
    for name in ("server", "worker"):
        assert services[name]["restart"] == "on-failure"
        assert services[name]["init"]
        seconds = int(services[name]["stop_grace_period"].removesuffix("s"))
        assert seconds >= 60  # --grace-seconds is 20 by default
    for name, service in services.items():
        image = service["image"].rpartition(":-")[2].rstrip("}")
        assert image not in ("", "latest"), name


def test_the_example_says_every_variable_of_compose_and_no_password() -> None:
    said = dict(
        line.split("=", 1)
        for line in (DEPLOY / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    text = (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "compose.gpu.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used | {"COMPOSE_PROJECT_NAME"} == set(said)
    assert said["GRAFANA_PASSWORD"] == ""


def test_base_and_tag_are_the_same_everywhere() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    base = COMPOSE["services"]["server"]["build"]["args"]["BASE"].removeprefix("${BASE:-").rstrip("}")
    assert f"ARG BASE={base}\n" in dockerfile
    index = COMPOSE["services"]["server"]["build"]["args"]["TORCH_INDEX"].removeprefix("${TORCH_INDEX-").rstrip("}")
    assert f"ARG TORCH_INDEX={index}\n" in dockerfile
    example = (DEPLOY / ".env.example").read_text()
    assert f"\nBASE={base}\nTORCH_INDEX={index}\n" in example
    assert "latest" not in dockerfile


@pytest.mark.parametrize("path", [DEPLOY / "job.toml", KUBERNETES / "job.toml"], ids=["compose", "kubernetes"])
def test_the_job_files_are_jobs(path: Path) -> None:
    job = resolve_job({}, path).config
    assert job.member_table == tuple(f"pool/{index}" for index in range(job.workers))
    if path.parent == KUBERNETES:
        (workers,) = (one for one in manifests() if one["kind"] == "Job")
        assert job.workers == workers["spec"]["parallelism"] == workers["spec"]["completions"]


@pytest.mark.parametrize("manifest", manifests(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_a_manifest_fits_its_published_schema(manifest: dict[str, Any]) -> None:
    import kubernetes_validate

    if manifest["kind"] == "PodMonitor":  # of the Prometheus operator, whose schema is not in Kubernetes' own
        check_pod_monitor(manifest)
        return
    for version in ("1.29", "1.37"):
        kubernetes_validate.validate(manifest, version, strict=True)


def check_pod_monitor(manifest: dict[str, Any]) -> None:
    """What monitoring.coreos.com/v1 asks of one, and that there are such pods with such a port."""
    assert manifest["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(manifest["spec"]) == {"selector", "podMetricsEndpoints"}
    labels = manifest["spec"]["selector"]["matchLabels"]
    pods = [one["spec"]["template"] for one in manifests() if "template" in one.get("spec", {})]
    (pod,) = (pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items())
    ports = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
    for endpoint in manifest["spec"]["podMetricsEndpoints"]:
        assert set(endpoint) <= {"port", "interval", "relabelings"}
        assert endpoint["port"] in ports
        for relabeling in endpoint["relabelings"]:
            assert set(relabeling) == {"action", "sourceLabels", "targetLabel"}


def test_pods_find_what_they_mount_and_run_as_the_images_user() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    made = {one["name"] for kind in ("configMapGenerator", "secretGenerator") for one in kustomization[kind]}
    user = (DEPLOY / "Dockerfile").read_text().partition("\nUSER ")[2].partition(":")[0]
    for one in manifests():
        if "template" not in one.get("spec", {}):
            continue
        pod = one["spec"]["template"]["spec"]
        assert str(pod["securityContext"]["runAsUser"]) == user
        claims = {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in pod["volumes"]} | claims
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for volume in pod["volumes"]:
            name = volume.get("configMap", {}).get("name") or volume.get("secret", {}).get("secretName")
            assert name is None or name in made


def test_kustomize_builds_it(tmp_path: Path) -> None:
    kustomize, kubectl = shutil.which("kustomize"), shutil.which("kubectl")
    if not kustomize and not kubectl:
        pytest.skip("neither kustomize nor kubectl is installed")
    build = [kustomize, "build"] if kustomize else [str(kubectl), "kustomize"]
    copy = shutil.copytree(KUBERNETES.parent, tmp_path / "kubernetes")
    made = run(["certs", "init", "--dir", copy / "base/certs", "--host", "ditherps-server", "--pool", "pool"])
    assert made.returncode == 0, made.stderr
    for folder in (copy / "base", copy / "gpu"):
        built = subprocess.run([*build, folder], capture_output=True, text=True, timeout=60, check=False)
        assert built.returncode == 0, built.stderr
        found = list(yaml.safe_load_all(built.stdout))
        assert {one["kind"] for one in found} >= {
            "StatefulSet",
            "Job",
            "PodMonitor",
            "Secret",
            "ConfigMap",
            "Namespace",
        }
        (workers,) = (one for one in found if one["kind"] == "Job")
        limits = workers["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (folder.name == "gpu")
