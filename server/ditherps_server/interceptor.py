"""The one place where errors become gRPC status codes, and where RPCs are counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from ditherps import wire
from ditherps.errors import DitherpsError, PayloadError, Reason, RefusedError
from ditherps.text import one_line
from ditherps_server.gate import token_of

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_STREAM = {False: "unary", True: "stream"}

log = logging.getLogger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps `DitherpsError` to a status and a `ditherps-reason`; an unexpected error is logged and answered INTERNAL.

    A stream whose other end does not read for `write_seconds` is ended.
    """

    def __init__(self, meter: wire.WireMeter, write_seconds: float, on_refused: Callable[[Reason], None]) -> None:
        self._meter = meter
        self._write_seconds = write_seconds
        self._on_refused = on_refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of each method of our service."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{wire.SERVICE.full_name}/"):
            return handler
        kind = f"{_STREAM[handler.request_streaming]}_{_STREAM[handler.response_streaming]}"
        inner = getattr(handler, kind)
        wrapped = self._stream(inner) if handler.response_streaming else self._unary(inner)
        make: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(self, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            self._meter.count_rpc(token_of(context))
            try:
                return await inner(wire.checked(request), context)
            except Exception as error:
                await self._abort(context, error)

        return handle

    def _stream(self, inner: Callable[..., AsyncGenerator[Any]]) -> Callable[..., Awaitable[None]]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._meter.count_rpc(token_of(context))
            try:
                async with aclosing(inner(wire.checked(request), context)) as responses:
                    async for response in responses:
                        async with asyncio.timeout(self._write_seconds):
                            await context.write(response)
            except TimeoutError:
                error = RefusedError(Reason.IDLE_TIMEOUT, f"nothing was read for {self._write_seconds:g} s")
                await self._abort(context, error)
            except Exception as error:
                await self._abort(context, error)

        return handle

    async def _abort(self, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
        """Answer with a status; gRPC sends nothing that a handler returns after it."""
        if isinstance(error, (RefusedError, PayloadError)):
            reason, message = error.reason, str(error)
            self._on_refused(reason)
        elif isinstance(error, DitherpsError):
            reason, message = Reason.MALFORMED, str(error)
            self._on_refused(reason)
        else:
            log.error("an RPC failed unexpectedly", exc_info=error)
            reason, message = Reason.INTERNAL, f"{type(error).__name__} in the server; its log says more"
        # gRPC refuses metadata of more than some kilobytes, and a message may quote what its sender wrote.
        try:
            await context.abort(
                wire.status_of(reason), one_line(message), trailing_metadata=((wire.REASON_KEY, reason.value),)
            )
        except grpc.aio.AbortError as aborted:
            # gRPC's state of the RPC keeps this exception, which keeps the frames that it passed, and those the state
            # and the messages: a refused RPC would stay until the collector of cycles comes by.
            aborted.__traceback__ = aborted.__context__ = None
