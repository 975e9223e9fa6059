"""Two acceptance reports on the same prompts: how far apart, whether by more than chance, and at which positions.

Owns: the paired tests. Must never run a model. The unit is the prompt: a permutation test swaps the two reports prompt
by prompt, an interval draws prompts anew; p values of positions are Holm's, so no more than one in twenty
pairs of equal reports shows any of them below 0.05.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from speculator.bench.bootstrap import Array, interval, ratio, weights
from speculator.bench.plain import RecordError, to_json
from speculator.bench.records import Interval, Report, read_report

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of both reports; `difference` is B minus A."""

    name: str
    a: float
    b: float
    difference: float
    interval: Interval | None
    p: float
    significant: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """A against B over the prompts they share."""

    prompts: int
    only_a: int
    only_b: int
    tau: Difference
    survival: tuple[Difference, ...]  # by position
    settings: tuple[str, ...]  # what the two runs were asked to do differently


def compare(a: Report, b: Report, confidence: float = 0.95, seed: int = 0) -> Comparison:
    """Compare two reports; RecordError when they share fewer than three prompts."""
    left, right = _rows(a), _rows(b)
    keys = [key for key in left if key in right]
    if len(keys) < 3:
        raise RecordError(f"The reports share {len(keys)} prompts; a paired comparison needs 3.", field="prompts")
    depth = min(len(left[keys[0]]), len(right[keys[0]])) - 2
    pair = np.array([[side[key][: depth + 2] for key in keys] for side in (left, right)])  # [2, prompts, 2 + depth]
    plan = _Draws(len(keys), seed)
    taus = _test("tau", pair[:, :, 1], pair[:, :, 0], plan, confidence)
    positions = [_test(str(i + 1), pair[:, :, 2 + i], pair[:, :, 0], plan, confidence) for i in range(depth)]
    return Comparison(
        prompts=len(keys),
        only_a=len(left) - len(keys),
        only_b=len(right) - len(keys),
        tau=taus,
        survival=_holm(positions, 1 - confidence),
        settings=_different(a, b),
    )


class _Draws:
    """One set of swaps and one of resamples for all figures."""

    def __init__(self, count: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.swaps = draw.integers(0, 2, (RESAMPLES, count)).astype(np.float64)
        self.weights = weights(count, RESAMPLES // 4, seed)


def _rows(report: Report) -> dict[tuple[str, str], list[int]]:
    """[rounds, tokens, accepted at 1, 2, ...] of every prompt, all turns together."""
    found: dict[tuple[str, str], list[int]] = {}
    depth = max((len(row.accepted_at) for row in report.prompts), default=0)
    for row in report.prompts:
        padded = [row.rounds, row.tokens, *row.accepted_at, *[0] * (depth - len(row.accepted_at))]
        before = found.setdefault((row.set, row.id), [0] * (depth + 2))
        found[row.set, row.id] = [x + y for x, y in zip(before, padded, strict=True)]
    return found


def _test(name: str, over: Array, under: Array, draws: _Draws, confidence: float) -> Difference:
    """The difference of totals over[1] / under[1] - over[0] / under[0]; over and under are [2, prompts]."""
    a, b = (float(over[i].sum() / max(1.0, under[i].sum())) for i in range(2))
    swapped = _swapped(over, under, draws.swaps)
    p = float((1 + (np.abs(swapped) >= abs(b - a) - 1e-12).sum()) / (1 + len(swapped)))
    drawn = ratio(draws.weights @ over[1], draws.weights @ under[1]) - ratio(
        draws.weights @ over[0], draws.weights @ under[0]
    )
    band = interval(drawn, over.shape[1], confidence)
    return Difference(name, round(a, 6), round(b, 6), round(b - a, 6), band, p, p < 1 - confidence)


def _swapped(over: Array, under: Array, swaps: Array) -> Array:
    """Differences when the prompts marked in swaps [resamples, prompts] change sides."""
    moved_over, moved_under = swaps @ (over[0] - over[1]), swaps @ (under[0] - under[1])
    second = ratio(over[1].sum() + moved_over, under[1].sum() + moved_under)
    first = ratio(over[0].sum() - moved_over, under[0].sum() - moved_under)
    return np.nan_to_num(second - first)


def _holm(found: Sequence[Difference], level: float) -> tuple[Difference, ...]:
    """Holm's step-down adjustment of the p values."""
    order = sorted(range(len(found)), key=lambda i: found[i].p)
    adjusted, highest = list(found), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, found[i].p * (len(found) - rank)))
        d = found[i]
        adjusted[i] = Difference(d.name, d.a, d.b, d.difference, d.interval, highest, highest < level)
    return tuple(adjusted)


def _different(a: Report, b: Report) -> tuple[str, ...]:
    left, right = to_json(a.settings), to_json(b.settings)
    return tuple(f"{name}: {left[name]} against {right[name]}" for name in left if left[name] != right[name])


def main(argv: list[str] | None = None) -> int:
    """`speculator bench compare A.json B.json`; exit code 0, 2 for files that cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="a report of `speculator bench acceptance --json`")
    parser.add_argument("b", type=Path)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args(argv)
    try:
        found = compare(read_report(args.a), read_report(args.b), args.confidence)
    except RecordError as error:
        Console(stderr=True).print(error.message, markup=False, style="red")
        return 2
    show(found, Console())
    if args.json:
        args.json.write_text(json.dumps(to_json(found), indent=1) + "\n", encoding="utf-8")
    return 0


def show(found: Comparison, console: Console) -> None:
    """A table on the terminal."""
    for line in found.settings:
        console.print(f"differs in {line}", markup=False)
    if found.only_a or found.only_b:
        console.print(f"left out: {found.only_a} prompts only A has, {found.only_b} only B has")
    table = Table(title=f"B against A, {found.prompts} prompts, paired")
    for column in ("figure", "A", "B", "B - A", "interval", "p", "differs"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for row in (found.tau, *found.survival):
        name = "tau" if row.name == "tau" else f"survival at {row.name}"
        band = "-" if row.interval is None else f"{row.interval[0]:+.3f} .. {row.interval[1]:+.3f}"
        marks = (f"{row.p:.4f}", "yes" if row.significant else "no")
        table.add_row(name, f"{row.a:.3f}", f"{row.b:.3f}", f"{row.difference:+.3f}", band, *marks)
    console.print(table)
