"""One sequence through an engine in this process: no scheduler, no server.

Owns: the simplest correct loop over `Engine.step`, for benches, probes and scripts. Must never be used beside a worker
on the same engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speculator.engine import Engine
from speculator.types import Draft, DraftShape, EngineInfo, Feed, SamplingParams, Step, StepResult


class LocalSequence:
    """A sequence on row `row` with its own run of pages; `shape` None is plain decoding."""

    def __init__(self, engine: Engine, row: int, sampling: SamplingParams, shape: DraftShape | None) -> None:
        self.engine, self.row, self.shape = engine, row, shape
        self.pages = _own_pages(engine.info, row)
        self.tokens: list[int] = []
        self.cached = 0
        self.draft: Draft | None = None
        engine.open(row, sampling, shape is not None)

    def feed(self) -> Step:
        """The next chunk of the prompt."""
        chunk = self.tokens[self.cached : self.cached + self.engine.info.prefill_chunk]
        end = self.cached + len(chunk)
        following = self.tokens[end] if end < len(self.tokens) else None
        return self._step(feed=Feed(chunk, following), propose=self.shape if following is None else None)

    def round(self) -> Step:
        """Verify the last draft (nothing, when plain) and draft again."""
        return self._step(root=self.tokens[-1], draft=self.draft or Draft(), propose=self.shape)

    def take(self, step: Step, result: StepResult) -> tuple[int, ...]:
        """Commit a result; returns the new tokens."""
        self.cached += len(step.feed.tokens) if step.feed else len(result.tokens)
        self.tokens += result.tokens
        self.draft = result.draft
        return result.tokens

    def _step(
        self, feed: Feed | None = None, root: int = 0, draft: Draft | None = None, propose: DraftShape | None = None
    ) -> Step:
        return Step(self.row, self.cached, self.pages, feed, root, draft, propose)


def generate(
    engine: Engine,
    prompt: Sequence[int],
    limit: int,
    sampling: SamplingParams | None = None,
    shape: DraftShape | None = None,
    stop: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, ...]]:
    """Yield what each step commits, up to `limit` tokens or the first one of `stop`, which is yielded too."""
    sequence = LocalSequence(engine, 0, sampling or SamplingParams(), shape)
    sequence.tokens = list(prompt)
    done = 0
    while done < limit:
        step = sequence.feed() if sequence.cached < len(sequence.tokens) - 1 or not done else sequence.round()
        tokens = _cut(sequence.take(step, engine.step([step])[0]), limit - done, stop)
        done += len(tokens)
        if tokens:
            yield tokens
        if tokens and tokens[-1] in stop:
            break
    engine.close(0)


def _cut(tokens: tuple[int, ...], limit: int, stop: frozenset[int]) -> tuple[int, ...]:
    ends = [i + 1 for i, token in enumerate(tokens) if token in stop]
    return tokens[: min([limit, *ends])]


def _own_pages(info: EngineInfo, row: int) -> list[int]:
    """An equal share of the pool for each row."""
    share = (info.total_pages - 1) // info.max_rows
    return list(range(1 + row * share, 1 + (row + 1) * share))
