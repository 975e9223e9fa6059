"""The charts of an acceptance report as SVG.

Owns: which figure becomes which marks. Must never compute a figure, nor know the page around the charts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from speculator.bench.records import Calibration, Interval, Report, Shape, Time
from speculator.bench.report.heat import heat_grid
from speculator.bench.report.svg import BOTTOM, TOP, Axis, Chart, Point, step_axis, unit_axis, value_axis
from speculator.bench.report.words import at, bracketed, number, number_range, seconds, share, share_range

Shares = Sequence[float | None]
PLAIN = 5  # the colour of plain decoding, after those of a round's parts


def survival(report: Report) -> str:
    """Survival by position with its band, and that of the baselines."""
    figures = report.overall
    chart = Chart("Survival by draft position", _positions(figures.survival), unit_axis("rounds that got this far"))
    _rates(chart, figures.survival, figures.intervals.survival, series=0)
    if report.baselines:
        chart.name(0, f"this head, {_kind(report.settings.shape)}")
    for series, baseline in enumerate(report.baselines[:3], start=1):
        _rates(chart, baseline.figures.survival, baseline.figures.intervals.survival, series)
        chart.name(series, f"{baseline.name}, {_kind(baseline.shape)}")
    return chart.svg()


def conditional(report: Report) -> str:
    """Conditional acceptance by position, with theory beside it where it was measured."""
    figures = report.overall
    chart = Chart("Conditional acceptance by draft position", _positions(figures.conditional), unit_axis("accepted"))
    _rates(chart, figures.conditional, figures.intervals.conditional, series=0)
    if report.theory is not None:
        theory = report.theory
        _rates(chart, theory.acceptance[: len(figures.conditional)], theory.intervals, series=1)
        chart.name(0, f"measured, {_kind(report.settings.shape)}")
        chart.name(1, f"theory of a chain, 1 - TV(p, q), {theory.rule}")
    return chart.svg()


def _kind(shape: Shape) -> str:
    """Trees accept more than chains by construction: a curve says which it is of."""
    return "tree" if shape.parents or shape.branching > 1 else "chain"


def histogram(report: Report) -> str:
    """Shares of rounds by accepted drafts."""
    counts = report.overall.histogram
    rounds = max(1, sum(counts))
    names = [str(accepted) for accepted in range(len(counts))]
    chart = Chart("Rounds by accepted drafts", step_axis("drafted tokens accepted", names), _share_axis(counts, rounds))
    for accepted, count in enumerate(counts):
        says = f"{count} of {rounds} rounds accepted {accepted}"
        chart.box(accepted - 0.38, accepted + 0.38, 0, count / rounds, says)
        chart.note(accepted, count / rounds, f"{100 * count / rounds:.0f} %")
    return chart.svg()


def calibration(found: Calibration) -> str:
    """Reliability: acceptance over confidence, a dot a bin, its area by the number of tokens."""
    chart = Chart("Reliability of the head's confidence", unit_axis("confidence of the head"), unit_axis("accepted"))
    chart.line([(0, 0), (1, 1)], extra="dashed muted")
    most = max((one.count for one in found.bins), default=0)
    for one in found.bins:
        if one.confidence is not None and one.acceptance is not None:
            accepted = bracketed(share(one.acceptance), share_range(one.interval))
            says = f"{one.count} tokens: confidence {share(one.confidence)}, accepted {accepted}"
            if one.interval is not None:
                chart.whisker(one.confidence, *one.interval)
            chart.dot(one.confidence, one.acceptance, says, radius=3 + 9 * math.sqrt(one.count / most))
    return chart.svg()


def ledger(time: Time) -> str:
    """One bar of the parts of the mean round, above the bar of plain decoding for the same tokens."""
    parts = time.ledger.parts
    plain = time.tau * time.plain_token
    axis = value_axis("milliseconds", 1e3 * max(time.ledger.round, plain))
    rows = Axis("", 0.0, 2.0, [(1.5, "round"), (0.5, "plain")])
    chart = Chart("Time of a round beside plain decoding of as many tokens", axis, rows, height=150)
    start = 0.0
    for series, (name, spent) in enumerate(parts.items()):
        says = f"{name}: {seconds(spent)}, {share(spent / time.ledger.round if time.ledger.round else None)} of a round"
        chart.box(1e3 * start, 1e3 * (start + spent), 1.15, 1.85, says, series)
        chart.name(series, f"{name} {seconds(spent)}")
        start += spent
    chart.box(0, 1e3 * plain, 0.15, 0.85, f"plain decoding of {number(time.tau)} tokens: {seconds(plain)}", PLAIN)
    chart.name(PLAIN, f"plain decoding of {number(time.tau)} tokens {seconds(plain)}")
    return chart.svg()


def depths(report: Report) -> str:
    """tau of counterfactual chains by depth; "" with fewer than two."""
    chains = [one for one in report.counterfactual if one.shape.branching <= 1 and not one.shape.parents]
    rows = sorted((one.shape.depth, one.figures) for one in chains if one.figures.tau is not None)
    if len(rows) < 2:
        return ""
    highest = max(figures.intervals.tau[1] if figures.intervals.tau else figures.tau or 0 for _, figures in rows)
    axes = step_axis("depth of the chain", [str(depth) for depth, _ in rows]), value_axis("accept length", highest)
    chart = Chart("Accept length by depth of the chain", *axes)
    chart.line([(i, figures.tau or 0.0) for i, (_, figures) in enumerate(rows)])
    for i, (depth, figures) in enumerate(rows):
        _dot(chart, i, figures.tau or 0.0, f"chain {depth}", number(figures.tau), figures.intervals.tau)
    return chart.svg()


def sweep(report: Report) -> str:
    """A heat map of tau: shapes by sampling (and head); "" without a sweep."""
    grid = heat_grid(report)
    if not grid.columns:
        return ""
    top = len(grid.rows)
    height = TOP + BOTTOM + 56 * top
    columns = Axis(
        "draft; trees: depth / nodes / top-k",
        0.0,
        len(grid.columns),
        [(i + 0.5, c) for i, c in enumerate(grid.columns)],
    )
    chart = Chart("Accept length over shapes and sampling", columns, Axis("", 0.0, top, ()), height)
    values = [value for value in grid.values.values()]
    low, spread = min(values), max(values) - min(values)
    for (row, column), value in grid.values.items():
        place = (column, column + 1, top - row - 1, top - row)
        says = f"{grid.rows[row]}, {grid.columns[column]}: tau {number(value)}"
        chart.cell(*place, (value - low) / spread if spread else 0.5, number(value), says)
    for i, name in enumerate(grid.rows):
        chart.row_name(top - i - 0.04, name)
    return chart.svg()


# ---- marks that several charts share ----


def _positions(values: Shares) -> Axis:
    return step_axis("draft position", [str(i + 1) for i in range(len(values))])


def _share_axis(counts: Sequence[int], rounds: int) -> Axis:
    axis = value_axis("share of rounds", 100 * max(counts, default=0) / rounds * 1.08)
    ticks = [(value / 100, f"{text} %") for value, text in axis.ticks]
    return Axis(axis.label, 0.0, axis.high / 100, ticks)


def _rates(chart: Chart, rates: Shares, intervals: Sequence[Interval | None], series: int) -> None:
    points: list[Point] = [(float(i), rate) for i, rate in enumerate(rates) if rate is not None]
    bounds = [(x, at(intervals, int(x))) for x, _ in points]
    chart.band([(x, *interval) for x, interval in bounds if interval is not None], series)
    chart.line(points, series)
    for (x, rate), (_, interval) in zip(points, bounds, strict=True):
        words = f"position {x + 1:.0f}: {share(rate)}"
        chart.dot(x, rate, f"{words} ({share_range(interval)})" if interval else words, series)
        if series == 0:
            chart.note(x, rate, f"{100 * rate:.0f} %")


def _dot(chart: Chart, x: float, y: float, name: str, value: str, interval: Interval | None) -> None:
    if interval is not None:
        chart.whisker(x, *interval)
    chart.dot(x, y, f"{name}: {value} {number_range(interval)}".strip())
    chart.note(x, interval[1] if interval else y, value)
