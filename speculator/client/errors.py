"""What a server or a connection answers in place of a result, as the errors of the service.

Owns: the way from google.rpc.Status and gRPC status codes to SpeculatorError. Must never import torch, nor decide
what to do about an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2, message
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from speculator import errors
from speculator.errors import InvalidArgumentError, ServerFullError, SpeculatorError

Detail = TypeVar("Detail", bound=message.Message)


class ConnectionLostError(SpeculatorError):
    """The server cannot be reached, or went away before it answered; a step may or may not have been committed."""

    status, reason = "UNAVAILABLE", "CONNECTION_LOST"


class RemoteError(SpeculatorError):
    """The other end failed with a status that the service itself never sends; `status` is the gRPC code's name."""

    def __init__(self, message: str, status: str, **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.status = self.reason = status


BY_REASON: dict[str, type[SpeculatorError]] = {
    kind.reason: kind
    for kind in (
        errors.InvalidArgumentError,
        errors.PromptTooLongError,
        errors.InvalidTreeError,
        errors.SessionNotFoundError,
        errors.SessionExistsError,
        errors.PositionMismatchError,
        errors.DraftNotFoundError,
        errors.SessionFinishedError,
        errors.SpeculationDisabledError,
        errors.SessionBusyError,
        errors.ServerFullError,
        errors.DrainingError,
        errors.EngineFailedError,
        errors.NumericalError,
        errors.StepCancelledError,
        errors.DeadlineExceededError,
        errors.UnauthenticatedError,
        errors.SessionForbiddenError,
        errors.CheckpointError,
        errors.ConfigError,
        errors.SpeculatorError,
    )
}
# What a status means when it comes without ErrorInfo: from gRPC itself, a proxy, or another implementation.
BY_STATUS: dict[str, type[SpeculatorError]] = {
    "INVALID_ARGUMENT": errors.InvalidArgumentError,
    "UNAVAILABLE": ConnectionLostError,
    "DEADLINE_EXCEEDED": errors.DeadlineExceededError,
    "CANCELLED": ConnectionLostError,  # nobody here asked for it: a server or a proxy on its way out
    "UNAUTHENTICATED": errors.UnauthenticatedError,
}
NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
ACTOR_DIED = "actor died"  # how Ray Serve reports a lost replica, with status INTERNAL
TOO_LARGE = "larger than max"
DETAILS_KEY = "grpc-status-details-bin"


def from_call(error: grpc.RpcError) -> SpeculatorError:
    """The error behind a failed call, sync or aio."""
    call: Any = error  # every error that a stub raises is the call, too; the declared type does not say so
    code, text = call.code(), call.details() or ""
    packed = next((value for key, value in call.trailing_metadata() or () if key == DETAILS_KEY), b"")
    try:
        status = status_pb2.Status.FromString(packed)
    except DecodeError:
        status = status_pb2.Status()
    if status.code != code.value[0]:  # no details, or somebody else's: what gRPC itself says counts
        status = status_pb2.Status(code=code.value[0], message=text)
    return from_status(status)


def from_status(status: status_pb2.Status) -> SpeculatorError:
    """The error that a google.rpc.Status describes; its reason decides, its code where there is none."""
    info = _detail(status.details, error_details_pb2.ErrorInfo)
    name = NAMES.get(status.code, "UNKNOWN")
    if info is None or info.domain != errors.DOMAIN or info.reason not in BY_REASON:
        return _foreign(name, status.message)
    error = BY_REASON[info.reason](status.message)
    error.metadata = dict(info.metadata)
    _add_details(error, status.details)
    return error


def _foreign(name: str, text: str) -> SpeculatorError:
    if name == "INTERNAL" and ACTOR_DIED in text:
        return ConnectionLostError(text)
    if name == "RESOURCE_EXHAUSTED" and TOO_LARGE in text:
        return InvalidArgumentError(f"the message is too large: {text}")
    kind = BY_STATUS.get(name)
    return kind(text) if kind else RemoteError(text, name)


def _add_details(error: SpeculatorError, details: Iterable[any_pb2.Any]) -> None:
    if isinstance(error, InvalidArgumentError):
        bad = _detail(details, error_details_pb2.BadRequest)
        error.field = bad.field_violations[0].field if bad and bad.field_violations else ""
    if isinstance(error, ServerFullError):
        retry = _detail(details, error_details_pb2.RetryInfo)
        if retry is not None:
            error.retry_after = retry.retry_delay.ToTimedelta().total_seconds()


def _detail(details: Iterable[any_pb2.Any], kind: type[Detail]) -> Detail | None:
    for packed in details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None
