"""Attention-data parallelism: engines of ranks that have sessions of their own and share the experts of one target.

Owns: that one order of rank 0 moves all ranks through the same passes of the target, and that their results come back
to it. Must never know processes, sockets or the service.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from graphs.errors import GraphError
from graphs.shape import row_ladder, token_ladder
from speculator.config import Config
from speculator.engine import Engine
from speculator.errors import ConfigError, EngineFailedError, SpeculatorError
from speculator.heads.base import DraftHead
from speculator.passes import EagerPasses
from speculator.ranks.codec import Change, Close, Open, Order
from speculator.ranks.engine import Follower, LeadEngine
from speculator.ranks.errors import RankLostError
from speculator.ranks.joint import JointPasses
from speculator.ranks.returns import REFUSALS, Outcome, Returns
from speculator.ranks.shares import Share
from speculator.ranks.team import Team
from speculator.recorded import RecordedPasses, Sizes
from speculator.types import EngineInfo, SamplingParams, Step, StepResult, StepTimes
from speculator.under_way import device_failures
from target.cache import PagedCache
from target.experts import Exchange, ExpertDecoder

log = logging.getLogger(__name__)

COUNTED, REFUSED = 0, 1  # the digest of an order: what became of the step before it


class Part:
    """This rank's part of every step: its engine runs the rank's own steps and joins the passes of the others."""

    def __init__(self, engine: Engine, share: Share, returns: Returns) -> None:
        self.share = share
        self._engine, self._returns = engine, returns
        self._held = engine.rows.held()

    def open(self, row: int, sampling: SamplingParams, speculate: bool) -> None:
        if self.share.owner(row) == self.share.rank:
            Engine.open(self._engine, self.share.local(row), sampling, speculate)

    def close(self, row: int) -> None:
        if self.share.owner(row) == self.share.rank:
            Engine.close(self._engine, self.share.local(row))

    def run(self, steps: Sequence[Step], before: int) -> list[StepResult]:
        """All ranks' results on rank 0; raises there what any rank's steps were refused for.

        `before` says whether the step before this one counted: where one rank refused its steps, no result counts, and
        what they were drafted from is held again.
        """
        rows = self._engine.rows
        if before == REFUSED:
            rows.hold_again(self._held)
        self._held = rows.held()
        return self._returns.gather(steps, self._own(steps))

    def _own(self, steps: Sequence[Step]) -> Outcome:
        passes, own = self._engine.passes, self.share.own(steps)
        assert isinstance(passes, JointPasses)
        passes.begin(self.share.passes(steps))
        outcome: Outcome = []
        start = time.perf_counter()
        try:
            outcome = Engine.step(self._engine, own) if own else []
        except SpeculatorError as error:
            if type(error) not in REFUSALS:  # nobody knows how far the rank came
                raise EngineFailedError(error.message) from error
            outcome = error
        with device_failures():
            passes.finish()
        if not own:
            self._engine.times = StepTimes(verify=time.perf_counter() - start)
        return outcome


class DataLead(LeadEngine):
    """The engine of rank 0, whose rows are those of all ranks: rank r has the r-th part of them, and its own pages."""

    def __init__(
        self,
        team: Team,
        share: Share,
        pages: Sequence[int],
        info: EngineInfo,
        model: ExpertDecoder,
        head: DraftHead | None,
        cache: PagedCache,
    ) -> None:
        super().__init__(team.channel, team.lost, team.pulse, info, model, head, cache)
        whole = 1 + sum(count - 1 for count in pages)
        self.info = replace(info, max_rows=share.size * share.rows, total_pages=whole, rank_pages=tuple(pages))
        self._part = Part(self, share, Returns(team.channel.group, share, team.pulse))
        self._before = COUNTED

    def open(self, row: int, sampling: SamplingParams, speculate: bool) -> None:
        self._part.open(row, sampling, speculate)
        self._changes.append(Open(row, sampling, speculate))

    def close(self, row: int) -> None:
        self._part.close(row)
        self._changes.append(Close(row))

    def step(self, steps: Sequence[Step]) -> list[StepResult]:
        before, self._before = self._before, REFUSED
        self._tell(Order(self._changes, steps, before))
        results = self._outcome(lambda: self._part.run(steps, before))
        self._before = COUNTED
        return results


class DataFollower(Follower):
    """Another rank: it runs its part of what rank 0 tells."""

    def __init__(self, engine: Engine, team: Team) -> None:
        super().__init__(engine, team.channel, team.pulse)
        share = share_of(team, engine.info)
        self._part = Part(engine, share, Returns(team.channel.group, share, team.pulse))

    def _change(self, change: Change) -> None:
        if isinstance(change, Open):
            self._part.open(*change)
        elif isinstance(change, Close):
            self._part.close(change.row)

    def _check(self, order: Order) -> None:
        """Ranks compute different things: their results are compared by nobody."""

    def _do(self, order: Order) -> None:
        try:
            self._part.run(order.steps, order.digest)
        except EngineFailedError as failure:
            raise RankLostError(f"rank {self._channel.rank} failed in a step: {failure.message}") from failure


def check_data_parallel(config: Config) -> None:
    """ConfigError for what ranks with sessions of their own do not have."""
    without = "ranks with sessions of their own (parallel.attention_data)"
    if config.graphs.mode == "round":
        text = "one that is recorded holds the sessions of its rank alone, and all would have to replay the same one"
        raise ConfigError(f"graphs.mode round is not for {without}: {text}; say piecewise or split")
    if config.parallel.head == "shard":
        raise ConfigError(f"parallel.head shard is not for {without}: each drafts alone, with a whole head")
    if config.policy.costs or config.policy.measure == "on":
        raise ConfigError(f"{without} do not measure rounds: leave out policy.costs, and policy.measure = on")


def share_of(team: Team, info: EngineInfo) -> Share:
    """The part of a rank whose own engine `info` describes."""
    return Share(team.rank, team.size, info.max_rows)


def shared_engine(
    team: Team, info: EngineInfo, model: ExpertDecoder, head: DraftHead | None, cache: PagedCache
) -> Engine:
    """A rank's engine over its own cache; `info` describes this rank alone. A vote of all ranks."""
    pages = team.each(info.total_pages, "pages of a rank's own KV cache")
    if team.rank:
        return Engine(info, model, head, cache)
    return DataLead(team, share_of(team, info), pages, info, model, head, cache)


