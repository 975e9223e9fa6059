"""What ranks run in the tests of pipelines. Apart from the tests, because each rank imports it anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from speculator.errors import SpeculatorError
from speculator.load import load_engine
from speculator.ranks.data import follower
from speculator.ranks.engine import Follower, LeadEngine
from speculator.ranks.stages import LeadStage
from speculator.ranks.team import Team
from speculator.types import Draft, DraftShape, Rule, SamplingParams, Step
from tests.unit.engines import Driver, Sequence_
from tests.unit.ranks_programs import CHAIN, COUNT, PARAMS, PROMPTS, TREE, config_of


def shapes_of(trees: bool) -> list[DraftShape | None]:
    return [TREE, CHAIN, TREE] if trees else [CHAIN, DraftShape(2), CHAIN]


class Noting(Driver):
    """Notes log-probabilities too."""

    def __init__(self, engine: Any, scatter: int = 0) -> None:
        super().__init__(engine, scatter)
        self.logprobs: list[Any] = []

    def _run(self, steps: Any, sessions: Any) -> Any:
        results = super()._run(steps, sessions)
        self.logprobs += [r.logprobs for r in results]
        return results


def logprobs_of(engine: Any) -> list[list[float]]:
    """Of three sessions, step by step."""
    driver = Noting(engine)
    driver.rounds(driver.start(PROMPTS, PARAMS, CHAIN), COUNT, [CHAIN] * 3)
    return [list(p) for p in driver.logprobs]


def logprobs(rank: int, folder: str, axis: str, sets: dict[str, Any]) -> Any:
    """Rank 0 serves sessions of two ranks that divide `axis`."""
    torch.set_num_threads(1)
    team = Team.build(2, torch.device("cpu"), 20.0, lambda why: why, axis=axis)
    engine = load_engine(config_of(folder, **sets), None, team)
    if rank:
        follower(engine, team).run()
        return "followed"
    assert isinstance(engine, LeadEngine)
    found = logprobs_of(engine)
    engine.end()
    return found


def lucky(texts: list[list[int]]) -> Callable[[Sequence_], Draft]:
    """Trees that hold what comes next, below a wrong token each, so that accepted nodes have to be moved."""

    def draft(s: Sequence_) -> Draft:
        tokens, parents, above = list[int](), list[int](), -1
        for token in texts[s.row][len(s.produced) :][:3]:
            tokens, parents = [*tokens, token ^ 1, token], [*parents, above, above]
            above = len(tokens) - 1
        return Draft(tuple(tokens), tuple(parents))

    return draft


def play(engine: Any, shapes: list[DraftShape | None]) -> list[Any]:
    """Committed tokens, accepted counts and log-probabilities, by the head's drafts and then by ones that are right.

    Sessions end in between and open again, in scattered pages.
    """
    found: list[Any] = []
    drafter = None
    for again in range(2):
        driver = Noting(engine, scatter=again)
        sessions = driver.start(PROMPTS, PARAMS, shapes[0])
        driver.rounds(sessions, COUNT, shapes, drafter)
        drafter = lucky([s.produced for s in sessions])
        found += [[s.produced, s.accepted] for s in sessions] + [[list(p) for p in driver.logprobs]]
        for s in sessions:
            engine.close(s.row)
    return found


def on_stage(rank: int, folder: str, sizes: tuple[int, int], sets: dict[str, Any]) -> tuple[Any, Team]:
    torch.set_num_threads(1)
    pipeline, tensor = sizes
    team = Team.build(tensor, torch.device("cpu"), 20.0, lambda why: why, pipeline=pipeline)
    both = {"parallel.pipeline": pipeline, "parallel.tensor": tensor, **sets}
    return load_engine(config_of(folder, **both), None, team), team


def stage(rank: int, folder: str, sizes: tuple[int, int], trees: bool, sets: dict[str, Any]) -> Any:
    """Rank 0 serves sessions; what it committed, and how many passes each rank ran as graphs."""
    engine, team = on_stage(rank, folder, sizes, sets)
    held = [list(engine.model.span), len(engine.cache.layers), sum(p.numel() for p in engine.model.parameters())]
    if rank:
        Follower(engine, team.channel).run()
        return [held, {name: list(counts) for name, counts in engine.passes_run().items()}]
    assert isinstance(engine, LeadStage)
    found = play(engine, shapes_of(trees))
    engine.end()
    return [held, {name: list(counts) for name, counts in engine.passes_run().items()}, found]


def refused(rank: int, folder: str) -> Any:
    """The distribution of a drawn draft is gone."""
    engine, team = on_stage(rank, folder, (2, 1), {})
    if rank:
        Follower(engine, team.channel).run()
        return "followed"
    driver, said = Driver(engine), list[Any]()
    [session] = driver.start([PROMPTS[0]], [SamplingParams(temperature=1.0, rule=Rule.REJECTION)], CHAIN)
    held, session.draft = session.draft, replace(session.draft, draft_id=10**6)
    try:
        driver.rounds([session], COUNT, [CHAIN])
    except SpeculatorError as error:
        said += [error.reason, error.message]
    session.draft = held
    driver.rounds([session], COUNT, [CHAIN])
    engine.end()
    return [*said, len(session.produced) >= COUNT]


class Turns(Driver):
    """Keeps up to `most` groups of sessions under way, each launched again when its results are there."""

    def together(self, groups: list[list[Sequence_]], drafter: Callable[[Sequence_], Draft], most: int) -> None:
        waiting, flights = deque(groups), deque[Any]()
        while waiting or flights:
            while waiting and len(flights) < most:
                group = waiting.popleft()
                flights.append((group, self.engine.launch(self.steps(group, drafter))))
            group, flight = flights.popleft()
            self._note(group, flight.collect())
            if any(len(s.produced) < COUNT for s in group):
                waiting.append(group)

    def alone(self, groups: list[list[Sequence_]], drafter: Callable[[Sequence_], Draft]) -> None:
        """The same, one step after the other."""
        for group in groups:
            while any(len(s.produced) < COUNT for s in group):
                self._note(group, self.engine.step(self.steps(group, drafter)))

    def steps(self, group: list[Sequence_], drafter: Callable[[Sequence_], Draft]) -> list[Step]:
        return [self._step(s, draft=drafter(s), root=s.tokens[-1], propose=CHAIN) for s in group]

    def _note(self, sessions: Any, results: Any) -> None:
        for session, result in zip(sessions, results, strict=True):
            session.cached += len(result.tokens)
            session.accepted.append(len(result.accepted))
            session.tokens += result.tokens
            session.produced += result.tokens


def two_groups(engine: Any, texts: list[list[int]], most: int) -> Any:
    """Two groups of sessions with trees that are right by `texts`, of which `most` are under way at once."""
    driver = Turns(engine)
    sessions = driver.start(PROMPTS, PARAMS, CHAIN)
    groups = [sessions[:1], sessions[1:]]
    driver.together(groups, lucky(texts), most) if most else driver.alone(groups, lucky(texts))
    for s in sessions:
        engine.close(s.row)
    return [[s.produced, s.accepted] for s in sessions]


def in_turns(rank: int, folder: str, sizes: tuple[int, int], texts: list[list[int]]) -> Any:
    """One group is on the first stage while the other is on a later one."""
    engine, team = on_stage(rank, folder, sizes, {})
    if rank:
        Follower(engine, team.channel).run()
        return "followed"
    found = two_groups(engine, texts, 2)
    engine.end()
    return found


def groups_alone(engine: Any, texts: list[list[int]]) -> Any:
    return two_groups(engine, texts, 0)


def left_behind(rank: int, folder: str) -> Any:
    """Rank 0 ends while a step is under way whose results it never asked for."""
    engine, team = on_stage(rank, folder, (2, 2), {})
    if rank:
        Follower(engine, team.channel).run()
        return "followed"
    driver = Turns(engine)
    sessions = driver.start(PROMPTS, PARAMS, CHAIN)
    engine.launch(driver.steps(sessions, lucky([[1, 2, 3]] * 3)))
    engine.end()
    return "ended"
