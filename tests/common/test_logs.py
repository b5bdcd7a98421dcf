"""What is logged, for people and for machines."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from ditherps.logs import JsonFormatter, fields
from tests.service.harness import environment


def record(message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("ditherps.x", logging.WARNING, "", 0, message, args, None)


@pytest.mark.parametrize(
    ("message", "args", "found"),
    [
        ("joined worker=%s index=%d", ("worker-0", 3), {"worker": "worker-0", "index": 3}),
        ("%d of 100 %% share=%.3f", (5, 0.25), {"share": 0.25}),
        ("lost, trying again: %s", ("why",), {}),
        ("loss=%.6g nmse=%.4g", (float("nan"), float("inf")), {"loss": None, "nmse": None}),
        ("left reason=%s: %s (code=%-5d)", (ValueError("x"), "y", 7), {"reason": "x", "code": 7}),
        ("nothing=here", (), {}),
    ],
)
def test_pairs_of_a_message_are_fields_of_their_own_type(
    message: str, args: tuple[object, ...], found: dict[str, object]
) -> None:
    assert fields(record(message, *args)) == found
    line = json.loads(JsonFormatter().format(record(message, *args)))
    assert {key: line[key] for key in found} == found
    assert line["message"] == (message % args if args else message)
    assert (line["level"], line["logger"]) == ("warning", "ditherps.x")


def test_a_traceback_stays_on_the_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        failed = record("failed")
        failed.exc_info = sys.exc_info()
    text = JsonFormatter().format(failed)
    assert "\n" not in text
    assert "ValueError: two" in json.loads(text)["error"]


def test_a_mistake_is_a_line_of_json_too() -> None:
    asked = ["server", "--log-format", "json", "--task", "digits", "--host", "0.0.0.0", "--port", "0"]
    ended = subprocess.run(
        [sys.executable, "-m", "ditherps", *asked], capture_output=True, text=True, timeout=100, env=environment(),
        check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    last = json.loads(ended.stderr.splitlines()[-1])
    assert (last["level"], last["exit_code"]) == ("error", 2)
    assert "certs" in last["message"]
