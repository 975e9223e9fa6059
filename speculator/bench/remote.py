"""Plays prompts on a running server over gRPC and records every round, as rounds.py does in process.

Owns: the steps of an answer on a Draft stream, and the client's clock. Must never compute a figure, load a model, or
repeat a step: a run whose server goes away ends with its error, and its recording is gone on with later.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from speculator.bench.forced import Found
from speculator.bench.prompts import Prompt
from speculator.bench.recording import Answer, Round
from speculator.bench.records import Theory
from speculator.bench.rounds import (
    ChatTokenizer,
    End,
    Job,
    Key,
    Plan,
    answer_of,
    answer_seed,
    end_of,
    fitting,
    next_job,
)
from speculator.bench.together import together
from speculator.client.blocking import Steps
from speculator.client.records import Created, Sampling, Shape, Stopping, Verified
from speculator.errors import ConfigError, ServerFullError, SpeculatorError, StepCancelledError
from speculator.types import Draft, DraftShape, FinishReason, SamplingParams

SLACK = 2  # tokens beyond the answer and one draft, so that the server never cuts a draft short before the end


class RemotePlayer:
    """A server behind `steps` (a Draft stream), whose sessions hold at most `room` tokens."""

    def __init__(self, steps: Steps, room: int) -> None:
        self.steps, self.room = steps, room
        self.notes: Sequence[str] = ()

    def play(
        self,
        tokenizer: ChatTokenizer,
        prompts: Sequence[Prompt],
        plan: Plan,
        have: dict[Key, Answer],
        notes: list[str] | None = None,
    ) -> Iterator[Answer]:
        """See rounds.play; `plan.rows` sessions at a time, each on a thread of its own."""

        def converse(prompt: Prompt, stop: threading.Event) -> Iterator[Answer]:
            while (job := next_job(tokenizer, prompt, have)) and fitting([job], self.room, notes):
                answer = self._answer(job, plan, stop)
                have[answer.key] = replace(answer, rounds=())
                yield answer

        return together(prompts, converse, plan.rows)

    def draft_everywhere(
        self,
        answers: Sequence[Answer],
        shapes: Sequence[DraftShape],
        sampling: SamplingParams,
        rows: int,
        have: Callable[[Answer], Found],
    ) -> Iterator[tuple[Answer, Found]]:
        """See forced.draft_everywhere: the server is told the text by Extend and asked for drafts on the way."""

        def work(answer: Answer, stop: threading.Event) -> Iterator[tuple[Answer, Found]]:
            known = have(answer)
            found: Found = {shape: dict(known.get(shape, {})) for shape in shapes}
            self._draft_along(answer, replace(sampling, seed=answer.seed), found, stop)
            yield answer, found

        return together(answers, work, rows)

    def theory(
        self, prompts: Sequence[Sequence[int]], plan: Plan, depth: int, resamples: int, confidence: float
    ) -> Theory:
        raise ConfigError("--theory compares whole distributions, which a server does not give: run it in process.")

    # ---- one answer

    def _answer(self, job: Job, plan: Plan, stop: threading.Event) -> Answer:
        prompt = job.prompt
        sampling = replace(plan.sampling, seed=answer_seed(plan.sampling.seed, (prompt.set, prompt.id, job.turn)))
        limit = min(plan.tokens, self.room - len(job.tokens))
        drafting = plan.shape if plan.drafter is None else None
        with self._session(job.tokens, sampling, drafting, limit) as (name, created):
            assert created.next_token is not None
            talk = _Talk(self.steps, name, job, plan, limit, [created.next_token])
            end = talk.run(drafting, stop)
        return answer_of(job, sampling.seed, talk.written[: end.length], end.stopped, talk.rounds)

    def _draft_along(self, answer: Answer, sampling: SamplingParams, found: Found, stop: threading.Event) -> None:
        text, start = answer.whole, len(answer.prompt) + 1
        wanted = [base for base in range(start, answer.end) if any(base not in drafts for drafts in found.values())]
        if not wanted:
            return
        deepest = max(found, key=lambda shape: shape.depth)
        base = wanted[0]
        with self._session(text[:base], sampling, deepest, answer.end - base, prefill_only=True) as (name, _):
            for place in wanted:
                _check(stop)
                if place > base:
                    self.steps.extend(name, base, text[base:place])
                base = place
                for shape in (shape for shape, drafts in found.items() if base not in drafts):
                    found[shape][base] = _with_logprobs(self.steps.propose(name, base, wire_shape(shape)).draft)

    @contextmanager
    def _session(
        self,
        tokens: Sequence[int],
        sampling: SamplingParams,
        shape: DraftShape | None,
        limit: int,
        prefill_only: bool = False,
    ) -> Iterator[tuple[str, Created]]:
        """A session of `limit` more tokens, freed at the end."""
        name = str(uuid.uuid4())
        created = self._created(name, tokens, sampling, shape, limit, prefill_only)
        try:
            yield name, created
        finally:
            with suppress(SpeculatorError):  # it expires by itself
                self.steps.delete(name)

    def _created(
        self,
        name: str,
        tokens: Sequence[int],
        sampling: SamplingParams,
        shape: DraftShape | None,
        limit: int,
        prefill_only: bool,
    ) -> Created:
        """Waits while other callers fill the server."""
        late = time.monotonic() + self.steps.patience
        beyond = SLACK + (shape.depth if shape else 0)
        while True:
            try:
                return self.steps.create(
                    tokens,
                    session_id=name,
                    sampling=wire_sampling(sampling),
                    stopping=Stopping(limit + beyond, ignore_eos=prefill_only),
                    shape=wire_shape(shape) or Shape(),
                    speculate=shape is not None,
                    prefill_only=prefill_only,
                )
            except ServerFullError as error:
                if time.monotonic() + error.retry_after > late:
                    raise
                time.sleep(error.retry_after)


class _Talk:
    """One answer on its way: the committed tokens, the rounds, and the clock between them."""

    def __init__(self, steps: Steps, name: str, job: Job, plan: Plan, limit: int, written: list[int]) -> None:
        self.steps, self.name, self.job, self.plan, self.limit = steps, name, job, plan, limit
        self.written, self.rounds = written, list[Round]()
        self._start = self._last = time.perf_counter()

    @property
    def base(self) -> int:
        return len(self.job.tokens) + len(self.written)

    def run(self, drafting: DraftShape | None, stop: threading.Event) -> End:
        """Rounds until the answer ends."""
        shape, draft = wire_shape(drafting), Draft()
        end = self._end()
        if shape is not None and end is None:
            draft = _with_logprobs(self.steps.propose(self.name, self.base, shape).draft)
        while end is None:
            _check(stop)
            draft = self.plan.drafter([*self.job.tokens, *self.written]) if self.plan.drafter else draft
            found, end = self._round(draft, shape)
            draft = _with_logprobs(found.next_draft.draft) if found.next_draft else Draft()
        return end

    def _round(self, draft: Draft, shape: Shape | None) -> tuple[Verified, End | None]:
        base, asked = self.base, time.perf_counter()
        found = self.steps.verify(self.name, base, draft, shape)
        heard = time.perf_counter()
        self.written += found.tokens
        end = self._end()
        committed = time.perf_counter()
        if self.plan.record:
            self.rounds.append(self._note(base, draft, found, (asked, heard, committed)))
        self._last = committed
        self._checked(found, end)
        return found, end

    def _note(self, base: int, draft: Draft, found: Verified, clock: tuple[float, float, float]) -> Round:
        asked, heard, committed = clock
        spent = found.timing
        here, there = asked - self._last, max(0.0, spent.total - spent.draft - spent.verify)
        return Round(
            base, draft.tokens, draft.parents, draft.logprobs, found.accepted, found.tokens, found.logprobs,
            spent.verify, spent.draft, here + there, spent.batch, spent.batch == 1,
            committed - heard, max(0.0, heard - asked - spent.total), committed - self._start,
        )  # fmt: skip

    def _end(self) -> End | None:
        return end_of(self.written, self.limit, self.plan.ends)

    def _checked(self, found: Verified, end: End | None) -> None:
        asked = self.plan.sampling.rule
        if found.rule is not asked:
            told = found.rule.value if found.rule else "another rule"
            raise ConfigError(f"The server verified by {told} where {asked.value} was asked for.")
        if end is None and found.finish is not FinishReason.RUNNING:
            raise ConfigError(
                f"The server ended an answer after {len(self.written)} tokens ({found.finish.value}): its limits or "
                "its end tokens are not those that it told."
            )


# ---- words of the wire


def wire_sampling(params: SamplingParams) -> Sampling:
    return Sampling(
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.seed,
        params.rule,
    )


def wire_shape(shape: DraftShape | None) -> Shape | None:
    """The same shape, said in full: nothing of it is left to the server's default."""
    if shape is None:
        return None
    if shape.parents:
        return Shape(depth=shape.depth, parents=shape.parents)
    if shape.is_chain:
        return Shape(depth=shape.depth, branching=1)
    return Shape(shape.depth, shape.nodes, shape.branching)


def _with_logprobs(draft: Draft) -> Draft:
    if len(draft.logprobs) != len(draft.tokens):
        raise ConfigError("The server gives no log-probabilities of its drafts, so its rounds cannot be recorded.")
    return draft


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise StepCancelledError("the run was ended")
