"""Two acceptance reports on the same prompts: how far apart, whether by more than chance, and at which positions.

Owns: the paired tests. Must never run a model. The unit is the prompt: a permutation test swaps the two reports prompt
by prompt, an interval draws prompts anew; p values of positions are Holm's, so no more than one in twenty
pairs of equal reports shows any of them below 0.05. Survival is over each report's own rounds, and worse drafts start
their rounds elsewhere, also where the head is surer: a position can rise because later ones fell. Where the first
difference lies is told by the counterfactual chains, which are judged along the same text in both reports.
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
from speculator.bench.outputs import check_files
from speculator.bench.plain import RecordError, to_json
from speculator.bench.records import Interval, PromptRow, Report, read_report
from speculator.bench.report.tables import Table as Rows
from speculator.bench.report.tables import beside
from speculator.bench.report.terminal import grid
from speculator.bench.report.words import SYNTHETIC
from speculator.errors import ConfigError

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
class Paired:
    """Run B against run A over the prompts they share."""

    prompts: int
    only_a: int
    only_b: int
    tau: Difference
    survival: tuple[Difference, ...]  # by position


@dataclass(frozen=True, slots=True)
class Comparison(Paired):
    """Report B against report A."""

    synthetic: bool = False  # one of the two is, so no difference in acceptance means anything
    settings: tuple[str, ...] = ()  # what the two runs were asked to do differently
    equal_to: int | None = None  # chains of up to this depth are judged the same in both; None: it cannot be told


def compare(a: Report, b: Report, confidence: float = 0.95, seed: int = 0) -> Comparison:
    """Compare two reports; RecordError when they share fewer than three prompts."""
    found = paired(a.prompts, b.prompts, confidence, seed)
    parts = {name: getattr(found, name) for name in Paired.__dataclass_fields__}
    return Comparison(
        **parts, synthetic=a.synthetic or b.synthetic, settings=_different(a, b), equal_to=_equal_to(a, b)
    )


def paired(a: Sequence[PromptRow], b: Sequence[PromptRow], confidence: float = 0.95, seed: int = 0) -> Paired:
    """Compare the prompts of two runs; RecordError when they share fewer than three, or one has two texts."""
    left, right = _rows(a), _rows(b)
    keys = [key for key in left if key in right]
    if len(keys) < 3:
        raise RecordError(f"The reports share {len(keys)} prompts; a paired comparison needs 3.", field="prompts")
    _check_texts(a, b)
    depth = min(len(left[keys[0]]), len(right[keys[0]])) - 2
    pair = np.array([[side[key][: depth + 2] for key in keys] for side in (left, right)])  # [2, prompts, 2 + depth]
    plan = _Draws(len(keys), seed)
    taus = _test("tau", pair[:, :, 1], pair[:, :, 0], plan, confidence)
    positions = [_test(str(i + 1), pair[:, :, 2 + i], pair[:, :, 0], plan, confidence) for i in range(depth)]
    return Paired(
        prompts=len(keys),
        only_a=len(left) - len(keys),
        only_b=len(right) - len(keys),
        tau=taus,
        survival=holm(positions, 1 - confidence),
    )


def _check_texts(a: Sequence[PromptRow], b: Sequence[PromptRow]) -> None:
    """RecordError when a prompt that both have was not the same text in both, as far as they say what it was."""
    asked = {(row.set, row.id, row.turn): row.asked for row in a if row.asked}
    for row in b:
        if row.asked and asked.get((row.set, row.id, row.turn), row.asked) != row.asked:
            raise RecordError(
                f"Prompt {row.id} of {row.set}, turn {row.turn}, is another text in A than in B: only reports on the"
                " same prompts can be paired.",
                field="prompts",
            )


def _equal_to(a: Report, b: Report) -> int | None:
    """Up to which depth counterfactual chains have exactly the same counts; None unless both have them on one text."""
    left, right = _chains(a), _chains(b)
    if _text(a) != _text(b):
        return None
    depths = sorted(left.keys() & right.keys())
    if not depths or depths[0] != 1:
        return None
    same = 0
    for depth in depths:
        if depth != same + 1 or left[depth] != right[depth]:
            break
        same = depth
    return same


def _text(report: Report) -> tuple[object, ...]:
    """What the text of a run without drafts depends on."""
    s = report.settings
    return _target(report), s.temperature, s.rule, s.seed, s.max_tokens, s.top_k, s.top_p, s.min_p


def _target(report: Report) -> str:
    """The target by what its files hold, or by its name where that is not known."""
    return str(report.provenance.get("target_revision") or report.settings.target)


def _chains(report: Report) -> dict[int, tuple[int, ...]]:
    """Rounds, tokens and accepted at every position of each counterfactual chain, by its depth."""
    chains = [one for one in report.counterfactual if one.shape.branching <= 1 and not one.shape.parents]
    return {c.shape.depth: (c.figures.rounds, c.figures.tokens, *c.figures.accepted_at) for c in chains}


class _Draws:
    """One set of swaps and one of resamples for all figures."""

    def __init__(self, count: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.swaps = draw.integers(0, 2, (RESAMPLES, count)).astype(np.float64)
        self.weights = weights(count, RESAMPLES // 4, seed)


def _rows(rows: Sequence[PromptRow]) -> dict[tuple[str, str], list[int]]:
    """[rounds, tokens, accepted at 1, 2, ...] of every prompt, all turns together."""
    found: dict[tuple[str, str], list[int]] = {}
    depth = max((len(row.accepted_at) for row in rows), default=0)
    for row in rows:
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


def holm(found: Sequence[Difference], level: float) -> tuple[Difference, ...]:
    """Holm's step-down adjustment of the p values."""
    order = sorted(range(len(found)), key=lambda i: found[i].p)
    adjusted, highest = list(found), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, found[i].p * (len(found) - rank)))
        d = found[i]
        adjusted[i] = Difference(d.name, d.a, d.b, d.difference, d.interval, highest, highest < level)
    return tuple(adjusted)


