"""Plays prompts through an engine in this process and records every round.

Owns: the loop that keeps a batch of answers going, and the clock of a step. Must never compute a figure. A prompt with
several turns asks each one after the model's own answer to the last.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from speculator.bench.prompts import Prompt
from speculator.bench.recording import Answer, Round
from speculator.engine import Engine
from speculator.local import LocalSequence
from speculator.types import Draft, DraftShape, EngineInfo, SamplingParams, Step, StepResult

Drafter = Callable[[Sequence[int]], Draft]
Key = tuple[str, str, int]


class ChatTokenizer(Protocol):
    """What the loop asks of a tokenizer."""

    @property
    def has_chat(self) -> bool: ...

    def encode_chat(self, messages: str | Sequence[dict[str, str]]) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """How to play. `drafter` makes the drafts in place of the head; `shape` None is plain decoding.

    Without `record` the answers have no rounds: only there to see what writing them down costs.
    """

    sampling: SamplingParams
    shape: DraftShape | None
    tokens: int  # at most so many in an answer
    rows: int  # answers at a time
    ends: frozenset[int] = frozenset()
    drafter: Drafter | None = None
    record: bool = True


class Job(NamedTuple):
    """One turn that can be asked now."""

    prompt: Prompt
    turn: int  # from 1
    tokens: list[int]


class End(NamedTuple):
    """Where an answer is over."""

    length: int
    stopped: bool  # by an end mark, not by the limit


def end_of(written: Sequence[int], limit: int, ends: frozenset[int]) -> End | None:
    """The end of an answer of at most `limit` tokens; None while it goes on."""
    stop = next((i + 1 for i, token in enumerate(written[:limit]) if token in ends), None)
    if stop or len(written) >= limit:
        return End(stop or limit, stop is not None)
    return None


@dataclass
class _Live:
    job: Job
    sequence: LocalSequence
    seed: int
    limit: int
    rounds: list[Round] = field(default_factory=list)

    @property
    def written(self) -> list[int]:
        return self.sequence.tokens[len(self.job.tokens) :]

    def next(self, drafter: Drafter | None) -> Step:
        s = self.sequence
        if s.cached < len(s.tokens) - 1 or not self.written:
            return s.feed()
        if drafter:
            s.draft = drafter(s.tokens)
        return s.round()

    def end(self, ends: frozenset[int]) -> End | None:
        return end_of(self.written, self.limit, ends)


def play(
    engine: Engine,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    plan: Plan,
    have: dict[Key, Answer],
    notes: list[str] | None = None,
) -> Iterator[Answer]:
    """Answers as they end; turns that are in `have` are not asked again, and `notes` names those that are too long."""
    room = room_of(engine.info)
    waiting = fitting(_open_jobs(tokenizer, prompts, have), room, notes)
    live: list[_Live] = []
    free = list(range(plan.rows))
    clock = Clock()
    while waiting or live:
        while waiting and free:
            live.append(_begin(engine, waiting.pop(0), free.pop(), plan, room))
        steps = [one.next(plan.drafter) for one in live]
        results = engine.step(steps)
        clock.tick(engine, steps)
        for one, step, result in zip(live, steps, results, strict=True):
            one.sequence.take(step, result)
        over = [one.end(plan.ends) for one in live]
        clock.committed()
        for one, step, result, end in zip(list(live), steps, results, over, strict=True):
            if plan.record and step.draft is not None:
                one.rounds.append(_round(one, step.draft, result, clock))
            if end is not None:
                live.remove(one)
                free.append(one.sequence.row)
                engine.close(one.sequence.row)
                answer = _answer(one, end)
                yield answer
                waiting = [*fitting(_following(tokenizer, one.job.prompt, answer, have), room, notes), *waiting]


def answer_seed(seed: int, key: Key) -> int:
    """The seed of one answer: other prompts must not share its noise."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Clock:
    """Seconds of the newest step, part by part; the parts follow each other, so that nothing is counted twice.

    `commit` is taking the results over, `host` everything since the step before that was neither that nor device work.
    """

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.verify = self.draft = self.host = self.commit = self.at = 0.0
        self.sessions, self.alone = 0, True

    def tick(self, engine: Engine, steps: Sequence[Step]) -> None:
        now = time.perf_counter()
        self.verify, self.draft = engine.times.verify, engine.times.draft
        self.host = now - self._last - sum(engine.times)
        self.sessions = sum(step.draft is not None for step in steps)
        self.alone = self.sessions == len(steps)
        self._last = now

    def committed(self) -> None:
        now = time.perf_counter()
        self.commit, self.at, self._last = now - self._last, now - self._start, now


