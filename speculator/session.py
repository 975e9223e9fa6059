"""One sequence: its committed tokens, its bounds, its draft, and the answer kept for replay.

Owns: what a session is and how an engine's verdict becomes committed text. Pure host values.
Must never import torch, grpc or protobuf, nor know of queues, batches or threads.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from speculator.answers import Acceptance, Answer, Created, Extended, Proposed, SessionView, Timing, Verified
from speculator.drafts import KEEP, ShapeRequest, draft_depth
from speculator.errors import (
    DraftNotFoundError,
    PositionMismatchError,
    SessionFinishedError,
    SpeculationDisabledError,
    SpeculatorError,
)
from speculator.types import Draft, DraftShape, FinishReason, SamplingParams, StoppingParams

GREEDY = SamplingParams()
UNBOUNDED = StoppingParams()
NOTHING = DraftShape(0)


class Kind(enum.Enum):
    """What a work item asks for."""

    CREATE = "create"
    GENERATE = "generate"
    PROPOSE = "propose"
    VERIFY = "verify"
    EXTEND = "extend"


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """The body of a create request; two equal ones are the same request.

    `prefill_only` commits nothing beyond `tokens`. `anonymous` says that the server made the id.
    """

    session_id: str
    owner: str
    tokens: tuple[int, ...]
    sampling: SamplingParams = GREEDY
    stopping: StoppingParams = UNBOUNDED
    shape: ShapeRequest = KEEP
    speculate: bool = True
    prefill_only: bool = False
    anonymous: bool = False
    idle_timeout: float | None = None


def _unheard(answer: object) -> None:
    return None


@dataclass(eq=False)
class Job:
    """One work item of one session. The fields below the line belong to the scheduler."""

    kind: Kind
    session_id: str
    owner: str
    deadline: float = math.inf
    base: int = 0
    draft: Draft | None = None  # VERIFY a tree that the client made
    draft_id: int = 0  # VERIFY a draft that the server keeps
    shape: ShapeRequest | None = None  # PROPOSE, or the draft that follows a commit
    tokens: Sequence[int] = ()  # EXTEND
    spec: SessionSpec | None = None  # CREATE, GENERATE
    done: Callable[[Answer | SpeculatorError], None] = _unheard  # gets the answers
    # ---- not slots: what is never set costs nothing in the hot path
    form: DraftShape | None = field(default=None, init=False)  # what `shape` asks for, resolved for the session
    queued: float = field(default=0.0, init=False)
    started: float = field(default=0.0, init=False)
    draft_time: float = field(default=0.0, init=False)
    verify_time: float = field(default=0.0, init=False)
    feed: Sequence[int] = field(default=(), init=False)
    following: int | None = field(default=None, init=False)
    fed: int = field(default=0, init=False)
    credit: int = field(default=0, init=False)

    @property
    def feeding(self) -> bool:
        return self.fed < len(self.feed)


class Kept(NamedTuple):
    """The last answer that committed something, and the request it belongs to."""

    kind: Kind
    base: int
    answer: Verified | Extended


@dataclass(slots=True, eq=False)
class Session:
    """One sequence of tokens and what the service knows about it.

    `limit` is the length at which it ends. `cached` tokens are in the KV caches, one less than `tokens` between steps.
    `dirty` says that the row was reset after an abandoned feed: the committed tokens are fed again before the next
    step. `row` is -1 once the device holds nothing of it.
    """

    spec: SessionSpec
    tokens: list[int]
    stops: frozenset[int]
    limit: int
    shape: DraftShape
    speculate: bool
    idle_timeout: float
    asked: ShapeRequest = KEEP  # the last shape asked for, and what it came to
    form: DraftShape = NOTHING
    row: int = -1
    pages: list[int] = field(default_factory=list)
    covered: int = 0  # tokens that `pages` hold
    reserved: int = 0
    cached: int = 0
    dirty: bool = False
    finish: FinishReason = FinishReason.RUNNING
    offer: Proposed | None = None  # the current draft, valid while `offer.base` tokens are committed
    offered: DraftShape | None = None  # the shape it was asked in
    offers: int = 0
    kept: Kept | None = None
    created: Created | None = None
    stats: Acceptance = field(default_factory=Acceptance)
    expires: float = 0.0
    job: Job | None = None

    @property
    def session_id(self) -> str:
        return self.spec.session_id

    @property
    def remaining(self) -> int:
        """Tokens that may still be committed."""
        return self.limit - len(self.tokens)


def view(session: Session, now: float, with_tokens: bool = False) -> SessionView:
    """A copy that may leave the worker's thread."""
    tokens = tuple(session.tokens) if with_tokens else None
    left = max(0.0, session.expires - now)
    stats = session.stats.copy()
    stats.output_tokens = len(session.tokens) - len(session.spec.tokens)
    return SessionView(session.session_id, len(session.tokens), session.finish, left, stats, tokens)


