"""What the tests under faults share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.harness import Cluster
from tests.worker.conftest import _deterministic as _deterministic


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Real processes, with logs beside their run folder; all are gone afterwards."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    cluster = Cluster(run_dir)
    yield cluster
    cluster.close()
