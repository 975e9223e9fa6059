"""The sweep of an acceptance report as a grid: shapes across, sampling and heads down, tau in the cells.

Owns: which run falls into which cell; runs that differ in the seed alone share one, as their mean.
Must never know how the grid is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from speculator.bench.records import Report, SweepPoint
from speculator.bench.report.words import sampling_text, short_shape


class Grid(NamedTuple):
    """`values[row, column]` is a mean tau; cells without a run are missing."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[int, int], float]


def heat_grid(report: Report) -> Grid:
    """Rows and columns in the order in which they first come."""
    cells: dict[tuple[str, str], list[float]] = {}
    for point in report.sweep:
        if point.figures.tau is not None:
            cells.setdefault((_row(point), short_shape(point.shape)), []).append(point.figures.tau)
    rows, columns = (list(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))
    values = {(rows.index(row), columns.index(column)): sum(t) / len(t) for (row, column), t in cells.items()}
    return Grid(rows, columns, values)


def _row(point: SweepPoint) -> str:
    sampling = sampling_text(point.temperature, point.rule)
    return f"{point.head}, {sampling}" if point.head else sampling
