"""How many RPCs there are, how they end, and how long they take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from ditherps import wire
from ditherps.metrics import ServerMetrics

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_STREAM = {False: "unary", True: "stream"}
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class RpcMeter(grpc.aio.ServerInterceptor):
    """Measures the methods of our service; goes before the interceptor that makes statuses of errors."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        for method in wire.SERVICE.methods:
            metrics.rpcs.labels(method.name, grpc.StatusCode.OK.name)
            metrics.rpc_seconds.labels(method.name)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of each method of our service."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        if handler is None or service != wire.SERVICE.full_name:
            return handler
        kind = f"{_STREAM[handler.request_streaming]}_{_STREAM[handler.response_streaming]}"
        make: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            self._measured(getattr(handler, kind), method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _measured(self, inner: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began, code = time.perf_counter(), grpc.StatusCode.UNKNOWN.name
            try:
                answer = await inner(request, context)
                code = _name(context.code())
                return answer
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED.name
                raise
            finally:
                self._metrics.rpcs.labels(method, code).inc()
                self._metrics.rpc_seconds.labels(method).observe(time.perf_counter() - began)

        return handle


def _name(code: Any) -> str:
    """A status as `context.code()` gives it: as an enum, as its number, or None where nobody has set one."""
    if code is None:
        return grpc.StatusCode.OK.name
    return code.name if isinstance(code, grpc.StatusCode) else _CODES.get(code, grpc.StatusCode.UNKNOWN.name)