def cut(session: Session, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason]:
    """The part of `tokens` that the session's bounds admit; a stop token is the last one admitted."""
    room = session.limit - len(session.tokens)
    if len(tokens) < room and session.stops.isdisjoint(tokens):
        return tokens, FinishReason.RUNNING
    admitted = tokens[:room]
    for i, token in enumerate(admitted):
        if token in session.stops:
            return admitted[: i + 1], FinishReason.STOP
    return admitted, FinishReason.LENGTH if len(admitted) == room else FinishReason.RUNNING


def commit(session: Session, tokens: Sequence[int], finish: FinishReason) -> None:
    """Appends tokens; the draft below the old end is gone."""
    session.tokens += tokens
    session.cached = len(session.tokens) - 1
    session.finish = finish
    session.offer = None


def count_round(session: Session, draft: Draft, accepted: int, most: int) -> tuple[int, int, int]:
    """Counts a round in its session: the drafted tokens, the levels judged (`most` at most), the accepted tokens."""
    judged = min(draft_depth(draft), most)
    session.stats.record(len(draft.tokens), judged, accepted)
    return len(draft.tokens), judged, accepted


def extend_finish(session: Session, tokens: Sequence[int]) -> FinishReason:
    """How a session stands after tokens that its caller decided on: only the last one can stop it."""
    if tokens[-1] in session.stops:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(tokens) == session.remaining else FinishReason.RUNNING


def offer(session: Session, shape: DraftShape, draft: Draft | None, timing: Timing) -> Proposed | None:
    """Keeps a new draft under a new id, unless there is none or nothing may follow."""
    if draft is None or session.finish is not FinishReason.RUNNING:
        return None
    session.offers += 1
    session.offered = shape
    session.offer = Proposed(session.offers, len(session.tokens), draft, timing)
    return session.offer


def replay(session: Session, kind: Kind, base: int) -> Answer:
    """The stored answer, marked as replayed, when `base` is the last one committed from.

    Otherwise raises PositionMismatchError unless `base` tokens are committed, SessionFinishedError if they are.
    """
    kept = session.kept
    if kept is not None and kept.base == base and kept.kind is kind:
        return kept.answer._replace(replayed=True, timing=Timing())
    length = len(session.tokens)
    if base != length:
        raise PositionMismatchError(
            f"base_length is {base} but {length} tokens are committed", committed_length=str(length)
        )
    raise SessionFinishedError(
        f"the session finished ({session.finish.value}) after {length} tokens",
        finish_reason=session.finish.value,
        committed_length=str(length),
    )


def check_speculation(session: Session) -> None:
    """Raises SpeculationDisabledError when the session cannot draft."""
    if not session.speculate:
        raise SpeculationDisabledError("this session drafts nothing: speculation is off or the server has no head")


def kept_draft(session: Session, draft_id: int) -> Draft:
    """The draft behind `draft_id`; raises DraftNotFoundError when the session has moved on."""
    if session.offer is None or session.offer.draft_id != draft_id:
        raise DraftNotFoundError(
            f"draft {draft_id} is not the session's current draft; propose again",
            current_draft_id=str(session.offer.draft_id if session.offer else 0),
        )
    return session.offer.draft