def follower(engine: Engine, team: Team) -> Follower:
    """The loop of a rank that is told what to do."""
    return Follower(engine, team.channel, team.pulse) if team.experts is None else DataFollower(engine, team)


def agreed_sizes(team: Team, sizes: Sizes, info: EngineInfo) -> Sizes:
    """The shapes that are recorded on all ranks; a rank's own cache, which `info` describes, holds each of them.

    Shapes that no rank holds are left out; 0 rows: nothing is left. ConfigError where only some ranks hold one: they
    would enter its passes alone, and wait there for the others.
    """
    capacity = (info.total_pages - 1) * info.page_size
    vote, shape = team.agreement.has_batch, sizes.shape
    width = sizes.path if shape.is_chain else max(sizes.path, len(shape.parents or range(shape.nodes)) + 1)
    row = -(-width // info.page_size) * info.page_size

    def hold(about: str, needed: int) -> bool:
        return vote(about, needed <= capacity, capacity, needed)

    try:
        team.agreement.draft_length(shape.depth)
        rows = [r for r in row_ladder(sizes.rows) if hold(f"{r} x {width} tokens", r * row)]
        buckets = token_ladder(sizes.prompt_tokens) if sizes.prompt_tokens else ()
        prompts = [tokens for tokens in buckets if hold(f"a prompt of {tokens} tokens", tokens)]
    except GraphError as error:
        raise ConfigError(str(error)) from None
    return sizes._replace(rows=max(rows, default=0), prompt_tokens=max(prompts, default=0))


def join_passes(engine: Engine, exchange: Exchange, team: Team) -> None:
    """From now on the engine's passes are those of all ranks. Replay is for all of them or for none."""
    passes = engine.passes
    assert isinstance(passes, EagerPasses | RecordedPasses)
    recorded = isinstance(passes, RecordedPasses) and passes.verifying.ready
    try:
        team.agreement.ready(recorded, "the passes of the target")
    except GraphError as error:
        raise ConfigError(str(error)) from None
    engine.passes = JointPasses(passes, exchange, engine.device)
