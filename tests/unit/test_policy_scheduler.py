"""The depth policy at work: what the scheduler lets it choose, and what it may never change.

Owns: whose shape wins, and that the tokens are those of plain decoding whatever was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from speculator.answers import Generated
from speculator.core import DrafterCore
from speculator.costs import Cost, CostTable
from speculator.drafts import KEEP, ShapeRequest
from speculator.metrics import ServiceMetrics
from speculator.policy import DepthPolicy, menu
from speculator.scheduler import Scheduler
from speculator.session import Job, Kind, SessionSpec
from speculator.types import Draft, DraftShape, FinishReason, Rule, SamplingParams, StoppingParams
from tests.fakes import INFO, FakeEngine, info, plain

DEPTH = INFO.default_shape.depth
TREE = DraftShape(3, 8, 2)
DRAFTS_ARE_FREE, DRAFTS_COST_ALL = 0.0, 5.0


def policy(price: float, shape: DraftShape = INFO.default_shape) -> DepthPolicy:
    """A policy that believes a drafted level to cost `price` plain rounds."""
    shapes = menu(shape, None)
    costs = tuple(Cost(s, rows, 64, 1.0 + price * s.depth) for s in shapes for rows in (1, 8))
    return DepthPolicy(shapes, CostTable(costs, {}))


class Served:
    """A scheduler under a policy, driven by hand."""

    def __init__(self, steering: DepthPolicy | None, hits: Sequence[float] = (0.8,), about=INFO) -> None:
        self.engine = FakeEngine(about, hits=hits)
        self.scheduler = Scheduler(about, self.engine, clock=lambda: 1.0)
        self.scheduler.steer(steering)
        self.texts: dict[str, list[int]] = {}

    def generate(self, count: int, tokens: int, **more) -> Served:
        for i in range(count):
            name = f"s{i}"
            spec = SessionSpec(name, "", tuple(range(1, 5 + i)), stopping=StoppingParams(tokens), **more)
            self.texts[name] = []
            self.scheduler.submit(Job(Kind.GENERATE, name, "", spec=spec))
        while self.step():
            pass
        return self

    def step(self) -> bool:
        steps = self.scheduler.next_steps()
        if steps:
            self.scheduler.complete(self.engine.step(steps), self.engine.times)
        for job, answer in self.scheduler.take_answers():
            assert isinstance(answer, Generated), answer
            self.texts[job.session_id] += answer.tokens
            if answer.finish is FinishReason.RUNNING:
                self.scheduler.credit(job, 1)
        self.scheduler.check()
        return bool(steps)

    @property
    def depths(self) -> list[int]:
        return [s.propose.depth for steps in self.engine.steps for s in steps if s.propose is not None]


def test_drafts_end_where_they_lose() -> None:
    served = Served(policy(DRAFTS_COST_ALL)).generate(4, 120)
    assert set(served.depths[20:]) <= {0, 1}  # one is a probe
    assert served.depths.count(0) > 0.9 * len(served.depths)


def test_drafts_stay_where_they_win() -> None:
    served = Served(policy(DRAFTS_ARE_FREE)).generate(2, 120)
    assert served.depths.count(DEPTH) > 0.8 * len(served.depths)


@pytest.mark.parametrize("price", [DRAFTS_ARE_FREE, 0.15, DRAFTS_COST_ALL])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_tokens_are_those_of_plain_decoding(price: float, temperature: float) -> None:
    sampling = SamplingParams(temperature, seed=7, rule=Rule.COUPLED)
    served = Served(policy(price), hits=(0.9, 0.6, 0.3)).generate(5, 90, sampling=sampling)
    for i, text in enumerate(served.texts.values()):
        assert text == plain(range(1, 5 + i), 90, sampling)


def test_tree_sizes_are_chosen_too() -> None:
    about = info(default_shape=TREE)
    served = Served(policy(DRAFTS_COST_ALL, TREE), about=about).generate(2, 100)
    assert served.depths.count(0) > 0.8 * len(served.depths)
    free = Served(policy(DRAFTS_ARE_FREE, TREE), about=about).generate(2, 100)
    assert {s.propose for steps in free.engine.steps for s in steps if s.propose and s.propose.depth == 3} >= {TREE}


@pytest.mark.parametrize("asked", [ShapeRequest(depth=3), ShapeRequest(depth=2, branching=2, nodes=4)])
def test_a_session_that_names_its_shape_gets_it(asked: ShapeRequest) -> None:
    served = Served(policy(DRAFTS_COST_ALL)).generate(3, 60, shape=asked)
    shapes = [s.propose for steps in served.engine.steps for s in steps if s.propose is not None]
    assert asked.over(INFO.default_shape) in shapes and all(shape.depth <= asked.depth for shape in shapes)
    assert shapes.count(asked.over(INFO.default_shape)) > 0.8 * len(shapes)
    assert not any(served.scheduler.policy.given.values())


def test_a_session_that_opted_out_drafts_nothing() -> None:
    served = Served(policy(DRAFTS_ARE_FREE)).generate(2, 40, speculate=False)
    assert served.depths == []


def test_a_step_that_names_its_shape_gets_it_and_one_that_does_not_asks_the_policy() -> None:
    served = Served(policy(DRAFTS_COST_ALL))
    scheduler = served.scheduler
    spec = SessionSpec("s", "", (1, 2, 3))
    job = Job(Kind.CREATE, "s", "", spec=spec)
    for turn in range(30):
        scheduler.submit(job)
        steps = scheduler.next_steps()
        scheduler.complete(served.engine.step(steps), served.engine.times)
        ((_, answer),) = scheduler.take_answers()
        base, draft = (answer.length, answer.next_draft.draft_id) if turn else (4, 0)
        shape = KEEP if turn % 2 else ShapeRequest(depth=2)
        nothing = None if turn else Draft()
        job = Job(Kind.VERIFY, "s", "", base=base, draft=nothing, draft_id=draft, shape=shape)
    asked = [s.propose.depth for steps in served.engine.steps for s in steps if s.propose is not None]
    assert asked[0::2] == [2] * len(asked[0::2])
    assert set(asked[11::2]) == {0}


def test_without_a_policy_nothing_changes() -> None:
    served = Served(None).generate(2, 40)
    assert set(served.depths) - set(range(DEPTH + 1)) == set() and served.depths.count(DEPTH) > len(served.depths) // 2


async def test_the_chosen_depths_are_told_to_prometheus() -> None:
    core = DrafterCore(FakeEngine(), policy=policy(DRAFTS_COST_ALL))
    registry = CollectorRegistry()
    registry.register(ServiceMetrics(core, {"version": "1"}))
    await core.start()
    try:
        spec = SessionSpec("g", "", (1, 2, 3), stopping=StoppingParams(60))
        async for _ in core.generate(spec):
            pass
        text = generate_latest(registry).decode()
    finally:
        await core.stop()
    counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if "policy_drafts_total{" in line}
    assert counts['speculator_policy_drafts_total{depth="0",nodes="0"}'] > 20
    assert len(counts) == DEPTH + 1


def test_a_row_that_changes_hands_starts_from_what_everybody_does() -> None:
    steering = policy(0.15)
    served = Served(steering, hits=(1.0,), about=replace(INFO, max_rows=1)).generate(1, 80)
    known = steering.expected(0, INFO.default_shape)
    served.generate(1, 2)
    assert steering.expected(0, INFO.default_shape) != known
