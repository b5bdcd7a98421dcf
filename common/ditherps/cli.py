"""The command line: finds the commands, turns errors into one line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

import typer

from ditherps import __version__
from ditherps.errors import DitherpsError, ExitCode, HandshakeError, RefusedError
from ditherps.text import printable

_LINE = "%(asctime)s %(levelname)s %(name)s %(message)s"
COMMANDS = "ditherps.commands"
"""Entry-point group: each package that has commands names a `register(app)` there."""


def build_app() -> typer.Typer:
    """The application with every installed command."""
    app = typer.Typer(
        name="ditherps", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help="Federated training that spends as few bits as possible. Start with: [b]ditherps local[/b]",
    )  # fmt: skip

    @app.callback(invoke_without_command=True)
    def common(version: bool = typer.Option(False, "--version", help="Print the versions and exit.")) -> None:
        if version:
            from ditherps.wire import PROTOCOL_VERSION

            print(f"ditherps {__version__} (protocol {PROTOCOL_VERSION})")
            raise typer.Exit

    for entry in sorted(entry_points(group=COMMANDS), key=lambda found: found.name):
        entry.load()(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (see `ExitCode`)."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC says of each failed handshake what nobody can read
    try:
        build_app()(list(arguments) if arguments is not None else None, prog_name="ditherps")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else ExitCode.OK
    except DitherpsError as error:
        reason = f"{error.reason}: " if isinstance(error, (HandshakeError, RefusedError)) else ""
        print(f"error: {reason}{printable(str(error))}", file=sys.stderr)
        return error.exit_code
    return ExitCode.OK


class _OneLine(logging.Formatter):
    """A message is one line, whatever others put into it; the traceback of an error follows it as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def log_to_stderr(*, verbose: bool) -> None:
    """Structured lines on standard error: time, level, message."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        stream=sys.stderr,
        force=True,
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_OneLine(_LINE))
    for noisy in ("asyncio", "matplotlib", "numba", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
