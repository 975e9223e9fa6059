"""The service without a transport: async calls in, plain records out.

Owns: admission control, the way from the event loop to the worker and back, draining.
Must never import torch, grpc or protobuf; every error is a SpeculatorError.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from speculator.answers import (
    Acceptance,
    Answer,
    Created,
    Extended,
    Generated,
    Proposed,
    SessionView,
    Usage,
    Verified,
)
from speculator.drafts import (
    KEEP,
    ShapeRequest,
    check_prompt,
    check_sampling,
    check_session_id,
    check_stopping,
    check_tokens,
)
from speculator.errors import (
    DrainingError,
    EngineFailedError,
    InvalidArgumentError,
    ServerFullError,
    SpeculatorError,
)
from speculator.inbox import Inbox
from speculator.policy import DepthPolicy
from speculator.scheduler import WINDOW
from speculator.session import Job, Kind, SessionSpec
from speculator.totals import Totals
from speculator.types import Draft, DraftShape, EngineInfo, FinishReason
from speculator.watch import AcceptanceWatch
from speculator.worker import Delivery, EngineLike, Worker

log = logging.getLogger(__name__)

MAX_IDLE_SECONDS = 86400.0
SWEEP_SECONDS = 0.25
Value = TypeVar("Value")


class DrafterCore:
    """Sessions of one engine. Made and used on one event loop; `start` begins, `stop` ends.

    Deadlines are absolute, on the loop's clock (`time.monotonic`). `owner` is who calls; a session answers its owner
    only. Every method raises SpeculatorError.
    """

    def __init__(
        self,
        engine: EngineLike,
        *,
        max_queued: int = 1024,
        idle_timeout: float = 600.0,
        watch: AcceptanceWatch | None = None,
        policy: DepthPolicy | None = None,
    ) -> None:
        self.info: EngineInfo = engine.info
        self.totals = Totals()
        self.watch = watch
        self.draining = False
        self.on_dead: Callable[[], None] = _nothing
        self._answers: Inbox[list[Delivery]] = Inbox(watched=True)
        self._engine = engine
        self._worker = Worker(engine, self._answers.put, self._bury, idle_timeout=idle_timeout, totals=self.totals)
        self._worker.scheduler.steer(policy)
        self._max_queued = max_queued
        self._in_flight = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._stopped = False
        self._refuses: SpeculatorError | None = None  # why no work item is taken any more
        self._generations: set[_Inbox] = set()  # of readers that wait for more
        self._quiet: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- life ----

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._answers.fileno(), self._collect)
        self._worker.start()
        self._sweep()

    async def stop(self) -> None:
        """Ends the worker; work items under way are answered with an error."""
        self.close()
        self._stop_sweeping()
        await asyncio.to_thread(self._worker.stop)
        self._stopped = True
        if self._loop is not None:
            self._loop.remove_reader(self._answers.fileno())
        for answers in (*self._answers.take(), self._worker.leftovers()):
            self._receive(answers)

    def drain(self) -> None:
        """Takes no new session from now on; sessions that are open go on."""
        self.draining = True

    def close(self) -> None:
        """Takes no new work item from now on; those under way are answered, generations after the steps they did."""
        self.draining = True
        self._refuses = self._refuses or _shutting_down()
        for inbox in self._generations:
            inbox.put(self._refuses)

    async def quiet(self) -> None:
        """Waits until no work item is under way."""
        while self._in_flight:
            self._quiet = asyncio.get_running_loop().create_future()
            await self._quiet

    @property
    def in_flight(self) -> int:
        """Work items that wait or run."""
        return self._in_flight

    @property
    def context(self) -> int:
        """Longest session, prompt and output, in tokens."""
        return self._worker.scheduler.context

    # ---- calls ----

    async def create(self, spec: SessionSpec, deadline: float = math.inf) -> Created:
        """Prefills a prompt; with the same body again, answers what is stored."""
        return cast(Created, await self.ask(self.create_job(spec, deadline)))

    async def propose(
        self, session_id: str, base: int, shape: ShapeRequest = KEEP, owner: str = "", deadline: float = math.inf
    ) -> Proposed:
        """Drafts below the committed tokens; commits nothing."""
        job = Job(Kind.PROPOSE, session_id, owner, deadline, base, shape=shape)
        return cast(Proposed, await self.ask(job))

    async def verify(
        self,
        session_id: str,
        base: int,
        draft: Draft | int,
        shape: ShapeRequest | None = None,
        owner: str = "",
        deadline: float = math.inf,
    ) -> Verified:
        """Verifies a draft (or the one kept under an id) and commits; `shape` asks for the next draft."""
        tree, kept = (None, draft) if isinstance(draft, int) else (draft, 0)
        job = Job(Kind.VERIFY, session_id, owner, deadline, base, tree, kept, shape)
        return cast(Verified, await self.ask(job))

    async def extend(
        self,
        session_id: str,
        base: int,
        tokens: tuple[int, ...],
        shape: ShapeRequest | None = None,
        owner: str = "",
        deadline: float = math.inf,
    ) -> Extended:
        """Commits tokens that the caller decided on; `shape` asks for the next draft."""
        job = Job(Kind.EXTEND, session_id, owner, deadline, base, shape=shape, tokens=tokens)
        return cast(Extended, await self.ask(job))

    async def generate(self, spec: SessionSpec, deadline: float = math.inf) -> AsyncGenerator[Generated, None]:
        """Runs the draft/verify loop on the server, one item a committed step; closing it frees the session."""
        inbox = _Inbox()
        spec = replace(self._checked(spec), prefill_only=False)
        job = Job(Kind.GENERATE, spec.session_id, spec.owner, deadline, spec=spec, done=inbox.put)
        self.start_job(job)
        self._generations.add(inbox)
        taken, finish = 0, FinishReason.RUNNING
        try:
            while finish is FinishReason.RUNNING:
                item = await inbox.get()
                finish, taken = item.finish, taken + 1
                yield item
                if taken % (WINDOW // 2) == 0:
                    self._worker.post_amid(self._worker.scheduler.credit, job, WINDOW // 2)
        finally:
            self._generations.discard(inbox)
            if finish is FinishReason.RUNNING:
                self.cancel(job)

    async def get(self, session_id: str, owner: str = "", with_tokens: bool = False) -> SessionView:
        """The committed state of a session."""
        return await self._call(self._worker.scheduler.look, session_id, owner, with_tokens)

    async def delete(self, session_id: str, owner: str = "") -> Acceptance | None:
        """Frees a session; None when there is none."""
        return await self._call(self._worker.scheduler.delete, session_id, owner)

    async def page(self, owner: str = "", after: str = "", count: int = 50) -> list[SessionView]:
        """The caller's sessions by id, from the first one after `after`."""
        return await self._call(self._worker.scheduler.page, owner, after, count)

    async def acceptance(self) -> Acceptance:
        """Acceptance of everything that was answered before this call."""
        return await self._call(self._worker.scheduler.acceptance)

    def passes_run(self) -> dict[str, tuple[int, int]]:
        """Replayed and eager passes by name; numbers read while the worker runs."""
        return dict(self._engine.passes_run())

    def drafts_given(self) -> dict[DraftShape, int]:
        """Drafts that the depth policy asked for, by shape; numbers read while the worker runs, empty without one."""
        policy = self._worker.scheduler.policy
        return {} if policy is None else dict(policy.given)

    def usage(self) -> Usage:
        """What is held now; numbers read while the worker runs, each right by itself."""
        return self._worker.scheduler.usage()

    # ---- work items, for callers that bring their own `done` ----

    def create_job(self, spec: SessionSpec, deadline: float = math.inf) -> Job:
        """The work item of `create`, with an id where the caller gave none."""
        spec = self._checked(spec)
        return Job(Kind.CREATE, spec.session_id, spec.owner, deadline, spec=spec)

    async def ask(self, job: Job) -> Answer:
        """The answer of a work item; cancelling the wait drops the item."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        job.done = partial(_settle, future)
        self.start_job(job)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel(job)
            raise

    def start_job(self, job: Job) -> None:
        """Sends a work item to the worker; `job.done` gets its answers on the loop. Raises when there is no room."""
        try:
            self._admit(job)
        except SpeculatorError as error:
            self.totals.reject(error.reason)
            raise
        self._in_flight += 1
        job.queued = time.monotonic()
        self._worker.submit(job)

    def _admit(self, job: Job) -> None:
        if self._refuses is not None or (self.draining and job.spec is not None):
            raise self._refuses or _shutting_down()
        if self._in_flight >= self._max_queued:
            raise ServerFullError(f"{self._in_flight} work items are waiting, the limit is {self._max_queued}")
        if job.kind is Kind.EXTEND:
            self._check_extend(job.tokens)

    def _check_extend(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise InvalidArgumentError("extend takes at least one token", field="token_ids")
        check_tokens(tokens, self.info.vocab_size, "token_ids")

    def cancel(self, job: Job) -> None:
        """Drops a work item unless it has committed; its `done` still hears how it ended."""
        self._worker.post(self._worker.scheduler.cancel, job)

    def _checked(self, spec: SessionSpec) -> SessionSpec:
        if not spec.session_id:
            spec = replace(spec, session_id=str(uuid.uuid4()), anonymous=True)
        check_session_id(spec.session_id)
        check_prompt(spec.tokens, self.context, self.info)
        if spec.prefill_only and len(spec.tokens) < 2:
            raise InvalidArgumentError("prefill_only needs at least two tokens", field="token_ids")
        check_sampling(spec.sampling)
        check_stopping(spec.stopping, self.info)
        if spec.idle_timeout is not None and not 0 < spec.idle_timeout <= MAX_IDLE_SECONDS:
            raise InvalidArgumentError(
                f"idle_timeout must be above 0 and at most {MAX_IDLE_SECONDS:.0f} seconds", field="idle_timeout"
            )
        return spec

    async def _call(self, act: Callable[..., Value], *args: Any) -> Value:
        if self._stopped:
            raise EngineFailedError("the engine has stopped")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Value] = loop.create_future()
        self._worker.post(_call_back, loop, future, act, args)
        return await future

    def _sweep(self) -> None:
        assert self._loop is not None
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        self._worker.post_amid(self._worker.scheduler.sweep)
        if self.watch is not None:
            self.watch.observe(self.totals.acceptance.copy())

    def _stop_sweeping(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _collect(self) -> None:
        self._answers.awake()
        for answers in self._answers.take():
            self._receive(answers)

    def _receive(self, answers: list[Delivery]) -> None:
        for job, answer in answers:
            if job.kind is not Kind.GENERATE or not _more_to_come(answer):
                self._in_flight -= 1
            if isinstance(answer, SpeculatorError):
                self.totals.reject(answer.reason)
            try:
                job.done(answer)
            except Exception:
                log.exception("an answer could not be delivered")
        if self._quiet is not None and not self._in_flight and not self._quiet.done():
            self._quiet.set_result(None)

    def _bury(self, error: BaseException) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._mourn, error)

    def _mourn(self, error: BaseException) -> None:
        log.error("no work item is taken any more: the device thread has ended", exc_info=error)
        self._refuses = EngineFailedError("the engine has stopped")
        self._stopped = True
        self._stop_sweeping()
        self._receive(self._worker.leftovers())
        self.on_dead()


class _Inbox:
    """Answers of one generation on their way from the worker's callback to the reader."""

    def __init__(self) -> None:
        self._items: deque[Answer | SpeculatorError] = deque()
        self._some = asyncio.Event()

    def put(self, answer: Answer | SpeculatorError) -> None:
        self._items.append(answer)
        self._some.set()

    async def get(self) -> Generated:
        while not self._items:
            self._some.clear()
            await self._some.wait()
        item = self._items.popleft()
        if isinstance(item, SpeculatorError):
            raise item
        return cast(Generated, item)


def _nothing() -> None:
    return None


def _shutting_down() -> DrainingError:
    return DrainingError("the server is shutting down; go to another one")


def _more_to_come(answer: Answer | SpeculatorError) -> bool:
    return isinstance(answer, Generated) and answer.finish is FinishReason.RUNNING


def _settle(future: asyncio.Future[Answer], answer: Answer | SpeculatorError) -> None:
    if future.done():
        return
    if isinstance(answer, SpeculatorError):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _call_back(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], act: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Runs on the worker's thread."""
    try:
        value, error = act(*args), None
    except SpeculatorError as problem:
        value, error = None, problem
    except Exception:
        log.exception("a call on the worker's thread failed")
        value, error = None, SpeculatorError("internal error")
    loop.call_soon_threadsafe(_settle_call, future, value, error)


def _settle_call(future: asyncio.Future[Any], value: object, error: SpeculatorError | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
