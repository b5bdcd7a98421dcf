"""Links that are cut in the middle of a push: it goes on where it was, and nothing enters twice."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from ditherps import wire
from ditherps.job import resolve_job
from tests.faults.link import How, Way, link_to
from tests.service.harness import Cluster
from tests.service.inprocess import serving
from tests.service.simulation import simulated
from tests.tiny import Tiny
from tests.worker.test_loop import worker

WORKERS = 2
PUSH_BYTES = 4 * 550_004
"""An update of the model in float32: three chunks."""
CONTROL_BYTES = 2000
"""Most that a worker sends in a round, and to join again, beside its update."""


def rounds_of(seed: int, cuts: int) -> tuple[int, list[int]]:
    """Rounds of a job, and after how many bytes of the uplink each cut of one worker's link comes after the last.

    All but a few bytes of the uplink are pushes, so a cut is anywhere in one of them.
    """
    choice = random.Random(seed)
    gaps = [choice.randrange(PUSH_BYTES // 2, 3 * PUSH_BYTES // 2) for _ in range(cuts)]
    return math.ceil(sum(gaps) / PUSH_BYTES) + 1, gaps


@pytest.mark.slow
def test_links_that_are_cut_in_the_middle_of_pushes(cluster: Cluster, faults_in_full: bool) -> None:
    each = 10 if faults_in_full else 2
    plans = [rounds_of(seed, each) for seed in range(WORKERS)]
    rounds = max(number for number, _ in plans)
    flags = {"task": "tests.tiny:Tiny", "model": "broad", "workers": WORKERS, "rounds": rounds, "codec": "none"}
    cluster.server(*(word for key, value in flags.items() for word in (f"--{key}", value)))
    with link_to(cluster.address) as first, link_to(cluster.address) as second:
        links = (first, second)
        for index, (link, (_, gaps)) in enumerate(zip(links, plans, strict=True)):
            for number, gap in enumerate(gaps):
                link.cut_after(gap, how=How.CLOSE if number % 2 else How.RESET)
            cluster.worker(f"worker-{index}", "--task", flags["task"], server=link.address)
        first.cut_after(PUSH_BYTES // 2, Way.DOWN)  # and one in the middle of a pull
        result = cluster.result()
        logs = [cluster.finish(f"worker-{index}") for index in range(WORKERS)]

    resolved = resolve_job(flags)
    assert result["model_sha256"] == simulated(resolved.config, resolved.task)
    assert result["contributions"] == WORKERS * rounds
    assert [code for code, _, _ in logs] == [0] * WORKERS
    pauses = [seconds for link in links for seconds in link.pauses_seconds]
    print(f"cuts={len(pauses)} seconds away: sum={sum(pauses):.1f} longest={max(pauses):.1f}")
    for link in links:
        up = [cut for cut in link.cuts if cut.way is Way.UP]
        assert len(up) == each
        assert all(cut.connections == 1 for cut in link.cuts)
        again = link.uplink_bytes - rounds * PUSH_BYTES
        print(f"bytes sent again, with control: {again} for {each} cuts")
        assert 0 < again <= each * wire.CHUNK_BYTES + (rounds + len(link.cuts)) * CONTROL_BYTES
    assert len(first.cuts) == each + 1
    assert sum(pauses) < 3.0 * len(pauses)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("how", [How.SILENCE, How.CLOSE])
async def test_a_connection_that_dies_in_the_middle_of_a_push(tmp_path: Path, how: How) -> None:
    """Silently, as past a firewall that has forgotten it, or with a word: a new one gets through."""
    options: dict[str, Any] = {"model": "wide", "codec": "none", "workers": 1, "rounds": 2}
    async with serving(tmp_path, idle_timeout_seconds=2.0, **options) as served:
        with link_to(served.address) as link:
            link.cut_after(60_000, how=how)
            result = await worker(link.address, "worker-0", connect_timeout_seconds=20)
            assert [cut.how for cut in link.cuts] == [how]
        assert result.model_sha256 == simulated(served.job, Tiny())
