"""100,000 mutated messages over all RPCs: no crash, no hang, no growth, a typed answer to each, training unharmed.

The suite sends fewer; `pytest tests/faults/test_mutations.py --mutations 100000 -s` all of them, and says how they were
answered.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import tomli_w

from ditherps.gradient import make_deterministic
from ditherps.job import resolve_job
from ditherps.security.certificates import Authority
from tests.faults.forked import start_forked
from tests.faults.mutations import Attack
from tests.service.harness import Cluster
from tests.service.simulation import simulated
from tests.tiny import Tiny

# One loop for all: gRPC's own poller outlives the loop that it began in.
pytestmark = pytest.mark.asyncio(loop_scope="session")

SEED = 5
TASK, MODEL = "tests.tiny:Tiny", "norm"
WORKERS = ("worker-0", "worker-1")
GROWTH_BYTES = 5 << 20
"""After a tenth of the messages: 100,000 took 1.4 MiB, the suite's few, which begin with a cold server, 2 to 3."""
LIMITS = {"worker_join_burst": 1_000_000, "join_burst": 1_000_000}
"""The rate of Joins has tests of its own; here all of them are to be looked at."""


def own_bytes(pid: int) -> int:
    """Memory of a process that is not a file's."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGESIZE")


@pytest.mark.timeout(3600)
async def test_mutated_messages(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    make_deterministic(1)
    count = pytestconfig.getoption("mutations")
    rounds = 80 + count // 50
    options = {
        "task": TASK, "model": MODEL, "rounds": rounds, "codec": "dqsg", "batch_size": 8, "quorum": 0.6,
        "codec_options": {"coder": "rans"}, "members": [*WORKERS, "eve"], "workers": 3, "evaluate_every": rounds,
        "idle_timeout_seconds": 30,
        "downlink": {"history_steps": 20},  # else the steps of a thousand rounds are kept, as they should be
    }  # fmt: skip
    certs = tmp_path / "certs"
    authority = Authority(certs)
    authority.server([])
    for name in (*WORKERS, "eve"):
        authority.worker(name)
    config = tmp_path / "job.toml"
    job = resolve_job(options).config
    config.write_text(tomli_w.dumps({**options, "server": {"limits": LIMITS}}))
    cluster = Cluster(tmp_path, start_forked)
    samples: list[tuple[int, int]] = []
    try:
        with (tmp_path / "server.log").open("w") as log:
            cluster.server("--config", config, "--certs", certs / "server", stderr=log)
        pid = cluster.processes["server"].pid
        for name in WORKERS:
            with (tmp_path / f"{name}.log").open("w") as log:
                folder = certs / "workers" / name
                cluster.worker(name, "--task", TASK, "--certs", folder, stderr=log)

        def on_progress(sent: int) -> None:
            if not samples or sent - samples[-1][0] >= count // 100:
                assert cluster.processes["server"].poll() is None
                samples.append((sent, own_bytes(pid)))

        attack = Attack(cluster.address, certs / "workers/eve", "eve", job, SEED)
        began = time.monotonic()
        try:
            await attack.join()
            outcomes = await attack.run(count, on_progress, episode=max(200, count // 100))
            await attack.leave()
        finally:
            await attack.close()
        seconds = time.monotonic() - began
        result = cluster.result()
        for name in WORKERS:
            assert cluster.processes[name].wait(60) == 0, (tmp_path / f"{name}.log").read_text()[-2000:]
    finally:
        cluster.close()
    print(f"\n{outcomes.messages} messages, {sum(outcomes.counts.values())} calls in {seconds:.1f} s")
    print(f"{outcomes.left:8d} broken off by the attacker, {outcomes.unseen} answers lost by its own library")
    for (status, reason), number in outcomes.by_status().most_common():
        print(f"{number:8d} {status} {reason}")
    shares = [next(used for sent, used in samples if sent >= count * tenths // 10) for tenths in (1, 3, 5, 7, 9)]
    settled, grown = shares[0], samples[-1][1] - shares[0]
    curve = ", ".join(f"{(used - settled) / 2**20:+.1f}" for used in (*shares[1:], samples[-1][1]))
    print(
        f"server memory: {settled / 2**20:.1f} MiB after a tenth of them, then MiB more after 3, 5, 7, 9, 10: {curve}"
    )

    assert outcomes.messages >= count
    assert not outcomes.wrong, outcomes.wrong[:20]
    said = (tmp_path / "server.log").read_text()
    for sign in ("Traceback", "the server failed", "unexpectedly", "ERROR", "never retrieved", "never awaited"):
        assert sign not in said, said[max(0, said.index(sign) - 500) :][:3000]
    assert grown < GROWTH_BYTES, samples
    assert result["contributions"] == 2 * rounds
    assert result["model_sha256"] == simulated(job, Tiny(), [(0, 1)] * rounds)
