"""A tiny exact engine for tests of the service: it computes little and asserts much.

Owns: a deterministic language model over token hashes, paged storage like the real one's, and every clause of the
step contract as an assertion. Must never import torch.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from speculator.errors import NumericalError
from speculator.types import (
    Draft,
    DraftShape,
    EngineInfo,
    Feed,
    SamplingParams,
    Step,
    StepResult,
    StepTimes,
)

EOS = 0
INFO = EngineInfo(
    target_model="fake-target",
    draft_model="fake-head",
    draft_method="eagle3",
    vocab_size=101,
    eos_token_ids=(EOS,),
    max_context=256,
    max_rows=8,
    page_size=4,
    total_pages=700,
    scratch_tokens=70,
    prefill_chunk=16,
    default_shape=DraftShape(4),
)


def info(**changes: object) -> EngineInfo:
    return replace(INFO, **changes)  # type: ignore[arg-type]


def draw(*parts: object) -> int:
    """A number that depends on `parts` alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def next_token(prefix: Sequence[int], sampling: SamplingParams, vocab: int = INFO.vocab_size) -> int:
    """What the fake target says after `prefix`; never EOS. Depends on the seed only when it samples."""
    seed = sampling.seed if sampling.temperature else None
    return 1 + draw(tuple(prefix), seed) % (vocab - 1)


