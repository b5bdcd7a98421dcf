"""Who is at the other end of an RPC, and as which member it may speak."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from ditherps import wire
from ditherps.errors import Reason, RefusedError
from ditherps.security.credentials import identity_of
from ditherps.security.tokens import TokenFile, Tokens


class Call(Protocol):
    """What is asked of gRPC about an RPC."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]: ...  # noqa: D102
    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...  # noqa: D102


class Gate:
    """The server's rule: everybody (plaintext), who shows a certificate, or who has a token.

    An identity is a worker's name, or `POOL/*`, which stands for each member `POOL/...`; None is anybody.
    """

    def __init__(self, *, mutual: bool = False, tokens: Tokens | TokenFile | None = None) -> None:
        self._mutual, self._tokens = mutual, tokens

    def identity(self, call: Call) -> str | None:
        """Who calls; raises `RefusedError` (`unauthenticated`, `token_invalid`) for a stranger."""
        if self._tokens is not None:
            token = token_of(call)
            if not token:
                raise RefusedError(
                    Reason.UNAUTHENTICATED, "the server asks for a token: say --token @FILE, or set DITHERPS_TOKEN"
                )
            return self._tokens.identity(token)
        if not self._mutual:
            return None
        identity = identity_of(call.auth_context())
        if identity is None:
            raise RefusedError(
                Reason.UNAUTHENTICATED,
                "this certificate names no worker and no pool: make one with `ditherps certs init --worker NAME`",
            )
        return identity

    def name(self, identity: str | None, asked: str) -> str:
        """The name under which a caller joins, who asks for `asked` (empty: as it is called).

        Raises `RefusedError`: `identity_mismatch` for a name that is another's.
        """
        if identity is None:
            return asked
        if asked and not covers(identity, asked):
            raise RefusedError(
                Reason.IDENTITY_MISMATCH,
                f"the certificate or token is that of {identity}, not of {asked[:80]!r}: leave --name away, or use "
                "the folder or token that was made for it",
            )
        return asked or identity

    def check(self, identity: str | None, member: str) -> None:
        """Raises `RefusedError` (`identity_mismatch`) unless an identity may speak for a member."""
        if identity is not None and not covers(identity, member):
            raise RefusedError(Reason.IDENTITY_MISMATCH, f"this session is {member}'s, the caller is {identity}")


def token_of(call: Call) -> str:
    """The token that goes with an RPC; empty: none, or more than one."""
    given = [str(value) for key, value in call.invocation_metadata() or () if key == wire.TOKEN_KEY]
    return given[0] if len(given) == 1 else ""


def covers(identity: str, member: str) -> bool:
    """Whether an identity is a member's own, or that of its pool."""
    if identity.endswith("/*"):
        return member.startswith(identity[:-1])
    return identity == member
