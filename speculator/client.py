"""The light client: what `from speculator.client import ...` offers.

Owns: the flat names of the client library. Must never import torch, nor hold code.
"""

from speculator.client_async import AsyncClient, AsyncDraftStream, AsyncSession
from speculator.client_channel import DEFAULT_ADDRESS, Tls, read_token
from speculator.client_errors import ConnectionLostError, RemoteError
from speculator.client_sync import Client, DraftStream, Session
from speculator.client_types import (
    Chunk,
    Created,
    Extended,
    Limits,
    Opening,
    Proposed,
    Round,
    Sampling,
    ServerInfo,
    ServerStats,
    SessionState,
    Shape,
    Stats,
    Stopping,
    Timing,
    Verified,
)
from speculator.types import Distribution, Draft, FinishReason, Rule

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "AsyncDraftStream",
    "AsyncSession",
    "Chunk",
    "Client",
    "ConnectionLostError",
    "Created",
    "Distribution",
    "Draft",
    "DraftStream",
    "Extended",
    "FinishReason",
    "Limits",
    "Opening",
    "Proposed",
    "RemoteError",
    "Round",
    "Rule",
    "Sampling",
    "ServerInfo",
    "ServerStats",
    "Session",
    "SessionState",
    "Shape",
    "Stats",
    "Stopping",
    "Timing",
    "Tls",
    "Verified",
    "read_token",
]
