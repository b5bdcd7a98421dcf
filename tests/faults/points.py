"""Faults at named points of the real command line, of which the product knows nothing.

    python -m tests.faults.points FAULT... --marker FILE -- server --task digits ...

runs `ditherps server --task digits ...` in this process, with each FAULT put in beforehand by wrapping an attribute.
A FAULT is `ACTION:WHEN:MODULE:ATTRIBUTE:CALL[:VALUE]`:

    ACTION     kill   the process ends at once, as by a power cut (SIGKILL to itself)
               stall  for VALUE seconds, or until the file VALUE is there; of a coroutine only itself stands still
               full   OSError ENOSPC, as of a disk without room
               clock  VALUE is wall=SECONDS or monotonic=SECONDS: `time.time` or `time.monotonic` jump by that much
    WHEN       before or after the call; after one that raised nothing happens
    MODULE     where the attribute is looked up when it is called
    ATTRIBUTE  a function or CLASS.METHOD, sync or async; with `@TEXT` only calls count whose arguments hold TEXT
    CALL       3: at the third call; 3+: at the third and all later ones

A line of FILE, written and synced before the action, proves that a fault has fired: `fired` reads them.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import importlib
import inspect
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditherps.cli import main

ACTIONS = ("kill", "stall", "full", "clock")
_CALL = re.compile(r"([1-9]\d*)(\+?)")
_open, _write, _fsync, _close = os.open, os.write, os.fsync, os.close  # as they are before a fault wraps them


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at one point."""

    spec: str
    action: str
    after: bool
    module: str
    attribute: str
    text: str
    call: int
    lasting: bool
    value: str

    @classmethod
    def parse(cls, spec: str) -> Fault:
        """Raises `ValueError` for what is not a FAULT."""
        parts = spec.split(":", 5)
        if len(parts) < 5 or parts[0] not in ACTIONS or parts[1] not in ("before", "after"):
            raise ValueError(f"not ACTION:before|after:MODULE:ATTRIBUTE:CALL[:VALUE]: {spec!r}")
        action, when, module, attribute, call, *value = parts
        number = _CALL.fullmatch(call)
        if number is None or bool(value) != (action in ("stall", "clock")):
            raise ValueError(f"CALL or VALUE is wrong: {spec!r}")
        name, _, text = attribute.partition("@")
        return cls(
            spec, action, when == "after", module, name, text, int(number[1]), bool(number[2]), "".join(value)
        )  # fmt: skip


def command(marker: Path, *faults: str) -> list[str]:
    """What runs `ditherps` with these faults: its arguments follow."""
    for fault in faults:
        Fault.parse(fault)
    return [sys.executable, "-m", "tests.faults.points", *faults, "--marker", str(marker), "--"]


def fired(marker: Path) -> list[str]:
    """The faults that have fired, each as often as it has, in their order."""
    return [json.loads(line)["fault"] for line in marker.read_text().splitlines()] if marker.exists() else []


class Clock:
    """Two of the process's clocks, which can jump."""

    def __init__(self) -> None:
        self._ahead_seconds = {"wall": 0.0, "monotonic": 0.0}
        wall, monotonic = time.time, time.monotonic
        time.time = lambda: wall() + self._ahead_seconds["wall"]
        time.monotonic = lambda: monotonic() + self._ahead_seconds["monotonic"]

    def jump(self, value: str) -> None:
        """By `wall=SECONDS` or `monotonic=SECONDS`."""
        name, _, seconds = value.partition("=")
        self._ahead_seconds[name] += float(seconds)


class Point:
    """A wrapped attribute: counts its calls, and acts at the ones that the fault names."""

    def __init__(self, fault: Fault, marker: str, clock: Clock | None) -> None:
        self._fault, self._marker, self._clock = fault, marker, clock
        self._calls = itertools.count(1)

    def put_in(self) -> None:
        """Wrap the attribute; raises `AttributeError` where there is none."""
        owner: Any = importlib.import_module(self._fault.module)
        *path, name = self._fault.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        found = inspect.getattr_static(owner, name)
        kind = type(found) if isinstance(found, (staticmethod, classmethod)) else None
        wrapped = self._wrapped(found.__func__ if kind else found)
        setattr(owner, name, kind(wrapped) if kind else wrapped)

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(function):
            raise ValueError(f"{self._fault.spec}: an asynchronous generator has no single call")
        after = self._fault.after

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            due = self._due(args, kwargs)
            if due and not after:
                self._act(due)
            answer = function(*args, **kwargs)
            if due and after:
                self._act(due)
            return answer

        @functools.wraps(function)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            due = self._due(args, kwargs)
            if due and not after:
                await self._act_async(due)
            answer = await function(*args, **kwargs)
            if due and after:
                await self._act_async(due)
            return answer

        return coroutine if inspect.iscoroutinefunction(function) else call

    def _due(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The number of a call at which the fault is due, else 0."""
        text = self._fault.text
        if text and not any(text in str(value) for value in (*args, *kwargs.values())):
            return 0
        number = next(self._calls)
        return number if number == self._fault.call or (self._fault.lasting and number > self._fault.call) else 0

    async def _act_async(self, number: int) -> None:
        if self._fault.action == "stall":
            await asyncio.to_thread(self._act, number)
        else:
            self._act(number)

    def _act(self, number: int) -> None:
        self._mark(number)
        match self._fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stall":
                _stand_still(self._fault.value)
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "clock" if self._clock is not None:
                self._clock.jump(self._fault.value)

    def _mark(self, number: int) -> None:
        line = json.dumps({"fault": self._fault.spec, "call": number, "pid": os.getpid()}) + "\n"
        file = _open(self._marker, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        _write(file, line.encode())
        _fsync(file)
        _close(file)


def _stand_still(value: str) -> None:
    try:
        time.sleep(float(value))
    except ValueError:
        while not os.path.exists(value):
            time.sleep(0.01)


def run(arguments: Sequence[str]) -> int:
    """FAULT... --marker FILE -- ARGUMENTS of `ditherps`."""
    at = arguments.index("--")
    *specs, option, marker = arguments[:at]
    if option != "--marker":
        raise SystemExit(__doc__)
    faults = [Fault.parse(spec) for spec in specs]
    clock = Clock() if any(fault.action == "clock" for fault in faults) else None
    for fault in faults:
        Point(fault, marker, clock).put_in()
    return main(arguments[at + 1 :])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
