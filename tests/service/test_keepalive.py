"""The keepalive options: gRPC ignores names that it does not know, so a run has to prove them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from ditherps import wire

pytestmark = pytest.mark.asyncio(loop_scope="session")

PERMISSION = "grpc.http2.min_ping_interval_without_data_ms"


class Silent(grpc.GenericRpcHandler):
    """One stream that says nothing for a while, then one word."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def wait(_: bytes, __: Any) -> AsyncIterator[bytes]:
            await asyncio.sleep(self._seconds)
            yield b"still here"

        return grpc.unary_stream_rpc_method_handler(wait)


async def a_quiet_call(server_options: list[tuple[str, int]]) -> bytes:
    """What a call hears that is quiet for 4.5 s while the client pings each second and no bad ping is forgiven."""
    server = grpc.aio.server(options=[*server_options, ("grpc.http2.max_ping_strikes", 1)])
    server.add_generic_rpc_handlers((Silent(4.5),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client_options = [(name, 1000 if name == "grpc.keepalive_time_ms" else n) for name, n in wire.CHANNEL_OPTIONS]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=client_options) as channel:
            call: Any = channel.unary_stream("/any/Method")
            async for word in call(b"", timeout=20):
                assert isinstance(word, bytes)
                return word
        return b""
    finally:
        await server.stop(0)


async def test_the_server_permits_its_clients_pings_by_an_option_that_works() -> None:
    own = dict(wire.SERVER_OPTIONS)
    assert own.pop(PERMISSION) <= wire.KEEPALIVE_SECONDS * 1000 // 2
    assert dict(wire.CHANNEL_OPTIONS)["grpc.keepalive_time_ms"] == wire.KEEPALIVE_SECONDS * 1000
    without = list(own.items())
    heard, refused = await asyncio.gather(
        a_quiet_call([*without, (PERMISSION, 500)]), a_quiet_call(without), return_exceptions=True
    )
    assert heard == b"still here"
    # Without it the same pings end the call: the client does ping, and the option is what permits it.
    assert isinstance(refused, grpc.aio.AioRpcError)
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    assert "too_many_pings" in str(refused.debug_error_string()).lower() + str(refused.details()).lower().replace(
        " ", "_"
    )
