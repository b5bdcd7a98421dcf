"""How a worker reaches its server: plaintext or TLS, a token with every call, and why it does not get through."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

import grpc

from ditherps import wire
from ditherps.config import WorkerConfig
from ditherps.errors import HandshakeError, Reason, UserError
from ditherps.network import is_loopback
from ditherps.security.credentials import Files, channel_credentials
from ditherps.security.probe import probe
from ditherps.security.tokens import read_token

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at a server that lets nobody in: it may just be starting."""

Answer = TypeVar("Answer")


class Connection:
    """One channel, made anew when the certificates of this end have been replaced, or the server is silent on it."""

    def __init__(self, config: WorkerConfig, meter: wire.WireMeter) -> None:
        """Raises `UserError` for files that cannot be used, and for a token that would travel in plaintext."""
        self._server, self._meter = config.server, meter
        self._files = Files(config.certs) if config.certs else None
        self._token = read_token(config.token.get_secret_value())
        if self._token and self._files is None:
            raise UserError("--token needs --certs, a folder with the server's ca.pem: a token goes over TLS only")
        self._open()

    def _open(self) -> None:
        self._doubted = False
        if self._files is None:
            # No proxy, which an environment variable may name: what is allowed in plaintext stays on its way.
            options = [*wire.CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)]
            self.channel = grpc.aio.insecure_channel(self._server, options=options)
        else:
            self._stamp = self._files.stamp()
            credentials = channel_credentials(self._files)
            self.channel = grpc.aio.secure_channel(self._server, credentials, options=wire.CHANNEL_OPTIONS)
        self.stub = wire.Stub(self.channel, self._meter, self._token)

    def doubt(self) -> None:
        """An answer is overdue: the connection may be dead without a word, which gRPC takes minutes to see."""
        self._doubted = True

    async def renew(self) -> None:
        """A new channel where that is called for.

        Where the old one is in doubt, and to take certificates that are new since it was made; those that cannot be
        used leave it as it is.
        """
        old = self.channel
        try:
            replaced = self._files is not None and self._files.stamp() != self._stamp
            if not (replaced or self._doubted):
                return
            self._open()
        except (OSError, UserError) as error:
            log.warning("certificates changed, but cannot be used; the old ones stay: %s", error)
            return
        if replaced and self._files is not None:
            log.info("certificates read again from %s", self._files.folder)
        await old.close()

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()

    async def explained(self, call: Awaitable[Answer]) -> Answer:
        """What a call answers that waits for the connection; raises `HandshakeError` when there will be none."""
        answering = asyncio.ensure_future(call)
        explaining = asyncio.create_task(self._explain())
        try:
            await asyncio.wait([answering, explaining], return_when=asyncio.FIRST_COMPLETED)
            if explaining.done() and not answering.done():
                explaining.result()
            return await answering
        finally:
            for task in (answering, explaining):
                task.cancel()
            await asyncio.gather(answering, explaining, return_exceptions=True)

    async def _explain(self) -> None:
        """Raises `HandshakeError` once two looks in a row have found the same reason, one that stays."""
        found: HandshakeError | None = None
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before, found = found, await self._look()
            if found and before and found.reason is before.reason is not Reason.NOTHING_LISTENS:
                raise found

    async def _look(self) -> HandshakeError | None:
        """Why there is no connection now; None where there is one, or there could be."""
        # Whatever else gRPC says of the channel: from one failure to the next it may call it anything.
        if self.channel.get_state() is grpc.ChannelConnectivity.READY:
            return None
        try:
            await asyncio.to_thread(probe, self._server, self._files)
        except HandshakeError as error:
            log.debug("no connection: %s: %s", error.reason, error)
            return error
        except UserError as error:  # files that are just being replaced
            log.debug("no connection: %s", error)
        return None


def check_plaintext(config: WorkerConfig) -> None:
    """Say loudly that a worker speaks plaintext beyond this machine; raises `UserError` unless that was asked for."""
    if config.certs is not None:
        if config.insecure:
            raise UserError("--insecure and --certs exclude each other")
        return
    if is_loopback(config.server.rpartition(":")[0].strip("[]")):
        return
    if not config.insecure:
        raise UserError(
            f"--server {config.server} would be reached in plaintext: say --certs DIR, the folder that `ditherps certs "
            "init` made for this worker, or say --insecure to allow it"
        )
    log.warning("INSECURE: plaintext and without authentication to %s", config.server)
