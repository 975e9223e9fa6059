"""How figures of an acceptance report are written: numbers, intervals, shapes, and the warning of a synthetic run.

Owns: rounding and wording, the same in every output. Must never compute a figure or know a medium.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from speculator.bench.records import Interval, Report, Settings, Shape

NONE = "–"
SYNTHETIC = (
    "Synthetic run: random weights, or acceptance that the engine made up. Times mean something; acceptance, "
    "calibration and speed-ups do not, and must not be quoted or compared."
)


def number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """0..1 as per cent."""
    return NONE if value is None else f"{100 * value:.1f} %"


def seconds(value: float | None) -> str:
    """In the unit that leaves two or three digits before the point."""
    if value is None:
        return NONE
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-9:.3g} ns"


def number_range(interval: Interval | None, digits: int = 2) -> str:
    return "" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def share_range(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def bracketed(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval and value != NONE else value


def shape_text(shape: Shape) -> str:
    if shape.parents:
        return f"static tree, {len(shape.parents)} nodes, depth {shape.depth}"
    if shape.branching > 1:
        return f"tree, depth {shape.depth}, {shape.nodes} nodes, top {shape.branching}"
    return f"chain {shape.depth}"


def short_shape(shape: Shape) -> str:
    """For narrow places: trees are depth / nodes / top-k."""
    if shape.parents or shape.branching <= 1:
        return f"static {len(shape.parents)}" if shape.parents else f"chain {shape.depth}"
    return f"{shape.depth} / {shape.nodes} / {shape.branching}"


def sampling_text(temperature: float, rule: str) -> str:
    return "greedy" if temperature == 0 else f"T {temperature:g}, {rule}"


def subject(settings: Settings) -> str:
    """Target and head, by the last two parts of their paths: the last alone is often `target` or `final`."""
    target, head = ("/".join(text.rstrip("/").split("/")[-2:]) for text in (settings.target, settings.head))
    return f"{target} with {head or settings.method}"


def at(values: Iterable[Interval | None], index: int) -> Interval | None:
    """The interval of one position; none where the list is shorter."""
    return next((value for i, value in enumerate(values) if i == index), None)


class Headline(NamedTuple):
    """One figure that a reader should see first. `key` is its name in `definitions`."""

    key: str
    name: str
    value: str
    interval: str
    means: str


def headlines(report: Report) -> list[Headline]:
    """The figures at the top; what each means is the report's own definition, or ours where it has none."""
    return [*_acceptance(report), *_speed(report)]


def _acceptance(report: Report) -> list[Headline]:
    figures, found = report.overall, report.overall.intervals
    confidence = report.calibration
    mean = ("mean_tau", "Mean over sets", number(report.mean_tau), number_range(report.mean_tau_interval))
    rows = [
        ("tau", "Accept length (tau)", number(figures.tau), number_range(found.tau)),
        (
            "tau_without_bonus",
            "Without bonus",
            number(figures.tau_without_bonus),
            number_range(found.tau_without_bonus),
        ),
        *([mean] if len(report.sets) > 1 else []),
        ("acceptance_rate", "Acceptance rate", share(figures.acceptance_rate), share_range(found.acceptance_rate)),
    ]
    if confidence is not None:
        rows.append(("ece", "Calibration error (ECE)", share(confidence.ece), share_range(confidence.interval)))
    return [Headline(*row, means=means(report, row[0])) for row in rows]


def _speed(report: Report) -> list[Headline]:
    time = report.time
    if time is None:
        return []
    told = filter(None, (number_range(time.interval), f"predicted {number(time.predicted)}"))
    predicted = "; ".join(told)
    speed = Headline("measured", "Speed-up", f"{number(time.measured)} x", predicted, means(report, "measured"))
    if time.recommended_depth is None:
        return [speed]
    best = f"depth {time.recommended_depth}" if time.recommended_depth else "none: plain decoding is faster"
    depth = Headline("recommended_depth", "Best chain", best, "", means(report, "recommended_depth"))
    return [speed, depth]


MEANS = {
    "tau": "Tokens committed per target pass, the bonus token included; 1 is decoding without drafts.",
    "tau_without_bonus": "Drafted tokens accepted per target pass.",
    "acceptance_rate": "Accepted drafted positions over drafted positions. Falls with the depth by construction.",
    "ece": "How far the head's own confidence is from how often it is right; 0 is calibrated.",
    "measured": "Tokens a second over plain decoding, both measured in this run. Predicted: tau x t(plain) / t(round).",
    "recommended_depth": "The depth with the highest predicted speed-up, from survival and the measured costs.",
    "survival": "Share of all rounds that accepted at least this many drafted tokens.",
    "conditional": "Share accepted at this position among the rounds that accepted everything before it.",
    "histogram": "Rounds by how many drafted tokens they accepted.",
    "calibration": "When the head says 80 %, is it right in 80 % of the cases? Points on the diagonal: yes.",
    "ledger": "The mean time of a round by part, beside what plain decoding needs for as many tokens.",
    "depths": "What chains of each depth would have had accepted, from this one recording.",
    "sweep": "Accept length of other runs on the same prompts, mean over seeds; the stronger the colour, the longer.",
}


def means(report: Report, key: str) -> str:
    """The definition of a figure or section in a sentence; "" for an unknown one."""
    return report.definitions.get(key) or MEANS.get(key, "")
