"""The link does to a connection what it says, to the byte."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.link import How, Link, Way, link_to
from tests.service.harness import wait_until


class Sink:
    """A server that keeps what it gets on each connection, and how it ended; it greets with four bytes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.got: list[bytes] = []
        self.ends: list[str] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.got.append(b"")
                try:
                    connection.sendall(b"helo")
                    while data := connection.recv(1 << 16):
                        self.got[-1] += data
                    self.ends.append("closed")
                except ConnectionError:
                    self.ends.append("reset")

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.close()


@pytest.fixture
def link(sink: Sink) -> Iterator[Link]:
    with link_to(sink.address) as link:
        yield link


def connected(link: Link) -> socket.socket:
    host, _, port = link.address.rpartition(":")
    client = socket.create_connection((host, int(port)), timeout=10)
    assert client.recv(4) == b"helo"
    return client


def send_for_ever(client: socket.socket) -> None:
    while True:
        client.sendall(DATA)


def receive_all(client: socket.socket) -> None:
    while client.recv(4):
        pass


DATA = bytes(range(256)) * 4096  # 1 MiB


@pytest.mark.parametrize(("how", "end"), [(How.RESET, "reset"), (How.CLOSE, "closed")])
def test_a_cut_lets_through_exactly_the_bytes_before_it(sink: Sink, link: Link, how: How, end: str) -> None:
    link.cut_after(300_001, how=how)
    with connected(link) as client:
        with pytest.raises(ConnectionError):
            send_for_ever(client)
        wait_until(lambda: sink.ends, 10, "the end")
    assert (sink.got, sink.ends) == ([DATA[:300_001]], [end])
    (cut,) = link.cuts
    assert (cut.how, cut.way, cut.connections) == (how, Way.UP, 1)
    assert cut.uplink_bytes >= 300_001
    assert link.downlink_bytes == 4


def test_cuts_count_from_each_other(sink: Sink, link: Link) -> None:
    for count in (10, 20, 30):
        link.cut_after(count)
    for number in range(3):
        with connected(link) as client:
            client.sendall(bytes(10 * (number + 1)))
            wait_until(lambda n=number: len(sink.ends) > n, 10, "the cut")
    assert [len(got) for got in sink.got] == [10, 20, 30]
    assert len(link.cuts) == len(link.connected_at_seconds) == 3
    with connected(link) as client:  # and then the link holds
        client.sendall(DATA)
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: len(sink.ends) == 4, 10, "the end")
    assert sink.got[3] == DATA
    assert link.uplink_bytes == 60 + len(DATA)
    assert len(link.pauses_seconds) == 3


def test_a_cut_of_the_downlink_and_one_on_command(sink: Sink, link: Link) -> None:
    link.cut_after(2, Way.DOWN)
    host, _, port = link.address.rpartition(":")
    # Who connects may see the cut already.
    with pytest.raises(ConnectionError), socket.create_connection((host, int(port)), timeout=10) as client:
        receive_all(client)
    with connected(link) as client:
        link.cut()
        with pytest.raises(ConnectionError):
            client.recv(1)
    assert [cut.way for cut in link.cuts] == [Way.DOWN, None]


def test_silence_swallows_what_connections_send_until_they_are_reset(sink: Sink, link: Link) -> None:
    with connected(link) as client:
        client.sendall(b"before")
        wait_until(lambda: sink.got == [b"before"], 10)
        link.cut(How.SILENCE)
        client.sendall(b"swallowed")
        wait_until(lambda: link.uplink_bytes == 15, 10)
        assert (sink.got, sink.ends) == ([b"before"], [])
        link.heal()
        with pytest.raises(ConnectionError):
            client.recv(1)
    connected(link).close()
    assert [(cut.how, cut.connections) for cut in link.cuts] == [(How.SILENCE, 1)]


def test_delay_and_rate(sink: Sink, link: Link) -> None:
    link.delay_seconds = 0.2
    began = time.monotonic()
    with connected(link) as client:
        assert time.monotonic() - began >= 0.2
        link.delay_seconds, link.bytes_per_second = 0.0, 2 * len(DATA)
        began = time.monotonic()
        client.sendall(DATA)
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: sink.ends, 10, "the end")
        assert 0.4 <= time.monotonic() - began < 5
    assert sink.got == [DATA]
