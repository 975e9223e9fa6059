"""What ranks with sessions of their own run in tests. Apart from the tests, because each rank imports it anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from graphs.agreement import Agreement, Alone
from graphs.tape import TapeRecorder
from speculator.errors import InvalidArgumentError, SpeculatorError
from speculator.load import graph_sizes, load_engine, with_page_size
from speculator.passes import eager_passes
from speculator.ranks.data import DataLead, agreed_sizes, follower
from speculator.ranks.team import Team
from speculator.recorded import RecordedPasses
from speculator.types import Draft, DraftShape, Rule, SamplingParams, Step
from target.config_moe import MoeConfig
from target.errors import PlanError
from target.experts import EXPERTS, Exchange, SharedExperts
from target.parallel import Mesh
from tests.unit.engines import Driver, Sequence_
from tests.unit.ranks_programs import CHAIN, COUNT, PARAMS, PROMPTS, config_of
from tests.unit.test_moe import SIZE, random_moe, tokens

ROWS = 4  # of one rank: engine.max_sessions of `config_of`
TREE = DraftShape(3, 6, 2)


def in_team(rank: int, size: int, config: Any) -> tuple[Any, Team]:
    torch.set_num_threads(1)
    team = Team.build(size, torch.device("cpu"), 20.0, lambda why: why, axis=EXPERTS)
    return load_engine(config, None, team), team


class Spread(Driver):
    """A driver whose sessions lie in given rows; rows of one rank share its pages, of which each gets a part."""

    def __init__(self, engine: Any, rows: Sequence[int]) -> None:
        super().__init__(engine)
        self.rows = rows

    def start(self, prompts: Any, params: Any, shape: DraftShape | None) -> list[Sequence_]:
        sessions = [self._open(*each, shape) for each in zip(self.rows, prompts, params, strict=True)]
        while waiting := [s for s in sessions if not s.produced]:
            self._run([self._chunk(s, shape) for s in waiting], waiting)
        return sessions

    def start_in_turn(self, prompts: Any, params: Any, shape: DraftShape | None) -> list[Sequence_]:
        """Each prompt is fed while the sessions before it go on: one rank feeds and another verifies in one step."""
        sessions: list[Sequence_] = []
        for each in zip(self.rows, prompts, params, strict=True):
            before, new = list(sessions), self._open(*each, shape)
            sessions.append(new)
            while not new.produced:
                steps = [self._step(s, draft=s.draft or Draft(), root=s.tokens[-1], propose=shape) for s in before]
                self._run([*steps, self._chunk(new, shape)], sessions)
        return sessions

    def _open(self, row: int, prompt: Sequence[int], param: SamplingParams, shape: DraftShape | None) -> Sequence_:
        self.engine.open(row, param, shape is not None)
        first = 1 + 20 * (row % ROWS)
        return Sequence_(row, list(prompt), list(range(first, first + 20)))


def play(engine: Any, rows: Sequence[int], shapes: Sequence[DraftShape | None]) -> list[Any]:
    """Committed tokens and accepted counts of three sessions, which begin together, end, and begin again in turn."""
    found: list[Any] = []
    by_row = {row: shapes[i] for i, row in enumerate(rows)}
    for again in range(2):
        driver = Spread(engine, rows)
        sessions = (driver.start_in_turn if again else driver.start)(PROMPTS, PARAMS, shapes[0])
        driver.rounds(sessions, COUNT, by_row)  # type: ignore[arg-type]
        found += [[s.produced, s.accepted] for s in sessions]
        for s in sessions:
            engine.close(s.row)
    return found


def gang(
    rank: int, folder: str, size: int, rows: Sequence[int], trees: bool | None, sets: Sequence[dict[str, Any]]
) -> Any:
    """Sessions in `rows` of all ranks; what they committed, and how many passes ran as graphs on rank 0."""
    engine, team = in_team(rank, size, config_of(folder, **sets[rank % len(sets)]))
    if rank:
        follower(engine, team).run()
        return "followed"
    assert isinstance(engine, DataLead)
    found = play(engine, rows, shapes_of(trees))
    engine.end()
    return [found, {name: list(counts) for name, counts in engine.passes_run().items()}, list(engine.info.rank_pages)]


def shapes_of(trees: bool | None) -> list[DraftShape | None]:
    """Of three sessions; None is no drafts at all."""
    if trees is None:
        return [None] * 3
    return [TREE, CHAIN, TREE] if trees else [CHAIN, DraftShape(2), CHAIN]


def capture(rank: int, folder: str, sets: Sequence[dict[str, Any]], voting: bool) -> Any:
    """Record what this rank's cache holds, by a vote of all or by its own lights; then wait for work."""
    config = with_page_size(config_of(folder, **sets[rank]), torch.device("cpu"))
    engine, team = in_team(rank, 2, config)
    own = engine.info.rank_pages[0] if rank == 0 else engine.info.total_pages
    voters = team if voting else replace(team, agreement=Agreement(Alone()))
    sizes = agreed_sizes(voters, graph_sizes(config, engine.model), replace(engine.info, total_pages=own))
    if sizes.rows:
        eager = eager_passes(engine.model, engine.head, engine.cache)
        RecordedPasses(eager, TapeRecorder(), sizes._replace(prompt_tokens=0), engine.device).capture()
    if rank and not voting:
        team.channel.receive()
    return sizes.rows


