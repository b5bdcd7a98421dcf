"""The one place where errors become gRPC status codes, where RPCs are counted, and where strangers are turned away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from ditherps import wire
from ditherps.errors import DitherpsError, PayloadError, Reason, RefusedError
from ditherps.text import one_line
from ditherps_server.admission import Patience
from ditherps_server.gate import Gate, token_of

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

log = logging.getLogger(__name__)


async def first_message(requests: AsyncIterator[Any], patience: Patience) -> Any:
    """The message of a unary RPC; raises `PayloadError` for none or more, `RefusedError` where it does not come."""
    message = await patience.wait(_alone(requests))
    if message is None:
        raise PayloadError("the RPC ended before its message came", Reason.SIZE)
    return wire.checked(message)


async def _alone(requests: AsyncIterator[Any]) -> Any:
    message = await anext(requests, None)
    # To the end: gRPC keeps what belongs to a stream of which something may be left.
    if message is not None and await anext(requests, None) is not None:
        raise PayloadError("the RPC takes one message", Reason.SIZE)
    return message


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps `DitherpsError` to a status and a `ditherps-reason`; an unexpected error is logged and answered INTERNAL.

    Every RPC is served as a stream of messages both ways, which on the wire is the same: for the message of a unary
    one, and until its answer can be sent, gRPC would wait without a limit, and count it among those it serves. A
    stream whose other end does not read for `write_seconds` is ended.
    """

    def __init__(
        self, meter: wire.WireMeter, gate: Gate, messages: Patience, answers: Patience, write_seconds: float,
        on_refused: Callable[[Reason], None],
    ) -> None:  # fmt: skip
        self._meter, self._gate = meter, gate
        self._messages, self._answers = messages, answers
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
        make: Callable[..., Handler] = grpc.stream_stream_rpc_method_handler
        return make(
            self._served(handler),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _served(self, handler: Handler) -> Callable[[AsyncIterator[Any], Context], Awaitable[None]]:
        answer = self._streamed(handler) if handler.response_streaming else self._single(handler)

        async def handle(requests: AsyncIterator[Any], context: Context) -> None:
            self._meter.count_rpc(token_of(context))
            try:
                self._gate.identity(context)  # a stranger's messages are not even read
                streaming = handler.request_streaming
                await answer(requests if streaming else await first_message(requests, self._messages), context)
            except Exception as error:
                await self._abort(context, error)

        return handle

    def _single(self, handler: Handler) -> Callable[[Any, Context], Awaitable[None]]:
        inner: Any = handler.stream_unary or handler.unary_unary

        async def answer(request: Any, context: Context) -> None:
            response = await inner(request, context)
            await self._answers.wait(context.write(response))

        return answer

    def _streamed(self, handler: Handler) -> Callable[[Any, Context], Awaitable[None]]:
        inner: Any = handler.stream_stream or handler.unary_stream

        async def answer(request: Any, context: Context) -> None:
            try:
                async with aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        async with asyncio.timeout(self._write_seconds):
                            await context.write(response)
            except TimeoutError:
                message = f"nothing was read for {self._write_seconds:g} s"
                raise RefusedError(Reason.IDLE_TIMEOUT, message) from None

        return answer

    async def _abort(self, context: Context, error: Exception) -> None:
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
