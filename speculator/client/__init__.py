"""The light client: what `from speculator.client import ...` offers.

Owns: the flat names of the client library. Must never import torch, nor hold code.
"""

from speculator.client.aio import AsyncClient, AsyncDraftStream, AsyncSession
from speculator.client.blocking import Client, DraftStream, Session
from speculator.client.channel import DEFAULT_ADDRESS, Tls, read_token
from speculator.client.errors import ConnectionLostError, RemoteError
from speculator.client.records import (
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
