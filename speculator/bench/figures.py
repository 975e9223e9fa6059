"""From counted rounds to acceptance figures with their intervals.

Owns: the arithmetic of every figure that rounds give. Must never run a model, read a file, or import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from speculator.bench.bootstrap import Array, interval, ratio, weights
from speculator.bench.outcomes import Outcome, outcomes
from speculator.bench.recording import Answer
from speculator.bench.records import Figures, Interval, Intervals, PromptRow

Counted = tuple[Answer, Sequence[Outcome]]
BUCKETS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass
class Tally:
    """Counts of one prompt's rounds; index i is draft position i + 1."""

    levels: int
    rounds: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)  # drafted there, and accepted before it
    accepted: list[int] = field(default_factory=list)
    histogram: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drafted, self.reached, self.accepted = ([0] * self.levels for _ in range(3))
        self.histogram = [0] * (self.levels + 1)

    def add(self, outcome: Outcome) -> None:
        self.rounds += 1
        self.tokens += outcome.tokens
        self.histogram[outcome.accepted] += 1
        for i in range(outcome.drafted):
            self.drafted[i] += 1
            self.reached[i] += i <= outcome.accepted
            self.accepted[i] += i < outcome.accepted

    @property
    def row(self) -> list[int]:
        return [self.rounds, self.tokens, *self.drafted, *self.reached, *self.accepted]


class Table:
    """Counts by prompt as columns, [prompts] or [prompts, levels]; `resample` gives them as [resamples] sums."""

    def __init__(self, rows: Array, levels: int) -> None:
        self.rounds, self.tokens = rows[:, 0], rows[:, 1]
        self.drafted, self.reached, self.accepted = (rows[:, 2 + i * levels : 2 + (i + 1) * levels] for i in range(3))
        self._rows, self._levels = rows, levels

    def resample(self, drawn: Array) -> Table:
        return Table(drawn @ self._rows, self._levels)


class Sums:
    """The ratios of a table whose rows are totals."""

    def __init__(self, total: Table) -> None:
        self.tau = ratio(total.tokens, total.rounds)
        self.tau_without_bonus = ratio(total.accepted.sum(1), total.rounds)
        self.acceptance_rate = ratio(total.accepted.sum(1), total.drafted.sum(1))
        self.survival = ratio(total.accepted, total.rounds[:, None])
        self.conditional = ratio(total.accepted, total.reached)
        self.acceptance = ratio(total.accepted, total.drafted)


def tallies(counted: Iterable[Counted], levels: int) -> dict[tuple[str, str], Tally]:
    """Counts by (set, prompt id): all turns of a prompt together."""
    found: dict[tuple[str, str], Tally] = {}
    for answer, rounds in counted:
        tally = found.setdefault((answer.set, answer.id), Tally(levels))
        for outcome in rounds:
            tally.add(outcome)
    return found