def plain(prompt: Sequence[int], count: int, sampling: SamplingParams | None = None) -> list[int]:
    """`count` tokens of plain decoding."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, sampling or SamplingParams()))
    return tokens[len(prompt) :]


@dataclass
class Row:
    """What the device holds of one row."""

    sampling: SamplingParams
    speculate: bool
    cached: int = 0
    pending: int | None = None  # last committed token, not in the cache yet
    drafts: dict[int, Draft] = field(default_factory=dict)
    pages: set[int] = field(default_factory=set)


class FakeEngine:
    """Exact target, lucky head: a drafted token of depth d is right with chance `hits[d - 1]`, decided by a hash.

    Failpoints: `raise_next` is thrown by the next step; rows in `bad_rows` (or with a seed in `bad_seeds`) give NaN;
    `gate` holds every step until it is set; `delay` sleeps in each.
    """

    def __init__(self, about: EngineInfo = INFO, hits: Sequence[float] = (0.8, 0.7, 0.6, 0.5)) -> None:
        self.info = about
        self.times = StepTimes()
        self.hits = hits
        self.eos_after: set[int] = set()  # lengths after which the target says EOS
        self.raise_next: list[Exception] = []
        self.bad_rows: set[int] = set()
        self.bad_seeds: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.delay = 0.0
        self.steps: list[list[Step]] = []
        self.rows: dict[int, Row] = {}
        self._kv: dict[tuple[int, int], int] = {}
        self._page_owner: dict[int, int] = {}
        self._serial = 0
        self._threads: set[int] = set()

    # ---- the contract ----

    def open(self, row: int, sampling: SamplingParams, speculate: bool) -> None:
        assert 0 <= row < self.info.max_rows
        pages = self.rows[row].pages if row in self.rows else set()
        self.rows[row] = Row(sampling, speculate, pages=pages)

    def close(self, row: int) -> None:
        for page in self.rows.pop(row).pages:
            del self._page_owner[page]

    def launch(self, steps: Sequence[Step]) -> None:
        return None

    def passes_run(self) -> dict[str, tuple[int, int]]:
        return {}

    def step(self, steps: Sequence[Step]) -> list[StepResult]:
        self._threads.add(threading.get_ident())
        assert len(self._threads) == 1, "two threads on the device"
        assert steps and len({step.row for step in steps}) == len(steps), "a row twice in one step"
        self.entered.set()
        self.gate.wait()
        time.sleep(self.delay)
        for step in steps:
            self._check(step)
        self._fail(steps)
        self.steps.append(list(steps))
        self.times = StepTimes(0.001, 0.002, 0.003)
        return [self._run(step) for step in steps]

    def _fail(self, steps: Sequence[Step]) -> None:
        if self.raise_next:
            raise self.raise_next.pop()
        for step in steps:
            if step.row in self.bad_rows or self.rows[step.row].sampling.seed in self.bad_seeds:
                raise NumericalError("the target's logits are not finite")

    def _check(self, step: Step) -> None:
        row, about = self.rows[step.row], self.info
        assert step.cached == row.cached, f"cached is {step.cached}, the row holds {row.cached}"
        assert not (step.feed and step.draft), "feed and verify in one step"
        fed = len(step.feed.tokens) if step.feed else 0
        need = step.cached + max(fed, about.scratch_tokens)
        assert len(step.pages) * about.page_size >= need, "the page table does not cover what the step writes"
        assert len(set(step.pages)) == len(step.pages), "a page twice in one table"
        assert all(0 < page < about.total_pages for page in step.pages), "the null page, or one that is not there"
        for page in step.pages:
            assert self._page_owner.setdefault(page, step.row) == step.row, "a page of another session"
            row.pages.add(page)
        if step.feed:
            self._check_feed(step.feed, row)
        elif step.draft is not None:
            self._check_draft(step, row)
        if step.propose is not None:
            self._check_shape(step.propose, row)

    def _check_feed(self, feed: Feed, row: Row) -> None:
        assert 0 < len(feed.tokens) <= self.info.prefill_chunk
        assert row.pending is None or feed.tokens[0] == row.pending, "the feed does not begin at the pending token"

    def _check_draft(self, step: Step, row: Row) -> None:
        draft = step.draft
        assert draft is not None
        assert step.root == row.pending, "the root is not the last committed token"
        assert len(draft.tokens) == len(draft.parents) <= self.info.max_nodes
        assert all(-1 <= parent < i for i, parent in enumerate(draft.parents))
        if draft.draft_id:
            assert row.drafts.get(draft.draft_id) == draft, "a draft the engine does not keep"

    def _check_shape(self, shape: DraftShape, row: Row) -> None:
        assert row.speculate, "a draft asked of a row without speculation"
        assert shape.depth <= self.info.max_depth
        assert max(shape.nodes, len(shape.parents)) <= self.info.max_nodes
        assert shape.branching <= self.info.max_branching
        assert row.cached + shape.depth < self.info.max_context + self.info.max_depth

    # ---- the work ----

    def _run(self, step: Step) -> StepResult:
        row = self.rows[step.row]
        result = StepResult()
        if step.feed is not None:
            result = self._feed(step, step.feed, row)
        elif step.draft is not None:
            result = self._verify(step, step.draft, row)
        if step.propose is None:
            return result
        prefix = [*self._text(step.pages, row.cached), row.pending or 0]
        return result._replace(draft=self._propose(prefix, step.propose, row))

    def _feed(self, step: Step, feed: Feed, row: Row) -> StepResult:
        self._write(step.pages, row.cached, feed.tokens)
        row.cached += len(feed.tokens)
        row.pending = feed.following
        if feed.following is not None:
            return StepResult()
        row.pending = self._target(self._text(step.pages, row.cached), row)
        return StepResult((row.pending,), (-0.5,))

    def _verify(self, step: Step, draft: Draft, row: Row) -> StepResult:
        prefix = [*self._text(step.pages, row.cached), step.root]
        path: list[int] = []
        here = -1
        while True:
            want = self._target([*prefix, *(draft.tokens[i] for i in path)], row)
            children = [i for i, parent in enumerate(draft.parents) if parent == here and draft.tokens[i] == want]
            if not children:
                break
            here = children[0]
            path.append(here)
        tokens = tuple(draft.tokens[i] for i in path)
        self._write(step.pages, row.cached, (step.root, *tokens))
        row.cached += 1 + len(path)
        row.pending = want
        return StepResult((*tokens, want), (-0.5,) * (len(path) + 1), tuple(path))

    def _target(self, prefix: Sequence[int], row: Row) -> int:
        return EOS if len(prefix) in self.eos_after else next_token(prefix, row.sampling, self.info.vocab_size)

    def _propose(self, prefix: list[int], shape: DraftShape, row: Row) -> Draft:
        self._serial += 1
        parents = shape.parents or _parents(shape)
        tokens: list[int] = []
        for i, parent in enumerate(parents):
            path = self._path(tokens, parents, parent)
            rank = sum(1 for other in parents[:i] if other == parent)
            tokens.append(self._guess([*prefix, *path], len(path), rank, row))
        logprobs = (-0.25,) * len(tokens)
        row.drafts = {self._serial: Draft(tuple(tokens), tuple(parents), logprobs, draft_id=self._serial)}
        return row.drafts[self._serial]

    def _guess(self, prefix: list[int], depth: int, rank: int, row: Row) -> int:
        right = self._target(prefix, row)
        chance = self.hits[min(depth, len(self.hits) - 1)]
        hit = draw("hit", tuple(prefix)) % 1000 < chance * 1000
        return right if hit and rank == 0 else 1 + (right + rank) % (self.info.vocab_size - 1)

    def _path(self, tokens: list[int], parents: Sequence[int], node: int) -> list[int]:
        path: list[int] = []
        while node >= 0:
            path.insert(0, tokens[node])
            node = parents[node]
        return path

    def _text(self, pages: Sequence[int], count: int) -> list[int]:
        size = self.info.page_size
        return [self._kv[pages[t // size], t % size] for t in range(count)]

    def _write(self, pages: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        size = self.info.page_size
        for t, token in enumerate(tokens, start):
            self._kv[pages[t // size], t % size] = token


def _parents(shape: DraftShape) -> tuple[int, ...]:
    """A chain, or a tree whose first nodes of each level have `branching` children, cut to `nodes`."""
    if shape.is_chain:
        return tuple(range(-1, shape.depth - 1))
    parents, first = [], -1
    for _ in range(shape.depth):
        parents += [first] * shape.branching
        first = len(parents) - shape.branching
    return tuple(parents[: shape.nodes])


class FakeTokenizer:
    """Bytes as tokens, 1 to 100 for bytes below 100 and two tokens for others, so that UTF-8 can be cut."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for byte in text.encode():
            ids += [byte + 1] if byte < 99 else [100, byte - 98] if byte < 198 else [100, 100, byte - 197]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        data, offset = bytearray(), 0
        for token in ids:
            if token == 100:
                offset += 99
            elif token:
                data.append(min(255, token - 1 + offset))
                offset = 0
        return data.decode(errors="replace")


Clock = Callable[[], float]
