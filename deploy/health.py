"""Container health check: asks grpc.health.v1 whether the drafter service is serving; the exit status is the answer.

Owns: nothing but this question. SPECULATOR_ADDRESS says where, SPECULATOR_CA (a PEM file) that the server speaks TLS,
SPECULATOR_CERT and SPECULATOR_KEY that it asks for client certificates.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "speculator.v1.DrafterService"


def channel(address: str) -> grpc.Channel:
    ca, key, cert = (_file(os.environ.get(f"SPECULATOR_{name}", "")) for name in ("CA", "KEY", "CERT"))
    if ca is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert))


def _file(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None


def main() -> int:
    address = os.environ.get("SPECULATOR_ADDRESS", "127.0.0.1:50051")
    try:
        with channel(address) as link:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            answer = health_pb2_grpc.HealthStub(link).Check(request, timeout=3)
    except OSError as error:
        print(f"{address}: {error}", file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"{address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
