"""Where a round goes and what drafts gain: figures from made-up clocks, in every output; and what recording costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from bench_toys import GREEDY, Letters, lucky_engine, toy_prompts
from report_samples import full_report
from rich.console import Console

from speculator.bench import acceptance, overhead
from speculator.bench.clock import doubts, measure
from speculator.bench.overhead import Spent, summary
from speculator.bench.player import EnginePlayer
from speculator.bench.prompts import Prompt
from speculator.bench.recording import Answer, Round
from speculator.bench.records import Ledger, Report, Time
from speculator.bench.report.html import page
from speculator.bench.report.plots import write_plots
from speculator.bench.report.terminal import show
from speculator.bench.rounds import Plan
from speculator.types import DraftShape

PLAN = Plan(GREEDY, DraftShape(3), 20, 4)
ROUND = {"draft": 0.002, "verify": 0.005, "commit": 0.0005, "host": 0.0015, "rpc": 0.001}


class Clockwork:
    """Answers of 12 tokens whose rounds take what they are told to; drafts have 2 of 3 tokens accepted."""

    notes: Sequence[str] = ()

    def __init__(self, between: float = 0.0, slow: float = 1.0, alone: bool = True) -> None:
        self.between, self.slow, self.alone = between, slow, alone
        self.played: list[Plan] = []

    def play(self, tokenizer: Any, prompts: Sequence[Prompt], plan: Plan, have: Any, notes: Any = None) -> Any:
        self.played.append(plan)
        for prompt in prompts:
            yield self._plain(prompt) if plan.shape is None else self._drafted(prompt, plan.shape.depth)

    def draft_everywhere(self, *given: Any) -> Any:
        raise AssertionError("no drafts are asked for")

    def theory(self, *given: Any) -> Any:
        raise AssertionError("no theory is asked for")

    def _plain(self, prompt: Prompt) -> Answer:
        return self._answer(prompt, 0, 0, {"verify": 0.004})

    def _drafted(self, prompt: Prompt, depth: int) -> Answer:
        return self._answer(prompt, depth, min(depth, 2), ROUND)

    def _answer(self, prompt: Prompt, depth: int, accepted: int, parts: dict[str, float]) -> Answer:
        rounds, base, at, first = [], 4, 0.0, True
        while base < 3 + 25:
            at += sum(parts.values()) * self.slow + self.between
            rounds.append(
                Round(
                    base, (1,) * depth, tuple(range(-1, depth - 1)), (-0.1,) * depth, tuple(range(accepted)),
                    (1,) * (accepted + 1), (-0.1,) * (accepted + 1), at=at, alone=self.alone or first, **parts,
                )
            )  # fmt: skip
            base, first = base + accepted + 1, False
        return Answer(prompt.id, "toy", "x", 1, 0, (1, 2, 3), (1,) * 25, False, tuple(rounds))


def timed(player: Clockwork, **taus: float) -> Time | None:
    return measure(player, Letters(), toy_prompts(2), PLAN, {int(k[1:]): tau for k, tau in taus.items()})


def test_the_parts_of_a_round_add_up_and_the_speed_up_is_found_twice() -> None:
    found = timed(Clockwork())
    assert found is not None
    assert {name: pytest.approx(spent) for name, spent in ROUND.items()} == dict(found.ledger.parts)
    assert found.ledger.round == pytest.approx(0.01) and found.ledger.wall == pytest.approx(0.01)
    assert found.tau == pytest.approx(3.0)
    assert found.predicted == found.measured == pytest.approx(3 * 0.004 / 0.01)
    assert found.gap == 0 and doubts(found) == []


def test_time_that_is_in_no_part_is_shown_and_doubted() -> None:
    found = timed(Clockwork(between=0.004))
    assert found is not None and found.ledger.wall == pytest.approx(0.014)
    assert found.predicted == pytest.approx(1.2) and found.measured == pytest.approx(
        (3 / 0.014) / (1 / 0.008), abs=1e-3
    )
    assert found.gap is not None and found.gap < -0.1
    assert ["below the measured one" in text or "71 % of its time" in text for text in doubts(found)] == [True, True]


def test_the_measured_speed_up_has_an_interval() -> None:
    found = measure(Clockwork(), Letters(), toy_prompts(5), PLAN, {}, resamples=200)
    assert found is not None and found.interval == pytest.approx((found.measured,) * 2, abs=1e-3)  # all alike
    few = measure(Clockwork(), Letters(), toy_prompts(2), PLAN, {}, resamples=200)
    assert few is not None and few.interval is None


def test_each_depth_is_timed_and_the_best_recommended() -> None:
    player = Clockwork()
    found = timed(player, d1=1.5, d2=2.9, d3=2.0)
    assert found is not None
    assert [(c.depth, c.speedup) for c in found.costs] == [(1, 0.6), (2, pytest.approx(1.16)), (3, 0.8)]
    assert found.recommended_depth == 2
    assert {plan.rows for plan in player.played} == {1}


def test_disturbed_answers_are_not_timed() -> None:
    assert timed(Clockwork(alone=False)) is None


# ---- outputs


def with_ledger() -> Report:
    made = full_report()
    assert made.time is not None
    ledger = Ledger(900, 0.002, 0.005, 0.0015, 0.01, commit=0.0005, rpc=0.001, wall=0.0102)
    return replace(made, time=replace(made.time, ledger=ledger, gap=0.013))


def test_the_whole_ledger_is_in_every_output(tmp_path: Path) -> None:
    made, out = with_ledger(), StringIO()
    show(made, Console(file=out, width=200))
    text, html = out.getvalue(), page(made)
    for name, spent in (("draft", "2 ms"), ("commit", "500 µs"), ("rpc", "1 ms"), ("between the parts", "200 µs")):
        assert any(name in line and spent in line for line in text.splitlines()), name
        assert name in html and spent in html
    assert "+1.3 %" in text and "+1.3 %" in html
    assert {f"s{i}" for i in range(6)} <= {part for part in html.replace('"', " ").split() if part[0] == "s"}
    pytest.importorskip("matplotlib")
    assert "ledger" in [path.stem for path in write_plots(made, tmp_path)]


def test_older_reports_without_these_parts_are_shown_too() -> None:
    html = page(full_report())
    assert "Where a round goes" in html and "between the parts" not in html


# ---- the cost of recording


def test_what_recording_costs_is_the_median_over_pairs() -> None:
    pairs = [(Spent(1.02, 0.51, 100), Spent(1.0, 0.5)), (Spent(1.1, 0.52, 100), Spent(1.0, 0.5)),
             (Spent(0.98, 0.50, 100), Spent(1.0, 0.5))]  # fmt: skip
    found = summary(pairs)
    assert (found.pairs, found.rounds) == (3, 300)
    assert found.wall == pytest.approx(0.02) and found.cpu == pytest.approx(0.02)
    assert found.round == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("spread", "told"), [((-0.01, 0.02), "within"), ((0.04, 0.06), "above"), ((-0.2, 0.2), "cannot tell")]
)
def test_noise_is_no_verdict(spread: tuple[float, float], told: str) -> None:
    assert told in overhead.verdict(overhead.Overhead(9, 900, 0.01, sum(spread) / 2, 0.01, spread))


def test_runs_with_and_without_recording_take_turns(tmp_path: Path) -> None:
    player = EnginePlayer(lucky_engine())
    seen: list[bool] = []

    class Watched(EnginePlayer):
        def play(self, tokenizer: Any, prompts: Any, plan: Plan, have: Any, notes: Any = None) -> Iterator[Answer]:
            if not seen:
                assert not plan.record and not list(tmp_path.iterdir())  # nothing is written where nothing is recorded
            seen.append(plan.record)
            return super().play(tokenizer, prompts, plan, have, notes)

    groups = [toy_prompts(2), toy_prompts(2)]
    pairs = list(overhead.measure(Watched(player.engine), Letters(), groups, replace(PLAN, tokens=6), tmp_path))
    assert seen == [False, True, True, False]
    assert all(recorded.rounds > 0 and plain.rounds == 0 for recorded, plain in pairs)
    assert len(list(tmp_path.iterdir())) == 2


def test_without_recording_answers_are_the_same() -> None:
    player = EnginePlayer(lucky_engine())
    plain, recorded = (
        sorted(player.play(Letters(), toy_prompts(2), replace(PLAN, record=r), {}), key=lambda a: a.key) for r in (0, 1)
    )
    assert [a.tokens for a in plain] == [a.tokens for a in recorded]
    assert not any(a.rounds for a in plain) and all(a.rounds for a in recorded)


def test_wrong_pairs_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--pairs", "0"]) == 2
    assert "--pairs must be at least 1" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(args: Any) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(acceptance, "run", stop)
    kept = tmp_path / "run.jsonl"
    kept.write_text("{}\n")
    assert acceptance.main(["--record", str(kept)]) == acceptance.INTERRUPTED
    assert "goes on with them" in " ".join(capsys.readouterr().err.split())
    assert acceptance.main([]) == acceptance.INTERRUPTED
    assert "--record FILE" in " ".join(capsys.readouterr().err.split())
