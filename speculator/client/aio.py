"""The asyncio client.

Owns: turning calls into gRPC calls and waiting for them. Must never decide what follows an answer or an error (that
is client.flow), build or read a message (client.wire), nor import torch.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from speculator.client import wire as wire
from speculator.client.channel import DEFAULT_ADDRESS, MAX_MESSAGE_BYTES, Endpoint, Tls
from speculator.client.errors import ConnectionLostError, from_call
from speculator.client.flow import Flow, GenerateFlow, SessionFace, SessionFlow, Value, Wait
from speculator.client.records import (
    Chunk,
    Created,
    Extended,
    GenerateOptions,
    Opening,
    Prompt,
    Proposed,
    Round,
    ServerInfo,
    ServerStats,
    SessionOptions,
    SessionState,
    Shape,
    Stats,
    Verified,
)
from speculator.client.stream import AsyncStreamLeg
from speculator.client.wire import Answer, Call
from speculator.errors import SpeculatorError
from speculator.types import Draft, FinishReason
from speculator.v1 import drafter_pb2


class AsyncSteps(ABC):
    """The steps of sessions, over single calls (AsyncClient) or over one stream (AsyncDraftStream).

    Every method raises SpeculatorError. A `timeout` is in seconds; None takes the client's.
    """

    patience: float

    @abstractmethod
    async def ask(self, call: Call[Answer], timeout: float | None = None) -> Answer:
        """Make one call; the answer as a record."""

    async def run(self, flow: Flow[Value]) -> Value:
        """Make the calls and waits that a flow asks for; what it comes to."""
        return await _run(self, flow)

    async def create(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        **options: Unpack[SessionOptions],
    ) -> Created:
        """Open a session on token ids or text; with all its token ids so far, resume a lost one."""
        return await self.ask(wire.create(Opening(prompt, **options).named()), timeout)

    async def propose(
        self, session_id: str, base: int, shape: Shape | None = None, *, timeout: float | None = None
    ) -> Proposed:
        """Draft below the first `base` committed tokens."""
        return await self.ask(wire.propose(session_id, base, shape), timeout)

    async def verify(
        self,
        session_id: str,
        base: int,
        draft: Draft | int,
        next_shape: Shape | None = None,
        *,
        timeout: float | None = None,
    ) -> Verified:
        """Verify a draft of the caller's own, a proposed one, or one by its id; `next_shape` asks for the next."""
        return await self.ask(wire.verify(session_id, base, draft, next_shape), timeout)

    async def extend(
        self,
        session_id: str,
        base: int,
        tokens: Sequence[int],
        next_shape: Shape | None = None,
        *,
        timeout: float | None = None,
    ) -> Extended:
        """Commit tokens that the caller decided on."""
        return await self.ask(wire.extend(session_id, base, tokens, next_shape), timeout)

    async def delete(self, session_id: str, *, timeout: float | None = None) -> Stats:
        """Free a session; a missing one is no error."""
        return await self.ask(wire.delete(session_id), timeout)

    def session(
        self,
        prompt: Prompt,
        **options: Unpack[SessionOptions],
    ) -> AsyncSession:
        """A session that survives the loss of its server; opened by its first step."""
        return AsyncSession(self, SessionFlow(Opening(prompt, **options), self.patience))


