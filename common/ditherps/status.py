"""Ask a server what it does."""

from __future__ import annotations

from pathlib import Path

import grpc
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditherps import wire
from ditherps.errors import UnreachableError, UserError
from ditherps.security.credentials import Files, channel_credentials
from ditherps.security.probe import probe
from ditherps.security.tokens import read_token
from ditherps.text import one_line
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps.view import bits

STATUS_SECONDS = 5.0


def fetch_status(server: str, certs: Path | None = None, token: str = "") -> pb.StatusResponse:
    """The state of the server at `server` (HOST:PORT).

    `certs`: folder of this end's certificates; None: in plaintext. Raises `UnreachableError` if it does not answer,
    `HandshakeError` or `RefusedError` where there is no way in.
    """
    if token and certs is None:
        raise UserError("--token needs --certs: a token goes over TLS only")
    token, files = read_token(token), Files(certs) if certs else None
    with (
        grpc.secure_channel(server, channel_credentials(files), options=wire.CHANNEL_OPTIONS)
        if files
        else grpc.insecure_channel(server, options=wire.CHANNEL_OPTIONS)
    ) as channel:
        try:
            stub = wire.Stub(channel, wire.WireMeter(), token)
            response = stub.Status(pb.StatusRequest(), timeout=STATUS_SECONDS)
        except grpc.RpcError as error:
            if refusal := wire.refusal_of(error):
                raise refusal from None
            detail = error.details() if hasattr(error, "details") else error
            probe(server, files)  # says more of a handshake that fails
            raise UnreachableError(f"no ditherps server answers at {server}: {detail}") from None
    assert isinstance(response, pb.StatusResponse)
    return response


def print_status(status: pb.StatusResponse, *, as_json: bool) -> None:
    """Print a state: a sentence and a table, or one JSON object."""
    if as_json:
        print(
            MessageToJson(
                status, indent=None, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
        )
        return
    console = Console()
    names = {number: name for name, number in types_pb2.Phase.items()}
    phase = names.get(status.phase, f"phase {status.phase}").removeprefix("PHASE_").lower()
    console.print(
        f"[b]{_shown(status.task)}[/b] with [b]{_shown(status.codec)}[/b]: round {status.round} of "
        f"{status.rounds}, {phase}; waits {status.waiting_seconds:.1f} s for {_shown(status.waiting_for)}"
    )
    both = status.uplink_bytes + status.downlink_bytes
    values = status.contributions * status.coordinates
    below = f" ({8 * values / both:.1f} times below float32)" if both and values else ""
    console.print(
        f"uplink {bits(status.uplink_bytes)}, downlink {bits(status.downlink_bytes)} with "
        f"[b]{_shown(status.downlink_codec or 'none')}[/b], both {bits(both)}{below}; "
        f"running for {status.uptime_seconds:.0f} s"
    )
    table = Table("index", "worker", "state", "last seen")
    for member in status.members:
        table.add_row(
            str(member.index), _shown(member.worker), _shown(member.state), f"{member.last_seen_seconds:.1f} s ago"
        )
    console.print(table)


def _shown(text: str) -> str:
    """What the server said, without anything that the terminal or rich would obey."""
    return escape(one_line(text))
