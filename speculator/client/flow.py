"""What a client does over several calls: a session that outlives its server's memory, a generation that goes on.

Owns: which call comes next, what is committed so far, how trouble is met. Written as generators that ask for calls
and waits and are told the answers, so the sync and the async client run the same lines. Must never do I/O.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from speculator.answers import Acceptance
from speculator.client import wire as wire
from speculator.client.errors import ConnectionLostError
from speculator.client.records import Chunk, Created, Extended, Opening, Proposed, Round, Shape, Stats, Timing, Verified
from speculator.errors import (
    DraftNotFoundError,
    DrainingError,
    PositionMismatchError,
    ServerFullError,
    SessionBusyError,
    SessionExistsError,
    SessionFinishedError,
    SessionNotFoundError,
    SpeculatorError,
)
from speculator.types import Draft, FinishReason

FIRST_WAIT, LONGEST_WAIT = 0.05, 1.0  # seconds between two tries


class Wait(NamedTuple):
    """Time to let pass, in seconds."""

    seconds: float


Value = TypeVar("Value")
Flow = Generator[wire.Call[Any] | Wait, Any, Value]


class Patience:
    """How long to wait out trouble: `seconds` from its first sign to the next success, less and less often."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        self._since: float | None = None
        self._wait = FIRST_WAIT

    def wait(self, error: SpeculatorError, seconds: float = 0.0) -> Wait:
        """How long to wait now, at least `seconds`; raises `error` when patience has run out."""
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since >= self._seconds:
            raise error
        pause = max(seconds, self._wait * random.uniform(0.5, 1.0))
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        return Wait(pause)


def unreachable(error: SpeculatorError) -> bool:
    """Whether a server (this one or another) may answer the same call later."""
    return isinstance(error, (ConnectionLostError, DrainingError))


class SessionFlow:
    """One session, kept by its token ids.

    A step whose answer was lost is asked for again with the same base_length: the server repeats its answer, or takes
    the step now. When the server has lost the session, it is made again from its tokens, committing nothing. So every
    token is told once.
    """

    def __init__(self, opening: Opening, patience: float) -> None:
        self.opening = opening.named()
        self.tokens: list[int] = []
        self.prompt_length = 0
        self.finish = FinishReason.RUNNING
        self.resumes = 0
        self.counts = Acceptance()
        self._opened = self._gone = False
        self._draft: Draft | None = None
        self._patience = Patience(patience)

    @property
    def session_id(self) -> str:
        return self.opening.session_id

    # ---- what can be asked of a session

    def open(self) -> Flow[Round]:
        """Prefill the prompt; the round holds the first token (none after `prefill_only`)."""
        created = yield from self._patiently(self._create)
        first = () if created.next_token is None else (created.next_token,)
        self._opened = True
        return self._commit(first, 0, (), created.session.finish, created.timing)

    def step(self, shape: Shape | None = None) -> Flow[Round]:
        """Open the session, or verify the current draft (drafting it if need be) and ask for the next one."""
        if not self._opened:
            return (yield from self.open())
        self._check_running()
        return (yield from self._patiently(lambda: self._round(shape or Shape())))

    def propose(self, shape: Shape | None = None) -> Flow[Proposed]:
        """Draft below the last committed token."""
        yield from self._ensure_open()
        self._check_running()
        return (yield from self._patiently(lambda: self._propose(shape)))

    def verify(self, draft: Draft, next_shape: Shape | None = None) -> Flow[Round]:
        """Verify a draft of the caller's own, or one that `propose` gave."""
        yield from self._ensure_open()
        self._check_running()
        return (yield from self._patiently(lambda: self._verify_given(draft, next_shape)))

    def extend(self, tokens: Sequence[int], next_shape: Shape | None = None) -> Flow[FinishReason]:
        """Commit tokens that the caller decided on."""
        yield from self._ensure_open()
        self._check_running()
        return (yield from self._patiently(lambda: self._extend(tuple(tokens), next_shape)))

    def delete(self) -> Flow[Stats]:
        """Free the session on the server; the tokens stay here."""
        freed: Stats = yield wire.delete(self.session_id)
        self._draft = None
        return freed

    # ---- one try of each

    def _create(self) -> Flow[Created]:
        created: Created = yield wire.create(self.opening)
        if isinstance(self.opening.prompt, str):
            known = (yield wire.get(self.session_id, tokens=True)).tokens or ()
            self.tokens = list(known[: len(known) - (created.next_token is not None)])
        else:
            self.tokens = list(self.opening.prompt)
        self.prompt_length = len(self.tokens)
        return created

    def _round(self, shape: Shape) -> Flow[Round]:
        if self.opening.speculate and self._draft is None:
            yield from self._propose(shape)
        return (yield from self._verify(self._draft or Draft(), shape if self.opening.speculate else None))

    def _propose(self, shape: Shape | None) -> Flow[Proposed]:
        proposed: Proposed = yield wire.propose(self.session_id, len(self.tokens), shape)
        self._draft = proposed.draft
        return proposed

    def _verify_given(self, draft: Draft, next_shape: Shape | None) -> Flow[Round]:
        if draft.draft_id and (self._draft is None or self._draft.draft_id != draft.draft_id):
            draft = (yield from self._propose(None)).draft  # the one given was lost with its session
        return (yield from self._verify(draft, next_shape))

    def _verify(self, draft: Draft, next_shape: Shape | None) -> Flow[Round]:
        answer: Verified = yield wire.verify(self.session_id, len(self.tokens), draft, next_shape)
        self._count(draft, answer)
        self._draft = answer.next_draft.draft if answer.next_draft else None
        return self._commit(answer.tokens, len(answer.accepted), answer.logprobs, answer.finish, answer.timing)

    def _extend(self, tokens: tuple[int, ...], next_shape: Shape | None) -> Flow[FinishReason]:
        answer: Extended = yield wire.extend(self.session_id, len(self.tokens), tokens, next_shape)
        self._draft = answer.next_draft.draft if answer.next_draft else None
        return self._commit(tokens, 0, (), answer.finish, answer.timing).finish

    def _resume(self) -> Flow[None]:
        """Make the session again from its tokens; a stale copy under its name (on another replica) goes first."""
        if not self._opened:
            self._gone = False  # it is about to be made anyway
            return
        opening = self.opening.resumed(self.tokens, self.prompt_length)
        try:
            yield wire.create(opening)
        except SessionExistsError:
            yield wire.delete(self.session_id)
            yield wire.create(opening)
        self._gone = False
        self.resumes += 1

    # ---- bookkeeping

    def _ensure_open(self) -> Flow[None]:
        if not self._opened:
            yield from self.open()

    def _check_running(self) -> None:
        if self.finish is not FinishReason.RUNNING:
            raise SessionFinishedError(f"the session finished ({self.finish.value}) after {len(self.tokens)} tokens")

    def _commit(
        self, tokens: tuple[int, ...], accepted: int, logprobs: tuple[float, ...], finish: FinishReason, timing: Timing
    ) -> Round:
        self.tokens.extend(tokens)
        self.counts.output_tokens += len(tokens)
        self.finish = finish
        return Round(tokens, accepted, logprobs, finish, timing)

    def _count(self, draft: Draft, answer: Verified) -> None:
        judged = _levels(draft)
        if answer.finish is not FinishReason.RUNNING:
            judged = min(judged, len(answer.tokens))
        self.counts.record(len(draft.tokens), judged, len(answer.accepted))

    # ---- trouble

    def _patiently(self, attempt: Callable[[], Flow[Value]]) -> Flow[Value]:
        """Run `attempt` until it succeeds, putting right what can be put right in between."""
        self._patience.reset()
        while True:
            try:
                if self._gone:
                    yield from self._resume()
                return (yield from attempt())
            except SpeculatorError as error:
                yield self._put_right(error)

    def _put_right(self, error: SpeculatorError) -> Wait:
        """What to wait before the next try; raises `error` when another try would not help."""
        if isinstance(error, ServerFullError):
            return self._patience.wait(error, error.retry_after)
        if isinstance(error, DraftNotFoundError) and self._draft is not None:
            self._draft = None
        elif self._lost(error):
            self._gone, self._draft = True, None
        elif not (unreachable(error) or isinstance(error, SessionBusyError)):
            raise error
        return self._patience.wait(error)

    def _lost(self, error: SpeculatorError) -> bool:
        """Whether the server has nothing of the session, or a copy that lags behind."""
        if isinstance(error, PositionMismatchError):
            return int(error.metadata.get("committed_length", len(self.tokens))) < len(self.tokens)
        return isinstance(error, SessionNotFoundError)


