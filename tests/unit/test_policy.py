"""The depth policy against rounds whose cost and acceptance are known.

Owns: what it must never lose, where it must settle, and that it holds still. Must never touch a device or a clock.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculator.costs import Cost, CostTable
from speculator.policy import MARGIN, NOTHING, PROBE, DepthPolicy, Riders, Survival, menu
from speculator.types import Draft, DraftShape

DEPTH = 7
CHAINS = menu(DraftShape(DEPTH), None)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
Seconds = Callable[[int, int], float]  # rows, depth -> a round


def memory_bound(rows: int, depth: int) -> float:
    """A large GPU: weights are read once, drafts cost a little each, tokens nearly nothing until there are many."""
    return 4.8 + 0.25 * depth + 0.002 * rows * (1 + depth)


def compute_bound(rows: int, depth: int) -> float:
    """A device that pays for every token it verifies: beyond a few rows drafts only lose."""
    return 2.0 + 0.3 * depth + 0.9 * rows * (1 + depth)


MACHINES = {"memory": memory_bound, "compute": compute_bound}


def table(seconds: Seconds, shapes: Sequence[DraftShape] = CHAINS) -> CostTable:
    return CostTable(tuple(Cost(s, rows, 512, seconds(rows, s.depth)) for s in shapes for rows in BATCHES), {})


def chance(length: float) -> float:
    """The conditional acceptance at which chains of DEPTH commit `length` tokens a round."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(DEPTH + 1)) < length else (low, middle)
    return low


class Rounds:
    """Sessions in lockstep: a draft asked for in one round is verified in the next, as in the engine."""

    def __init__(self, policy: DepthPolicy, batch: int, seconds: Seconds, rate: float, seed: int = 0) -> None:
        self.policy, self.batch, self.seconds, self.rate = policy, batch, seconds, rate
        self.chances = random.Random(seed)
        self.held = [0] * batch
        for row in range(batch):
            policy.open(row)

    def run(self, rounds: int) -> Rounds:
        self.tokens, self.time, self.depths = 0, 0.0, list[int]()
        for _ in range(rounds):
            self._round()
        return self

    def _round(self) -> None:
        policy, verified = self.policy, self.held
        if policy.due(self.batch):
            policy.decide(Riders(range(self.batch), self.batch, 512))
        self.held = [policy.give().depth for _ in range(self.batch)]
        self.depths.append(self.held[0])
        self.time += self.seconds(self.batch, max(*verified, *self.held))
        for row, depth in enumerate(verified):
            accepted = next((i for i in range(depth) if self.chances.random() >= self.rate), depth)
            self.tokens += 1 + accepted
            policy.observe(row, chain(depth), accepted, 1 << 30)

    @property
    def pace(self) -> float:
        return self.tokens / self.time


def chain(depth: int, made_by: int = 1) -> Draft:
    return Draft((5,) * depth, tuple(range(-1, depth - 1)), draft_id=made_by)


def promised(batch: int, seconds: Seconds, rate: float, depth: int) -> float:
    """Tokens a second of drafts of one depth for ever."""
    tokens: float = batch * sum(rate**i for i in range(depth + 1))
    return tokens / seconds(batch, depth)


def riders(batch: int, **more: Any) -> Riders:
    return Riders(range(batch), batch, 512, **more)


