"""Acceptance reports made by hand, for the tests of what is done with reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from speculator.bench.records import (
    SCHEMA,
    Baseline,
    Calibration,
    CalibrationBin,
    Cost,
    Counterfactual,
    Figures,
    Intervals,
    Ledger,
    Name,
    PromptRow,
    Repetition,
    Report,
    Settings,
    Shape,
    Split,
    SweepPoint,
    Theory,
    Time,
    TokenClass,
)


def figures(accepted_at: Sequence[int] = (700, 420, 210), rounds: int = 1000, prompts: int = 20) -> Figures:
    """Figures of rounds that all drafted as deep as `accepted_at` is long, with intervals of 5 points."""
    reached = [rounds, *accepted_at]
    survival = tuple(count / rounds for count in accepted_at)
    conditional = tuple(after / before for before, after in zip(reached, accepted_at, strict=False))
    accepted, drafted = sum(accepted_at), rounds * len(accepted_at)
    tau = 1 + accepted / rounds
    around, given = (tuple((rate - 0.05, rate + 0.05) for rate in rates) for rates in (survival, conditional))
    return Figures(
        prompts=prompts,
        rounds=rounds,
        tokens=rounds + accepted,
        drafted=drafted,
        accepted=accepted,
        tau=tau,
        tau_without_bonus=tau - 1,
        acceptance_rate=accepted / drafted,
        survival=survival,
        conditional=conditional,
        acceptance=survival,
        histogram=tuple(a - b for a, b in zip(reached, [*accepted_at, 0], strict=True)),
        drafted_at=(rounds,) * len(accepted_at),
        accepted_at=tuple(accepted_at),
        intervals=Intervals((tau - 0.1, tau + 0.1), (tau - 1.1, tau - 0.9), (0.4, 0.5), around, given),
        repeated_4grams=0.05,
    )


def rows(prompts: int = 20, spread: int = 0) -> tuple[PromptRow, ...]:
    """Prompts of 50 rounds each, position 1 accepted in 35 of them, `spread` more and less in turns."""
    return tuple(
        PromptRow(
            f"p{i}", "set", "writing", 1, 40, 50, 116, (50, 50, 50), (35 + (-spread if i % 2 else spread), 21, 10)
        )
        for i in range(prompts)
    )


def report() -> Report:
    """A small report without options."""
    shape = Shape(3)
    settings = Settings("models/big", "models/big/head", "eagle3", shape, 0.0, "coupled", 0, 128, 8, resamples=1000)
    made = figures()
    return Report(
        SCHEMA,
        "speculator",
        False,
        {"commit": "abc123", "device": "a CPU"},
        settings,
        0.0,
        made.tau,
        made,
        {"set": made},
    )


def full_report() -> Report:
    """A report with every part."""
    base, less = report(), figures((500, 250, 100))
    bins = tuple(
        CalibrationBin(i / 5, (i + 1) / 5, 10 * i, i / 5 + 0.1 if i else None, 0.15 * i if i else None)
        for i in range(5)
    )
    costs = tuple(Cost(depth, 0.001 * depth + 0.004, 1 + 0.5 * depth, 1.5 + 0.1 * depth) for depth in (1, 2, 3))
    sweep = [
        SweepPoint(Shape(d), t, "coupled", seed, figures((100 * d,)))
        for d in (1, 2)
        for t in (0.0, 1.0)
        for seed in (0, 1)
    ]
    return replace(
        base,
        groups={"category": {"writing": less, "coding": base.overall}, "turn": {"1": less}, "context": {"0-255": less}},
        token_classes=(TokenClass("digits", 100, 60, 0.6, (0.5, 0.7)),),
        counterfactual=tuple(Counterfactual(Shape(d), "recorded", figures((700, 420, 210)[:d])) for d in (1, 2, 3)),
        baselines=(Baseline("n-gram", Shape(3), less),),
        calibration=Calibration(100, 0.034, (0.03, 0.04, None), bins, (0.02, 0.05)),
        theory=Theory("rejection", 1000, (0.72, 0.61, 0.5), (0.7, 0.6, 0.5), (1000, 700, 420)),
        repetition=Repetition(0.05, {"4": 0.11, "8": 0.02}, 0.0),
        noise=(Split("halves", 2.31, 2.35, 0.04, 0.09),),
        time=Time(8, Ledger(900, 0.002, 0.005, 0.001, 0.008), 0.004, 2.33, 1.165, 1.15, costs, 3),
        sweep=tuple(sweep),
        prompts=rows(),
        definitions={"tau": "Tokens per target pass, as this run defines it."},
        names=(Name("tau", "mean acceptance length", "accept length", "acceptance length"),),
        notes=("Two prompts were cut.",),
    )
