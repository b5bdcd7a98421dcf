"""Why no connection is made. gRPC says of a failed handshake only that a socket closed; Python's `ssl` says more."""

from __future__ import annotations

import contextlib
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime

from ditherps.errors import HandshakeError, OptionError, Reason, UserError
from ditherps.security import certificates
from ditherps.security.credentials import Files

PROBE_SECONDS = 5.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty SETTINGS
# OpenSSL's X509_V_ERR_*.
_NOT_YET_VALID, _EXPIRED, _WRONG_HOST = 9, 10, (62, 64)


@dataclass(frozen=True, slots=True)
class Found:
    """A server that takes this end in."""

    version: str
    """TLSv1.3, or empty for plaintext."""
    hosts: tuple[str, ...] = ()
    expires: datetime | None = None


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT; raises `OptionError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise OptionError("address", address, "HOST:PORT")
    return host.strip("[]"), int(port)


def probe(address: str, files: Files | None, *, seconds: float = PROBE_SECONDS, now: datetime | None = None) -> Found:
    """Connect to a server as a worker with these files does (None: in plaintext).

    `seconds` bounds each step. Raises `HandshakeError` with the reason, and what to do about it, and `UserError` for
    files that cannot be read.
    """
    host, port = split_address(address)
    if files is None:
        return _probe_plaintext(address, host, port, seconds)
    files.check(certificate=False)
    context = ssl.create_default_context(cafile=str(files.ca))
    context.set_alpn_protocols(["h2"])
    if files.has_certificate:
        context.load_cert_chain(files.certificate, files.key)
    try:
        with _connected(address, host, port, seconds) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
            shown = tls.getpeercert(binary_form=True) or b""
            # In TLS 1.3 the server looks at our certificate after its part is done: its first bytes say that we are in.
            if tls.recv(1):
                certificate = certificates.from_der(shown)
                return Found(
                    tls.version() or "", tuple(certificates.hosts_of(certificate)), certificate.not_valid_after_utc
                )
    except ssl.SSLCertVerificationError as error:
        raise _server_refused(error, address, host, port, files, seconds) from None
    except TimeoutError:
        raise HandshakeError(
            Reason.NOTHING_LISTENS, f"{address} takes connections but says nothing for {seconds:g} s: is it ditherps?"
        ) from None
    except OSError:  # ssl.SSLError among them
        if _speaks_plaintext(host, port, seconds):
            raise HandshakeError(
                Reason.PLAINTEXT_SERVER,
                f"{address} speaks plaintext, not TLS: start the server with --certs, or leave --certs away here (and "
                "say --insecure)",
            ) from None
    raise _client_refused(address, files, now or datetime.now(UTC))


def _connected(address: str, host: str, port: int, seconds: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), seconds)
    except socket.gaierror:
        message = f"no such host: {host}; is the name in --server right?"
    except TimeoutError:
        message = f"{address} does not answer within {seconds:g} s: is a firewall between?"
    except OSError as error:
        message = f"nothing listens at {address} ({error.strerror}): is the server running, and the port right?"
    raise HandshakeError(Reason.NOTHING_LISTENS, message)


def _speaks_plaintext(host: str, port: int, seconds: float) -> bool:
    """Whether a server answers HTTP/2 in plaintext: it begins with a SETTINGS frame."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), seconds) as plain:
        plain.sendall(_PREFACE)
        head = b""
        while len(head) < 5 and (more := plain.recv(64)):
            head += more
        return head[3:4] == b"\x04"
    return False


def _speaks_tls(host: str, port: int, seconds: float) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), seconds) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            return tls.version() is not None
    except OSError:
        return False


def _probe_plaintext(address: str, host: str, port: int, seconds: float) -> Found:
    _connected(address, host, port, seconds).close()
    if _speaks_plaintext(host, port, seconds):
        return Found("")
    if _speaks_tls(host, port, seconds):
        raise HandshakeError(
            Reason.TLS_SERVER, f"{address} speaks TLS, this end plaintext: say --certs DIR, the folder that was made "
            "for this worker",
        )  # fmt: skip
    raise HandshakeError(Reason.NOTHING_LISTENS, f"what listens at {address} is no ditherps server: is the port right?")


def _server_refused(
    error: ssl.SSLCertVerificationError, address: str, host: str, port: int, files: Files, seconds: float
) -> HandshakeError:
    """We do not take the server's certificate: why."""
    if error.verify_code in _WRONG_HOST:
        with contextlib.suppress(OSError, UserError):
            hosts = ", ".join(_hosts_shown(host, port, files, seconds))
            return HandshakeError(
                Reason.WRONG_HOST,
                f"the certificate of {address} is for {hosts}, not for {host}: use one of these names, or make it anew "
                f"with `ditherps certs init --host {host} --renew`",
            )
        return HandshakeError(Reason.WRONG_HOST, f"the certificate of {address} is not for {host}")
    if error.verify_code == _EXPIRED:
        return HandshakeError(
            Reason.SERVER_EXPIRED,
            f"the certificate of {address} has expired: make it anew with `ditherps certs init --host {host} --renew`",
        )
    if error.verify_code == _NOT_YET_VALID:
        return HandshakeError(
            Reason.SERVER_NOT_YET_VALID,
            f"the certificate of {address} is not yet valid: are the clocks of both machines right?",
        )
    return HandshakeError(
        Reason.WRONG_CA,
        f"the certificate of {address} is not from the authority in {files.ca}: copy the folder that was made with the "
        f"server's own ({error.verify_message})",
    )


def _hosts_shown(host: str, port: int, files: Files, seconds: float) -> list[str]:
    context = ssl.create_default_context(cafile=str(files.ca))
    context.check_hostname = False
    with (
        socket.create_connection((host, port), seconds) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        return certificates.hosts_of(certificates.from_der(tls.getpeercert(binary_form=True) or b""))


def _client_refused(address: str, files: Files, now: datetime) -> HandshakeError:
    """The server hung up on us: what is wrong with our own certificate."""
    if not files.has_certificate:
        return HandshakeError(
            Reason.NO_CERTIFICATE,
            f"{address} asks for a certificate, and {files.folder} has none: use the folder that `ditherps certs init "
            "--worker NAME` made, such as certs/workers/NAME",
        )
    own, authority = certificates.read_certificate(files.certificate), certificates.read_certificate(files.ca)
    if own.not_valid_after_utc < now:
        return HandshakeError(
            Reason.CERTIFICATE_EXPIRED,
            f"{files.certificate} has expired on {own.not_valid_after_utc:%Y-%m-%d}: make it anew with `ditherps certs "
            "init --worker NAME --renew`",
        )
    if own.not_valid_before_utc > now:
        return HandshakeError(
            Reason.CERTIFICATE_NOT_YET_VALID,
            f"{files.certificate} is not valid before {own.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: is the clock of "
            "this machine right?",
        )
    if not certificates.is_signed_by(own, authority):
        return HandshakeError(
            Reason.CERTIFICATE_REFUSED,
            f"{address} does not take {files.certificate}: it is not from the authority in {files.ca}; copy the whole "
            "folder that `ditherps certs init` made",
        )
    return HandshakeError(
        Reason.CERTIFICATE_REFUSED,
        f"{address} closed the connection on {files.certificate}: is it a worker's, does the server trust its "
        "authority, and are the clocks of both machines right? The server's log says more",
    )
