"""grpc.health.v1: `Check` alone."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health


class Health(health.aio.HealthServicer):
    """Says whether the server serves.

    `Watch` is not offered: anybody could hold its streams open for ever, and one that is not read would hold up the
    server's end, since the library writes to it under the lock that `enter_graceful_shutdown` needs.
    """

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802
        """Refuse; clients take this for a server that can only be asked."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "health is not watched here: ask Check")
