"""Real servers and workers as processes, and a proxy that counts what goes through a link."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 120.0


def environment(**extra: str) -> dict[str, str]:
    """The tests' own environment without options for ditherps, except where data is."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("DITHERPS_") or key == "DITHERPS_DATA"
    }
    return {**kept, "NO_COLOR": "1", "COLUMNS": "200", **extra}


def start(arguments: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    """Start `ditherps ARGUMENTS`."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "ditherps", *map(str, arguments)], text=True, env=environment(), **streams
    )


def run(arguments: Sequence[object], timeout: float = 100.0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `ditherps ARGUMENTS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "ditherps", *map(str, arguments)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, env=environment(**extra),
        check=False,
    )  # fmt: skip


def last_json(output: str) -> dict[str, Any]:
    """The JSON object in the last line of an output."""
    value = json.loads(output.rstrip().rsplit("\n", 1)[-1])
    assert isinstance(value, dict)
    return value


def wait_until(condition: Any, seconds: float = START_SECONDS, what: str = "") -> Any:
    """The first true value of `condition()`; fails after `seconds`."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, f"waited {seconds} s for {what or condition}"
        time.sleep(0.02)
    return value


class Cluster:
    """A server and workers, started one by one; all are gone when it closes."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.address = ""
        self.metrics_port = 0
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def server(self, *arguments: object) -> None:
        """Start the server and wait until it listens: at the port that it had before, or at any."""
        (self.run_dir / "server.json").unlink(missing_ok=True)
        port = self.address.rpartition(":")[2] or 0
        process = self.processes["server"] = start(
            ["server", "--run-dir", self.run_dir, "--port", port, "--metrics-port", 0, "--json", *arguments]
        )

        def listening() -> bool:
            assert process.poll() is None, process.stderr and process.stderr.read()
            return (self.run_dir / "server.json").exists()

        wait_until(listening, what="the server")
        announced = json.loads((self.run_dir / "server.json").read_text())
        self.address, self.metrics_port = announced["address"], announced["metrics_port"]

    def worker(self, name: str, *arguments: object, server: str = "", **options: Any) -> subprocess.Popen[str]:
        """Start a worker."""
        asked = ["worker", "--server", server or self.address, "--name", name, *arguments]
        self.processes[name] = start(asked, **options)
        return self.processes[name]

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        self.processes[name].kill()
        self.processes.pop(name).communicate()

    def finish(self, name: str, timeout: float = 180.0) -> tuple[int, str, str]:
        """Wait for a process's end: exit code, standard output, standard error."""
        process = self.processes[name]
        output, error = process.communicate(timeout=timeout)
        return process.returncode, output, error

    def result(self) -> dict[str, Any]:
        """The result of a server that ended well."""
        code, output, error = self.finish("server")
        assert code == 0, error
        return last_json(output)

    def close(self) -> None:
        """End what is left."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            with contextlib.suppress(ValueError):
                process.communicate()


class CountingProxy:
    """A TCP proxy that counts the payload bytes of both directions."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.uplink_bytes = self.downlink_bytes = 0
        self._lock = threading.Lock()
        self._stopping = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._relay, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _relay(self, client: socket.socket) -> None:
        with contextlib.suppress(ConnectionError), client, socket.create_connection(self._target) as server:
            self._pump(client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, (server, True))
            ready.register(server, selectors.EVENT_READ, (client, False))
            while not self._stopping:
                for key, _ in ready.select(timeout=0.2):
                    source, (sink, up) = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    try:
                        data = source.recv(1 << 16)
                        sink.sendall(data)
                    except OSError:
                        return
                    if not data:
                        return
                    with self._lock:
                        self.uplink_bytes += len(data) * up
                        self.downlink_bytes += len(data) * (not up)

    def close(self) -> None:
        """Stop relaying."""
        self._stopping = True
        self._listener.close()
        for thread in self._threads[1:]:
            thread.join(5)


@contextlib.contextmanager
def counting_proxy(target: str) -> Iterator[CountingProxy]:
    """A proxy in front of `target` (HOST:PORT), closed at the end."""
    proxy = CountingProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
