"""The depth policy at work on an engine with forced acceptance, between plain decoding of the same batch.

Owns: that comparison. Must never help the policy: it measures its own costs and learns from the rounds it plays.
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from graphs.errors import GraphError
from speculator.bench.round_forced import Depths
from speculator.bench.round_play import WARM, Rows, recorded
from speculator.costs import CostTable, measure_costs
from speculator.engine import Engine
from speculator.policy import DepthPolicy, Riders, menu
from speculator.recorded import Sizes

SETTLE, ROUNDS = 96, 160  # rounds in which the policy learns, and those that count
SHORTER = (0, 1, 3)  # depths with recorded rounds of their own, beside the deepest
MEASURE_S = 5.0
ALL = 1 << 30  # every level of a draft could be judged


def policy_paces(engine: Engine, mode: str, sizes: Sizes, context: int, accept: float) -> dict[str, Any]:
    """Tokens a second of `sizes.rows` rows under the policy and without drafts; `accept` is forced at full depth."""
    about = {"graphs": mode, "accept": accept, "rows": sizes.rows, "context": context}
    depths = Depths(accept, sizes.shape.depth, engine.device)
    shorter = tuple(depth for depth in SHORTER if depth < sizes.shape.depth)
    try:
        with recorded(engine, mode, sizes, depths, shorter):
            shapes = menu(sizes.shape, shorter)
            costs = measure_costs(engine, shapes, {}, seconds=MEASURE_S, rows=(sizes.rows,), contexts=(context,))
            depths.restart()
            return {**about, **_beside(engine, DepthPolicy(shapes, costs), sizes.rows, context)}
    except GraphError as error:
        return {**about, "error": str(error)}


def _beside(engine: Engine, policy: DepthPolicy, rows: int, context: int) -> dict[str, Any]:
    """Plain decoding before and after, so that a machine that grows slower counts against both."""
    before = plain_seconds(engine, rows, context)
    steered = Steered(engine, policy, rows, context)
    try:
        pace, drafts = steered.play()
    finally:
        steered.rows.close()
    plain = rows / statistics.fmean([*before, *plain_seconds(engine, rows, context)])
    return {
        "plain_tok_s": round(plain, 1),
        "policy_tok_s": round(pace, 1),
        "ratio": round(pace / plain, 3),
        "drafts": ", ".join(f"depth {depth}: {count}" for depth, count in sorted(drafts.items())),
        "costs_ms": _costs(policy.costs, policy, rows, context),
    }


def _costs(costs: CostTable, policy: DepthPolicy, rows: int, context: int) -> dict[str, float]:
    return {f"depth {shape.depth}": round(1e3 * costs.seconds(rows, shape, context), 4) for shape in policy.shapes}


def plain_seconds(engine: Engine, rows: int, context: int) -> list[float]:
    """Rounds of rows that opted out of drafts: one token each."""
    group = Rows(engine, rows, context, None)
    try:
        for _ in range(WARM):
            group.round()
        return [group.round() for _ in range(ROUNDS // 2)]
    finally:
        group.close()


class Steered:
    """Rows whose drafts the policy chooses, as the scheduler would have it do."""

    def __init__(self, engine: Engine, policy: DepthPolicy, rows: int, context: int) -> None:
        self.policy, self.count = policy, rows
        self.rows = Rows(engine, rows, context, policy.shapes[-1])
        for row in range(rows):
            policy.open(row)

    def play(self) -> tuple[float, Counter[int]]:
        """Tokens a second once it has settled, and the depths it asked for meanwhile."""
        for _ in range(SETTLE):
            self._round()
        before, seconds, drafts = self.rows.committed, 0.0, Counter[int]()
        for _ in range(ROUNDS):
            seconds += self._round()
            assert self.rows.shape is not None
            drafts[self.rows.shape.depth] += 1
        return (self.rows.committed - before) / seconds, drafts

    def _round(self) -> float:
        policy, rows = self.policy, self.rows
        if policy.due(self.count):
            policy.decide(Riders(range(self.count), self.count, statistics.fmean(rows.cached)))
        rows.shape, verified = policy.give(), list(rows.drafts)
        taken = rows.round()
        for row, result in enumerate(rows.results):
            policy.observe(row, verified[row], len(result.accepted), ALL)
        return taken
