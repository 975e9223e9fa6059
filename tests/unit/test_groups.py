"""Steps of several groups of sessions under way at once, as an engine of stages has them."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from speculator.engine import Engine
from speculator.errors import DeadlineExceededError, NumericalError, SpeculatorError
from speculator.types import DraftShape, Step, StepResult
from tests.fakes import info
from tests.unit.test_run_ahead import Hand, Story, plain
from tests.unit.test_scheduler import NAMES, AnyOrder, Bench

CHAIN, TREE = DraftShape(3), DraftShape(3, 6, 2)


class Stages:
    """An engine whose launched steps wait for their results, as if they were on their way through `size` stages.

    Results come in the order of launches; a step of a row that is under way, or one more than there are stages, fails
    the test. Of steps of several rows each `bad`-th launch comes to an error.
    """

    def __init__(self, engine: Engine, size: int, bad: int = 0) -> None:
        self._engine, self._size, self._bad = engine, size, bad
        self.info = replace(engine.info, pipeline_parallel=size)
        self.times, self.passes_run = engine.times, engine.passes_run
        self._flights: deque[_Flight] = deque()
        self.failed, self.shares = 0, list[int]()

    @property
    def rows(self) -> set[int]:
        return {row for flight in self._flights for row in flight.rows}

    def open(self, row: int, *what: Any) -> None:
        assert row not in self.rows
        self._engine.open(row, *what)

    def close(self, row: int) -> None:
        assert row not in self.rows
        self._engine.close(row)

    def step(self, steps: Sequence[Step]) -> list[StepResult]:
        assert not self.rows & {step.row for step in steps}
        return self._engine.step(steps)

    def launch(self, steps: Sequence[Step]) -> Any:
        rows = {step.row for step in steps}
        assert len(self._flights) < self._size and not rows & self.rows and not steps[0].ahead
        self.shares.append(len(rows))
        fails = self._bad and len(rows) > 1 and len(self.shares) % self._bad == 0
        self.failed += bool(fails)
        found = NumericalError("as the test wants it") if fails else self._engine.step(steps)
        self._flights.append(_Flight(self._flights, rows, found))
        return self._flights[-1]


class _Flight:
    def __init__(self, flights: deque[_Flight], rows: set[int], found: Any) -> None:
        self._flights, self.rows, self._found = flights, rows, found

    def collect(self) -> list[StepResult]:
        assert self._flights.popleft() is self, "results were asked for out of order"
        if isinstance(self._found, SpeculatorError):
            raise self._found
        return self._found  # type: ignore[no-any-return]


def staged(shape: DraftShape, size: int, bad: int = 0) -> tuple[Hand, Stages]:
    stages = Stages(plain("eagle3", shape), size, bad)
    return Hand(stages), stages  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "size"), [(CHAIN, 2), (TREE, 2), (CHAIN, 3)])
def test_every_message_is_that_of_an_engine_without_stages(shape: DraftShape, size: int) -> None:
    story = Story(size)
    expected = story.tell(Hand(plain("eagle3", shape)))
    hand, stages = staged(shape, size)
    story.tell(hand)
    assert hand.heard == expected.heard and not hand.errors
    assert hand.scheduler.acceptance() == expected.scheduler.acceptance()
    assert hand.engine.most == size and hand.at_rest()


def test_sessions_are_shared_out_evenly() -> None:
    hand, stages = staged(CHAIN, 2)
    for number in range(5):
        hand.generate(f"s{number}", [1 + number, 2], 30)
    hand.finish()
    assert stages.shares[2:12] == [3, 2] * 5


def test_a_session_alone_has_one_step_under_way() -> None:
    hand, stages = staged(CHAIN, 2)
    hand.generate("alone", [1, 2, 3], 20)
    hand.finish()
    assert hand.engine.most == 1 and set(stages.shares) == {1}


def test_a_group_that_fails_is_run_again_and_the_other_one_goes_on() -> None:
    story = Story(4)
    expected = story.tell(Hand(plain("eagle3", CHAIN)))
    hand, stages = staged(CHAIN, 2, bad=5)
    story.tell(hand)
    assert hand.heard == expected.heard and not hand.errors and stages.failed > 5


@pytest.mark.parametrize("seed", range(3))
def test_cancels_at_any_moment_lose_and_double_nothing(seed: int) -> None:
    story = Story(seed)
    whole = story.tell(Hand(plain("eagle3", CHAIN)))
    hand, _ = staged(CHAIN, 2)
    story.tell(hand, random.Random(seed))
    assert hand.at_rest()
    for name, messages in hand.heard.items():
        assert messages == whole.heard[name][: len(messages)]


def test_the_end_of_the_worker_leaves_no_step_behind() -> None:
    hand, _ = staged(CHAIN, 2)
    for number in range(4):
        hand.generate(f"s{number}", [1 + number, 2], 50)
    for _ in range(6):
        hand.turn()
    hand.worker._end()
    hand.worker._main()
    assert not hand.worker._flights and hand.engine.flying == 0


def test_a_deadline_ends_a_session_and_leaves_the_other_group_alone() -> None:
    expected = Hand(plain("eagle3", CHAIN))
    hand, _ = staged(CHAIN, 2)
    for one in (expected, hand):
        one.generate("a", [1, 2], 40, ignore_eos=True).deadline = 5.0 if one is hand else 1e9
        one.generate("b", [3, 4], 40, ignore_eos=True)
    expected.finish()
    while len(hand.heard["a"]) < 3:
        hand.turn()
    hand.now = 6.0
    hand.finish()
    assert isinstance(hand.errors.pop("a"), DeadlineExceededError) and not hand.errors
    assert hand.heard["a"] == expected.heard["a"][: len(hand.heard["a"])]
    assert hand.heard["b"] == expected.heard["b"] and hand.at_rest()


class StageBench(Bench):
    """A scheduler over two stages: each step completes while another one is under way."""

    def __init__(self) -> None:
        super().__init__(info(max_rows=4, total_pages=160, prefill_chunk=8, pipeline_parallel=2))
        self.flights: deque[Any] = deque()

    def step(self) -> int:
        steps = self.scheduler.next_steps()
        if steps:
            self.flights.append(self._launched(steps))
        if len(self.flights) == 2 or not steps:
            self.land()
        self._collect()
        self.scheduler.check()
        return len(steps)

    def _launched(self, steps: Sequence[Step]) -> Any:
        try:
            return self.engine.step(steps)
        except SpeculatorError as error:
            return error

    def land(self) -> None:
        if not self.flights:
            return
        found = self.flights.popleft()
        if isinstance(found, SpeculatorError):
            found = [StepResult() if step is None else self._run([step])[0] for step in self.scheduler.under_way]
        self.scheduler.complete(found, self.engine.times)
        self.scheduler.settle()
        self._collect()


class AnyOrderOverStages(AnyOrder):
    """The same with two steps under way, and deadlines that pass at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = StageBench()

    def _land_all(self) -> None:
        """What ends sessions waits for the steps under way, as the worker has it."""
        while self.bench.flights:
            self.bench.land()
        for name in list(self.waiting):
            self._hear(name)

    @rule(name=NAMES)
    def cancel(self, name: str) -> None:
        self._land_all()
        super().cancel(name)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        self._land_all()
        super().delete(name)

    @rule(name=NAMES, swept=st.booleans())
    def too_late(self, name: str, swept: bool) -> None:
        if name in self.waiting:
            self.waiting[name].deadline = self.bench.now - 1
            if swept:
                self.bench.scheduler.sweep()
                self.bench._collect()
            else:
                self.bench.engine.bad_rows = set()
                self.bench.step()
            self._land_all()


AnyOrderOverStages.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrderOverStages = AnyOrderOverStages.TestCase
