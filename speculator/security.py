"""Who may call, and who is calling.

Owns: bearer tokens, client certificates, TLS credentials. Must never log a token or know what a call does.
"""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from speculator.config import ServerConfig
from speculator.errors import ConfigError, UnauthenticatedError
from speculator.status import abort

PREFIX = "Bearer "
EXEMPT = "/grpc.health.v1.Health/"
CERTIFICATE_NAMES = ("x509_common_name", "x509_subject_alternative_name")

# quoted: the library's own classes are generic in their stubs only
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


class Tokens:
    """The bearer tokens that open the service; compared in constant time."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = [token.encode() for token in tokens]

    @classmethod
    def from_file(cls, path: str) -> Tokens:
        """One token a line; empty lines and lines that start with '#' are skipped."""
        try:
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the token file {path} cannot be read as UTF-8 text") from error
        tokens = [line for line in lines if line and not line.startswith("#")]
        if not tokens:
            raise ConfigError(f"the token file {path} holds no token")
        return cls(tokens)

    def identity(self, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
        """A name for the holder of the token in `metadata` that does not reveal it; None when there is none."""
        sent = next((value for key, value in metadata if key == "authorization"), "")
        if not isinstance(sent, str) or not sent.startswith(PREFIX):
            return None
        given = sent[len(PREFIX) :].encode()
        known = [hmac.compare_digest(given, token) for token in self._tokens]
        return "token:" + hashlib.sha256(given).hexdigest()[:16] if any(known) else None


class Guard(grpc.aio.ServerInterceptor):
    """Turns away calls without a known token, health checks excepted; `refused` hears of the methods that exist."""

    def __init__(self, tokens: Tokens, refused: Callable[[Handler, str], None] = lambda handler, method: None) -> None:
        self._tokens, self._refused = tokens, refused

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        details = handler_call_details
        exempt = details.method.startswith(EXEMPT)
        if exempt or self._tokens.identity(details.invocation_metadata or ()) is not None:
            return await continuation(details)
        wanted = await continuation(details)
        if wanted is not None:
            self._refused(wanted, details.method)
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await abort(context, UnauthenticatedError("send metadata 'authorization: Bearer <token>' with a known token"))


class Callers:
    """Names the caller of a call: by token, by client certificate, or "" when the server asks for neither."""

    def __init__(self, tokens: Tokens | None, mutual_tls: bool) -> None:
        self._tokens = tokens
        self._mutual_tls = mutual_tls

    def owner(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        if self._tokens is not None:
            return self._tokens.identity(context.invocation_metadata() or ()) or ""
        if self._mutual_tls:
            known = context.auth_context()
            names = [name for key in CERTIFICATE_NAMES for name in known.get(key, ())]
            return "cert:" + ",".join(sorted(name.decode(errors="replace") for name in names))
        return ""


def credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS of the configured files; None without them. Raises ConfigError for files that hold something else."""
    if not config.tls:
        return None
    _check_files(config)
    client_ca = Path(config.tls_client_ca).read_bytes() if config.tls_client_ca else None
    pair = (Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def _check_files(config: ServerConfig) -> None:
    """gRPC would only say that it cannot bind the address; OpenSSL says what is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = f"server.tls_cert {config.tls_cert} and server.tls_key {config.tls_key}"
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key, password="")  # never asks for one
        names = f"server.tls_client_ca {config.tls_client_ca}"
        if config.tls_client_ca:
            context.load_verify_locations(config.tls_client_ca)
    except OSError as error:  # of which SSLError is one
        reason = getattr(error, "reason", None) or error.strerror
        raise ConfigError(f"{names} cannot be used: {reason}; PEM files without a passphrase are expected") from error
