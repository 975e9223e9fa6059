"""How a client reaches a server: address, TLS, token, and what gRPC is told to do about trouble.

Owns: channel options, credentials, metadata, the retry policy. Must never import torch or know what a call means.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from speculator.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 32 << 20  # a prompt of a million tokens is 3 MB
KEEPALIVE_MS = 10_000
PING_TIMEOUT_MS = 5_000  # without it a frozen server is noticed after a minute

# gRPC retries a call only until the first message of its answer, so no token is ever doubled by it. A full server says
# in its trailers when to come back, and gRPC waits that long; the throttle ends retries where most of them fail.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "speculator.v1.DrafterService"}, {"service": "speculator.v1.AdminService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        },
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.5},
}


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS of a client. `ca` is a PEM file, "" trusts the system's; `cert` and `key` are for servers that ask who calls.

    `server_name` is the name to expect in the server's certificate when it is not that of the address.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ConfigError("a client certificate needs its key and the key its certificate: give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files; ConfigError names the one that cannot be read or holds something else."""
        return grpc.ssl_channel_credentials(_read_pem(self.ca), _read_pem(self.key), _read_pem(self.cert))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server to talk to. `token` is sent as `authorization: Bearer`; over plain text it can be read on the way."""

    address: str = DEFAULT_ADDRESS
    tls: Tls | None = None
    token: str = ""
    max_message_bytes: int = MAX_MESSAGE_BYTES

    @property
    def options(self) -> list[tuple[str, Any]]:
        """Arguments of the channel."""
        options: list[tuple[str, Any]] = [
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
            ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ]
        if self.tls and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def metadata(self, session_id: str = "") -> tuple[tuple[str, str], ...]:
        """What goes with a call: who calls, and the session for proxies that keep sessions on their replica."""
        rows: tuple[tuple[str, str], ...] = ()
        if self.token:
            rows += (("authorization", f"Bearer {self.token}"),)
        if session_id:
            rows += (("x-session-id", session_id), ("session_id", session_id))  # Envoy and Istio; Ray Serve
        return rows

    def silence(self, seconds: float) -> str:
        """The sentence for a server that did not answer: one with TLS is silent to plain text, and the reverse."""
        return f"no server at {self.address} after {seconds:g} s, asked {'over TLS' if self.tls else 'in plain text'}"

    def channel(self) -> grpc.Channel:
        if self.tls:
            return grpc.secure_channel(self.address, self.tls.credentials(), self.options)
        return grpc.insecure_channel(self.address, self.options)

    def aio_channel(self) -> grpc.aio.Channel:
        if self.tls:
            return grpc.aio.secure_channel(self.address, self.tls.credentials(), self.options)
        return grpc.aio.insecure_channel(self.address, self.options)


def read_token(path: str | Path) -> str:
    """The first token of a token file: its first line that is neither empty nor a comment."""
    lines = [line.strip() for line in (_read(str(path)) or b"").decode("utf-8", "replace").splitlines()]
    token = next((line for line in lines if line and not line.startswith("#")), "")
    if not token:
        raise ConfigError(f"the token file {path} holds no token")
    return token


def _read_pem(path: str) -> bytes | None:
    data = _read(path)
    if data is not None and b"-----BEGIN " not in data:
        raise ConfigError(f"{path} is no PEM file")  # gRPC would only say that there is no server
    return data


def _read(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
