"""A worker's channel, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditherps import wire
from ditherps.config import WorkerConfig
from ditherps.security.certificates import CA
from ditherps_worker.connection import Connection
from tests.authorities import make

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_certificate_that_vanishes_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between `exists` and `stat`, as it may be while certificates are replaced: the channel stays."""
    folder = make(tmp_path / "authority") / "workers" / "worker-0"
    connection = Connection(WorkerConfig(server="127.0.0.1:1", task="tiny", certs=folder), wire.WireMeter())
    channel, exists = connection.channel, Path.exists

    def vanishing(path: Path, **options: bool) -> bool:
        found = exists(path, **options)
        if path.name == CA:
            path.unlink(missing_ok=True)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", vanishing)
        await connection.renew()
    assert connection.channel is channel
    assert "the old ones stay" in caplog.text
    await connection.close()