def _different(a: Report, b: Report) -> tuple[str, ...]:
    left, right = ({**to_json(one.settings), "target": _target(one)} for one in (a, b))
    return tuple(f"{name}: {left[name]} against {right[name]}" for name in left if left[name] != right[name])


def main(argv: list[str] | None = None) -> int:
    """`speculator bench compare A.json [B.json]`; exit code 0, 2 for files that cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, help="a report of `speculator bench acceptance --json`")
    parser.add_argument(
        "b", type=Path, nargs="?", help="another; without it the runs of A's sweep stand beside each other"
    )
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args(argv)
    try:
        _check(args)
        a = read_report(args.a)
        found = compare(a, read_report(args.b), args.confidence) if args.b else _pairs(a, args.a)
    except (RecordError, ConfigError) as error:
        Console(stderr=True).print(error.message, markup=False, style="red")
        return 2
    if isinstance(found, Comparison):
        show(found, Console())
    else:
        _show_sweep(a, found, Console())
    if args.json:
        kept = found if isinstance(found, Comparison) else {"synthetic": a.synthetic, "sweep": a.sweep}
        args.json.write_text(json.dumps(to_json(kept), indent=1) + "\n", encoding="utf-8")
    return 0


def _check(args: argparse.Namespace) -> None:
    if not 0 < args.confidence < 1:
        raise ConfigError(f"--confidence must lie between 0 and 1, not be {args.confidence}.")
    check_files(args.json)


def _show_sweep(report: Report, found: Rows, console: Console) -> None:
    _warn(report.synthetic, console)
    console.print(grid(found))


def _warn(synthetic: bool, console: Console) -> None:
    if synthetic:
        console.print(SYNTHETIC, markup=False, style="bold yellow")


def _pairs(report: Report, path: Path) -> Rows:
    """What the report says of its own sweep."""
    found = beside(report)
    if not found.rows:
        raise RecordError(f"{path} has no sweep whose runs could stand beside each other: name a second report.")
    return found


def show(found: Comparison, console: Console) -> None:
    """A table on the terminal."""
    _warn(found.synthetic, console)
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
    if found.equal_to is not None:
        console.print(_begins(found.equal_to, len(found.survival)), markup=False)


def _begins(equal_to: int, depth: int) -> str:
    if equal_to >= depth:
        return f"Along the text, drafts are judged the same at all of the {depth} positions."
    return f"Along the text, drafts begin to differ at position {equal_to + 1}."
