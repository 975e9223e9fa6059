"""What ranks with sessions of their own run in tests. Apart from the tests, because each rank imports it anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from speculator.load import load_engine
from speculator.ranks.data import DataLead, follower
from speculator.ranks.team import Team
from speculator.types import DraftShape, SamplingParams
from target.experts import EXPERTS
from tests.unit.engines import Driver, Sequence_
from tests.unit.ranks_programs import CHAIN, COUNT, PARAMS, PROMPTS, config_of

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
        sessions = []
        for row, prompt, param in zip(self.rows, prompts, params, strict=True):
            first = 1 + 20 * (row % ROWS)
            sessions.append(Sequence_(row, list(prompt), list(range(first, first + 20))))
            self.engine.open(row, param, shape is not None)
        while waiting := [s for s in sessions if not s.produced]:
            self._run([self._chunk(s, shape) for s in waiting], waiting)
        return sessions


def play(engine: Any, rows: Sequence[int], shapes: Sequence[DraftShape | None]) -> list[Any]:
    """Committed tokens and accepted counts of three sessions, which all begin together, end, and open again."""
    found: list[Any] = []
    by_row = {row: shapes[i] for i, row in enumerate(rows)}
    for _ in range(2):
        driver = Spread(engine, rows)
        sessions = driver.start(PROMPTS, PARAMS, shapes[0])
        driver.rounds(sessions, COUNT, by_row)  # type: ignore[arg-type]
        found += [[s.produced, s.accepted] for s in sessions]
        for s in sessions:
            engine.close(s.row)
    return found


def gang(rank: int, folder: str, size: int, rows: Sequence[int], trees: bool, sets: Sequence[dict[str, Any]]) -> Any:
    """Sessions in `rows` of all ranks; what they committed, and how many passes ran as graphs on rank 0."""
    engine, team = in_team(rank, size, config_of(folder, **sets[rank % len(sets)]))
    if rank:
        follower(engine, team).run()
        return "followed"
    assert isinstance(engine, DataLead)
    found = play(engine, rows, shapes_of(trees))
    engine.end()
    return [found, {name: list(counts) for name, counts in engine.passes_run().items()}, list(engine.info.rank_pages)]


def shapes_of(trees: bool) -> list[DraftShape | None]:
    return [TREE, CHAIN, TREE] if trees else [CHAIN, DraftShape(2), CHAIN]


Program = Callable[..., Any]
SAMPLED = SamplingParams(temperature=0.8, seed=5)
