"""`ditherps certs`: make certificates and tokens, and say what is wrong with a connection."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

certs = typer.Typer(no_args_is_help=True, help="Certificates and tokens: make them, and find out what is wrong.")

Folder = Annotated[Path, typer.Option("--dir", "-d", help="Folder of the authority and of what it has signed.")]


@certs.command()
def init(
    dir_: Folder = Path("certs"),
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address of the server, repeatable; localhost is always there."),
    ] = None,
    worker: Annotated[list[str] | None, typer.Option("--worker", help="Name of a worker, repeatable.")] = None,
    pool: Annotated[
        list[str] | None, typer.Option("--pool", help="Name of a pool, repeatable: one certificate for NAME/0, ...")
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, help="How long they are valid.")] = 397,
    renew: Annotated[bool, typer.Option("--renew", help="Make those that are named here anew.")] = False,
) -> None:
    """Make an authority, and certificates of the server, of workers and of pools; what is there stays as it is.

        ditherps certs init --host server.example --worker worker-0 --worker worker-1 --pool gpu

    Each end gets its own folder, and no other: certs/server, certs/workers/worker-0, ...
    """
    from ditherps.security.certificates import Authority

    authority = Authority(dir_)
    print(f"{'made' if authority.new else 'kept'} {dir_}/ca.pem; its key, {dir_}/ca.key, stays on this machine")
    made = []
    if host or authority.new or not (dir_ / "server").exists():
        made.append(authority.server(host or [], days=days, renew=renew and bool(host)))
    made += [authority.worker(name, days=days, renew=renew) for name in worker or []]
    made += [authority.pool(name, days=days, renew=renew) for name in pool or []]
    for one in made:
        print(f"{'made' if one.new else 'kept'} {one.folder}")


@certs.command()
def check(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The server.")],
    dir_: Annotated[
        Path, typer.Option("--dir", "-d", help="Folder of the end that connects, such as certs/workers/worker-0.")
    ] = Path("certs"),
) -> None:
    """Connect to a server as a worker does, and say in one line whether that works, or else why not."""
    from ditherps.security.credentials import Files
    from ditherps.security.probe import probe

    found = probe(address, Files(dir_))
    assert found.expires is not None
    left = (found.expires - datetime.now(UTC)).days
    print(f"{address} takes {dir_}: {found.version}, certificate for {', '.join(found.hosts)}, valid for {left} days")


@certs.command()
def token(
    name: Annotated[str, typer.Argument(help="A worker's name, or POOL/* for all members of a pool.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="The server's --token-file; the hash is added to it.")],
) -> None:
    """Make a token and print it; only its hash is kept. Give it to the worker as DITHERPS_TOKEN, or in a file."""
    from ditherps.security.tokens import make_token

    secret = make_token(name, file)
    print(secret)
    print(f"its hash is in {file}", file=sys.stderr)