@pytest.mark.parametrize("length", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("machine", MACHINES)
@settings(max_examples=5, deadline=None)
@given(batch=st.integers(1, 64), seed=st.integers(0, 99))
def test_never_slower_than_plain_and_close_to_the_best_depth(
    machine: str, length: float, batch: int, seed: int
) -> None:
    seconds, rate = MACHINES[machine], chance(length)
    rounds = Rounds(DepthPolicy(CHAINS, table(seconds)), batch, seconds, rate, seed)
    rounds.run(128)  # it settles
    pace = rounds.run(max(300, 2500 // batch)).pace
    best = max(promised(batch, seconds, rate, depth) for depth in range(DEPTH + 1))
    noise = 2.5 / math.sqrt(rounds.tokens)  # of the drawn acceptance itself
    assert pace > promised(batch, seconds, rate, 0) * (1 - MARGIN)
    assert pace > best * (1 - MARGIN - noise)


@pytest.mark.parametrize("batch", [1, 64])
def test_where_drafts_only_lose_it_soon_drafts_nothing(batch: int) -> None:
    rounds = Rounds(DepthPolicy(CHAINS, table(compute_bound)), batch, compute_bound, 0.05).run(192)
    pace = rounds.run(512).pace
    assert Counter(rounds.depths).most_common(1)[0][0] == 0
    assert pace > promised(batch, compute_bound, 0.05, 0) * (1 - MARGIN)


def test_it_comes_back_when_acceptance_does() -> None:
    rounds = Rounds(DepthPolicy(CHAINS, table(memory_bound)), 8, memory_bound, 0.0).run(600)
    assert rounds.depths[-1] == 0
    rounds.rate = 0.9
    rounds.run(6000)
    assert Counter(rounds.depths[-300:]).most_common(1)[0][0] == DEPTH


def test_it_holds_still() -> None:
    rounds = Rounds(DepthPolicy(CHAINS, table(memory_bound)), 8, memory_bound, chance(3.0)).run(256)
    rounds.run(1024)
    settled = [depth for i, depth in enumerate(rounds.depths) if (i + 257) % PROBE]
    assert sum(a != b for a, b in pairwise(settled)) <= 12
    probes = len(rounds.depths) / PROBE
    assert sum(a != b for a, b in pairwise(rounds.depths)) <= 12 + 2 * probes + 2


def test_two_shapes_that_are_worth_the_same_are_not_taken_in_turns() -> None:
    flat = CostTable(tuple(Cost(DraftShape(d), 1, 512, 1.0 + 0.001 * d) for d in (0, 7)), {})
    policy, seen = DepthPolicy([NOTHING, DraftShape(7)], flat), []
    policy.open(0)
    for turn in range(800):
        if policy.due(1):
            policy.decide(riders(1))
        policy.observe(0, chain(7), turn % 150 == 0, 99)
        seen.append(policy.shape.depth)
    assert sum(a != b for a, b in pairwise(seen)) <= 1


def test_a_session_is_judged_by_its_own_past_and_a_new_one_by_everybody_s() -> None:
    policy = DepthPolicy(CHAINS, table(memory_bound))
    policy.open(0), policy.open(1)
    for _ in range(400):
        policy.observe(0, chain(7), 7, 99)
        policy.observe(1, chain(7), 0, 99)
    policy.open(2)
    good, bad, new = (policy.expected(row, DraftShape(7)) for row in range(3))
    assert good > 6 and bad < 1.8 and bad < new < good
    policy.open(0)  # another session on the row
    assert policy.expected(0, DraftShape(7)) == pytest.approx(policy.expected(2, DraftShape(7)))


def test_acceptance_is_by_position_and_what_was_not_reached_keeps_what_it_knew() -> None:
    survival = Survival(0.9)
    for _ in range(200):
        survival.record(3, 1)
    assert survival.rate(0, 0.5, 1.0) > 0.9 and survival.rate(1, 0.5, 1.0) < 0.1
    assert survival.rate(2, 0.5, 1.0) == 0.5
    before = survival.rate(1, 0.5, 1.0)
    survival.record(1, 1)
    assert survival.rate(1, 0.5, 1.0) == before


def test_drafts_of_clients_and_foreign_trees_teach_nothing() -> None:
    policy = DepthPolicy(menu(DraftShape(3, 8, 2), None), table(memory_bound, menu(DraftShape(3, 8, 2), None)))
    policy.open(0)
    before = policy.expected(0, DraftShape(3, 8, 2))
    policy.observe(0, Draft((1, 2, 3), (-1, -1, 0), draft_id=4), 2, 99)
    policy.observe(0, Draft((1,) * 8, (-1, -1, 0, 0, 1, 1, 2, 2)), 0, 99)
    policy.decide(riders(1))
    assert policy.expected(0, DraftShape(3, 8, 2)) == before
    policy.observe(0, Draft((1,) * 8, (-1, -1, 0, 0, 1, 1, 2, 2), draft_id=5), 0, 99)
    policy.decide(riders(1))
    assert policy.expected(0, DraftShape(3, 8, 2)) < before


def test_rows_that_wait_for_a_caller_s_deep_draft_take_one_as_deep() -> None:
    def costly(rows: int, depth: int) -> float:
        return 1.0 + 2.0 * depth

    policy = DepthPolicy(CHAINS, table(costly))
    policy.open(0)
    assert policy.decide(riders(1)).depth == 0
    assert policy.decide(Riders([0], 2, 512, DraftShape(7))).depth == 7


def test_it_chooses_now_and_then_and_at_once_when_the_crowd_changes() -> None:
    policy = DepthPolicy(CHAINS, table(memory_bound))
    policy.open(0)
    chosen = []
    for step in range(1, 41):
        batch = 1 if step < 20 else 30
        if policy.due(batch):
            policy.decide(riders(batch))
            chosen.append(step)
    assert chosen == [1, 8, 16, 20, 24, 32, 40]


def test_the_choice_never_looks_at_tokens() -> None:
    """Sessions whose drafts differ in nothing but their tokens are given the same shapes."""
    given_shapes = []
    for token in (3, 41):
        policy, chances, seen = DepthPolicy(CHAINS, table(memory_bound)), random.Random(5), []
        policy.open(0)
        for _ in range(300):
            if policy.due(1):
                policy.decide(riders(1))
            depth = policy.give().depth
            seen.append(depth)
            policy.observe(
                0, Draft((token,) * depth, tuple(range(-1, depth - 1)), draft_id=1), chances.randint(0, depth), 99
            )
        given_shapes.append(seen)
    assert given_shapes[0] == given_shapes[1]


def test_the_menu_is_never_deeper_than_what_is_configured() -> None:
    assert menu(DraftShape(3), None) == (NOTHING, DraftShape(1), DraftShape(2), DraftShape(3))
    assert menu(DraftShape(7), (0, 3, 9)) == (NOTHING, DraftShape(3), DraftShape(7))
    tree = DraftShape(6, 32, 4)
    assert menu(tree, (0,)) == (NOTHING, tree)
    assert menu(tree, None) == (NOTHING, DraftShape(6, 16, 4), DraftShape(6, 8, 4), tree)
    static = DraftShape(2, 3, 1, (-1, -1, 0))
    assert menu(static, None) == (NOTHING, DraftShape(1, 2, 1, (-1, -1)), static)
    assert menu(NOTHING, None) == (NOTHING, NOTHING)


def test_a_policy_needs_shapes() -> None:
    with pytest.raises(ValueError, match="shapes"):
        DepthPolicy([], table(memory_bound))