def _levels(draft: Draft) -> int:
    """How deep a draft goes."""
    depths: list[int] = []
    for parent in draft.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)


class SessionFace:
    """What can be read of a session without asking the server; base of the sync and the async Session."""

    def __init__(self, flow: SessionFlow) -> None:
        self._flow = flow

    @property
    def session_id(self) -> str:
        return self._flow.session_id

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and committed tokens; empty before the first step."""
        return tuple(self._flow.tokens)

    @property
    def output(self) -> tuple[int, ...]:
        """Committed tokens after the prompt."""
        return tuple(self._flow.tokens[self._flow.prompt_length :])

    @property
    def finish(self) -> FinishReason:
        return self._flow.finish

    @property
    def stats(self) -> Stats:
        """Acceptance as this client saw it, over all servers that held the session."""
        return wire.tallied(self._flow.counts)

    @property
    def resumes(self) -> int:
        """How often the session was lost and made again."""
        return self._flow.resumes


class GenerateFlow:
    """A server-side generation that goes on after its stream broke: asked for again from the tokens that came.

    A prompt given as text goes on only if nothing came yet, since its token ids are not known here.
    """

    def __init__(self, opening: Opening, patience: float) -> None:
        self._opening = opening
        self._tokens: list[int] = []
        self._patience = Patience(patience)
        self._finish = FinishReason.RUNNING

    @property
    def finished(self) -> bool:
        return self._finish is not FinishReason.RUNNING

    def call(self) -> wire.Call[Chunk]:
        """What to ask for now."""
        if not self._tokens:
            return wire.generate(self._opening)
        prompt = self._opening.prompt
        opening = self._opening.resumed([*map(int, prompt), *self._tokens], len(prompt))
        return wire.generate(replace(opening, prefill_only=False))

    def take(self, chunk: Chunk) -> Chunk:
        """Note what came."""
        self._tokens.extend(chunk.tokens)
        self._finish = chunk.finish
        self._patience.reset()
        return chunk

    def put_right(self, error: SpeculatorError) -> Wait:
        """How long to wait before asking again; raises `error` when asking again would not help."""
        if self._tokens and isinstance(self._opening.prompt, str):
            raise error
        if isinstance(error, ServerFullError):
            return self._patience.wait(error, error.retry_after)
        if unreachable(error):
            return self._patience.wait(error)
        raise error

    def ended(self) -> Wait:
        """The stream ended well but without its last chunk: treated as a lost connection."""
        return self.put_right(ConnectionLostError("the server ended the stream before the text had ended"))