class AsyncClient(AsyncSteps):
    """A connection to one server; tasks of one event loop may share it. Made on its loop.

    `timeout` bounds each call, `patience` how long sessions and generations wait out an unreachable or full server,
    both in seconds. `token` is a bearer token. Use with `async with`, or `close`.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tls: Tls | None = None,
        token: str = "",
        timeout: float = 60.0,
        patience: float = 60.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.timeout, self.patience = timeout, patience
        self._endpoint = Endpoint(address, tls, token, max_message_bytes)
        self._channel = self._endpoint.aio_channel()
        self._calls: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End every call and stream."""
        await self._channel.close()

    async def ask(self, call: Call[Answer], timeout: float | None = None) -> Answer:
        method = call.method
        metadata = self._endpoint.metadata(call.session_id)
        limit = self.timeout if timeout is None else timeout
        try:
            return method.read(await self._unary(method)(call.request, timeout=limit, metadata=metadata))
        except grpc.RpcError as error:
            raise from_call(error) from None

    def _unary(self, method: wire.Method[Any]) -> Any:
        if method.path not in self._calls:
            self._calls[method.path] = self._channel.unary_unary(
                method.path,
                request_serializer=wire.to_bytes,
                response_deserializer=method.response.FromString,
            )
        return self._calls[method.path]

    async def get(self, session_id: str, *, tokens: bool = False, timeout: float | None = None) -> SessionState:
        """The committed state of a session, with all its token ids when `tokens`."""
        return await self.ask(wire.get(session_id, tokens), timeout)

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Models, limits and defaults of the server."""
        return await self.ask(wire.server_info(), timeout)

    async def stats(self, *, timeout: float | None = None) -> ServerStats:
        """Acceptance since the server's start, and what it holds now."""
        return await self.ask(wire.server_stats(), timeout)

    async def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until the server can be reached; ConnectionLostError when it cannot within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._channel.channel_ready()
        except TimeoutError:
            raise ConnectionLostError(self._endpoint.silence(timeout)) from None

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Chunk, None]:
        """Let the server run the loop; one chunk a committed step. Ending the iteration ends the generation.

        `timeout` bounds each stream, None does not. A broken stream is taken up again where it broke, unless the
        prompt came as text and some of the answer was received.
        """
        flow = GenerateFlow(Opening(prompt, **options), self.patience)
        while not flow.finished:
            try:
                async with aclosing(self._chunks(flow, timeout)) as chunks:
                    async for chunk in chunks:
                        yield flow.take(chunk)
                pause = None if flow.finished else flow.ended()
            except SpeculatorError as error:
                pause = flow.put_right(error)
            if pause is not None:
                await asyncio.sleep(pause.seconds)

    async def _chunks(self, flow: GenerateFlow, timeout: float | None) -> AsyncGenerator[Chunk, None]:
        method, request = flow.call()
        start: Any = self._channel.unary_stream(
            method.path, request_serializer=wire.to_bytes, response_deserializer=method.response.FromString
        )
        call = start(request, timeout=timeout, metadata=self._endpoint.metadata())
        try:
            async for response in call:
                yield method.read(response)
        except grpc.RpcError as error:
            raise from_call(error) from None
        finally:
            call.cancel()

    def draft_stream(self) -> AsyncDraftStream:
        """One stream for the steps of many sessions: less than half the latency of single calls."""
        return AsyncDraftStream(self)

    def open_leg(self) -> AsyncStreamLeg:
        """One Draft stream as it is, without being opened anew."""
        start: Any = self._channel.stream_stream(
            wire.DRAFT,
            request_serializer=wire.to_bytes,
            response_deserializer=drafter_pb2.DraftResponse.FromString,
        )
        return AsyncStreamLeg(lambda requests: start(requests, metadata=self._endpoint.metadata()))


class AsyncDraftStream(AsyncSteps):
    """Steps of many sessions over one stream; tasks may share it.

    Opened by its first step, and opened anew by the next one after it broke or its server asked to be left.
    """

    def __init__(self, client: AsyncClient) -> None:
        self.patience = client.patience
        self._client = client
        self._leg: AsyncStreamLeg | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream; its sessions stay on the server."""
        leg, self._leg = self._leg, None
        if leg is not None:
            await leg.close()

    async def ask(self, call: Call[Answer], timeout: float | None = None) -> Answer:
        if not call.method.item:
            return await self._client.ask(call, timeout)
        return await self._open().ask(call, self._client.timeout if timeout is None else timeout)

    def _open(self) -> AsyncStreamLeg:
        if self._leg is None or self._leg.pending.ended:
            self._leg = self._client.open_leg()
        return self._leg


class AsyncSession(SessionFace):
    """One sequence, kept by its token ids; lost on the server, it is made again and goes on.

    No token is lost or told twice. One task at a time. Iterate for rounds until the session finishes; leaving the
    `async with` block frees it on the server. After an error the session is as it was: repeat the call that failed, and
    a step that was committed all the same is answered once more.
    """

    def __init__(self, steps: AsyncSteps, flow: SessionFlow) -> None:
        super().__init__(flow)
        self._steps = steps

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            await self.close()
        except SpeculatorError:
            pass  # it expires by itself

    async def __aiter__(self) -> AsyncIterator[Round]:
        while self.finish is FinishReason.RUNNING:
            yield await self.step()

    async def step(self, shape: Shape | None = None) -> Round:
        """One round: the first one opens the session, each other one verifies a draft and asks for the next."""
        return await self._steps.run(self._flow.step(shape))

    async def propose(self, shape: Shape | None = None) -> Proposed:
        """Draft below the last committed token."""
        return await self._steps.run(self._flow.propose(shape))

    async def verify(self, draft: Draft, next_shape: Shape | None = None) -> Round:
        """Verify a draft of the caller's own, or a proposed one."""
        return await self._steps.run(self._flow.verify(draft, next_shape))

    async def extend(self, tokens: Sequence[int], next_shape: Shape | None = None) -> FinishReason:
        """Commit tokens that the caller decided on."""
        return await self._steps.run(self._flow.extend(tokens, next_shape))

    async def close(self) -> None:
        """Free the session on the server; what it came to can still be read here."""
        await self._steps.run(self._flow.delete())


async def _run(steps: AsyncSteps, flow: Flow[Value]) -> Value:
    try:
        effect = next(flow)
        while True:
            if isinstance(effect, Wait):
                await asyncio.sleep(effect.seconds)
                effect = next(flow)
                continue
            try:
                answer = await steps.ask(effect)
            except SpeculatorError as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(answer)
    except StopIteration as end:
        value: Value = end.value
        return value
