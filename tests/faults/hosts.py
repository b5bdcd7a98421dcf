"""Hosts of their own on one machine: network namespaces, and a wire between them that loses, delays and throttles.

The wire is a TUN device in each namespace and a thread here that carries packets from one to the other. So the hosts'
TCP is the kernel's, the loss is seeded and counted, and no qdisc (tc netem) has to be in the kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import heapq
import itertools
import os
import random
import selectors
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES = 1 << 16
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace."""

    name: str
    namespace: str
    """Name of `ip netns`, and `namespace` of `start_forked`."""
    address: str
    """IPv4."""


class Wire:
    """Carries packets between hosts; its properties may change at any time, and hold for packets sent from then on."""

    def __init__(self, devices: dict[bytes, int], seed: int) -> None:
        """`devices`: a host's address -> its TUN device."""
        self.loss = 0.0
        """Share of packets that are lost."""
        self.delay_seconds = 0.0
        """One way."""
        self.bytes_per_second = 0.0
        """To each host; 0: no limit."""
        self.carried_packets = self.lost_packets = 0
        self._devices = devices
        self._choice = random.Random(seed)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop carrying."""
        self._stopping.set()
        self._thread.join(5)
        for device in self._devices.values():
            os.close(device)

    def _carry(self) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []
        free_at = dict.fromkeys(self._devices.values(), 0.0)
        order = itertools.count()
        with selectors.DefaultSelector() as ready:
            for device in self._devices.values():
                ready.register(device, selectors.EVENT_READ)
            while not self._stopping.is_set():
                wait = under_way[0][0] - time.monotonic() if under_way else 0.1
                for key, _ in ready.select(min(max(wait, 0.0), 0.1)):
                    for target, packet in self._sent(key.fd):
                        now = time.monotonic()
                        took = len(packet) / self.bytes_per_second if self.bytes_per_second else 0.0
                        free_at[target] = max(free_at[target], now) + took
                        due = free_at[target] + self.delay_seconds
                        heapq.heappush(under_way, (due, next(order), target, packet))
                while under_way and under_way[0][0] <= time.monotonic():
                    _, _, target, packet = heapq.heappop(under_way)
                    with contextlib.suppress(OSError):  # a full queue drops, as on any wire
                        os.write(target, packet)
                    self.carried_packets += 1

    def _sent(self, device: int) -> Iterator[tuple[int, bytes]]:
        """The packets that wait in a device and are not lost, and where they go."""
        while True:
            try:
                packet = os.read(device, _PACKET_BYTES)
            except BlockingIOError:
                return
            target = self._devices.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if target is None:
                continue
            if self._choice.random() < self.loss:
                self.lost_packets += 1
            else:
                yield target, packet


@functools.cache
def why_not() -> str:
    """Why there can be no such hosts here; empty where there can."""
    needs = "hosts of their own take root, iproute2's ip and a TUN device"
    if os.geteuid() != 0 or shutil.which("ip") is None or not _TUN.exists():
        return needs
    try:
        with hosts("a"):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{needs}: {error}"


@contextlib.contextmanager
def hosts(*names: str, seed: int = 0) -> Iterator[tuple[Wire, dict[str, Host]]]:
    """Hosts with one wire between them, gone at the end."""
    with contextlib.ExitStack() as stack:
        made, devices = {}, {}
        for place, name in enumerate(names, 1):
            unique = f"dp{os.getpid()}h{next(_numbers)}"
            _ip("netns", "add", unique)
            stack.callback(_ip, "netns", "delete", unique)
            host = made[name] = Host(name, unique, f"10.77.0.{place}")
            device = _tun(unique)
            devices[socket.inet_aton(host.address)] = device
            _ip("link", "set", unique, "netns", unique)
            _ip("-n", unique, "address", "add", f"{host.address}/24", "dev", unique)
            _ip("-n", unique, "link", "set", unique, "up")
            _ip("-n", unique, "link", "set", "lo", "up")
        wire = Wire(devices, seed)
        stack.callback(wire.close)
        yield wire, made


def _tun(name: str) -> int:
    device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(device)
        raise
    return device


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