def figures(
    counted: Iterable[Counted], levels: int, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Figures:
    """Figures of some rounds of drafts of at most `levels`; `resamples` 0 leaves the intervals out."""
    counts = [tally for tally in tallies(counted, levels).values() if tally.rounds]
    rows = np.array([tally.row for tally in counts], dtype=np.float64).reshape(len(counts), 2 + 3 * levels)
    table = Table(rows, levels)
    total = table.resample(np.ones((1, len(counts))))
    sums = Sums(total)
    found = Figures(
        prompts=len(counts),
        rounds=int(total.rounds[0]),
        tokens=int(total.tokens[0]),
        drafted=int(total.drafted.sum()),
        accepted=int(total.accepted.sum()),
        tau=_number(sums.tau[0]),
        tau_without_bonus=_number(sums.tau_without_bonus[0]),
        acceptance_rate=_number(sums.acceptance_rate[0]),
        survival=_numbers(sums.survival[0]),
        conditional=_numbers(sums.conditional[0]),
        acceptance=_numbers(sums.acceptance[0]),
        histogram=tuple(sum(column) for column in zip(*(t.histogram for t in counts), strict=True)),
        drafted_at=tuple(int(n) for n in total.drafted[0]),
        accepted_at=tuple(int(n) for n in total.accepted[0]),
    )
    if not resamples or not counts:
        return found
    drawn = weights(len(counts), resamples, seed)
    return replace(found, intervals=_intervals(Sums(table.resample(drawn)), len(counts), confidence))


def mean_tau(
    sets: Iterable[Iterable[Counted]], levels: int, resamples: int = 2000, confidence: float = 0.95
) -> tuple[float | None, Interval | None]:
    """The unweighted mean of tau over sets of prompts, and its interval: prompts are drawn anew inside each set."""
    tables = [
        np.array([t.row[:2] for t in tallies(part, levels).values() if t.rounds], dtype=np.float64) for part in sets
    ]
    tables = [table for table in tables if len(table)]
    if not tables:
        return None, None
    mean = _number(np.mean([table[:, 1].sum() / table[:, 0].sum() for table in tables]))
    if not resamples:
        return mean, None
    drawn = [(weights(len(table), resamples, seed) @ table).T for seed, table in enumerate(tables)]
    means = np.mean([ratio(tokens, rounds) for rounds, tokens in drawn], axis=0)
    return mean, rounded(interval(means, min(len(table) for table in tables), confidence))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def _numbers(values: Array) -> tuple[float | None, ...]:
    return tuple(_number(value) for value in values)


def _intervals(sums: Sums, count: int, confidence: float) -> Intervals:
    def one(values: Array) -> Interval | None:
        return rounded(interval(values, count, confidence))

    return Intervals(
        tau=one(sums.tau),
        tau_without_bonus=one(sums.tau_without_bonus),
        acceptance_rate=one(sums.acceptance_rate),
        survival=tuple(one(column) for column in sums.survival.T),
        conditional=tuple(one(column) for column in sums.conditional.T),
        acceptance=tuple(one(column) for column in sums.acceptance.T),
    )


def rounded(found: Interval | None) -> Interval | None:
    return None if found is None else (round(found[0], 6), round(found[1], 6))


# groups


def by_answer(counted: Iterable[Counted], name: Callable[[Answer], str]) -> dict[str, list[Counted]]:
    """Answers by a name of theirs."""
    groups: dict[str, list[Counted]] = {}
    for answer, rounds in counted:
        groups.setdefault(name(answer), []).append((answer, rounds))
    return groups


def by_context(counted: Iterable[Counted]) -> dict[str, list[Counted]]:
    """Rounds by the number of tokens before them; buckets in ascending order."""
    groups: dict[int, list[Counted]] = {}
    for answer, rounds in counted:
        parts: dict[int, list[Outcome]] = {}
        for outcome in rounds:
            parts.setdefault(sum(outcome.base >= limit for limit in BUCKETS), []).append(outcome)
        for bucket, part in parts.items():
            groups.setdefault(bucket, []).append((answer, part))
    return {bucket_name(bucket): groups[bucket] for bucket in sorted(groups)}


def bucket_name(bucket: int) -> str:
    low = BUCKETS[bucket - 1] if bucket else 0
    return f"{low}-{BUCKETS[bucket] - 1}" if bucket < len(BUCKETS) else f"{low}-"


def prompt_rows(counted: Iterable[Counted], levels: int) -> tuple[PromptRow, ...]:
    """Counts of every answer."""
    rows = []
    for answer, rounds in counted:
        tally = Tally(levels)
        for outcome in rounds:
            tally.add(outcome)
        rows.append(
            PromptRow(
                id=answer.id,
                set=answer.set,
                category=answer.category,
                turn=answer.turn,
                context=len(answer.prompt),
                rounds=tally.rounds,
                tokens=tally.tokens,
                drafted_at=tuple(tally.drafted),
                accepted_at=tuple(tally.accepted),
                asked=answer.asked,
            )
        )
    return tuple(rows)


def as_recorded(answers: Iterable[Answer]) -> list[Counted]:
    """Answers with their own rounds."""
    return [(answer, outcomes(answer)) for answer in answers]


def grouped(
    counted: Sequence[Counted], levels: int, resamples: int, confidence: float
) -> Mapping[str, Mapping[str, Figures]]:
    """Figures by category, turn and context bucket."""
    groups = {
        "category": by_answer(counted, lambda a: a.category),
        "turn": by_answer(counted, lambda a: str(a.turn)),
        "context": by_context(counted),
    }
    return {
        kind: {name: figures(part, levels, resamples, confidence) for name, part in parts.items()}
        for kind, parts in groups.items()
    }
