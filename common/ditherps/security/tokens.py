"""Tokens: a secret that names its holder, and the server's file of their hashes.

A token is `NAME:SECRET`, the secret 32 random bytes in base64. The server's file has a line `NAME SHA256` for each, the
SHA-256 of the whole token in hexadecimal; NAME is a worker's name, or `POOL/*` for all members of a pool. `#` begins a
comment. A fast hash is right here: the secrets are random, not chosen by people.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ditherps.config import WORKER_NAME
from ditherps.errors import OptionError, Reason, RefusedError, UserError

log = logging.getLogger(__name__)

LARGEST_TOKEN_BYTES = 256
LARGEST_FILE_BYTES = 16 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_NOBODY = "0" * 64


def is_identity(name: str) -> bool:
    """Whether a name is a worker's or a pool's (`POOL/*`)."""
    return WORKER_NAME.fullmatch(name.removesuffix("/*")) is not None


def make_token(identity: str, file: Path) -> str:
    """A new token for a worker or a pool, its hash added to the server's file; raises `UserError` if there is one."""
    if not is_identity(identity):
        raise OptionError("NAME", identity, f"a worker's name, {WORKER_NAME.pattern}, or POOL/*")
    if file.exists() and identity in Tokens.read(file).hashes:
        raise UserError(f"{file} already has a token of {identity}: remove its line first to replace it")
    token = f"{identity}:{secrets.token_urlsafe(32)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+") as lines:
        text = lines.read()
        gap = "\n" if text and not text.endswith("\n") else ""
        lines.write(f"{gap}{identity} {hashed(token)}\n")
    return token


def read_token(given: str) -> str:
    """A token as it is given: itself, or `@FILE`; raises `UserError` for one that cannot be."""
    if given.startswith("@"):
        try:
            given = Path(given[1:]).read_text()
        except (OSError, UnicodeDecodeError):
            raise UserError(f"--token {given}: the file cannot be read") from None
    given = given.strip()
    if not given.isascii() or not given.isprintable() or len(given) > LARGEST_TOKEN_BYTES:
        raise UserError(f"--token: a token is at most {LARGEST_TOKEN_BYTES} printable characters, NAME:SECRET")
    return given


def hashed(token: str) -> str:
    """What the server keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """Hashes by identity."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self.hashes = dict(hashes)

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """The tokens of a file; raises `UserError` with the first line that is wrong."""
        try:
            if path.stat().st_size > LARGEST_FILE_BYTES:
                raise UserError(f"token file {path} has more than {LARGEST_FILE_BYTES} bytes")
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            detail = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UserError(f"token file {path} cannot be read: {detail}") from None
        hashes: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2 or not is_identity(words[0]) or not _HASH.fullmatch(words[1]):
                raise UserError(f"{path}:{number}: a line is NAME (or POOL/*) and the SHA-256 of its token")
            if words[0] in hashes:
                raise UserError(f"{path}:{number}: {words[0]} has a token already, in a line above")
            hashes[words[0]] = words[1]
        return cls(hashes)

    def identity(self, token: str) -> str:
        """Whom a token names; raises `RefusedError` (`token_invalid`) for one that is not right.

        Hashes are compared in constant time, and a name that has no token takes as long as one that has.
        """
        name = token[:LARGEST_TOKEN_BYTES].rpartition(":")[0]
        known = self.hashes.get(name, _NOBODY)
        same = hmac.compare_digest(known, hashed(token[:LARGEST_TOKEN_BYTES]))
        if not (same and name in self.hashes and len(token) <= LARGEST_TOKEN_BYTES):
            raise RefusedError(
                Reason.TOKEN_INVALID,
                "the server does not know this token: make one with `ditherps certs token NAME --file FILE`, FILE "
                "being the server's --token-file",
            )
        return name


class TokenFile:
    """The server's tokens, read again when their file changes: one may be added, or taken back, while it runs."""

    LOOK_SECONDS = 1.0
    """Between two looks at the file."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises `UserError` for a file that cannot be used; later on the last good one stays, with a warning."""
        self._path, self._clock = path, clock
        self._looked, self._stamp = clock(), self._present()
        self._tokens = Tokens.read(path)

    def _present(self) -> tuple[int, int, int] | None:
        """Changes whenever the file is replaced or written to."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def identity(self, token: str) -> str:
        """As `Tokens.identity`, of the newest file that could be used."""
        now = self._clock()
        if now - self._looked >= self.LOOK_SECONDS:
            self._looked = now
            self._look()
        return self._tokens.identity(token)

    def _look(self) -> None:
        stamp = self._present()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tokens = Tokens.read(self._path)
        except UserError as error:
            log.warning("tokens changed, but cannot be used; the old ones stay: %s", error)
        else:
            log.info("tokens read again from %s: %d", self._path, len(self._tokens.hashes))
