"""grpc.health.v1: `Check` alone.

`Watch` is not offered: anybody could hold its streams open for ever, and one that is not read would hold up the
server's end, since the library writes to it under the lock that `enter_graceful_shutdown` needs. Clients take its
absence for a server that can only be asked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from ditherps import wire
from ditherps.errors import PayloadError, RefusedError
from ditherps_server.admission import Patience
from ditherps_server.interceptor import first_message

SERVICE = "grpc.health.v1.Health"


class Health(health.aio.HealthServicer):
    """Says whether the server serves."""

    def __init__(self, messages: Patience) -> None:
        super().__init__()
        self._messages = messages

    async def _check(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """As the library's; what is no message, or does not come, is its sender's fault."""
        try:
            request = await first_message(requests, self._messages)
        except (PayloadError, RefusedError) as error:
            trailer = ((wire.REASON_KEY, error.reason.value),)
            await context.abort(wire.status_of(error.reason), str(error), trailing_metadata=trailer)
        return await self.Check(request, context)

    @property
    def handler(self) -> grpc.GenericRpcHandler:
        """For the server; probes are not training traffic, and are not counted."""
        check = grpc.stream_unary_rpc_method_handler(
            self._check,
            request_deserializer=wire.parser(health_pb2.HealthCheckRequest),
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Check": check})
