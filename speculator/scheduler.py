"""Which sessions go together in the next engine step, and what they hold meanwhile.

Owns: sessions by id, rows, KV pages, the queue of work items, the one place where a commit happens.
Must never import torch, grpc or protobuf, nor touch a thread: one caller drives it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Protocol

from speculator.answers import (
    Acceptance,
    Answer,
    Created,
    Extended,
    Generated,
    Proposed,
    SessionView,
    Timing,
    Usage,
    Verified,
)
from speculator.chains import check_chain, check_chain_shape
from speculator.costs import size
from speculator.drafts import KEEP, ShapeRequest, capped, check_rule, check_shape, draft_depth, fitted, validate
from speculator.errors import (
    DeadlineExceededError,
    EngineFailedError,
    InvalidArgumentError,
    ServerFullError,
    SessionBusyError,
    SessionExistsError,
    SessionForbiddenError,
    SessionNotFoundError,
    SpeculatorError,
    StepCancelledError,
)
from speculator.places import Places
from speculator.policy import NOTHING, DepthPolicy, Riders
from speculator.session import (
    Job,
    Kept,
    Kind,
    Session,
    SessionSpec,
    check_speculation,
    commit,
    count_round,
    cut,
    extend_finish,
    kept_draft,
    offer,
    replay,
    view,
)
from speculator.totals import Totals
from speculator.types import (
    Bounds,
    Draft,
    DraftShape,
    EngineInfo,
    Feed,
    FinishReason,
    SamplingParams,
    Step,
    StepResult,
    StepTimes,
)

log = logging.getLogger(__name__)

NO_DRAFT = Draft()
DEEP = 1 << 30  # no draft has as many levels
WINDOW = 64  # messages of one generation that may wait for their reader
SETTLE = 64  # engine steps that are counted together
MAX_FINISHED = 1024  # finished sessions whose text and last answer are kept


class RowDevice(Protocol):
    """The part of the engine that follows sessions coming and going."""

    def open(self, row: int, sampling: SamplingParams, speculate: bool) -> None: ...

    def close(self, row: int) -> None: ...


Going = tuple[Job, Session, Step]


class Scheduler:
    """Admits work items, forms engine steps and commits their results.

    One thread calls `submit`, `cancel` and `delete` between steps, then `next_steps`, then `complete`; answers pile up
    in `take_answers`. Every step carries all waiting rounds and at most `info.prefill_chunk` prompt tokens, prompts in
    turn, so that long prompts do not starve rounds nor each other.

    While a step is under way `next_steps` gives the round that follows it, if its sessions need nobody to go on; the
    next `complete` is for the older step still. `credit` and `sweep` alone may be called then.

    Where the engine has stages, as many steps may be under way, each of sessions of its own: `next_steps` gives the
    share of one, and the next `complete` is for the oldest. `submit` may be called too then.
    """

    def __init__(
        self,
        info: EngineInfo,
        rows: RowDevice,
        *,
        idle_timeout: float = 600.0,
        totals: Totals | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self.totals = totals or Totals()
        self.sessions: dict[str, Session] = {}
        self.places = Places(info)
        self.context = min(info.max_context, self.places.largest * info.page_size - info.scratch_tokens)
        self._device = rows
        self._idle_timeout = idle_timeout
        self._clock = clock
        self._ready: dict[Job, Session] = {}
        self._parked: dict[Job, Session] = {}
        self._running: list[Going | None] = []  # None: the session ended meanwhile
        self._ahead: list[Going] = []
        self._behind: deque[list[Going | None]] = deque()  # steps begun after the running one, of other sessions
        self.now = clock()  # when the step at hand began, or ended
        self._times: list[tuple[int, StepTimes]] = []  # what `settle` has yet to count
        self._rounds: list[tuple[Session, Draft, int, int]] = []  # accepted tokens, levels that can have been judged
        self._items: list[tuple[Timing, int]] = []
        self._answers: list[tuple[Job, Answer | SpeculatorError]] = []
        self._finished: dict[str, None] = {}
        self.policy: DepthPolicy | None = None

    def steer(self, policy: DepthPolicy | None) -> None:
        """From now on, for sessions opened from now on, `policy` picks the shapes that callers leave open."""
        self.policy = policy

    # ---- what callers ask ----

    def submit(self, job: Job) -> None:
        """Queues a work item, or answers it at once when it is wrong or was answered before."""
        job.queued = job.queued or self._clock()
        try:
            if job.spec is not None:
                self._admit_create(job, job.spec)
            else:
                self._admit_step(job)
        except SpeculatorError as error:
            self._answer(job, error)
        except Exception:
            log.exception("a work item could not be admitted")
            self._answer(job, SpeculatorError("internal error"))

    def cancel(self, job: Job) -> None:
        """Drops a work item that has not committed yet; a session that nobody knows the id of goes with it."""
        session = self._ready.get(job) or self._parked.get(job)
        if session is not None:
            self._abort(job, session, StepCancelledError("the caller went away"))
            return
        if job.spec is not None and job.spec.anonymous and job.session_id in self.sessions:
            self._remove(self.sessions[job.session_id])

    def credit(self, job: Job, messages: int) -> None:
        """The reader of a generation has taken `messages` more."""
        job.credit += messages
        session = self._parked.pop(job, None)
        if session is not None:
            self._ready[job] = session

    def delete(self, session_id: str, owner: str) -> Acceptance | None:
        """Frees a session and ends the work item it has in the queue. A missing session is no error."""
        if session_id not in self.sessions:
            return None
        session = self._owned(session_id, owner)
        if session.job is not None:
            self._end_by_delete(session.job, session)
        self._remove(session)
        return self._view(session).stats

    def look(self, session_id: str, owner: str, with_tokens: bool = False) -> SessionView:
        """The committed state of a session; raises SessionNotFoundError."""
        return self._view(self._owned(session_id, owner), with_tokens)

    def page(self, owner: str, after: str, count: int) -> list[SessionView]:
        """Up to `count` of the caller's sessions whose ids follow `after`, by id."""
        ids = sorted(key for key, session in self.sessions.items() if key > after and session.spec.owner == owner)
        return [self._view(self.sessions[key]) for key in ids[:count]]

    def acceptance(self) -> Acceptance:
        """Acceptance since the start, all sessions together."""
        self.settle()
        return self.totals.acceptance.copy()

    def usage(self) -> Usage:
        finished = len(self._finished)
        waiting = len(self._ready) + len(self._parked)
        places = self.places
        return Usage(len(self.sessions) - finished, finished, waiting, places.used, places.reserved, places.capacity)

    # ---- the engine's side ----

    @property
    def ready(self) -> bool:
        return bool(self._ready)

    def next_steps(self) -> list[Step]:
        """One batch for the engine: at most one step a session, nothing for work items that came too late."""
        if self._running and self.info.pipeline_parallel == 1:
            return self._steps_ahead()
        if len(self._times) >= SETTLE:
            self.settle()
        self.now = now = self._clock()
        self._choose(self._ready.items())
        budgets, share = [self.info.prefill_chunk] * len(self.places.pools), self._share()
        going: list[Going | None] = []
        steps: list[Step] = []
        for job, session in list(self._ready.items()):
            if job.deadline <= now:
                self._abort(job, session, DeadlineExceededError("the deadline passed before the step began"))
                continue
            rank = self.places.rank(session.row)
            step = self._step(job, session, budgets[rank]) if len(steps) < share else None
            if step is None:
                continue
            if step.feed is not None:
                budgets[rank] -= len(step.feed.tokens)
            job.started = job.started or now
            del self._ready[job]
            going.append((job, session, step))
            steps.append(step)
        self._begin(going)
        return steps

    def _share(self) -> int:
        """Sessions of one step: all that have work, divided over the steps that may be under way."""
        busy = sum(map(len, (self._ready, self._running, *self._behind)))
        return -(-busy // self.info.pipeline_parallel)

    def _begin(self, going: list[Going | None]) -> None:
        if not self._running:
            self._running = going
        elif going:
            self._behind.append(going)

    def complete(self, outcomes: Sequence[StepResult | SpeculatorError], times: StepTimes) -> None:
        """Commits what the engine found for the steps of the last `next_steps`, in their order."""
        running, self._running = self._running, []
        self.now = self._clock()
        batch = sum(going is not None for going in running)
        self._times.append((batch, times))
        for going, outcome in zip(running, outcomes, strict=True):
            if going is not None:
                self._complete_alone(going, outcome, times, batch)
        ahead, self._ahead = self._ahead, []
        self._running = [self._goes_on(*going) for going in ahead]
        if self._behind:
            self._running = self._behind.popleft()

    def _complete_alone(
        self, going: Going, outcome: StepResult | SpeculatorError, times: StepTimes, batch: int
    ) -> None:
        """What goes wrong here is one session's: it ends, since nobody knows how far it came, and the others go on."""
        job, session, _ = going
        try:
            self._complete(going, outcome, times, batch)
        except Exception:
            log.exception("session %s could not take its results over and has ended", session.session_id)
            self._abort(job, session, EngineFailedError("the session could not take its results over and has ended"))
            self._remove(session)

    def _complete(self, going: Going, outcome: StepResult | SpeculatorError, times: StepTimes, batch: int) -> None:
        job, session, step = going
        if isinstance(outcome, SpeculatorError):
            self._abort(job, session, outcome)
            return
        job.draft_time += times.draft
        job.verify_time += times.feed + times.verify
        if step.feed is None or self._fed(job, session, step.feed):
            self._commit(job, session, step, outcome, batch)

    @property
    def under_way(self) -> list[Step | None]:
        """The steps that the next `complete` is for, as they stand now; None where the session has ended."""
        return [going and going[2] for going in self._running]

    def recall(self) -> None:
        """Nothing comes of the round that `next_steps` gave ahead: its sessions go on from the step under way."""
        self._ahead = []

    def settle(self) -> None:
        """Counts what `complete` did since the last time; apart from it, so that answers need not wait for it.

        Nobody is served worse for figures that cannot be counted.
        """
        try:
            self._count()
        except Exception:
            log.exception("figures of some steps could not be counted and are left out")
        self._times.clear()
        self._rounds.clear()
        self._items.clear()

    def _count(self) -> None:
        for batch, times in self._times:
            self.totals.step(batch, times)
        for session, draft, accepted, most in self._rounds:
            nodes, judged, _ = count_round(session, draft, accepted, most)
            self.totals.acceptance.record(nodes, judged, accepted)
            self.totals.confidence.record(draft, judged, accepted)
        for timing, tokens in self._items:
            self.totals.item(timing, tokens)

    def take_answers(self) -> list[tuple[Job, Answer | SpeculatorError]]:
        answers, self._answers = self._answers, []
        return answers

    def sweep(self) -> None:
        """Frees sessions idle for too long and ends work items whose time ran out while they waited."""
        self.settle()
        now = self._clock()
        for job, session in [*self._ready.items(), *self._parked.items()]:
            if job.deadline <= now:
                self._abort(job, session, DeadlineExceededError("the deadline passed before the commit"))
        for session in [s for s in self.sessions.values() if s.job is None and s.expires <= now]:
            self._remove(session)

    def fail_all(self, error: SpeculatorError) -> None:
        """Ends every work item; for a worker that cannot go on."""
        running, self._running, self._ahead = [*self._running, *chain(*self._behind)], [], []
        self._behind.clear()
        for job, session, _ in filter(None, running):
            self._abort(job, session, error)
        for job, session in [*self._ready.items(), *self._parked.items()]:
            self._abort(job, session, error)

    def check(self) -> None:
        """Asserts that rows, pages and queues add up; for tests."""
        live = [s for s in self.sessions.values() if s.row >= 0]
        for rank, pool in enumerate(self.places.pools):
            held = [s for s in live if self.places.rank(s.row) == rank]
            pages = sorted(chain(pool.free, *(s.pages for s in held)))
            assert pages == list(range(1, pool.capacity + 1)), "pages lost, doubled, or the null page handed out"
            assert pool.reserved == sum(s.reserved for s in held), "reservations do not add up"
        rows = sorted([*self.places.free_rows, *(s.row for s in live)])
        assert rows == list(range(self.info.max_rows)), "rows lost"
        assert all(len(s.pages) <= s.reserved for s in live), "a session holds more pages than it reserved"
        jobs = {s.job for s in self.sessions.values() if s.job is not None}
        running = [going for going in chain(self._running, *self._behind) if going is not None]
        queued = {*self._ready, *self._parked, *(job for job, _, _ in running)}
        assert len({step.row for _, _, step in running}) == len(running), "a session is in two steps at once"
        assert jobs == queued, "a session and the queue disagree about its work item"
        for s in self.sessions.values():
            assert (s.finish is FinishReason.RUNNING) == (s.row >= 0), "finished sessions hold no row, others do"
            assert len(s.tokens) <= s.limit, "a session grew beyond its limit"
            idle = s.job is None and s.finish is FinishReason.RUNNING
            assert not idle or s.dirty or s.cached == len(s.tokens) - 1, "the caches lag behind an idle session"
        assert set(self._finished) == {s.session_id for s in self.sessions.values() if s.row < 0}

    # ---- admission ----

    def _admit_create(self, job: Job, spec: SessionSpec) -> None:
        known = self.sessions.get(spec.session_id)
        if known is not None:
            self._answer(job, self._created_before(job, spec, known))
            return
        session = self._open(spec)
        job.feed, job.following = spec.tokens, None
        if spec.prefill_only:
            job.feed, job.following = spec.tokens[:-1], spec.tokens[-1]
        if job.kind is Kind.GENERATE:
            job.credit = WINDOW
            job.form = session.shape if session.speculate else None
        self._enqueue(job, session)

    def _created_before(self, job: Job, spec: SessionSpec, known: Session) -> Created:
        self._owned(spec.session_id, spec.owner)
        if job.kind is Kind.GENERATE or known.spec != spec:
            raise SessionExistsError("the session id is taken by a session with another body")
        if known.created is None:
            raise SessionBusyError("the session is still being created")
        known.expires = job.queued + known.idle_timeout
        return known.created._replace(session=self._view(known), replayed=True)

    def _open(self, spec: SessionSpec) -> Session:
        info = self.info
        shape = fitted(spec.shape.over(info.default_shape), info)
        check_chain_shape(shape, info)
        check_shape(shape, spec.sampling.rule, info)
        check_rule(spec.sampling, info)
        new = spec.stopping.max_new_tokens
        limit = self.context if new is None else min(self.context, len(spec.tokens) + new)
        stops = spec.stopping.stop_token_ids
        session = Session(
            spec,
            list(spec.tokens),
            stops if spec.stopping.ignore_eos else stops | frozenset(info.eos_token_ids),
            limit,
            shape,
            spec.speculate and info.draft_method != "none",
            self._idle_timeout if spec.idle_timeout is None else spec.idle_timeout,
            form=shape,
        )
        self._take_place(session)
        self.sessions[spec.session_id] = session
        return session

    def _take_place(self, session: Session) -> None:
        pages = self._pages_for(session.limit + self.info.scratch_tokens)
        if not self.places.has(pages):
            self.sweep()
        if self.places.full:
            raise ServerFullError(f"all {self.info.max_rows} sessions are taken", limit="sessions")
        row = self.places.take(pages)
        if row is None:
            raise ServerFullError(
                f"the session may need {pages} KV pages, {self.places.unpromised} are not promised; "
                "ask for fewer max_new_tokens or come back later",
                limit="kv_pages",
            )
        session.reserved, session.row = pages, row
        if self.policy is not None:
            self.policy.open(session.row)
        self._open_row(session)

    def _open_row(self, session: Session) -> None:
        try:
            self._device.open(session.row, session.spec.sampling, session.speculate)
        except SpeculatorError:
            self._release(session)
            raise
        except Exception as error:
            log.exception("opening a row failed")
            self._release(session)
            raise EngineFailedError("the engine could not open a row for the session") from error

    def _admit_step(self, job: Job) -> None:
        session = self._owned(job.session_id, job.owner)
        if session.job is not None:
            raise SessionBusyError("another step of the session is under way")
        session.expires = job.queued + session.idle_timeout
        if job.base != len(session.tokens) or session.finish is not FinishReason.RUNNING:
            self._answer(job, replay(session, job.kind, job.base))
            return
        if job.shape is not None:
            job.form = self._resolve(job.shape, session)
        if job.kind is Kind.PROPOSE and session.offer is not None and session.offered == job.form:
            self._answer(job, session.offer._replace(timing=Timing()))
            return
        if job.kind is Kind.VERIFY:
            self._prepare_verify(job, session)
        elif job.kind is Kind.EXTEND:
            self._prepare_extend(job, session)
        self._enqueue(job, session)

    def _resolve(self, request: ShapeRequest, session: Session) -> DraftShape:
        """The shape asked for, checked; the one of the step before is remembered."""
        check_speculation(session)
        if request is not session.asked:
            shape = fitted(request.over(session.shape), self.info)
            check_chain_shape(shape, self.info)
            check_shape(shape, session.spec.sampling.rule, self.info)
            session.asked, session.form = request, shape
        return session.form

    def _prepare_verify(self, job: Job, session: Session) -> None:
        if job.draft is None:
            job.draft = kept_draft(session, job.draft_id)
        else:
            validate(job.draft, self.info, session.spec.sampling.rule)
            check_chain(job.draft, self.info)

    def _prepare_extend(self, job: Job, session: Session) -> None:
        if len(job.tokens) > session.remaining:
            raise InvalidArgumentError(
                f"{len(job.tokens)} tokens given, the session takes {session.remaining} more", field="token_ids"
            )
        job.feed = [session.tokens[-1], *job.tokens[:-1]]
        job.following = job.tokens[-1]

    def _enqueue(self, job: Job, session: Session) -> None:
        session.job = job
        self._ready[job] = session

    def _owned(self, session_id: str, owner: str) -> Session:
        session = self.sessions.get(session_id)
        if session is None:
            raise SessionNotFoundError(
                f"no session {session_id!r}: never created, deleted or expired; create it again from its token ids",
                session_id=session_id,
            )
        if session.spec.owner != owner:
            raise SessionForbiddenError("the session belongs to another caller")
        return session

    # ---- steps ----

    def _step(self, job: Job, session: Session, budget: int) -> Step | None:
        if session.dirty:
            return self._rebuild_step(session, budget)
        if job.fed < len(job.feed):
            return self._feed_step(job, session, budget)
        return self._round_step(job, session)

    def _rebuild_step(self, session: Session, budget: int) -> Step | None:
        end = min(len(session.tokens) - 1, session.cached + min(budget, self.info.prefill_chunk))
        if end == session.cached:
            return None
        feed = Feed(session.tokens[session.cached : end], session.tokens[end])
        self._cover(session, len(feed.tokens))
        return Step(session.row, session.cached, session.pages, feed)

    def _feed_step(self, job: Job, session: Session, budget: int) -> Step | None:
        end = min(len(job.feed), job.fed + min(budget, self.info.prefill_chunk))
        if end == job.fed:
            return None
        last = end == len(job.feed)
        feed = Feed(job.feed[job.fed : end], job.following if last else job.feed[end])
        self._cover(session, end - job.fed)
        shape = self._wanted(job, session) if last else None
        if shape is not None:
            shape = self._fitting(shape, session, len(job.tokens) or 1)
        return Step(session.row, session.cached, session.pages, feed, propose=shape)

    def _round_step(self, job: Job, session: Session) -> Step:
        if session.covered < session.cached + self.info.scratch_tokens:
            self._cover(session, 0)
        draft = job.draft
        if job.kind is Kind.GENERATE:
            draft = session.offer.draft if session.offer else NO_DRAFT
        shape = self._wanted(job, session)
        if shape is not None:
            shape = self._fitting(shape, session, 0 if draft is None else 1)
        bounds = Bounds(session.limit, session.stops) if job.kind is Kind.GENERATE else None
        return Step(session.row, session.cached, session.pages, None, session.tokens[-1], draft, shape, bounds)

    # one round ahead: of sessions whose last round is under way, when nobody else waits

    def _steps_ahead(self) -> list[Step]:
        """The round after the one under way, unless somebody has to be asked first; a session that ends sits out."""
        now = self._clock()
        going = [g for g in self._running if g is not None and g[1].remaining > 1]
        if self._ready or self._ahead or not all(self._goes_alone(*g, now) for g in going):
            return []
        self._choose([(job, session) for job, session, _ in going])
        self._ahead = [(job, session, self._step_ahead(job, session, step)) for job, session, step in going]
        return [step for _, _, step in self._ahead]

    def _goes_alone(self, job: Job, session: Session, step: Step, now: float) -> bool:
        """Whether nobody has to be asked between a step and the round after it.

        Near the end of a session that drafts trees one has to wait: what fits there depends on what is accepted now.
        """
        if job.kind is not Kind.GENERATE or step.feed is not None or job.credit <= 1 or job.deadline <= now:
            return False
        shape = job.form
        return shape is None or shape.is_chain or self._fitting(shape, session, _most(step) + 1) is shape

    def _step_ahead(self, job: Job, session: Session, step: Step) -> Step:
        shape = self._wanted(job, session)
        self._cover(session, min(_most(step), session.remaining - 1))
        return Step(session.row, 0, session.pages, None, 0, NO_DRAFT, shape, step.bounds, ahead=True)

    def _goes_on(self, job: Job, session: Session, step: Step) -> Going | None:
        """A round ahead, now that it is known where it began; None if there was nothing left to do."""
        if session.job is not job:
            return None
        del self._ready[job]
        job.started = self.now
        draft = session.offer.draft if session.offer else NO_DRAFT
        shape = None if step.propose is None else self._fitting(step.propose, session, 1)
        known = Step(session.row, session.cached, session.pages, None, session.tokens[-1], draft, shape, step.bounds)
        return job, session, known

    def _choose(self, sessions: Collection[tuple[Job, Session]]) -> None:
        """Let the policy look at the sessions of the coming step."""
        if self.policy is not None and sessions and self.policy.due(len(sessions)):
            self.policy.decide(self._riders(sessions))

    def _riders(self, sessions: Collection[tuple[Job, Session]]) -> Riders:
        """What the policy may know of sessions: whose shape is open, and how long they are."""
        rows, fixed, tokens = list[int](), NOTHING, 0
        for job, session in sessions:
            tokens += session.cached
            if job.form is not None and _is_open(job, session):
                rows.append(session.row)
            elif job.form is not None:
                fixed = max(fixed, job.form, key=size)
        return Riders(rows, len(sessions), tokens / len(sessions), fixed)

    def _wanted(self, job: Job, session: Session) -> DraftShape | None:
        """The shape of the next draft: the caller's own, or the policy's where it is left open."""
        if self.policy is None or job.form is None or not _is_open(job, session):
            return job.form
        return self.policy.give()

    def _fitting(self, shape: DraftShape, session: Session, commits: int) -> DraftShape | None:
        """The asked shape, cut by what is surely left after `commits` more tokens: never by a token it gates."""
        room = session.limit - len(session.tokens) - commits - 1
        if shape.depth <= room:
            return shape
        return capped(shape, room) if room >= 0 else None

    def _cover(self, session: Session, fed: int) -> None:
        end = session.cached + fed + self.info.scratch_tokens
        while session.covered < end:
            session.pages.append(self.places.page(session.row))
            session.covered += self.info.page_size

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.info.page_size)

    # ---- results ----

    def _fed(self, job: Job, session: Session, feed: Feed) -> bool:
        """Notes what the caches hold now; True when it was the last piece."""
        session.cached += len(feed.tokens)
        if session.dirty:
            session.dirty = session.cached < len(session.tokens) - 1
        else:
            job.fed += len(feed.tokens)
            if not job.feeding:
                return True
        self._ready[job] = session
        return False

    def _commit(self, job: Job, session: Session, step: Step, result: StepResult, batch: int) -> None:
        """The one place where a session grows."""
        timing = Timing(job.started - job.queued, job.draft_time, job.verify_time, batch)
        session.job = None
        session.expires = self.now + session.idle_timeout
        before = len(session.tokens)
        answer = COMMITS[job.kind](self, job, session, step, result, timing)
        self._items.append((timing, len(session.tokens) - before))
        self._answers.append((job, answer))
        if session.finish is not FinishReason.RUNNING:
            self._retire(job, session)

    def _created(self, job: Job, session: Session, step: Step, result: StepResult, timing: Timing) -> Created:
        if job.following is None:
            commit(session, *cut(session, result.tokens))
        token = session.tokens[-1] if job.following is None else None
        session.created = Created(self._view(session), token, timing)
        return session.created

    def _proposed(self, job: Job, session: Session, step: Step, result: StepResult, timing: Timing) -> Proposed:
        made = self._offer(job, session, step, result, timing)
        assert made is not None, "a session that takes a step can always be offered a draft"
        return made

    def _verified(self, job: Job, session: Session, step: Step, result: StepResult, timing: Timing) -> Verified:
        tokens, finish, accepted = self._commit_round(session, step, result)
        answer = Verified(
            result.accepted[:accepted],
            tokens,
            result.logprobs[: len(tokens)],
            len(session.tokens),
            finish,
            session.spec.sampling.rule,
            self._offer(job, session, step, result, timing),
            timing,
        )
        session.kept = Kept(Kind.VERIFY, job.base, answer)
        return answer

    def _extended(self, job: Job, session: Session, step: Step, result: StepResult, timing: Timing) -> Extended:
        commit(session, job.tokens, extend_finish(session, job.tokens))
        offered = self._offer(job, session, step, result, timing)
        answer = Extended(len(session.tokens), session.finish, offered, timing)
        session.kept = Kept(Kind.EXTEND, job.base, answer)
        return answer

    def _generated(self, job: Job, session: Session, step: Step, result: StepResult, timing: Timing) -> Generated:
        first = step.feed is not None
        if first:
            commit(session, *cut(session, result.tokens))
            tokens, finish, accepted = result.tokens[:1], session.finish, 0
        else:
            tokens, finish, accepted = self._commit_round(session, step, result)
        self._offer(job, session, step, result, timing)
        seen = None
        if first or finish is not FinishReason.RUNNING:
            seen = self._view(session)
        if finish is FinishReason.RUNNING:
            self._next_round(job, session)
        return Generated(tokens, result.logprobs[: len(tokens)], accepted, finish, timing, seen)

    def _view(self, session: Session, with_tokens: bool = False) -> SessionView:
        self.settle()
        return view(session, self._clock(), with_tokens)

    def _next_round(self, job: Job, session: Session) -> None:
        job.queued, job.started, job.draft_time, job.verify_time = self.now, 0.0, 0.0, 0.0
        session.job = job
        job.credit -= 1
        (self._ready if job.credit > 0 else self._parked)[job] = session

    def _commit_round(
        self, session: Session, step: Step, result: StepResult
    ) -> tuple[tuple[int, ...], FinishReason, int]:
        tokens, finish = cut(session, result.tokens)
        commit(session, tokens, finish)
        accepted = min(len(result.accepted), len(tokens))
        judged = DEEP if finish is FinishReason.RUNNING else len(tokens)  # what lies behind the end was never judged
        self._rounds.append((session, step.draft or NO_DRAFT, accepted, judged))
        if self.policy is not None and step.draft is not None:
            self.policy.observe(session.row, step.draft, accepted, judged)
        return tokens, finish, accepted

    def _offer(self, job: Job, session: Session, step: Step, result: StepResult, timing: Timing) -> Proposed | None:
        if step.propose is None or job.form is None:
            return None
        return offer(session, job.form, _asked(result.draft or NO_DRAFT, step.propose), timing)

    # ---- endings ----

    def _abort(self, job: Job, session: Session, error: SpeculatorError) -> None:
        self._ready.pop(job, None)
        self._parked.pop(job, None)
        session.job = None
        if job.spec is not None:
            self._remove(session)
        elif job.fed or session.dirty:
            self._reset_row(session)
        self._answer(job, error)

    def _reset_row(self, session: Session) -> None:
        """An abandoned feed leaves tokens in the row that were never committed: the row starts over."""
        self._device.open(session.row, session.spec.sampling, session.speculate)
        session.cached, session.dirty, session.offer = 0, True, None

    def _end_by_delete(self, job: Job, session: Session) -> None:
        if job.kind is not Kind.GENERATE:
            self._abort(job, session, StepCancelledError("the session was deleted"))
            return
        self._ready.pop(job, None)
        self._parked.pop(job, None)
        session.job, session.finish = None, FinishReason.CANCELLED
        self._answer(job, Generated((), (), 0, session.finish, Timing(), self._view(session)))

    def _retire(self, job: Job, session: Session) -> None:
        """A finished session gives its row and pages back; its text and last answer stay until it expires."""
        if job.kind is Kind.GENERATE:
            self._remove(session)
            return
        self._give_back(session)
        self._finished[session.session_id] = None
        if len(self._finished) > MAX_FINISHED:
            self._remove(self.sessions[next(iter(self._finished))])

    def _remove(self, session: Session) -> None:
        if self.sessions.pop(session.session_id, None) is None:
            return
        self._finished.pop(session.session_id, None)
        self._give_back(session)

    def _give_back(self, session: Session) -> None:
        if session.row >= 0:
            self._device.close(session.row)
            self._release(session)

    def _release(self, session: Session) -> None:
        self.places.give(session.row, session.pages, session.reserved)
        session.row, session.pages, session.covered, session.reserved = -1, [], 0, 0

    def _answer(self, job: Job, answer: Answer | SpeculatorError) -> None:
        self._answers.append((job, answer))


def _most(step: Step) -> int:
    """Tokens that a round can commit."""
    return 1 + draft_depth(step.draft or NO_DRAFT)


def _asked(draft: Draft, shape: DraftShape) -> Draft:
    """Of a chain that was drafted ahead, when its room was not known yet, what `shape` asks for."""
    depth = shape.depth
    if not draft.is_chain or len(draft.tokens) <= depth:
        return draft
    cut = Draft(draft.tokens[:depth], draft.parents[:depth], draft.logprobs[:depth], draft_id=draft.draft_id)
    return cut if depth else NO_DRAFT


def _is_open(job: Job, session: Session) -> bool:
    """Whether the caller named no shape, neither for the session nor for this draft."""
    return session.spec.shape == KEEP and (job.shape is None or job.shape == KEEP)


COMMITS: dict[Kind, Callable[[Scheduler, Job, Session, Step, StepResult, Timing], Answer]] = {
    Kind.CREATE: Scheduler._created,
    Kind.PROPOSE: Scheduler._proposed,
    Kind.VERIFY: Scheduler._verified,
    Kind.EXTEND: Scheduler._extended,
    Kind.GENERATE: Scheduler._generated,
}
