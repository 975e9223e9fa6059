"""A real server on loopback over a fake engine, and a raw stub to talk to it; for tests of the wire.

Owns: starting, connecting, stopping, and reading error details. Must never import torch.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from speculator.config import ServerConfig
from speculator.core import DrafterCore
from speculator.server import Server
from speculator.status import DETAILS_KEY
from speculator.text import Tokenizer
from speculator.translate import About
from speculator.v1 import admin_pb2_grpc, drafter_pb2_grpc
from speculator.v1 import drafter_pb2 as pb
from tests.fakes import FakeEngine

PROMPT = (5, 6, 7, 8)


@dataclass
class Service:
    """A running server and the means to use it."""

    engine: FakeEngine
    core: DrafterCore
    server: Server
    channel: grpc.aio.Channel
    stub: drafter_pb2_grpc.DrafterServiceStub = field(init=False)
    admin: admin_pb2_grpc.AdminServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.stub = drafter_pb2_grpc.DrafterServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def works(self) -> None:
        """Asserts that the service serves."""
        created = await self.stub.CreateSession(create())
        name, length = created.session.session_id, created.session.committed_length
        answer = await self.stub.Verify(pb.VerifyRequest(session_id=name, base_length=length, tree=pb.DraftTree()))
        assert answer.committed_length == length + 1
        await self.stub.DeleteSession(pb.DeleteSessionRequest(session_id=name))


def create(name: str = "", tokens: Sequence[int] = PROMPT, **more: Any) -> pb.CreateSessionRequest:
    return pb.CreateSessionRequest(session_id=name, token_ids=pb.TokenIds(ids=tokens), **more)


def bound(count: int) -> pb.StoppingParams:
    return pb.StoppingParams(max_new_tokens=count)


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    connect: Callable[[int], grpc.aio.Channel] | None = None,
    **options: Any,
) -> AsyncIterator[Service]:
    """A server on a free port; `options` are those of ServerConfig. At the end rows and pages must add up."""
    engine = engine or FakeEngine()
    config = ServerConfig(**{"port": 0, "metrics_port": 0, **options})
    core = DrafterCore(engine, max_queued=config.max_queued_steps, idle_timeout=config.session_idle_timeout_s)
    about = About("0.0.test", "fake-target", "here", "rev", "sha", "head-rev")
    server = Server(core, config, about=about, tokenizer=tokenizer)
    await server.start()
    channel = (connect or plain_channel)(server.port)
    try:
        async with channel:
            yield Service(engine, core, server, channel)
    finally:
        engine.gate.set()
        await server.stop()
        core._worker.scheduler.check()


def plain_channel(port: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        f"127.0.0.1:{port}",
        options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)],
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something that must come true; the test's own timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.005)


def details(source: grpc.aio.AioRpcError | status_pb2.Status) -> dict[str, Any]:
    """Error details by type name."""
    if isinstance(source, grpc.aio.AioRpcError):
        data = next(value for key, value in source.trailing_metadata() if key == DETAILS_KEY)
        source = status_pb2.Status.FromString(data)
    found = {}
    for packed in source.details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
        found[kind.DESCRIPTOR.name] = detail = kind()
        assert packed.Unpack(detail)
    return found


def reason(source: grpc.aio.AioRpcError | status_pb2.Status) -> str:
    return str(details(source)["ErrorInfo"].reason)
