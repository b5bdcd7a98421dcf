"""Server and workers on hosts of their own, with a bad line between them."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.faults.forked import start_forked
from tests.faults.hosts import Host, Wire, hosts, why_not
from tests.faults.runs import Run
from tests.service.harness import Cluster

LOSS, DELAY_SECONDS = 0.1, 0.1
SERVER = "import socket; s = socket.create_server(('', 4000)); c = s.accept()[0]; c.sendall(c.recv(9))"
CLIENT = """
import socket, sys, time
for _ in range(100):
    try:
        c = socket.create_connection((sys.argv[1], 4000), 5)
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
began = time.monotonic()
c.sendall(b"ping")
assert c.recv(9) == b"ping"
print(time.monotonic() - began)
"""


@pytest.fixture
def net() -> Iterator[tuple[Wire, dict[str, Host]]]:
    if reason := why_not():
        pytest.skip(reason)
    with hosts("server", "left", "right", seed=1) as made:
        yield made


def test_a_packet_takes_as_long_as_the_wire_says(net: tuple[Wire, dict[str, Host]]) -> None:
    wire, made = net
    wire.delay_seconds = 0.15
    at = [("ip", "netns", "exec", made[name].namespace, sys.executable, "-c") for name in ("server", "left")]
    server = subprocess.Popen([*at[0], SERVER])
    try:
        command = [*at[1], CLIENT, made["server"].address]
        client = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert 0.3 <= float(client.stdout) < 2.0
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
    assert wire.carried_packets >= 5
    assert wire.lost_packets == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plaintext", "mutual TLS"])
def test_loss_and_delay_change_nothing_but_the_time(
    cluster: Cluster, net: tuple[Wire, dict[str, Host]], faults_in_full: bool, how: str
) -> None:
    wire, made = net
    rounds = 40 if faults_in_full else 6
    job = Run(cluster, workers=2, rounds=rounds, codec="ndqsg", optimizer={"lr": 0.05, "momentum": 0.9})
    server, address = made["server"], made["server"].address
    options: list[list[object]] = [["--insecure"]] * 3
    if how != "plaintext":
        certs = job.folder / "certs"
        names = ("--worker", "worker-0", "--worker", "worker-1")
        assert start_forked(["certs", "init", "--dir", certs, "--host", address, *names]).wait(60) == 0
        options = [["--certs", certs / name] for name in ("server", "workers/worker-0", "workers/worker-1")]
    wire.loss, wire.delay_seconds = LOSS, DELAY_SECONDS
    began = time.monotonic()
    job.server("--host", address, *options[0], namespace=server.namespace)
    for index, name in enumerate(("left", "right")):
        job.worker(index, *options[1 + index], namespace=made[name].namespace)
    result = job.ended_well()
    seconds = statistics.median(record["round_seconds"] for record in cluster.records())
    print(f"{how}: {time.monotonic() - began:.1f} s in all, {seconds:.2f} s a round, "
          f"{wire.lost_packets} of {wire.lost_packets + wire.carried_packets} packets lost")  # fmt: skip
    assert result["model_sha256"] == job.expected()
    assert result["digest_mismatches"] == 0
    assert wire.lost_packets > 0.05 * wire.carried_packets
    assert seconds > 4 * DELAY_SECONDS  # a pull and a push go there and back at least once each
