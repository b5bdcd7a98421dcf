"""A certificate authority in a folder, and the certificates of server, workers and pools that it signs.

::

    certs/ca.pem  ca.key                          the authority; its key stays where it was made
    certs/server/{ca,cert,key}.pem                the server's folder
    certs/workers/worker-0/{ca,cert,key}.pem      one worker's folder: copy it to that worker alone
    certs/pools/gpu/{ca,cert,key}.pem             the folder that all members of a pool share

A worker's identity stands in its certificate as the URI `ditherps:NAME` and as common name; a pool's is `POOL/*`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ditherps.config import WORKER_NAME
from ditherps.errors import OptionError, UserError

CA, CERTIFICATE, KEY = "ca.pem", "cert.pem", "key.pem"
CA_KEY = "ca.key"
IDENTITY_SCHEME = "ditherps:"
ALWAYS = ("localhost", "127.0.0.1")
CA_DAYS, LEAF_DAYS = 3653, 397
_BEFORE = timedelta(hours=1)
"""Certificates are valid since a little before they were made: clocks differ."""
_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Made:
    """One folder of `certs init`."""

    folder: Path
    new: bool


class Authority:
    """The certificate authority in a folder; makes it where there is none.

    Raises `UserError` for a folder that holds half of one.
    """

    def __init__(self, folder: Path, now: datetime | None = None) -> None:
        self.folder = folder
        self._now = now or datetime.now(UTC)
        certificate, key = folder / CA, folder / CA_KEY
        self.new = not certificate.exists() and not key.exists()
        if self.new:
            folder.mkdir(parents=True, exist_ok=True)
            self._make()
        for path in (certificate, key):
            if not path.exists():
                raise UserError(f"{path} is missing: only the folder with both {CA} and {CA_KEY} can sign certificates")
        self.certificate = read_certificate(certificate)
        self._key = _read_key(key)

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ditherps CA {x509.random_serial_number():x}"[:48])])
        certificate = (
            _builder(name, name, key.public_key(), self._now, timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(self.folder / CA_KEY, _key_bytes(key), private=True)
        _write(self.folder / CA, certificate.public_bytes(serialization.Encoding.PEM), private=False)

    def server(self, hosts: Sequence[str], *, days: int = LEAF_DAYS, renew: bool = False) -> Made:
        """The server's folder: its certificate holds `hosts`, localhost and 127.0.0.1.

        Raises `UserError` where there is one for fewer hosts, unless `renew` allows a new one.
        """
        names = list(dict.fromkeys([*hosts, *ALWAYS]))
        folder = self.folder / "server"
        wanted: list[x509.GeneralName] = [_general_name(host) for host in names]
        if (folder / KEY).exists() and not renew:
            missing = set(wanted) - set(alternative_names(read_certificate(folder / CERTIFICATE)))
            if missing:
                lacks = ", ".join(sorted(str(name.value) for name in missing))
                raise UserError(f"{folder / CERTIFICATE} is not for {lacks}: say --renew to make the server a new one")
        return self._leaf(folder, "ditherps server", wanted, ExtendedKeyUsageOID.SERVER_AUTH, days, renew)

    def worker(self, name: str, *, days: int = LEAF_DAYS, renew: bool = False) -> Made:
        """The folder of one worker."""
        if not WORKER_NAME.fullmatch(name):
            raise OptionError("--worker", name, f"a worker's name, {WORKER_NAME.pattern}")
        return self._client(self.folder / "workers" / folder_name(name), name, days, renew)

    def pool(self, name: str, *, days: int = LEAF_DAYS, renew: bool = False) -> Made:
        """The folder that the members `NAME/0`, `NAME/1`, ... of a pool share."""
        name = name.removesuffix("/*")
        if not WORKER_NAME.fullmatch(name) or len(name) > 56:
            raise OptionError("--pool", name, f"a pool's name, {WORKER_NAME.pattern}, at most 56 characters")
        return self._client(self.folder / "pools" / folder_name(name), f"{name}/*", days, renew)

    def _client(self, folder: Path, identity: str, days: int, renew: bool) -> Made:
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(IDENTITY_SCHEME + identity)]
        return self._leaf(folder, identity, names, ExtendedKeyUsageOID.CLIENT_AUTH, days, renew)

    def _leaf(
        self, folder: Path, common_name: str, names: Sequence[x509.GeneralName], use: x509.ObjectIdentifier, days: int,
        renew: bool,
    ) -> Made:  # fmt: skip
        if (folder / KEY).exists() and not renew:
            return Made(folder, new=False)
        lifetime = timedelta(days=days)
        if self._now + lifetime > self.certificate.not_valid_after_utc:
            left = (self.certificate.not_valid_after_utc - self._now).days
            raise OptionError("--days", days, f"less than the {left} days for which the CA is valid")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        issuer = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            _builder(subject, self.certificate.subject, key.public_key(), self._now, lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / CA, self.certificate.public_bytes(serialization.Encoding.PEM), private=False)
        # The key first: who reads between the two finds a pair that does not match, and keeps the one that it has.
        _write(folder / KEY, _key_bytes(key), private=True)
        _write(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), private=False)
        return Made(folder, new=True)


def folder_name(name: str) -> str:
    """A worker's or pool's name as one part of a path: names hold `/`, but never `+`."""
    return name.replace("/", "+")


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file; raises `UserError` if it cannot be read."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not a certificate in PEM form") from None


def from_der(data: bytes) -> x509.Certificate:
    """A certificate as a peer shows it; raises `UserError` if it is none."""
    try:
        return x509.load_der_x509_certificate(data)
    except ValueError:
        raise UserError("the other end shows no certificate") from None


def alternative_names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """The subject alternative names of a certificate."""
    with contextlib.suppress(x509.ExtensionNotFound):
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    return []


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The host names and addresses that a server's certificate is for."""
    names = alternative_names(certificate)
    return [str(name.value) for name in names if isinstance(name, (x509.DNSName, x509.IPAddress))]


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `authority` itself has signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def key_matches(certificate: Path, key: Path) -> bool:
    """Whether a private key is that of a certificate; raises `UserError` for files that cannot be read."""
    return read_certificate(certificate).public_key() == _read_key(key).public_key()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    begin = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return (
        begin.serial_number(x509.random_serial_number()).not_valid_before(now - _BEFORE).not_valid_after(now + lifetime)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(host: str) -> x509.GeneralName:
    host = host.strip("[]")
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not _HOST.fullmatch(host):
        raise OptionError("--host", host, "a host name or an IP address, without a port")
    return x509.DNSName(host)


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise UserError(f"{path} is not an unencrypted private key in PEM form") from None
    return key  # type: ignore[return-value]  # RSA and Ed25519 keys of another authority serve as well


def _write(path: Path, data: bytes, *, private: bool) -> None:
    """Beside it and renamed, so that nobody reads half of it; a private key is never readable by others."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as file:
        file.write(data)
    unfinished.replace(path)
