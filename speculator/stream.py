"""One Draft stream: many steps of many sessions over one call, each answered as it ends.

Owns: the order of items within a session, deadlines of items, errors as items, the drain notice. Must never decide
anything about a session, nor end the stream because an item failed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

import grpc

from speculator.answers import Acceptance, Answer
from speculator.core import DrafterCore
from speculator.errors import DeadlineExceededError, InvalidArgumentError, SpeculatorError
from speculator.session import Job, SessionSpec
from speculator.status import status_of
from speculator.translate import (
    About,
    extend_job,
    fill_created,
    fill_deleted,
    fill_extended,
    fill_proposed,
    fill_total,
    fill_verified,
    propose_job,
    seconds_of,
    verify_job,
)
from speculator.v1 import drafter_pb2 as pb
from speculator.writer import Writer

log = logging.getLogger(__name__)

MAX_OPEN = 1024  # items under way and answers not yet written, from which on requests are left unread

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # generic in the library's stubs only


class Malformed:
    """Stands for a message that did not parse."""

    def __init__(self, error: Exception) -> None:
        self.error = InvalidArgumentError(f"the message does not parse: {error}")


class Specs(Protocol):
    """Turns a create request into a session spec; tokenizing may take a while."""

    def __call__(self, request: pb.CreateSessionRequest, owner: str) -> Awaitable[SessionSpec]: ...


class Item:
    """One request of the stream until it is answered. Items with the same key are answered in order."""

    deadline = math.inf
    job: Job | None = None
    timer: asyncio.TimerHandle | None = None
    answered = False

    def __init__(self, number: int, key: str, kind: str, body: Any) -> None:
        self.number, self.key, self.kind, self.body = number, key, kind, body


class DraftStream:
    """Reads requests, starts them in order per session, writes answers as they come."""

    def __init__(self, core: DrafterCore, context: Context, owner: str, about: About, specs: Specs) -> None:
        self._core, self._context, self._owner, self._about, self._specs = core, context, owner, about, specs
        self._loop = asyncio.get_running_loop()
        self._lines: dict[str, list[Item]] = {}  # by key: the item under way, then those that wait behind it
        self._open = 0  # items not let go of
        self._tasks: set[asyncio.Task[None]] = set()
        self._writer = Writer(context.write, self._move_on, self.end)
        self._room: asyncio.Future[None] | None = None  # set while requests are left unread
        self._read_all = False
        self._ended: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Serves the stream until the client has sent all and heard all; raises what `end` was given."""
        self._tasks.add(self._loop.create_task(self._read()))
        try:
            await self._ended
        except Exception:
            self._abandon_all()
            await self._writer.finish()  # gRPC takes no status while a message is on its way
            raise
        finally:
            self._close()

    def _close(self) -> None:
        self._writer.cancel()
        self._abandon_all()
        if self._ended.done() and not self._ended.cancelled():
            self._ended.exception()  # heard of, even when the stream ended for another reason

    def _abandon_all(self) -> None:
        for task in self._tasks:
            task.cancel()
        for line in self._lines.values():
            self._abandon(line)

    def _abandon(self, line: list[Item]) -> None:
        for item in line:
            item.answered = True
            if item.timer is not None:
                item.timer.cancel()
        self._cancel(line[0])

    def end(self, error: Exception) -> None:
        """Ends the whole stream with `error`."""
        if not self._ended.done():
            self._ended.set_exception(error)

    def send(self, response: pb.DraftResponse) -> None:
        """Writes a message now, or when its turn comes."""
        self._writer.put(response)

    # ---- reading ----

    async def _read(self) -> None:
        read = self._context.read
        try:
            while (request := await read()) is not grpc.aio.EOF:
                if isinstance(request, Malformed):
                    self.end(request.error)
                    return
                self._take(request)
                if self._full():
                    self._room = self._loop.create_future()
                    await self._room
                    self._room = None
        except Exception:
            log.exception("a stream cannot be read on")
        finally:
            self._read_all = True
            self._move_on()

    def _full(self) -> bool:
        return len(self._writer.waiting) + self._open >= MAX_OPEN

    def _take(self, request: pb.DraftRequest) -> None:
        kind = request.WhichOneof("request")
        if kind is None:
            error = InvalidArgumentError("the item holds no request this server knows", field="request")
            self._say(request.correlation_id, error)
            return
        body = getattr(request, kind)
        item = Item(request.correlation_id, body.session_id or f" {request.correlation_id}", kind, body)
        if request.HasField("timeout"):
            self._set_timer(item, seconds_of(request.timeout))
        self._open += 1
        line = self._lines.setdefault(item.key, [])
        line.append(item)
        if len(line) == 1:
            self._start_first(line)

    def _set_timer(self, item: Item, seconds: float) -> None:
        item.deadline = time.monotonic() + seconds
        item.timer = self._loop.call_later(max(0.0, seconds), self._too_late, item)

    def _too_late(self, item: Item) -> None:
        """Tells the client now; the item keeps its place until the worker has let go of it."""
        self._answer(item, DeadlineExceededError("the item's timeout passed before its answer"))
        self._cancel(item)

    def _cancel(self, item: Item) -> None:
        if item.job is not None:
            self._core.cancel(item.job)

    # ---- items ----

    def _start_first(self, line: list[Item]) -> None:
        """Starts the first item of a line that can be started; those that cannot are answered on the way."""
        while line:
            item = line[0]
            try:
                if not item.answered:
                    self._start(item)
                    return
            except SpeculatorError as error:
                self._answer(item, error)
            line.pop(0)
            self._let_go()
        del self._lines[item.key]

    def _start(self, item: Item) -> None:
        make = JOBS.get(item.kind)
        if make is not None:
            self._submit(item, make(item.body, self._owner, item.deadline))
            return
        task = self._loop.create_task(self._attempt(item))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _submit(self, item: Item, job: Job) -> None:
        item.job = job
        job.done = partial(self._finish, item)
        self._core.start_job(job)

    async def _attempt(self, item: Item) -> None:
        try:
            await SLOW[item.kind](self, item)
        except SpeculatorError as error:
            self._finish(item, error)
        except Exception:
            log.exception("an item failed")
            self._finish(item, SpeculatorError("internal error"))

    async def _create(self, item: Item) -> None:
        spec = await self._specs(item.body, self._owner)
        self._submit(item, self._core.create_job(spec, item.deadline))

    async def _delete(self, item: Item) -> None:
        self._finish(item, await self._core.delete(item.body.session_id, self._owner))

    def _finish(self, item: Item, answer: Answer | Acceptance | SpeculatorError | None) -> None:
        """The worker has let go of the item: answer it, then start the next one of its session."""
        self._answer(item, answer)
        line = self._lines[item.key]
        line.pop(0)
        if line:
            self._start_first(line)
        else:
            del self._lines[item.key]
        self._let_go()

    # ---- writing ----

    def _answer(self, item: Item, answer: Answer | Acceptance | SpeculatorError | None) -> None:
        if item.answered:
            return
        item.answered = True
        if item.timer is not None:
            item.timer.cancel()
        if isinstance(answer, SpeculatorError):
            self._say(item.number, answer)
        else:
            response = pb.DraftResponse(correlation_id=item.number)
            body = getattr(response, item.kind)
            FILLS[item.kind](body, answer, item.body, self._about)
            if item.job is not None:
                fill_total(body.timing, time.monotonic() - item.job.queued)
            self.send(response)

    def _say(self, number: int, error: SpeculatorError) -> None:
        self.send(pb.DraftResponse(correlation_id=number, status=status_of(error)))

    def _let_go(self) -> None:
        self._open -= 1
        if self._room is not None or self._read_all:
            self._move_on()

    def _move_on(self) -> None:
        """Reads on when there is room again, ends when nothing is left to do."""
        if self._room is not None and not self._room.done() and not self._full():
            self._room.set_result(None)
        if self._read_all and not self._open and not self._ended.done():
            if self._writer.idle():
                self._ended.set_result(None)
            else:
                self._writer.report()


JOBS: dict[str, Callable[[Any, str, float], Job]] = {
    "propose": propose_job,
    "verify": verify_job,
    "extend": extend_job,
}
SLOW: dict[str, Callable[[DraftStream, Item], Awaitable[None]]] = {
    "create_session": DraftStream._create,
    "delete_session": DraftStream._delete,
}
FILLS: dict[str, Callable[[Any, Any, Any, About], None]] = {
    "create_session": fill_created,
    "delete_session": fill_deleted,
    "propose": fill_proposed,
    "verify": fill_verified,
    "extend": fill_extended,
}
