"""The command line: finds the commands, turns errors into one line and an exit code."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

import typer

from ditherps import __version__
from ditherps.errors import DitherpsError, ExitCode, HandshakeError, RefusedError
from ditherps.logs import logs_json
from ditherps.text import printable

log = logging.getLogger(__name__)

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
    atexit.register(gc.freeze)  # else the interpreter looks for cycles in all of torch before it ends, for a second
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC says of each failed handshake what nobody can read
    try:
        build_app()(list(arguments) if arguments is not None else None, prog_name="ditherps")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else ExitCode.OK
    except DitherpsError as error:
        if logs_json():
            log.error("failed reason=%s exit_code=%d: %s", getattr(error, "reason", ""), error.exit_code, error)
            return error.exit_code
        reason = f"{error.reason}: " if isinstance(error, (HandshakeError, RefusedError)) else ""
        print(f"error: {reason}{printable(str(error))}", file=sys.stderr)
        return error.exit_code
    return ExitCode.OK