def rejection_sessions(engine: Any, rows: Sequence[int]) -> list[Sequence_]:
    """Two sessions that draw, and accept by the rejection rule, which needs what their drafts were drawn from."""
    driver = Spread(engine, rows)
    sessions = driver.start(PROMPTS[:2], [SamplingParams(1.0, seed=s, rule=Rule.REJECTION) for s in (3, 4)], CHAIN)
    driver.rounds(sessions, COUNT, {row: CHAIN for row in rows})  # type: ignore[arg-type]
    return sessions


def refuse(rank: int, folder: str, sets: dict[str, Any]) -> Any:
    """A draft that rank 1 does not know; run again alone, as a worker does, the session of rank 0 goes on."""
    engine, team = in_team(rank, 2, config_of(folder, **sets))
    if rank:
        follower(engine, team).run()
        return "followed"
    driver = Spread(engine, (0, ROWS))
    sessions = driver.start(PROMPTS[:2], [SamplingParams(1.0, seed=s, rule=Rule.REJECTION) for s in (3, 4)], CHAIN)
    steps = [driver._step(s, draft=s.draft, root=s.tokens[-1], propose=CHAIN) for s in sessions]
    steps[1] = steps[1]._replace(draft=replace(steps[1].draft, draft_id=10**6))
    failed = reason(engine, steps)
    again = [reason(engine, [step]) for step in steps]
    for s in sessions:
        engine.close(s.row)
    texts = [s.produced for s in rejection_sessions(engine, (0, ROWS))]
    engine.end()
    return [failed, again, texts]


def reason(engine: Any, steps: Sequence[Step]) -> str:
    try:
        engine.step(steps)
    except SpeculatorError as error:
        return error.reason
    return "ok"


def fail(rank: int, folder: str, sets: dict[str, Any], of_device: bool) -> Any:
    """Rank 1 fails in the middle of a pass, by its device or by an error that no step should bring."""
    engine, team = in_team(rank, 2, config_of(folder, **sets))
    if rank == 0:
        try:
            return play(engine, (0, 4, 5), shapes_of(False))
        except SpeculatorError as error:
            return error.reason
    calls = iter(range(100))

    def broken(*inputs: Any) -> None:
        if next(calls) == 9:
            raise RuntimeError("an illegal access") if of_device else InvalidArgumentError("an illegal access")

    engine.model.layers[-1].attention.register_forward_pre_hook(broken)
    follower(engine, team).run()
    return "followed"


def mixture(rank: int, inner: int) -> Any:
    """A layer divided over three ranks on batches of other sizes: how many tokens, and how far from the whole one."""
    torch.set_num_threads(1)
    config = MoeConfig(experts=6, top_k=2, inner_size=inner, gate="sigmoid", normalise=True, shared_size=8)
    axis = Mesh.build({EXPERTS: 3}, "gloo", timedelta(seconds=10)).axes[EXPERTS]
    whole, shared = random_moe(config), random_moe(config)
    experts = SharedExperts(SIZE, config, Exchange(axis))
    for name in ("gate_up", "down"):
        mine = getattr(whole.experts, name).data[2 * rank : 2 * rank + 2]
        getattr(experts, name).data.copy_(mine)
    shared.experts = experts
    x = tokens((5, 1, 0)[rank], seed=rank)[None]
    with torch.inference_mode(), experts.exchange.of(6):
        off = (shared(x) - whole(x)).abs().max().item() if x.numel() else shared(x).numel()
        try:
            shared(tokens(7)[None])
        except PlanError as error:
            return [x.shape[1], off, str(error)]
    return None
