"""Drafts at every position of texts that are known, by the engine itself.

Owns: feeding a known text and asking for drafts on the way. Must never verify or sample a token of the target. A draft
at a position is the one that a round there would have got: the head sees the same committed tokens and features, and a
coupled draft draws with the noise of its positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from speculator.bench.recording import Answer
from speculator.engine import Engine
from speculator.local import LocalSequence
from speculator.types import Draft, DraftShape, Feed, SamplingParams, Step

Found = dict[DraftShape, dict[int, Draft]]


def draft_everywhere(
    engine: Engine,
    answers: Sequence[Answer],
    shapes: Sequence[DraftShape],
    sampling: SamplingParams,
    rows: int,
    have: Callable[[Answer], Found] | None = None,
) -> Iterator[tuple[Answer, Found]]:
    """For each answer, drafts of every shape by the number of committed tokens before them; `rows` answers at a time.

    Positions whose drafts are all in `have` are fed but not drafted at. `sampling` must be greedy or coupled; every
    answer has its own seed.
    """
    ordered = sorted(answers, key=lambda a: len(a.prompt))  # prompts of a batch are padded to the longest
    for start in range(0, len(ordered), rows):
        group = [
            _Text(engine, row, answer, shapes, sampling, have(answer) if have else {})
            for row, answer in enumerate(ordered[start : start + rows])
        ]
        _run(engine, group, shapes)
        for text in group:
            engine.close(text.row)
            yield text.answer, text.found


def _run(engine: Engine, group: Sequence[_Text], shapes: Sequence[DraftShape]) -> None:
    while live := [text for text in group if text.advance()]:
        engine.step([text.feed() for text in live])
        drafting = [text for text in live if not text.reading]
        for shape in shapes if drafting else ():
            results = engine.step([text.step(propose=shape) for text in drafting])
            for text, result in zip(drafting, results, strict=True):
                text.found[shape][text.base] = result.draft or Draft()


class _Text:
    """One answer on a row; `base` is where the next draft is wanted."""

    def __init__(
        self,
        engine: Engine,
        row: int,
        answer: Answer,
        shapes: Sequence[DraftShape],
        params: SamplingParams,
        have: Found,
    ) -> None:
        self.row, self.answer, self.tokens = row, answer, answer.whole
        self.pages = LocalSequence(engine, row, replace(params, seed=answer.seed), shapes[0]).pages
        self.chunk = engine.info.prefill_chunk
        self.found: Found = {shape: dict(have.get(shape, {})) for shape in shapes}
        self.cached, self.base = 0, len(answer.prompt) + 1

    @property
    def reading(self) -> bool:
        """Whether tokens before `base` are still to be fed."""
        return self.cached < self.base - 1

    def feed(self) -> Step:
        """Feed up to the token before `base`, a chunk at a time."""
        end = min(self.base - 1, self.cached + self.chunk)
        feed = Feed(self.tokens[self.cached : end], self.tokens[end])
        step = self.step(feed)
        self.cached = end
        return step

    def advance(self) -> bool:
        """Go to the next position that lacks a draft; False when there is none."""
        while self.base < self.answer.end and all(self.base in drafts for drafts in self.found.values()):
            self.base += 1
        return self.base < self.answer.end

    def step(self, feed: Feed | None = None, propose: DraftShape | None = None) -> Step:
        return Step(self.row, self.cached, self.pages, feed, propose=propose)
