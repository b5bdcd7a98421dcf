"""Certificates good and bad, as folders: what the tests of security show to each other."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ditherps.security.certificates import Authority

NOW = datetime.now(UTC)


def make(root: Path) -> Path:
    """Make below `root`: `server`, `workers/...`, `pools/gpu`, bad ones in `bad/...`, another authority in `other`."""
    bad = root / "bad"
    past, future = NOW - timedelta(days=500), NOW + timedelta(days=30)
    for name, when in (("expired", past), ("early", future)):
        authority = Authority(root, now=past if name == "expired" else when)
        for made in (authority.server([]), authority.worker("worker-0")):
            shutil.move(made.folder, bad / f"{name}-{made.folder.name}")
    authority = Authority(root)
    authority.server([])
    for index in range(2):
        authority.worker(f"worker-{index}")
    authority.worker("gpu/0")
    authority.pool("gpu")
    other = Authority(root / "other")
    other.server([])
    other.worker("worker-0")
    mixed = bad / "mixed"  # another authority's certificate, and trust in the right one
    shutil.copytree(root / "other/workers/worker-0", mixed)
    shutil.copy(root / "ca.pem", mixed)
    return root
