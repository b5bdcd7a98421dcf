"""What the processes say: lines for a person, or JSON objects for a machine, on standard error.

A message is a few words and `name=%s` pairs. As text it is that line; as JSON the pairs are fields with their values'
own types, so what a line says is said once.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from ditherps.text import printable

LogFormat = Literal["text", "json"]

ROUNDS = "ditherps.rounds"
"""Logger with a line for each round and worker: for machines, and with --verbose for people."""

_CONVERSION = re.compile(r"(?:\b(\w+)=)?%(?:%|[-#0 +]*\d*(?:\.\d+)?[a-zA-Z])")
_QUIET = ("asyncio", "matplotlib", "numba", "PIL", "tensorboard")


class TextFormatter(logging.Formatter):
    """A message is one line, whatever others put into it; the traceback of an error follows it as it is."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line."""
        return printable(super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the message's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(), **fields(record),
        }  # fmt: skip
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, allow_nan=False)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """The `name=%s` pairs of a message, as JSON has them; what is not finite is null."""
    if not isinstance(record.args, tuple):
        return {}
    names = [match[1] for match in _CONVERSION.finditer(str(record.msg)) if match[0] != "%%"]
    return {name: _plain(value) for name, value in zip(names, record.args, strict=False) if name}


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str)) or value is None else str(value)


def log_to_stderr(*, verbose: bool, form: LogFormat = "text") -> None:
    """Log to standard error in this form."""
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, stream=sys.stderr, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    # Who reads text sees the rounds in the view.
    logging.getLogger(ROUNDS).setLevel(logging.NOTSET if verbose or form == "json" else logging.WARNING)
    for noisy in _QUIET:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def logs_json() -> bool:
    """Whether standard error carries JSON, so that nothing else may be printed there."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
