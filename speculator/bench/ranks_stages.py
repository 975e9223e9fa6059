"""`speculator bench ranks --pipeline M`: each stage's part of a step alone, and steps with 1 and M batches under way.

Owns: what is timed on which rank. Weights are random and acceptance is not forced: a step verifies and drafts what it
would anyway. With M batches under way a step should take as long as the slowest stage's part of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from speculator.bench.ranks_shapes import Shape, shape_of
from speculator.bench.round_floor import settle
from speculator.bench.round_play import WARM, WRAP
from speculator.bench.synthetic import eagle3_record, random_weights
from speculator.config import Config
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.heads.base import DraftHead
from speculator.heads.load import HEADS, lend
from speculator.load import build_engine
from speculator.ranks.engine import Follower
from speculator.ranks.link import Loopback
from speculator.ranks.stages import StageEngine
from speculator.ranks.team import Team
from speculator.staged import StagedPasses, StagedRecorded
from speculator.types import Draft, DraftShape, SamplingParams, Step, StepResult
from target.decoder import Decoder
from target.errors import PlanError
from target.pipeline import PIPELINE, Stage, check_stages, cut_to_stage


def check_stages_fit(args: argparse.Namespace) -> None:
    """ConfigError for stages that the shape does not have."""
    try:
        check_stages(shape_of(args.shape, args.small).config, args.pipeline)
    except PlanError as error:
        raise ConfigError(str(error)) from None


def measure_stages(args: argparse.Namespace, team: Team, config: Config) -> list[dict[str, Any]]:
    """On every rank: rows of the report, which only rank 0 has in full."""
    shape = shape_of(args.shape, args.small)
    record = eagle3_record(shape.config, shape.draft_vocab)
    engine = build_engine(config, team.device, lambda: _pair(shape, team), None, team, record)
    parts = [row for batch in args.batches for row in _parts(engine, args, team, batch)]
    if team.rank:
        Follower(engine, team.channel).run()
        return parts
    lanes = sorted({1, team.stage.size})
    return parts + [_together(engine, args, batch, under_way) for batch in args.batches for under_way in lanes]


def _pair(shape: Shape, team: Team) -> tuple[Decoder, DraftHead | None]:
    """This stage of a random target, and on the last one a random head."""
    with torch.device("meta"):
        target = Decoder(shape.config)
        if team.stage.size > 1:
            cut_to_stage(target, team.stage, embeds=team.stage.last)
    torch.manual_seed(team.rank)
    target = random_weights(target, shape.dtype, team.device)
    if not team.stage.last:
        return target, None
    record = eagle3_record(target.config, shape.draft_vocab)
    with torch.device("meta"):
        head = HEADS["eagle3"](record, lend(record, target), len(target.cache_layers))
    head = random_weights(head, shape.dtype, team.device)
    head.target_ids = torch.arange(shape.draft_vocab, device=team.device)
    return target, head


# ---- one stage by itself


def _parts(engine: Engine, args: argparse.Namespace, team: Team, batch: int) -> list[dict[str, Any]]:
    """The seconds of every stage's part of a step, each measured alone and at the same time."""
    sessions = Sessions(engine, 0, batch, args.context, DraftShape(args.depth))
    steps = sessions.steps(fixed=True)
    with alone(engine, team.stage):
        mine = _median(engine, lambda: _part(engine, steps), args.rounds)
    sessions.close()
    found = torch.tensor([mine], dtype=torch.float64, device=team.device)
    every = team.mesh.axes[PIPELINE].gather(found).flatten().tolist() if team.link else [mine]
    return [{"what": f"part of stage {i}", "rows": batch, "ms": _ms(seconds)} for i, seconds in enumerate(every)]


def _part(engine: Engine, steps: Sequence[Step]) -> Any:
    return StageEngine.launch(engine, steps) if isinstance(engine, StageEngine) else engine.step(steps)


@contextmanager
def alone(engine: Engine, stage: Stage) -> Iterator[None]:
    """A stage that receives zeros and sends nothing; a rank that is no stage as it is."""
    if not isinstance(engine, StageEngine):
        yield
        return
    passes = engine.passes.eager if isinstance(engine.passes, StagedRecorded) else engine.passes
    assert isinstance(passes, StagedPasses)
    link, here = engine.link, Loopback(stage, engine.device)
    engine.link = passes.link = here
    try:
        yield
    finally:
        engine.link = passes.link = link
        engine.forget()


def _median(engine: Engine, run: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for _ in range(WARM + rounds):
        begin = time.perf_counter()
        run()
        settle(engine.device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[WARM:])


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


# ---- all together


class Sessions:
    """Sessions on rows from `first` on, each in pages of its own, beginning with `context` tokens."""

    def __init__(self, engine: Engine, first: int, count: int, context: int, shape: DraftShape) -> None:
        each = (engine.info.total_pages - 1) // engine.info.max_rows
        self.engine, self.shape, self.start = engine, shape, context
        self.rows = range(first, first + count)
        self.pages = [range(1 + row * each, 1 + (row + 1) * each) for row in self.rows]
        self.cached, self.roots, self.drafts = [context] * count, [7 + row for row in self.rows], [Draft()] * count
        for row in self.rows:
            engine.open(row, SamplingParams(), True)

    def close(self) -> None:
        for row in self.rows:
            self.engine.close(row)

    def steps(self, fixed: bool = False) -> list[Step]:
        """The next round; `fixed` verifies made-up chains of the full depth."""
        depth = self.shape.depth
        chain = Draft(tuple(range(1, depth + 1)), tuple(range(-1, depth - 1)))
        parts = zip(self.rows, self.cached, self.pages, self.roots, self.drafts, strict=True)
        return [Step(r, at, pages, None, root, chain if fixed else d, self.shape) for r, at, pages, root, d in parts]

    def take(self, results: Sequence[StepResult]) -> None:
        for i, result in enumerate(results):
            held = self.cached[i] + len(result.tokens)
            self.cached[i] = held if held < self.start + WRAP else self.start
            self.roots[i], self.drafts[i] = result.tokens[-1], result.draft or Draft()


def _together(engine: Engine, args: argparse.Namespace, batch: int, under_way: int) -> dict[str, Any]:
    """Seconds a step, of `under_way` batches that are launched one after the other."""
    shape = DraftShape(args.depth)
    groups = [Sessions(engine, i * batch, batch, args.context, shape) for i in range(under_way)]
    _play(engine, groups, WARM)
    begin = time.perf_counter()
    _play(engine, groups, args.rounds)
    seconds = (time.perf_counter() - begin) / (args.rounds * under_way)
    for group in groups:
        group.close()
    return {"what": f"step, {under_way} under way", "rows": batch, "ms": _ms(seconds)}


def _play(engine: Engine, groups: Sequence[Sessions], rounds: int) -> None:
    flights: deque[tuple[Sessions, Any]] = deque()
    for group in [*groups] * rounds:
        if len(flights) == len(groups):
            oldest, flight = flights.popleft()
            oldest.take(flight.collect())
        flights.append((group, _launched(engine, group.steps())))
    for group, flight in flights:
        group.take(flight.collect())


class Done:
    """A step that has run already."""

    def __init__(self, results: Sequence[StepResult]) -> None:
        self._results = results

    def collect(self) -> Sequence[StepResult]:
        return self._results


def _launched(engine: Engine, steps: Sequence[Step]) -> Any:
    return engine.launch(steps) or Done(engine.step(steps))
