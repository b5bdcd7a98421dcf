"""What the tests under faults share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.forked import start_forked
from tests.service.harness import Cluster
from tests.worker.conftest import _deterministic as _deterministic


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Real processes that start quickly, in a run folder of their own; all are gone afterwards."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    cluster = Cluster(run_dir, start_forked)
    yield cluster
    cluster.close()
