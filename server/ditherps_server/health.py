"""grpc.health.v1: `Check` alone.

`Watch` is not offered: anybody could hold its streams open for ever, and one that is not read would hold up the
server's end, since the library writes to it under the lock that `enter_graceful_shutdown` needs. Clients take its
absence for a server that can only be asked.
"""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from ditherps import wire
from ditherps.errors import PayloadError, Reason

SERVICE = "grpc.health.v1.Health"


class Health(health.aio.HealthServicer):
    """Says whether the server serves."""

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        """As the library's; what is no message is its sender's fault."""
        if isinstance(request, PayloadError):
            trailer = ((wire.REASON_KEY, Reason.MALFORMED.value),)
            await context.abort(wire.status_of(Reason.MALFORMED), str(request), trailing_metadata=trailer)
        return await super().Check(request, context)

    @property
    def handler(self) -> grpc.GenericRpcHandler:
        """For the server; probes are not training traffic, and are not counted."""
        check = grpc.unary_unary_rpc_method_handler(
            self.Check,
            request_deserializer=wire.parser(health_pb2.HealthCheckRequest),
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Check": check})
