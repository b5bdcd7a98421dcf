"""One link between a worker and its server: a TCP proxy that counts, delays and throttles what passes, and cuts it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fcntl
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

READ_BYTES = 1 << 16
FLUSH_SECONDS = 2.0
"""Most that a cut waits for the bytes before it to arrive."""


class How(enum.StrEnum):
    """What the ends see of a cut."""

    RESET = "reset"
    """Both connections are reset (RST)."""
    CLOSE = "close"
    """Both connections are closed (FIN): one end sees a stream that is too short."""
    SILENCE = "silence"
    """Nothing: what either end sends on the connections that there are is swallowed, until they are reset by `heal`.
    New ones get through, as past a firewall that has forgotten the old ones."""


class Way(enum.StrEnum):
    """A direction."""

    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut that has fired."""

    how: How
    way: Way | None
    """The direction whose byte count it waited for; None: on command."""
    uplink_bytes: int
    """Seen on the link until then."""
    downlink_bytes: int
    connections: int
    """That it broke."""
    at_seconds: float
    """Of the monotonic clock."""


@dataclass(slots=True)
class _Planned:
    way: Way
    how: How
    left_bytes: int


@dataclass(eq=False)
class _Connection:
    """The two sockets of one connection through the link."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    silent: bool = False
    healed: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def end(self, *, reset: bool) -> None:
        for writer in (self.client, self.server):
            if reset:
                made: socket.socket = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                writer.close()


class Link:
    """A proxy in front of a server, with an event loop of its own in a thread.

    `delay_seconds` (each way) and `bytes_per_second` (each way and connection; 0: no limit) may be set at any time, and
    hold for bytes that arrive from then on.
    """

    def __init__(self, target: str) -> None:
        """`target`: HOST:PORT."""
        self._target = target.rpartition(":")
        self.delay_seconds = 0.0
        self.bytes_per_second = 0.0
        self.cuts: list[Cut] = []
        """That have fired, in their order."""
        self.connected_at_seconds: list[float] = []
        """When each connection came, on the monotonic clock."""
        self._bytes = {Way.UP: 0, Way.DOWN: 0}
        self._planned: deque[_Planned] = deque()
        self._open: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self._call(self._listen)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def pauses_seconds(self) -> list[float]:
        """From each cut to the next connection, as far as there has been one."""
        ends = [next((at for at in self.connected_at_seconds if at > cut.at_seconds), None) for cut in self.cuts]
        return [end - cut.at_seconds for end, cut in zip(ends, self.cuts, strict=True) if end is not None]

    @property
    def uplink_bytes(self) -> int:
        """TCP payload that the worker's end has sent."""
        return self._bytes[Way.UP]

    @property
    def downlink_bytes(self) -> int:
        """TCP payload that the server's end has sent."""
        return self._bytes[Way.DOWN]

    def cut(self, how: How = How.RESET) -> None:
        """Cut now."""

        async def now() -> None:
            self._cut(how, None)

        self._call(now)

    def cut_after(self, count: int, way: Way = Way.UP, how: How = How.RESET) -> None:
        """Cut once `count` more bytes have passed in one direction, right after the last of them has been delivered.

        Cuts that are planned one after another count each from the one before it.
        """

        async def plan() -> None:
            self._planned.append(_Planned(way, how, count))

        self._call(plan)

    def heal(self) -> None:
        """End a silence: the connections that it swallowed are reset."""

        async def now() -> None:
            for connection in list(self._open):
                if connection.silent:
                    connection.end(reset=True)
                    connection.healed.set()

        self._call(now)

    def close(self) -> None:
        """Stop relaying."""

        async def stop() -> None:
            self._server.close()
            tasks = [task for connection in self._open for task in connection.tasks]
            for connection in list(self._open):
                connection.end(reset=False)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _call(self, work: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        host, _, port = self._target
        try:
            answers, server = await asyncio.open_connection(host, int(port))
        except OSError:
            client.transport.abort()
            return
        self.connected_at_seconds.append(time.monotonic())
        connection = _Connection(client, server)
        self._open.add(connection)
        connection.tasks += [
            asyncio.create_task(self._relay(connection, Way.UP, reader, server)),
            asyncio.create_task(self._relay(connection, Way.DOWN, answers, client)),
        ]
        try:
            await asyncio.wait(connection.tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            connection.end(reset=False)
            for task in connection.tasks:
                task.cancel()
            await asyncio.gather(*connection.tasks, return_exceptions=True)
            self._open.discard(connection)

    async def _relay(
        self, connection: _Connection, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Until one end closes, or a cut ends it. What has been read goes through a queue that stands for the way."""
        writer.transport.set_write_buffer_limits(0)
        queue: asyncio.Queue[tuple[float, bytes, _Planned | None]] = asyncio.Queue(64)
        delivering = asyncio.create_task(self._deliver(connection, queue, writer))
        free_at = 0.0
        try:
            while data := await reader.read(READ_BYTES):
                self._bytes[way] += len(data)
                if connection.silent:
                    continue
                planned = self._reached(way, data)
                passed = data[: planned.left_bytes] if planned else data
                now = time.monotonic()
                free_at = max(free_at, now) + (len(passed) / self.bytes_per_second if self.bytes_per_second else 0.0)
                await queue.put((free_at + self.delay_seconds, passed, planned))
                if planned and planned.how is not How.SILENCE:
                    break
            if connection.silent:  # that one end is gone is not heard at the other
                await connection.healed.wait()
            await queue.put((0.0, b"", None))
            await delivering
        except OSError:
            pass
        finally:
            delivering.cancel()

    def _reached(self, way: Way, data: bytes) -> _Planned | None:
        """The planned cut that is due within `data`, no longer planned; `left_bytes` says where."""
        if not self._planned or self._planned[0].way is not way:
            return None
        if len(data) < self._planned[0].left_bytes:
            self._planned[0].left_bytes -= len(data)
            return None
        return self._planned.popleft()

    async def _deliver(
        self, connection: _Connection, queue: asyncio.Queue[tuple[float, bytes, _Planned | None]],
        writer: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        while True:
            due, data, planned = await queue.get()
            if not data and planned is None:
                return
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if connection.silent:
                continue
            writer.write(data)
            await writer.drain()
            if planned is not None:
                await _arrived(writer)
                self._cut(planned.how, planned.way)

    def _cut(self, how: How, way: Way | None) -> None:
        broken = [connection for connection in self._open if not connection.silent]
        self.cuts.append(Cut(how, way, self.uplink_bytes, self.downlink_bytes, len(broken), time.monotonic()))
        for connection in broken:
            if how is How.SILENCE:
                connection.silent = True
            else:
                connection.end(reset=how is How.RESET)


async def _arrived(writer: asyncio.StreamWriter) -> None:
    """Returns when the other end's machine has acknowledged all that was written: a reset drops what has not left."""
    limit = time.monotonic() + FLUSH_SECONDS
    made: socket.socket = writer.get_extra_info("socket")
    unsent = bytearray(4)
    while time.monotonic() < limit:
        fcntl.ioctl(made.fileno(), termios.TIOCOUTQ, unsent)
        if not any(unsent):
            return
        await asyncio.sleep(0.001)


@contextlib.contextmanager
def link_to(target: str) -> Iterator[Link]:
    """A link to `target` (HOST:PORT), closed at the end."""
    link = Link(target)
    try:
        yield link
    finally:
        link.close()
