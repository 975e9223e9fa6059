"""Counterfactual runs equal real runs: other depths, smaller trees, other shapes, another drafter."""

from __future__ import annotations

import pytest
from bench_toys import GREEDY, SAMPLED, lucky_engine, run

from speculator.bench.counterfactual import cut, cut_all, matching, recorded, walk
from speculator.bench.forced import draft_everywhere
from speculator.bench.ngram import lookup
from speculator.bench.outcomes import outcomes
from speculator.engine import Engine
from speculator.types import Draft, DraftShape, SamplingParams

CHAIN, TREE = DraftShape(5), DraftShape(4, 12, 3)
SUB_TREES = [DraftShape(4, 12, 3), DraftShape(4, 7, 3), DraftShape(4, 3, 3), DraftShape(2, 4, 3), DraftShape(1, 2, 3)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return lucky_engine()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_every_depth_of_a_chain_equals_a_real_run(engine: Engine, params: SamplingParams) -> None:
    answers = run(engine, params, CHAIN)
    everywhere = list(
        draft_everywhere(engine, answers, [CHAIN], params, 4, have=lambda answer: {CHAIN: recorded(answer)})
    )
    found = {answer.key: drafts[CHAIN] for answer, drafts in everywhere}
    for depth in range(1, 6):
        shape = DraftShape(depth)
        for real in run(engine, params, shape):
            drafts = cut_all(found[real.key], CHAIN, shape)
            assert drafts is not None
            assert walk(real, drafts.__getitem__) == outcomes(real)
            assert all(drafts[base] == draft for base, draft in _same(recorded(real), drafts))


def _same(real: dict[int, Draft], mine: dict[int, Draft]) -> list[tuple[int, Draft]]:
    """Real drafts without probabilities, which may differ by rounding, and ours likewise."""
    return [(base, Draft(draft.tokens, draft.parents, mine[base].logprobs)) for base, draft in real.items()]


def test_recorded_rounds_alone_are_not_enough(engine: Engine) -> None:
    """The rounds of a shallower run start where the deeper one had none."""
    answers, shallow = run(engine, GREEDY, CHAIN), run(engine, GREEDY, DraftShape(1))
    deep = {answer.key: set(recorded(answer)) for answer in answers}
    assert any(set(recorded(answer)) - deep[answer.key] for answer in shallow)


def test_sub_trees_equal_real_runs(engine: Engine) -> None:
    answers = run(engine, GREEDY, TREE)
    found = {a.key: d[TREE] for a, d in draft_everywhere(engine, answers, [TREE], GREEDY, 4)}
    rounds = 0
    for part in SUB_TREES:
        for real in run(engine, GREEDY, part):
            drafts = cut_all(found[real.key], TREE, part)
            assert drafts is not None, part
            assert walk(real, drafts.__getitem__) == outcomes(real)
            rounds += len(real.rounds)
    assert rounds > 500


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_shapes_drafted_afresh_equal_real_runs(engine: Engine, params: SamplingParams) -> None:
    shapes = [DraftShape(3, 8, 2), DraftShape(4), DraftShape(2, parents=(-1, -1, 0))]
    found = {a.key: d for a, d in draft_everywhere(engine, run(engine, params, CHAIN), shapes, params, 3)}
    for shape in shapes:
        for real in run(engine, params, shape):
            assert walk(real, found[real.key][shape].__getitem__) == outcomes(real)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_prompt_lookup_equals_a_real_run_with_its_drafts(engine: Engine, params: SamplingParams) -> None:
    real = run(engine, params, CHAIN, drafter=lambda tokens: lookup(tokens, 4))
    for answer in real:
        assert walk(answer, lambda base, text=answer.whole: lookup(text[:base], 4)) == outcomes(answer)  # type: ignore[misc]


def test_lookup_takes_the_longest_and_latest_match() -> None:
    assert lookup([1, 2, 3, 9, 1, 2, 3], 2).tokens == (9, 1)
    assert lookup([1, 5, 2, 5, 7, 1, 5], 2).tokens == (2, 5)  # two tokens match at the start, one later on
    assert lookup([1, 2, 3], 4) == Draft()
    assert lookup([4, 4], 3) == Draft((4,), (-1,))


def test_a_tree_is_matched_by_whole_paths() -> None:
    draft = Draft((1, 2, 3, 3, 4), (-1, -1, 0, 1, 3))
    assert matching(draft, (2, 3, 4, 9)) == 3
    assert matching(draft, (2, 3)) == 2
    assert matching(draft, (1, 4)) == 1
    assert matching(draft, (3, 3)) == 0


def test_what_cannot_be_told_from_a_draft_is_none() -> None:
    tree = Draft((1, 2, 3), (-1, 0, 1), (-0.1, -0.2, -0.3))
    assert cut(tree, DraftShape(3, 3, 2), DraftShape(1, 2, 2)) is None  # a second child of the root was not kept
    assert cut(tree, DraftShape(3, 3, 2), DraftShape(3, 3, 1)) is None
    assert cut(Draft((1,), (-1,)), DraftShape(1), DraftShape(2)) is None
