"""Errors on the wire: SpeculatorError to google.rpc.Status, with the details people and retry policies read.

Owns: the mapping and the trailers. Must never import torch nor know what a session is.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf import duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from speculator.errors import (
    DOMAIN,
    InvalidArgumentError,
    ServerFullError,
    SessionNotFoundError,
    SpeculatorError,
)

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # the only hint that gRPC's own retry policies obey


def status_of(error: SpeculatorError) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always, more where the kind of error has more to say."""
    status = status_pb2.Status(code=grpc.StatusCode[error.status].value[0], message=error.message)
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def _details(error: SpeculatorError) -> list[message.Message]:
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if isinstance(error, InvalidArgumentError):
        details.append(_bad_request(error))
    if isinstance(error, ServerFullError):
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after)))
    if isinstance(error, SessionNotFoundError):
        name = error.metadata.get("session_id", "")
        details.append(error_details_pb2.ResourceInfo(resource_type="speculator.v1.Session", resource_name=name))
    return details


def _bad_request(error: InvalidArgumentError) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
    return error_details_pb2.BadRequest(field_violations=[violation])


def _duration(seconds: float) -> duration_pb2.Duration:
    whole = int(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def trailers(error: SpeculatorError) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata of a call that ends with `error`."""
    rows: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status_of(error).SerializeToString())]
    if isinstance(error, ServerFullError):
        rows.append((PUSHBACK_KEY, str(round(error.retry_after * 1000))))
    return tuple(rows)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: SpeculatorError) -> NoReturn:
    """Ends the call with `error`."""
    await context.abort(grpc.StatusCode[error.status], error.message, trailers(error))
    raise AssertionError("abort raises")
