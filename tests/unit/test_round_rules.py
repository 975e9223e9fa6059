"""Rounds of every rule, and with repetition penalties: what they say is the same as pass by pass, and graphs did it.

The GPU tests run the same functions with CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch

from speculator.errors import NumericalError
from speculator.round_state import EVERY, MODES, RoundState, mode_of
from speculator.rows import Rows
from speculator.types import Draft, DraftShape, Feed, Rule, SamplingParams, Step, StepResult
from tests.unit import test_round as whole
from tests.unit import test_run_ahead as ahead
from tests.unit.engines import tiny_engine, tiny_head, tiny_target
from tests.unit.test_recorded import PROMPTS, pair
from tests.unit.test_round import CHAIN, TREE, Lent, Listening, lent, picks, play, record, same, visitors

REJECTION, BLOCK = (SamplingParams(0.9, seed=3, rule=rule) for rule in (Rule.REJECTION, Rule.BLOCK))
PENALTY = SamplingParams(repetition_penalty=1.4)
DRAWN = [  # of chains; trees know no block rule
    [REJECTION, SamplingParams(0.7, seed=8, top_k=9, rule=Rule.REJECTION)],
    [BLOCK, SamplingParams(0.7, seed=8, top_p=0.8, rule=Rule.BLOCK, repetition_penalty=1.3)],
    [REJECTION, BLOCK, SamplingParams(0.9, seed=5)],
    [SamplingParams(rule=Rule.BLOCK), REJECTION, SamplingParams(0.8, seed=2, min_p=0.05, repetition_penalty=0.8)],
    [PENALTY, SamplingParams(0.9, seed=1, repetition_penalty=1.2), SamplingParams()],
]
TREES = [[p for p in params if p.rule is not Rule.BLOCK] for params in DRAWN if params[0] is not BLOCK]
KINDS = [("eagle3", CHAIN, DRAWN), ("eagle3", TREE, TREES), ("mtp2", CHAIN, DRAWN[1:4])]


def any_rule(kind: str, shape: DraftShape, device: str) -> Lent:
    return lent(kind, shape, device, every_rule=True)


@pytest.mark.parametrize("kind, shape, mixes", KINDS)
def test_everything_said_is_that_of_eager_passes(
    kind: str, shape: DraftShape, mixes: Sequence[Sequence[SamplingParams]], device: str = "cpu"
) -> None:
    """Committed tokens by rule, with sessions of all rules in one batch and sessions that end one by one."""
    it, accepted, rejected = any_rule(kind, shape, device), 0, 0
    for params in mixes:
        expected = play(it.plain(), params, shape)
        assert same(play(it.engine, params, shape), expected)
        taken = [len(result.accepted) for results in expected.values() for result in results]
        accepted, rejected = accepted + sum(taken), rejected + taken.count(0)
    assert accepted > 5 and rejected > 5
    assert it.rounds.counts.replayed > 30 and it.rounds.counts.share == 1.0, it.rounds.counts.eager


def test_drafts_are_drawn_from_a_vocabulary_of_the_heads_own(device: str = "cpu") -> None:
    target = tiny_target().to(device)
    head = tiny_head(target, "eagle3", draft_vocab_size=20, d2t=True)
    engine = tiny_engine(target, head)
    rounds = record(engine, CHAIN, rows=2, every_rule=True)
    for params in ([REJECTION, BLOCK], [BLOCK]):
        assert same(play(engine, params, CHAIN), play(tiny_engine(target, head), params, CHAIN))
    assert rounds.counts.share == 1.0 and rounds.counts.replayed > 20


@pytest.mark.parametrize("kind, shape", [("eagle3", CHAIN), ("eagle3", TREE)])
def test_hundreds_of_rounds_with_sessions_coming_and_going(kind: str, shape: DraftShape, device: str = "cpu") -> None:
    it = any_rule(kind, shape, device)
    rules = list(Rule) if shape.is_chain else [Rule.COUPLED, Rule.REJECTION]
    assert same(visitors(it.engine, shape, 60, rules=rules), visitors(it.plain(), shape, 60, rules=rules))
    assert it.rounds.counts.replayed > 80 and it.rounds.counts.share == 1.0, it.rounds.counts.eager


@pytest.mark.parametrize("kind, shape", [("eagle3", CHAIN), ("eagle3", TREE)])
def test_every_graph_replays_what_running_gives_bit_for_bit(kind: str, shape: DraftShape, device: str = "cpu") -> None:
    rounds = any_rule(kind, shape, device).rounds
    assert sum(graph.variant[-1] == EVERY for graph in rounds.manager.graphs) == 3  # draft, no draft, no head
    with mock.patch.object(whole, "lent", lambda *_: any_rule(kind, shape, device)):
        whole.test_every_graph_replays_what_running_gives_bit_for_bit(kind, shape, device)


def test_depths_change_from_round_to_round(device: str = "cpu") -> None:
    target, head = pair("eagle3", device)
    heard, params = [], [REJECTION, BLOCK, PENALTY]
    for recorded in (False, True):
        engine = tiny_engine(target, head)
        rounds = record(engine, CHAIN, depths=(0, 2), every_rule=True) if recorded else None
        driver = Listening(engine)
        sessions = driver.start(PROMPTS, params, CHAIN)
        for goal in range(4, 60, 2):
            shapes = [DraftShape(depth) if depth else None for depth in (goal % 5, (goal // 2) % 3, 4 - goal % 3)]
            driver.rounds(sessions, goal, shapes)
        heard.append(driver.heard)
        if rounds:
            assert rounds.counts.share == 1.0, rounds.counts.eager
    assert same(heard[1], heard[0])


def test_passes_and_rounds_take_turns_over_drawn_drafts(device: str = "cpu") -> None:
    """Each verifies what the other drafted, by the distributions that the other drew from."""
    it, heard, turns = any_rule("eagle3", CHAIN, device), [], list[bool]()

    def one_by_one(steps: Sequence[Step]) -> list[StepResult]:
        turns.append(bool(len(turns) % 3))
        with mock.patch.object(it.rounds, "_unfit", lambda step: None if turns[-1] else "its turn"):
            return step_(steps)

    step_ = it.engine.step
    for engine in (it.plain(), it.engine):
        driver = Listening(engine)
        sessions = driver.start(PROMPTS, [REJECTION, BLOCK, PENALTY], CHAIN)
        if engine is it.engine:
            with mock.patch.object(engine, "step", one_by_one):
                driver.rounds(sessions, 50, [CHAIN] * 3)
        else:
            driver.rounds(sessions, 50, [CHAIN] * 3)
        heard.append(driver.heard)
    assert same(heard[1], heard[0])
    assert it.rounds.counts.replayed > 10 and it.rounds.counts.eager["its turn"] > 5


def test_drafts_of_clients_between_rounds(device: str = "cpu") -> None:
    it, heard = any_rule("eagle3", CHAIN, device), []
    for engine in (it.plain(), it.engine):
        driver = Listening(engine)
        sessions = driver.start(PROMPTS, [REJECTION, BLOCK, PENALTY], CHAIN)
        for goal in range(6, 48, 6):
            driver.rounds(sessions, goal, [CHAIN] * 3)
            driver.rounds(sessions, goal + 3, [CHAIN] * 3, drafter=lambda s: Draft((5, 9), (-1, 0)))
        heard.append(driver.heard)
    assert same(heard[1], heard[0])
    assert it.rounds.counts.replayed > 8
    assert set(it.rounds.counts.eager) == {"a draft that the device does not hold"}


@pytest.mark.parametrize("params", [[REJECTION, BLOCK, PENALTY], [PENALTY, SamplingParams(0.9, seed=4)]])
def test_a_round_that_failed_is_run_again_over_what_its_drafts_were_drawn_from(
    params: list[SamplingParams], device: str = "cpu"
) -> None:
    """Nothing that the failed round made is remembered: neither its distributions nor tokens for the penalty.

    Every third round fails, so that its drafts were made in a round.
    """
    it = any_rule("eagle3", CHAIN, device)
    expected = play(it.plain(), params, CHAIN, 20)
    step, table, turns, failures = it.engine.step, it.target.embed.weight.data, list[int](), 0

    def failing(steps: Sequence[Step]) -> list[StepResult]:
        nonlocal failures
        if all(s.draft and s.draft.tokens for s in steps) and len(steps) > 1:
            turns.append(len(steps))
        if not turns or len(turns) % 3 or len(steps) < 2:
            return step(steps)
        root = steps[0].root  # the other sessions find nothing wrong
        kept = table[root].clone()
        table[root] = float("nan")
        with pytest.raises(NumericalError):
            step(steps)
        table[root] = kept
        failures += 1
        return [step([s])[0] for s in steps]

    with mock.patch.object(it.engine, "step", failing):
        assert same(play(it.engine, params, CHAIN, 20), expected)
    assert failures > 5 and it.rounds.counts.eager["a draft that the device does not hold"] > 5


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("params", [[REJECTION, BLOCK], [PENALTY, PENALTY]])
def test_sessions_go_on_where_a_prompt_in_their_step_failed(
    params: list[SamplingParams], recorded: bool, device: str = "cpu"
) -> None:
    """Rounds that nothing was wrong with run again over their drafts, for the first time as far as they know."""
    it = any_rule("eagle3", CHAIN, device)
    engine, bad = (it.engine if recorded else it.plain()), 60
    expected = play(it.plain(), params, CHAIN, 12)
    step, table, turns, failures = engine.step, it.target.embed.weight.data, 0, 0
    engine.open(7, SamplingParams(), True)

    def failing(steps: Sequence[Step]) -> list[StepResult]:
        nonlocal turns, failures
        turns += 1
        if turns % 3 or not all(s.draft for s in steps):
            return step(steps)
        kept, failures = table[bad].clone(), failures + 1
        table[bad] = float("nan")
        with pytest.raises(NumericalError):
            free = set(range(1, engine.info.total_pages)).difference(*(s.pages for s in steps))
            step([*steps, Step(7, 0, sorted(free), feed=Feed([bad], 5))])
        table[bad] = kept
        return [step([s])[0] for s in steps]

    with mock.patch.object(engine, "step", failing):
        assert same(play(engine, params, CHAIN, 12), expected)
    assert failures > 4
    if recorded:
        assert any("could not be taken back" in reason for reason in it.rounds.counts.eager)


def test_what_a_step_noted_is_taken_back_and_nothing_else(device: str = "cpu") -> None:
    rows = Rows(4, 1, 6, torch.float32, torch.device(device))
    for row in (1, 2):
        rows.open(row, PENALTY, True)
    index, counts, asked = rows.cached.new_tensor([1, 2]), rows.cached.new_tensor([1, 2]), rows.sampling([1, 2])
    rows.note(index, index.new_tensor([[3, 4], [0, 1]]), counts, asked)
    held, before = rows.held(), rows.watch().clone()
    with torch.inference_mode():
        rows.note(index, index.new_tensor([[3, 4], [1, 5]]), counts, asked)
        rows.note(index[:1], index.new_tensor([[2, 2]]), counts[:1], asked)
    assert rows.watch().sum() == before.sum() + 2
    rows.open(2, PENALTY, True)  # another session
    rows.note(index[1:], index.new_tensor([[4, 4]]), counts[1:], asked)
    rows.hold_again(held)
    assert torch.equal(rows.watch()[1], before[1]) and not rows.watch()[2].any()
    rows.hold_again(held)
    assert torch.equal(rows.watch()[1], before[1])


# which rounds they are


def test_others_keep_the_rounds_they_had(device: str = "cpu") -> None:
    """A batch goes through the graphs of every rule only as long as somebody in it needs them."""
    target, head = pair("eagle3", device)
    engine = tiny_engine(target, head)
    picked = picks(record(engine, CHAIN, every_rule=True))
    play(engine, [SamplingParams(rule=Rule.REJECTION), REJECTION, BLOCK], CHAIN)  # the first is alone for a while
    assert {"4x5/chain/greedy", f"4x5/chain/{EVERY}"} == set(picked)


def test_rounds_of_every_rule_are_recorded_where_that_is_asked(device: str = "cpu") -> None:
    target, head = pair("eagle3", device)
    made = {}
    for every in (False, True):
        rounds = record(tiny_engine(target, head), CHAIN, rows=1, every_rule=every)
        made[every] = {shape.variant[-1] for shape in rounds.manager.graphs}, set(rounds.memory())
    assert made[False][0] == set(MODES) - {EVERY} and made[True][0] == set(MODES)
    assert made[True][1] - made[False][1] == {"penalty", "rule", "q", "seen"}


def test_which_parameters_ask_for_them() -> None:
    asked = [REJECTION, BLOCK, PENALTY, SamplingParams(0.5, repetition_penalty=0.9)]
    others = [SamplingParams(0.5, top_k=3), SamplingParams(rule=Rule.BLOCK), SamplingParams(0.5)]
    assert [MODES[mode_of(p)] == EVERY for p in [*asked, *others]] == [True] * 4 + [False] * 3
    state = RoundState(4, 2, 3, torch.device("cpu"), every_rule=True, vocab=5)
    state.open(1, BLOCK)
    assert state.own_q(1, 2) is not None and state.rule(1) is Rule.BLOCK
    state.open(1, SamplingParams(rule=Rule.BLOCK))
    assert state.own_q(1, 2) is None and state.rule(1) is Rule.COUPLED and state.memory["rule"].sum() == 0


def test_no_round_of_them_is_launched_before_the_last_one_counts(device: str = "cpu") -> None:
    """Nobody could take back which tokens were seen, and what drafts were drawn from."""
    hands = []
    for recorded in (False, True):
        engine = ahead.limited(tiny_engine(*pair("eagle3", device)), CHAIN)
        if recorded:
            record(engine, CHAIN, every_rule=True)
        hand = ahead.Hand(engine)
        for name, params in (("a", REJECTION), ("b", PENALTY), ("c", BLOCK)):
            hand.generate(name, PROMPTS[0], 25, ignore_eos=True, sampling=params)
        hands.append(hand.finish())
    assert hands[0].heard == hands[1].heard and not hands[1].errors
    assert hands[1].engine.launches > 10 and hands[1].engine.ahead == 0 and hands[1].engine.most == 1