def room_of(info: EngineInfo) -> int:
    """Tokens that a row can hold."""
    share = (info.total_pages - 1) // info.max_rows
    return min(info.max_context, share * info.page_size - info.scratch_tokens)


def fitting(jobs: Iterable[Job], room: int, notes: list[str] | None) -> list[Job]:
    """The jobs that leave room for an answer; `notes` names the others."""
    fit = []
    for job in jobs:
        if len(job.tokens) < room:
            fit.append(job)
        elif notes is not None:
            notes.append(f"{job.prompt.set} {job.prompt.id}, turn {job.turn} left out: {len(job.tokens)} tokens.")
    return fit


def _open_jobs(tokenizer: ChatTokenizer, prompts: Iterable[Prompt], have: dict[Key, Answer]) -> Iterator[Job]:
    """The first turn of each prompt that is not there yet."""
    for prompt in prompts:
        if job := next_job(tokenizer, prompt, have):
            yield job


def _following(tokenizer: ChatTokenizer, prompt: Prompt, answer: Answer, have: dict[Key, Answer]) -> Iterator[Job]:
    have[answer.key] = replace(answer, rounds=())
    if job := next_job(tokenizer, prompt, have):
        yield job


def next_job(tokenizer: ChatTokenizer, prompt: Prompt, have: dict[Key, Answer]) -> Job | None:
    """The first turn of a prompt that has no answer in `have`; None when all have one."""
    return _job(tokenizer, prompt, 1, [], have)


def _job(
    tokenizer: ChatTokenizer, prompt: Prompt, turn: int, said: list[dict[str, str]], have: dict[Key, Answer]
) -> Job | None:
    if turn > len(prompt.turns):
        return None
    said = [*said, {"role": "user", "content": prompt.turns[turn - 1]}]
    if (answer := have.get((prompt.set, prompt.id, turn))) is None:
        return Job(prompt, turn, tokenizer.encode_chat(_asked(tokenizer, said)))
    said.append({"role": "assistant", "content": tokenizer.decode(answer.tokens)})
    return _job(tokenizer, prompt, turn + 1, said, have)


def _asked(tokenizer: ChatTokenizer, said: list[dict[str, str]]) -> str | list[dict[str, str]]:
    """A conversation, or all of it as one text for a model that knows no roles."""
    return said if tokenizer.has_chat else "\n".join(message["content"] for message in said)


def _begin(engine: Engine, job: Job, row: int, plan: Plan, room: int) -> _Live:
    seed = answer_seed(plan.sampling.seed, (job.prompt.set, job.prompt.id, job.turn))
    drafting = plan.shape if plan.drafter is None else None
    sequence = LocalSequence(engine, row, replace(plan.sampling, seed=seed), drafting)
    sequence.tokens = list(job.tokens)
    return _Live(job, sequence, seed, min(plan.tokens, room - len(job.tokens)))


def _round(live: _Live, draft: Draft, result: StepResult, clock: Clock) -> Round:
    base = len(live.sequence.tokens) - len(result.tokens)
    return Round(
        base, draft.tokens, draft.parents, draft.logprobs, result.accepted, result.tokens, result.logprobs,
        clock.verify, clock.draft, clock.host, clock.sessions, clock.alone, clock.commit, 0.0, clock.at,
    )  # fmt: skip


def _answer(live: _Live, end: End) -> Answer:
    return answer_of(live.job, live.seed, live.written[: end.length], end.stopped, live.rounds)


def answer_of(job: Job, seed: int, tokens: Sequence[int], stopped: bool, rounds: Sequence[Round]) -> Answer:
    """What is written down of a job that is over."""
    return Answer(
        id=job.prompt.id,
        set=job.prompt.set,
        category=job.prompt.category,
        turn=job.turn,
        seed=seed,
        prompt=tuple(job.tokens),
        tokens=tuple(tokens),
        stopped=stopped,
        rounds=tuple(rounds),
        asked=job.prompt.fingerprint(job.turn),
    )
