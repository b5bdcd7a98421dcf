"""Whether a process is well: what container engines ask every few seconds, so it loads next to nothing."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ditherps.errors import UnreachableError
from ditherps.security.credentials import Files, channel_credentials

HEALTH_SECONDS = 5.0


def check_health(address: str, certs: Path | None = None) -> None:
    """Returns if what listens at `address` is well; raises `UnreachableError` if not.

    `address`: `HOST:PORT` or `unix:PATH` of a server, which is asked by gRPC's health protocol, or the `http://`
    address of an end's metrics. `certs`: folder of this end's certificates, for HOST:PORT under TLS.
    """
    if address.startswith("http://"):
        try:
            with urllib.request.urlopen(address, timeout=HEALTH_SECONDS):
                return
        except (OSError, urllib.error.URLError) as error:
            raise UnreachableError(f"{address}: {error}") from None
    with (
        grpc.secure_channel(address, channel_credentials(Files(certs))) if certs else grpc.insecure_channel(address)
    ) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_SECONDS)
        except grpc.RpcError as error:
            detail = error.details() if hasattr(error, "details") else error
            raise UnreachableError(f"{address}: {detail}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise UnreachableError(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
