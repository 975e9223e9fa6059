"""speculator: lossless draft tokens for large language models over gRPC. This module is the light client.

Owns: the flat public names. Importing it must never import torch, and must stay cheap: grpc comes with the first
use of a client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from speculator.errors import (
    CheckpointError,
    ConfigError,
    DeadlineExceededError,
    DraftNotFoundError,
    DrainingError,
    EngineFailedError,
    InvalidArgumentError,
    InvalidTreeError,
    NumericalError,
    PositionMismatchError,
    PromptTooLongError,
    ServerFullError,
    SessionBusyError,
    SessionExistsError,
    SessionFinishedError,
    SessionForbiddenError,
    SessionNotFoundError,
    SpeculationDisabledError,
    SpeculatorError,
    StepCancelledError,
    UnauthenticatedError,
)

if TYPE_CHECKING:
    from speculator.client import AsyncClient, Client

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "CheckpointError",
    "Client",
    "ConfigError",
    "DeadlineExceededError",
    "DraftNotFoundError",
    "DrainingError",
    "EngineFailedError",
    "InvalidArgumentError",
    "InvalidTreeError",
    "NumericalError",
    "PositionMismatchError",
    "PromptTooLongError",
    "ServerFullError",
    "SessionBusyError",
    "SessionExistsError",
    "SessionFinishedError",
    "SessionForbiddenError",
    "SessionNotFoundError",
    "SpeculationDisabledError",
    "SpeculatorError",
    "StepCancelledError",
    "UnauthenticatedError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in ("AsyncClient", "Client"):
        return getattr(import_module("speculator.client"), name)
    raise AttributeError(f"module 'speculator' has no attribute {name!r}")
