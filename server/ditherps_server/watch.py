"""Streams of state to the workers, each behind a bounded queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ditherps.v1 import parameter_server_pb2 as pb

QUEUE_MESSAGES = 64


class Watchers:
    """One stream a worker; a newer one ends the older."""

    class Stream:
        """The messages for one worker, until `end`.

        A worker that does not read loses the oldest: each message holds the whole present state.
        """

        def __init__(self, first: pb.WatchResponse) -> None:
            self._queue: asyncio.Queue[pb.WatchResponse | None] = asyncio.Queue()
            self._queue.put_nowait(first)

        def tell(self, response: pb.WatchResponse | None) -> None:
            """Queue a message; None ends the stream."""
            if self._queue.qsize() >= QUEUE_MESSAGES:
                self._queue.get_nowait()
            self._queue.put_nowait(response)

        async def __aiter__(self) -> AsyncIterator[pb.WatchResponse]:
            while (response := await self._queue.get()) is not None:
                yield response

    def __init__(self) -> None:
        self.streams: dict[int, Watchers.Stream] = {}
        self._none = asyncio.Event()
        self._closing = False

    def begin(self, index: int, first: pb.WatchResponse) -> Stream:
        """A new stream for a worker, which begins with `first`."""
        self.end(index)
        stream = self.streams[index] = self.Stream(first)
        self._none.clear()
        if self._closing:
            stream.tell(None)
        return stream

    def tell(self, index: int, response: pb.WatchResponse) -> None:
        """Send a worker a message, if it listens."""
        if index in self.streams:
            self.streams[index].tell(response)

    def end(self, index: int, stream: Stream | None = None) -> None:
        """End a worker's stream (only if it still is `stream`, where one is given)."""
        if index in self.streams and stream in (None, self.streams[index]):
            self.streams.pop(index).tell(None)
        if not self.streams:
            self._none.set()

    async def close(self) -> None:
        """End all streams after what is queued, new ones after their first message, and wait for their readers."""
        self._closing = True
        for stream in self.streams.values():
            stream.tell(None)
        if self.streams:
            await self._none.wait()
