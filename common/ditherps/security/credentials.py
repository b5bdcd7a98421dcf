"""The files of one end as gRPC's credentials, and the identity of whoever is at the other end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc

from ditherps.errors import UserError
from ditherps.security import certificates
from ditherps.security.certificates import CA, CERTIFICATE, IDENTITY_SCHEME, KEY
from ditherps.security.tokens import is_identity

log = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]


class Files:
    """The folder of one end: `ca.pem`, and for who has to show one `cert.pem` and `key.pem`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca, self.certificate, self.key = folder / CA, folder / CERTIFICATE, folder / KEY

    @property
    def has_certificate(self) -> bool:
        """Whether there is a certificate to show."""
        return self.certificate.exists() and self.key.exists()

    def stamp(self) -> _Stamp:
        """Changes whenever a file is replaced."""
        found = [path.stat() for path in (self.ca, self.certificate, self.key) if path.exists()]
        return tuple((status.st_ino, status.st_mtime_ns, status.st_size) for status in found)

    def check(self, *, certificate: bool) -> None:
        """Raises `UserError` with the first file that is missing or wrong; with `certificate` one has to be there."""
        if not self.folder.is_dir():
            raise UserError(f"--certs {self.folder} is not a folder: make it with `ditherps certs init`")
        certificates.read_certificate(self.ca)
        if certificate or self.certificate.exists() or self.key.exists():
            for path in (self.certificate, self.key):
                if not path.exists():
                    raise UserError(
                        f"{path} is missing: --certs takes the folder of one end, such as certs/server or "
                        "certs/workers/worker-0"
                    )
            if not certificates.key_matches(self.certificate, self.key):
                raise UserError(
                    f"{self.key} is not the key of {self.certificate}: both must come from one `certs init`"
                )

    def expiry(self) -> dict[str, float]:
        """When the certificates end, in seconds since 1970, by `ca` and `own`."""
        found = {"ca": self.ca, "own": self.certificate}
        return {
            name: certificates.read_certificate(path).not_valid_after_utc.timestamp()
            for name, path in found.items()
            if path.exists()
        }


def channel_credentials(files: Files) -> grpc.ChannelCredentials:
    """A worker's: it trusts `ca.pem` alone, and shows its certificate if it has one. Raises `UserError`."""
    files.check(certificate=False)
    if not files.has_certificate:
        return grpc.ssl_channel_credentials(files.ca.read_bytes())
    return grpc.ssl_channel_credentials(files.ca.read_bytes(), files.key.read_bytes(), files.certificate.read_bytes())


class ServerFiles:
    """The server's certificates, read again whenever their files change: each handshake has the newest."""

    def __init__(self, files: Files, *, mutual: bool) -> None:
        """`mutual`: a worker has to show a certificate of the same authority. Raises `UserError`."""
        self.files = files
        files.check(certificate=True)
        self._mutual = mutual
        self._lock = threading.Lock()
        self._stamp = files.stamp()

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC's `add_secure_port`."""
        first = self._configuration()
        newest: Callable[[], Any] = self._newest  # None is allowed, though the stubs do not say so
        return grpc.dynamic_ssl_server_credentials(first, newest, require_client_authentication=self._mutual)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (self.files.key.read_bytes(), self.files.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], self.files.ca.read_bytes())

    def _newest(self) -> grpc.ServerCertificateConfiguration | None:
        """Called for every handshake, from a thread of gRPC; None: nothing has changed, or it is not whole yet."""
        with self._lock:
            try:
                stamp = self.files.stamp()
                if stamp == self._stamp:
                    return None
                self.files.check(certificate=True)
                configuration = self._configuration()
            except (OSError, UserError) as error:
                log.warning("certificates changed, but cannot be used; the old ones stay: %s", error)
                return None
            self._stamp = stamp
        log.info("certificates read again from %s", self.files.folder)
        return configuration


def identity_of(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """Whom the certificate at the other end names, a worker or a pool (`POOL/*`); None without one that names any.

    The URI `ditherps:NAME` counts, else the common name, so that another authority's certificates serve as well.
    gRPC has checked the certificate by then.
    """
    values = {key: [value.decode(errors="replace") for value in found] for key, found in auth_context.items()}
    if "ssl" not in values.get("transport_security_type", []):
        return None
    uris = [uri for uri in values.get("peer_uri", []) if uri.startswith(IDENTITY_SCHEME)]
    names = [uri.removeprefix(IDENTITY_SCHEME) for uri in uris] or values.get("x509_common_name", [])
    return names[0] if len(names) == 1 and is_identity(names[0]) else None
