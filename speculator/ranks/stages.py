"""Engines of a pipeline: each stage runs its layers of a step, the last one decides and drafts, and tells the rest.

Owns: in which order a stage computes, hands on and hears, also while steps of other sessions are under way.
Must never know how tensors travel, processes or the service. Rank 0 is on the first stage.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speculator.engine import Engine
from speculator.errors import EngineFailedError, SpeculatorError
from speculator.ranks.engine import LeadEngine
from speculator.ranks.link import Link
from speculator.ranks.outcome import Layout, failed
from speculator.round_parts import move_path
from speculator.tree import pack
from speculator.types import Step, StepResult, StepTimes
from speculator.under_way import UnderWay, device_failures
from target.batch import Batch


class Move(NamedTuple):
    """Drafted trees whose accepted paths are yet to be known: steps `picked` [R], paths of `depth` nodes."""

    batch: Batch
    picked: Tensor
    depth: int


class StageEngine(Engine, ABC):
    """What all stages share: a step is launched, and what it came to is one outcome, by the order of launches.

    Steps may be under way together if they are of different rows; how many is the caller's choice.
    """

    def __init__(self, link: Link, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.link, self.layout = link, Layout(self.info.max_depth + 1, self.info.max_nodes)

    @property
    def launches(self) -> bool:
        return True

    def step(self, steps: Sequence[Step]) -> list[StepResult]:
        flight = StageEngine.launch(self, steps)
        if flight is None:
            raise EngineFailedError("a step ahead of one that is under way cannot run on stages")
        return flight.collect()

    @torch.inference_mode()
    def launch(self, steps: Sequence[Step]) -> UnderWay | None:
        """Start a step; None, and nothing begun, for steps that go on where others under way will end."""
        if any(step.ahead for step in steps):
            return None
        begun = time.perf_counter()
        with device_failures():
            return self._begin(StageFlight(self, len(steps), begun), steps)

    @abstractmethod
    def _begin(self, flight: StageFlight, steps: Sequence[Step]) -> StageFlight:
        """Queue the stage's part of a step."""

    @abstractmethod
    def outcome_of(self, flight: StageFlight) -> Tensor:
        """Wait for what a step came to."""

    def finish(self) -> None:
        self.link.finish()

    def forget(self) -> None:
        """Nobody will ask for steps that are under way: they were for timing."""
        return None


class StageFlight(UnderWay):
    """A launched step of one stage."""

    def __init__(self, engine: StageEngine, sessions: int, begun: float) -> None:
        self._stage, self.sessions, self._begun = engine, sessions, begun
        self.outcome: Tensor | None = None
        self.moves: list[Move] = []
        self.queued = begun

    @torch.inference_mode()
    def collect(self) -> list[StepResult]:
        """Wait for the results, and for those of the steps launched before; raises as `Engine.step`."""
        with device_failures(), self._stage.waiting():
            results = self._stage.layout.results(self._stage.outcome_of(self))
        self._stage.times = StepTimes(0.0, self.queued - self._begun, time.perf_counter() - self.queued)
        return results


class EarlyStage(StageEngine):
    """A stage that hands on: its caches follow what the last one decides."""

    def __init__(self, link: Link, *arguments: Any, **named: Any) -> None:
        super().__init__(link, *arguments, **named)
        self._flights: deque[StageFlight] = deque()

    def _begin(self, flight: StageFlight, steps: Sequence[Step]) -> StageFlight:
        rest = self._by_passes(steps, None)
        if feeds := [i for i in rest if steps[i].feed]:
            self._feed_on([steps[i] for i in feeds])
        if rounds := [i for i in rest if steps[i].draft is not None]:
            flight.moves = self._verify_on(steps, rounds)
        flight.queued = time.perf_counter()
        self._flights.append(flight)
        return flight

    @torch.inference_mode()
    def finish(self) -> None:
        while self._flights:
            self._hear(self._flights.popleft())
        super().finish()

    def forget(self) -> None:
        self._flights.clear()

    def _feed_on(self, chosen: Sequence[Step]) -> None:
        feeds = [s.feed for s in chosen if s.feed]
        rows, counts = self._ints([s.row for s in chosen]), self._ints([len(feed.tokens) for feed in feeds])
        self.passes.feed(self._feed_batch(chosen, feeds, rows, counts))

    def _verify_on(self, steps: Sequence[Step], picked: Sequence[int]) -> list[Move]:
        chosen = [steps[i] for i in picked]
        tree = pack([s.draft for s in chosen], [s.root for s in chosen], self.device)
        batch = self._verify_batch(chosen, tree, self.rows.cached[self._ints([s.row for s in chosen])])
        self.passes.verify(batch)
        return [] if batch.ancestors is None else [Move(batch, self._ints(picked), tree.max_depth + 1)]

    def outcome_of(self, flight: StageFlight) -> Tensor:
        while flight.outcome is None:
            self._hear(self._flights.popleft())
        return flight.outcome

    def _hear(self, flight: StageFlight) -> None:
        """The oldest step under way is decided: keep the accepted paths."""
        flight.outcome = self.link.answered(self.layout.shape(flight.sessions))
        for move in flight.moves:
            move_path(self.cache, move.batch, *self.layout.verdict(flight.outcome, move.picked, move.depth))


class LastStage(StageEngine):
    """The stage with the draft head: it verifies, samples, drafts, and tells the others."""

    def _begin(self, flight: StageFlight, steps: Sequence[Step]) -> StageFlight:
        outcome = self.layout.empty(len(steps), self.device)
        try:
            self._fill(outcome, steps)
        except SpeculatorError as error:  # all hidden states of the step have come by then
            failed(outcome, error)
        self.link.answer(outcome)
        flight.outcome, flight.queued = outcome, time.perf_counter()
        return flight

    def _fill(self, outcome: Tensor, steps: Sequence[Step]) -> None:
        decided = self._decide(steps, self._by_passes(steps, None))
        for part in decided.committed:
            self.layout.commit(outcome, self._ints(part.steps), part)
        for drafted in decided.drafted:
            self.layout.offer(outcome, self._ints(drafted.steps), drafted, self._ints(drafted.ids))

    def outcome_of(self, flight: StageFlight) -> Tensor:
        assert flight.outcome is not None
        return flight.outcome


class LeadStage(LeadEngine, EarlyStage):
    """The first stage on rank 0, which tells the other ranks of every step."""

    def end(self) -> None:
        if not self._ended:
            with self._alone():
                self.finish()
        super().end()
