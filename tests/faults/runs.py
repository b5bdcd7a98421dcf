"""One job over real processes that come and go, and the model that it has to end with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w

from ditherps.job import resolve_job
from tests.faults.tasks import PACE_FILE
from tests.service.harness import Cluster
from tests.service.simulation import Taken, simulated

PACED = "tests.faults.tasks:Paced"


class Run:
    """A job file, its server and its workers; their logs lie beside the run folder and go on over all their lives."""

    def __init__(self, cluster: Cluster, **job: Any) -> None:
        self.cluster = cluster
        self.folder = cluster.run_dir.parent
        self._file = self.folder / "job.toml"
        worker = {"connect_timeout_seconds": 300.0}
        default = {"task": PACED, "model": "wide"} if "task" not in job else {}
        self._file.write_text(tomli_w.dumps({**default, **job, "worker": worker}))
        self.job = resolve_job({}, self._file)

    def server(self, *arguments: object, **options: Any) -> None:
        """Start the server, and wait until it listens; options as of `harness.start`."""
        self.begin_server(*arguments, **options)
        self.cluster.await_server()

    def begin_server(self, *arguments: object, **options: Any) -> None:
        """Start the server."""
        with self.log("server").open("a") as log:
            self.cluster.begin_server("--config", self._file, *arguments, stderr=log, **options)

    def worker(self, index: int, *arguments: object, **options: Any) -> None:
        """Start a worker."""
        name = self.job.config.member_table[index]
        with self.log(name).open("a") as log:
            asked = ["--config", self._file, "--data-dir", self.folder, *arguments]
            asked += ["--allow-data"] if self.job.config.mode == "data" else []
            self.cluster.worker(name, *asked, stderr=log, **options)

    def workers(self) -> None:
        """Start all of them."""
        for index in range(self.job.config.workers):
            self.worker(index)

    def log(self, name: str) -> Path:
        """What a process has written."""
        return self.folder / f"{name}.log"

    def pace(self, seconds: float) -> None:
        """Every training step takes this long from now on."""
        part = self.folder / f"{PACE_FILE}.part"
        part.write_text(str(seconds))
        part.replace(self.folder / PACE_FILE)

    def expected(self, records: Iterable[dict[str, Any]] = ()) -> str:
        """The SHA-256 of the model that the job makes, with the participation in `records`; default all in each."""
        return simulated(self.job.config, self.job.task, [Taken.of(record) for record in records])

    def ended_well(self) -> dict[str, Any]:
        """The result, once the server and all workers have come to their end.

        It stands in result.json too, each round in rounds.jsonl, once and in order, and totals never go backwards.
        """
        result = self.cluster.result()
        for name in self.job.config.member_table:
            code, _, _ = self.cluster.finish(name)
            assert code == 0, self.log(name).read_text()[-2000:]
        records, rounds = self.cluster.records(), self.job.config.rounds
        assert [(record["round"], record["version"]) for record in records] == [(n, n + 1) for n in range(rounds)]
        assert result["rounds"] == rounds
        assert result["contributions"] == sum(len(record["workers"]) for record in records)
        for way in ("uplink_total_bytes", "downlink_total_bytes", "elapsed_seconds"):
            totals = [record[way] for record in records]
            assert totals == sorted(totals), way
        return result
