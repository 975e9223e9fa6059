"""Figures against hand-counted rounds, and intervals against a simulated head whose acceptance is known."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from speculator.bench.bootstrap import interval, ratio, split_differences, student, weights
from speculator.bench.calibration import calibration, token_class, token_classes
from speculator.bench.clock import recommend
from speculator.bench.compare import compare
from speculator.bench.figures import Counted, by_context, figures, grouped, mean_tau, prompt_rows
from speculator.bench.measure import other_shapes, seed_split
from speculator.bench.outcomes import Outcome
from speculator.bench.plain import RecordError
from speculator.bench.recording import Answer, Round
from speculator.bench.records import SCHEMA, Cost, Report, Settings, Shape
from speculator.bench.repetition import repeated_share, repetition
from speculator.types import DraftShape


def answer(name: str, tokens: tuple[int, ...] = tuple(range(40)), **more: object) -> Answer:
    return replace(Answer(name, "toy", "x", 1, 0, (1, 2, 3), tokens, False, ()), **more)  # type: ignore[arg-type]


def counted(*rounds: tuple[int, int, int]) -> list[Counted]:
    """One prompt for each round (drafted, accepted, tokens)."""
    return [(answer(str(i)), [Outcome(4, *one)]) for i, one in enumerate(rounds)]


def test_figures_count_what_they_say() -> None:
    found = figures(counted((3, 2, 3), (3, 0, 1), (3, 3, 4), (1, 1, 1)), 3, resamples=0)
    assert (found.prompts, found.rounds, found.tokens, found.drafted, found.accepted) == (4, 4, 9, 10, 6)
    assert (found.tau, found.tau_without_bonus, found.acceptance_rate) == (2.25, 1.5, 0.6)
    assert found.survival == (0.75, 0.5, 0.25)
    assert found.conditional == (0.75, 1.0, 0.5)  # the round that drafted one level never drafted the second
    assert found.acceptance == (0.75, pytest.approx(2 / 3, abs=1e-6), pytest.approx(1 / 3, abs=1e-6))
    assert found.histogram == (1, 1, 1, 1)
    assert (found.drafted_at, found.accepted_at) == ((4, 3, 3), (3, 2, 1))


def test_no_rounds_give_no_figures() -> None:
    found = figures([(answer("a"), [])], 2)
    assert found.rounds == 0 and found.tau is None and found.survival == (None, None)


def test_turns_of_one_prompt_are_one_unit() -> None:
    two = [(answer("a"), [Outcome(4, 1, 1, 2)]), (answer("a", turn=2), [Outcome(4, 1, 0, 1)])]
    assert figures(two, 1).prompts == 1
    assert figures(two, 1).intervals.tau is None
    assert [row.turn for row in prompt_rows(two, 1)] == [1, 2]
    assert grouped(two, 1, 0, 0.95)["turn"]["2"].tau == 1.0


def test_rounds_fall_into_context_buckets() -> None:
    groups = by_context([(answer("a"), [Outcome(127, 1, 0, 1), Outcome(128, 1, 1, 2), Outcome(300, 1, 1, 2)])])
    assert {name: [o.base for o in part[0][1]] for name, part in groups.items()} == {
        "0-127": [127],
        "128-255": [128],
        "256-511": [300],
    }


@pytest.mark.parametrize("degrees", [5, 11, 23, 79])
def test_students_quantile(degrees: int) -> None:
    assert student(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


@pytest.mark.parametrize("prompts", [24, 80])
def test_intervals_cover_what_they_claim(prompts: int) -> None:
    """A head with known tau: every prompt has its own acceptance, so rounds of one prompt are alike."""
    draw = np.random.default_rng(prompts)
    depth, runs, truth = 4, 1500, _true_tau(4)
    covered = 0
    for run in range(runs):
        easy = draw.beta(6, 4, prompts)
        rounds = draw.integers(20, 60, prompts)
        tokens = np.array([_tokens(draw, a, n, depth) for a, n in zip(easy, rounds, strict=True)], dtype=np.float64)
        drawn = weights(prompts, 600, run)
        band = interval(ratio(drawn @ tokens, drawn @ rounds.astype(np.float64)), prompts)
        assert band is not None
        covered += band[0] <= truth <= band[1]
    assert 0.93 <= covered / runs <= 0.97


def _tokens(draw: np.random.Generator, accepts: float, rounds: int, depth: int) -> int:
    """Committed by `rounds` rounds of chains whose every token is accepted with probability `accepts`."""
    return int((np.minimum(draw.geometric(1 - accepts, rounds) - 1, depth) + 1).sum())


def _true_tau(depth: int) -> float:
    """E[1 + a + ... + a^depth] of a beta(6, 4): rounds and acceptance are independent."""
    moments = [1.0]
    for k in range(depth):
        moments.append(moments[-1] * (6 + k) / (10 + k))
    return sum(moments)


def test_halves_of_equal_prompts_do_not_differ() -> None:
    a, b = split_differences(np.full(10, 6.0), np.full(10, 3.0), splits=50)
    assert (a == 2).all() and (b == 2).all()
    a, b = split_differences(np.arange(1.0, 11), np.full(10, 1.0), splits=200)
    assert np.allclose(a + b, 11) and (a != b).any()


def test_a_seed_that_changes_nothing_is_no_difference() -> None:
    same = counted((2, 1, 2), (2, 0, 1), (2, 2, 3), (2, 1, 2))
    assert seed_split(same, same, 2).difference == 0.0
    assert seed_split(same, counted((2, 2, 3), (2, 1, 2), (2, 2, 3), (2, 2, 3)), 2).difference == 0.75


def test_the_mean_over_sets_gives_each_set_the_same_weight() -> None:
    low, high = counted(*[(2, 1, 2)] * 9), counted(*[(2, 2, 3), (2, 1, 2), (2, 3, 4)])
    assert mean_tau([low, high], 3, resamples=0) == (2.5, None)
    mean, band = mean_tau([low, high], 3, resamples=400)
    assert mean == 2.5 and band is not None and band[0] < 2.5 < band[1]
    assert mean_tau([low], 3, resamples=400) == (2.0, (2.0, 2.0))
    assert mean_tau([[]], 3) == (None, None)


# calibration


def drafted(name: str, sure: float, accepted: int, rounds: int = 10) -> Answer:
    """`rounds` drafts of one token with confidence `sure`, of which `accepted` are accepted."""
    made = tuple(
        Round(4 + i, (1,), (-1,), (math.log(sure),), (0,) if i < accepted else (), (1,), (0.0,)) for i in range(rounds)
    )
    return answer(name, rounds=made)


def test_a_calibrated_head_has_no_error_and_an_overconfident_one_has() -> None:
    honest = calibration([drafted("a", 0.3, 3), drafted("b", 0.7, 7)], 1, resamples=0)
    assert honest.count == 20 and honest.ece == pytest.approx(0, abs=1e-6)
    assert [(b.low, b.count, b.acceptance) for b in honest.bins if b.count] == [(0.3, 10, 0.3), (0.7, 10, 0.7)]
    proud = calibration([drafted("a", 0.95, 5), drafted("b", 0.95, 5)], 2, resamples=0)
    assert proud.ece == pytest.approx(0.45, abs=1e-6) and proud.ece_at == (proud.ece, None)
    banded = calibration([drafted(str(i), 0.95, 3 + i) for i in range(4)], 1, resamples=300).bins
    assert [b.interval is not None for b in banded] == [False] * 9 + [True]
    low, high = banded[-1].interval or (0, 0)
    assert low < (banded[-1].acceptance or 0) == 0.45 < high


def test_token_classes_follow_the_text_of_the_answer() -> None:
    pieces = {5: " the", 6: "7", 7: ".", 8: "\n", 9: "ing"}
    text = answer("a", (0, 5, 6, 7, 8, 9), rounds=())
    found = token_classes([(text, [Outcome(4, 3, 1, 2), Outcome(6, 3, 3, 3)])], pieces.__getitem__, resamples=0)
    assert {c.name: (c.judged, c.accepted) for c in found} == {
        "word start": (1, 1),
        "number": (1, 0),
        "sign": (1, 1),
        "line end": (1, 1),
        "word inside": (1, 1),
    }
    assert token_class("") == "special" and token_class("  ") == "space"


def test_a_collapsed_model_is_seen() -> None:
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)
    loop = repetition([answer(str(i), (1, 2, 3, 4, 5, 6)) for i in range(3)])
    assert loop.repeated_4grams == 0 and loop.shared["4"] == 1.0 and loop.identical_answers == 1.0
    alive = repetition([answer("a", tuple(range(20))), answer("b", tuple(range(50, 70)))])
    assert alive.shared["4"] == 0 and alive.identical_answers == 0
    turns = repetition([answer("a"), answer("a", turn=2)])
    assert turns.shared["4"] == 0.0  # both are answers to one prompt


def test_the_best_depth_is_recommended() -> None:
    costs = [Cost(1, 0.01, 1.5, 1.2), Cost(2, 0.01, 2.0, 1.6), Cost(3, 0.02, 2.1, 1.6), Cost(4, 0.1, None, None)]
    assert recommend(costs) == 2
    assert recommend([Cost(1, 0.01, 1.5, 0.9)]) == 0
    assert recommend([]) is None


def test_other_shapes_of_a_tree_are_chains_fewer_nodes_and_fewer_levels() -> None:
    assert other_shapes(DraftShape(2)) == [DraftShape(1), DraftShape(2)]
    shapes = other_shapes(DraftShape(3, 8, 4))
    assert {DraftShape(3), DraftShape(3, 4, 4), DraftShape(2, 8, 4)} <= set(shapes)


# comparisons


def report(rates: list[float], seed: int, **more: object) -> Report:
    """Prompts of 40 rounds each with these acceptances, chains of 3."""
    draw, rows = np.random.default_rng(seed), list[Counted]()
    for i, rate in enumerate(rates):
        hits = np.minimum(draw.geometric(1 - rate, 40) - 1, 3)
        rows.append((answer(str(i)), [Outcome(4, 3, int(h), int(h) + 1) for h in hits]))
    found = figures(rows, 3, resamples=0)
    settings = Settings("t", "h", "eagle3", Shape(3), 0.0, "coupled", seed, 64, 8)
    return Report(SCHEMA, "speculator", False, {}, settings, 0.0, 1.0, found, {}, prompts=prompt_rows(rows, 3))


RATES = [0.3 + 0.4 * i / 23 for i in range(24)]


def test_a_better_head_is_better_and_where() -> None:
    found = compare(report(RATES, 1), report([r + 0.1 for r in RATES], 2))
    assert found.tau.significant and found.tau.difference > 0.1 and found.prompts == 24
    assert found.tau.interval is not None and found.tau.interval[0] > 0
    assert found.survival[0].significant
    assert found.settings == ("seed: 1 against 2",)


def test_equal_heads_seldom_differ() -> None:
    found = [compare(report(RATES, 2 * i), report(RATES, 2 * i + 1)) for i in range(40)]
    assert sum(c.tau.significant for c in found) <= 6  # 2 expected
    assert sum(any(d.significant for d in c.survival) for c in found) <= 6


def test_reports_of_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(RecordError, match="share 2 prompts"):
        compare(report(RATES[:2], 1), report(RATES, 2))


def test_repetition_has_intervals_over_prompts() -> None:
    rng = random.Random(0)
    alive = [answer(str(i), tuple(rng.sample(range(1000), 20))) for i in range(10)]
    loops = [answer(f"loop {i}", (i,) * 20) for i in range(10)]
    found = repetition(alive + loops)
    low, high = found.intervals["repeated_4grams"]
    assert found.repeated_4grams is not None and 0.1 < low < found.repeated_4grams < high < 0.9
    again = repetition([*alive, *alive[:0], *loops], resamples=0)
    assert not again.intervals and again.repeated_4grams == found.repeated_4grams
    turns = repetition([answer("a", (1,) * 20), answer("a", (2,) * 20, turn=2), answer("b", tuple(range(20)))])
    assert "repeated_4grams" not in turns.intervals, "two prompts are too few, however many their answers"
