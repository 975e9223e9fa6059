"""PNG plots of an acceptance report for papers, through matplotlib.

Owns: one file a figure. Must never compute a figure; matplotlib is imported when the first plot is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speculator.bench.records import Calibration, Interval, Report, Time
from speculator.bench.report.heat import heat_grid
from speculator.bench.report.words import at, number, sampling_text, shape_text, subject
from speculator.errors import ConfigError

DPI, SIZE = 200, (5.0, 3.4)  # inches: one column of a paper
Draw = Callable[[Any], None]


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Draws every figure that the report has into `folder`; returns the files.

    Raises ConfigError when matplotlib is not installed.
    """
    figure_class = check_plots(folder)
    return [_draw(figure_class, report, folder / f"{name}.png", draw) for name, draw in _plots(report).items()]


def check_plots(folder: Path) -> Any:
    """Makes the folder; what draws into it. Raises ConfigError when it cannot be, or matplotlib is not installed."""
    figure_class = _matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made a folder of plots: {error.strerror}.") from None
    return figure_class


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("PNG plots need matplotlib: pip install 'speculator[bench]'.") from error
    return Figure


def _plots(report: Report) -> dict[str, Draw]:
    plots: dict[str, Draw] = {
        "survival": lambda axes: _rates(axes, report.overall.survival, report.overall.intervals.survival, "survival"),
        "conditional": lambda axes: _rates(
            axes, report.overall.conditional, report.overall.intervals.conditional, "conditional acceptance"
        ),
        "histogram": lambda axes: _histogram(axes, report.overall.histogram),
    }
    if (found := report.calibration) is not None:
        plots["calibration"] = lambda axes: _calibration(axes, found)
    if (time := report.time) is not None:
        plots["ledger"] = lambda axes: _ledger(axes, time)
    if heat_grid(report).columns:
        plots["sweep"] = lambda axes: _sweep(axes, report)
    return plots


def _draw(figure_class: Any, report: Report, path: Path, draw: Draw) -> Path:
    figure = figure_class(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    chosen = report.settings
    run = f"{shape_text(chosen.shape)}, {sampling_text(chosen.temperature, chosen.rule)}"
    axes.set_title(f"{subject(chosen)}: {run}", fontsize=8)
    if report.synthetic:
        figure.text(0.5, 0.5, "SYNTHETIC", fontsize=32, color="red", alpha=0.25, ha="center", va="center", rotation=20)
    figure.savefig(path, dpi=DPI)
    return path


def _rates(axes: Any, rates: Sequence[float | None], intervals: Sequence[Interval | None], label: str) -> None:
    points = [(i + 1, rate) for i, rate in enumerate(rates) if rate is not None]
    axes.plot([x for x, _ in points], [rate for _, rate in points], marker="o", markersize=4)
    bounds = [(x, interval) for x, _ in points if (interval := at(intervals, x - 1)) is not None]
    axes.fill_between([x for x, _ in bounds], [i[0] for _, i in bounds], [i[1] for _, i in bounds], alpha=0.2)
    axes.set(xlabel="draft position", ylabel=label, ylim=(0, 1), xticks=[x for x, _ in points])


def _histogram(axes: Any, counts: Sequence[int]) -> None:
    rounds = max(1, sum(counts))
    axes.bar(range(len(counts)), [count / rounds for count in counts])
    axes.set(xlabel="drafted tokens accepted", ylabel="share of rounds", xticks=range(len(counts)))


def _calibration(axes: Any, found: Calibration) -> None:
    bins = [one for one in found.bins if one.confidence is not None and one.acceptance is not None]
    most = max((one.count for one in bins), default=1)
    axes.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
    for one in bins:
        if one.interval is not None:
            axes.plot([one.confidence] * 2, one.interval, color="C0", linewidth=1, alpha=0.6)
    sizes = [10 + 90 * one.count / most for one in bins]
    axes.scatter([one.confidence for one in bins], [one.acceptance for one in bins], s=sizes)
    axes.set(xlabel="confidence of the head", ylabel="accepted", xlim=(0, 1), ylim=(0, 1))


def _ledger(axes: Any, time: Time) -> None:
    left = 0.0
    for name, seconds in time.ledger.parts.items():
        axes.barh("round", 1e3 * seconds, left=left, label=name)
        left += 1e3 * seconds
    axes.barh("plain", 1e3 * time.tau * time.plain_token, color="grey", label=f"plain, {number(time.tau)} tokens")
    axes.set(xlabel="milliseconds")
    axes.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _sweep(axes: Any, report: Report) -> None:
    grid = heat_grid(report)
    nothing = float("nan")
    table = [[grid.values.get((r, c), nothing) for c in range(len(grid.columns))] for r in range(len(grid.rows))]
    axes.imshow(table, aspect="auto", cmap="Blues", alpha=0.5)
    for (row, column), value in grid.values.items():
        axes.text(column, row, number(value), ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(grid.columns)), grid.columns, fontsize=6, rotation=20)
    axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize=6)
