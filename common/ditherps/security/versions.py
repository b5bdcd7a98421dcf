"""TLS 1.3 alone. gRPC for Python has no option for the version: the suites of the older ones are taken away instead."""

from __future__ import annotations

import os
import sys

from ditherps.errors import UserError

_SUITES = "ECDHE-PSK-AES128-CBC-SHA"
"""For TLS 1.2 and below; the only one there needs a pre-shared key, so none can be agreed on. The suites of TLS 1.3 are
not subject to this list."""


def only_tls13() -> None:
    """From now on this process speaks TLS 1.3 alone, as server and as client.

    Call it before gRPC is imported, which reads this once. Raises `UserError` where gRPC is there already.
    """
    if "grpc" in sys.modules and os.environ.get("GRPC_SSL_CIPHER_SUITES") != _SUITES:
        raise UserError("--tls13 works only from the command line: gRPC is loaded already")
    os.environ["GRPC_SSL_CIPHER_SUITES"] = _SUITES
