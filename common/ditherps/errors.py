"""Every error that ditherps raises on purpose.

::

    DitherpsError
    ├── UserError                  a person's mistake: one line that says what to do
    │   ├── OptionError            a wrong option value, named
    │   └── DataMissingError       a dataset that is not where it was looked for
    ├── EncodingError              a vector that cannot be encoded
    │   └── NonFiniteError         it holds NaN or infinity
    ├── PayloadError               received bytes that are not what they claim to be
    ├── ContextMismatchError       both ends hold a different codec context
    ├── RefusedError               the other end said no, with a `Reason`
    ├── UnreachableError           the other end cannot be reached, or went silent
    │   └── HandshakeError         it is there, but no connection is made, with a `Reason`
    └── RunFailedError             a run ended without its result, with a `Reason`

`Reason` is the one closed list of machine-readable reasons: it travels in messages, labels metrics and stands in logs.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable


class ExitCode(enum.IntEnum):
    """Exit status of every `ditherps` command (documented in the README)."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    DATA_MISSING = 3
    JOIN_TIMEOUT = 4
    ROUND_FAILED = 5
    UNREACHABLE = 6
    REFUSED = 7
    INTERRUPTED = 130


class Reason(enum.StrEnum):
    """Why something was refused, abandoned or ended: one closed list for wire, logs and metric labels."""

    # A worker is not let in.
    PROTOCOL_VERSION = "protocol_version"
    TASK_MISMATCH = "task_mismatch"
    LAYOUT_MISMATCH = "layout_mismatch"
    LIMITS = "limits"
    DATA_NOT_ALLOWED = "data_not_allowed"
    NAME_INVALID = "name_invalid"
    UNKNOWN_MEMBER = "unknown_member"
    MEMBERS_FULL = "members_full"
    JOIN_RATE = "join_rate"
    UNAUTHENTICATED = "unauthenticated"
    TOKEN_INVALID = "token_invalid"
    IDENTITY_MISMATCH = "identity_mismatch"
    # A connection is not made; whoever calls finds out why (`ditherps.security.probe`).
    NOTHING_LISTENS = "nothing_listens"
    PLAINTEXT_SERVER = "plaintext_server"
    TLS_SERVER = "tls_server"
    WRONG_CA = "wrong_ca"
    WRONG_HOST = "wrong_host"
    SERVER_EXPIRED = "server_expired"
    SERVER_NOT_YET_VALID = "server_not_yet_valid"
    NO_CERTIFICATE = "no_certificate"
    CERTIFICATE_EXPIRED = "certificate_expired"
    CERTIFICATE_NOT_YET_VALID = "certificate_not_yet_valid"
    CERTIFICATE_REFUSED = "certificate_refused"
    # A message comes from the wrong session.
    SUPERSEDED = "superseded"
    WRONG_JOB = "wrong_job"
    WRONG_EPOCH = "wrong_epoch"
    NOT_JOINED = "not_joined"
    TOO_MANY_STREAMS = "too_many_streams"
    # A contribution is not taken.
    WRONG_ROUND = "wrong_round"
    NOT_INVITED = "not_invited"
    WRONG_ROLE = "wrong_role"
    LATE = "late"
    CONFLICTING_CONTRIBUTION = "conflicting_contribution"
    CONTEXT_MISMATCH = "context_mismatch"
    SIZE = "size"
    DIGEST_MISMATCH = "digest_mismatch"
    MALFORMED = "malformed"
    NON_FINITE = "non_finite"
    NORM = "norm"
    DISAGREEMENT = "disagreement"
    WEIGHT = "weight"
    STAGING_FULL = "staging_full"
    DISK_FULL = "disk_full"
    # A round or a run ends.
    DEADLINE = "deadline"
    QUORUM = "quorum"
    NO_SIDE_INFORMATION = "no_side_information"
    JOIN_TIMEOUT = "join_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    LEFT = "left"
    SILENT = "silent"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    SUSPENDED = "suspended"
    INTERNAL = "internal"
    VERSION_UNAVAILABLE = "version_unavailable"


class DitherpsError(Exception):
    """Base of all errors raised on purpose."""

    exit_code: ExitCode = ExitCode.INTERNAL


class UserError(DitherpsError):
    """A person's mistake; the message is one line that says what to do."""

    exit_code = ExitCode.USAGE


class OptionError(UserError):
    """An option has a value that is not allowed."""

    def __init__(self, option: str, value: object, allowed: str | Iterable[str]) -> None:
        self.option = option
        self.value = value
        self.allowed = allowed if isinstance(allowed, str) else ", ".join(allowed)
        super().__init__(f"{option} = {value!r} is not allowed; allowed: {self.allowed}")


class DataMissingError(UserError):
    """A dataset is not where it was looked for, and could not be downloaded."""

    exit_code = ExitCode.DATA_MISSING


class EncodingError(DitherpsError):
    """A vector cannot be encoded."""


class NonFiniteError(EncodingError):
    """A vector holds NaN or infinity."""


class PayloadError(DitherpsError):
    """Received bytes are not what they claim to be."""

    def __init__(self, message: str, reason: Reason = Reason.MALFORMED) -> None:
        self.reason = reason
        super().__init__(message)


class ContextMismatchError(DitherpsError):
    """Both ends hold a different codec context."""


class RefusedError(DitherpsError):
    """The other end refused, and said why."""

    exit_code = ExitCode.REFUSED

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class UnreachableError(DitherpsError):
    """The other end cannot be reached, or has been silent for too long."""

    exit_code = ExitCode.UNREACHABLE


class HandshakeError(UnreachableError):
    """No connection can be made as things are; the message says what to do about it."""

    exit_code = ExitCode.REFUSED

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)
        if reason is Reason.NOTHING_LISTENS:
            self.exit_code = ExitCode.UNREACHABLE


class RunFailedError(DitherpsError):
    """A run ended without its result."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)
        self.exit_code = {
            Reason.JOIN_TIMEOUT: ExitCode.JOIN_TIMEOUT,
            Reason.IDLE_TIMEOUT: ExitCode.JOIN_TIMEOUT,
            Reason.INTERRUPTED: ExitCode.INTERRUPTED,
            Reason.INTERNAL: ExitCode.INTERNAL,
        }.get(reason, ExitCode.ROUND_FAILED)
