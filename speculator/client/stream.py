"""The Draft stream of a client: many sessions' steps on one HTTP/2 stream.

Owns: correlation ids, who waits for which answer, opening the stream anew after it broke. Must never know what a step
means or decide to repeat one: an item whose answer was lost fails with ConnectionLostError.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import grpc

from speculator.client import wire as wire
from speculator.client.errors import ConnectionLostError, from_call, from_status
from speculator.errors import DeadlineExceededError, SpeculatorError, StepCancelledError
from speculator.v1 import drafter_pb2

SLACK = 1.0  # seconds that an answer may be late after its deadline on the server
ENDED = "the stream ended before the answer came"
CLOSED = "the stream was closed while the answer was awaited"

OpenSync = Callable[[Iterator[drafter_pb2.DraftRequest]], Any]
OpenAsync = Callable[[AsyncIterator[drafter_pb2.DraftRequest]], Any]


class Slot(Protocol):
    """Where an answer goes: a future of threads or of asyncio."""

    def done(self) -> bool: ...

    def set_result(self, result: Any, /) -> None: ...

    def set_exception(self, exception: BaseException, /) -> None: ...


class Item(NamedTuple):
    """One request that waits for its answer."""

    method: wire.Method[Any]
    slot: Slot


class Pending:
    """The items of one stream that wait for their answers."""

    def __init__(self) -> None:
        self.items: dict[int, Item] = {}
        self.draining = False
        self.ended = False
        self.reason: SpeculatorError = ConnectionLostError(ENDED)
        self._ids = itertools.count(1)

    def add(self, call: wire.Call[wire.Answer], timeout: float | None, slot: Slot) -> drafter_pb2.DraftRequest:
        """Notes who waits; the message to send. Raises what the stream ended with once it has."""
        if self.ended:
            raise self.reason
        number = next(self._ids)
        self.items[number] = Item(call.method, slot)
        request = drafter_pb2.DraftRequest(correlation_id=number, timeout=wire.duration(timeout))
        getattr(request, call.method.item).CopyFrom(call.request)
        return request

    def forget(self, number: int) -> None:
        self.items.pop(number, None)

    def settle(self, response: drafter_pb2.DraftResponse) -> None:
        """Hands an answer to whoever waits for it; an answer that nobody waits for any more is dropped."""
        kind = response.WhichOneof("response")
        if kind == "draining":
            self.draining = True
            return
        item = self.items.pop(response.correlation_id, None)
        if item is None or item.slot.done():
            return
        if kind == "status":
            item.slot.set_exception(from_status(response.status))
        else:
            item.slot.set_result(item.method.read(getattr(response, item.method.item)))

    def retire(self) -> bool:
        """Ends the stream if its server wants to go and nobody waits; the next item then opens another stream."""
        self.ended = self.ended or (self.draining and not self.items)
        return self.ended

    def fail(self, error: SpeculatorError) -> None:
        """Ends the stream: everybody who still waits gets `error`."""
        self.ended, self.reason = True, error
        while self.items:
            _, item = self.items.popitem()
            if not item.slot.done():
                item.slot.set_exception(error)


class StreamLeg:
    """One Draft stream of the sync client, with a thread that reads it."""

    def __init__(self, open_stream: OpenSync) -> None:
        self.pending = Pending()
        self._closed = False
        self._outbox: SimpleQueue[drafter_pb2.DraftRequest | None] = SimpleQueue()
        self._lock = threading.Lock()  # an item is either added before the end, or refused
        self._call = open_stream(iter(self._outbox.get, None))
        self._reader = threading.Thread(target=self._read, name="speculator-draft-stream", daemon=True)
        self._reader.start()

    def ask(self, call: wire.Call[wire.Answer], timeout: float | None) -> wire.Answer:
        """The answer to one item; raises the error it failed with."""
        slot: Future[wire.Answer] = Future()
        with self._lock:
            request = self.pending.add(call, timeout, slot)
        self._outbox.put(request)
        try:
            return slot.result(None if timeout is None else timeout + SLACK)
        except FutureTimeout:
            self.pending.forget(request.correlation_id)
            raise DeadlineExceededError(f"no answer within {timeout} s") from None

    def close(self) -> None:
        """Ends the stream; items that still wait fail with StepCancelledError."""
        self._closed = True
        self._outbox.put(None)
        self._call.cancel()
        self._reader.join()

    def _read(self) -> None:
        error: SpeculatorError = ConnectionLostError(ENDED)
        try:
            for response in self._call:
                self._take(response)
        except grpc.RpcError as problem:
            error = from_call(problem)
        finally:
            with self._lock:
                self.pending.fail(StepCancelledError(CLOSED) if self._closed else error)
            self._outbox.put(None)

    def _take(self, response: drafter_pb2.DraftResponse) -> None:
        with self._lock:
            self.pending.settle(response)
            if self.pending.retire():
                self._outbox.put(None)


class AsyncStreamLeg:
    """One Draft stream of the async client, with a task that reads it."""

    def __init__(self, open_stream: OpenAsync) -> None:
        self.pending = Pending()
        self._closed = False
        self._outbox: asyncio.Queue[drafter_pb2.DraftRequest | None] = asyncio.Queue()
        self._call = open_stream(self._requests())
        self._reader = asyncio.create_task(self._read())

    async def ask(self, call: wire.Call[wire.Answer], timeout: float | None) -> wire.Answer:
        """The answer to one item; raises the error it failed with."""
        slot: asyncio.Future[wire.Answer] = asyncio.get_running_loop().create_future()
        request = self.pending.add(call, timeout, slot)
        self._outbox.put_nowait(request)
        try:
            async with asyncio.timeout(None if timeout is None else timeout + SLACK):
                return await slot
        except TimeoutError:
            raise DeadlineExceededError(f"no answer within {timeout} s") from None
        finally:
            self.pending.forget(request.correlation_id)

    async def close(self) -> None:
        """Ends the stream; items that still wait fail with StepCancelledError."""
        self._closed = True
        self._outbox.put_nowait(None)
        self._call.cancel()
        await self._reader

    async def _requests(self) -> AsyncIterator[drafter_pb2.DraftRequest]:
        while (request := await self._outbox.get()) is not None:
            yield request

    async def _read(self) -> None:
        error: SpeculatorError = ConnectionLostError(ENDED)
        try:
            async for response in self._call:
                self.pending.settle(response)
                if self.pending.retire():
                    self._outbox.put_nowait(None)
        except grpc.RpcError as problem:
            error = from_call(problem)
        except asyncio.CancelledError:
            pass  # close() cancelled the call, or the loop is shutting down
        finally:
            self.pending.fail(StepCancelledError(CLOSED) if self._closed else error)
            self._outbox.put_nowait(None)
