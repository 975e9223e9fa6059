"""Sweeps of the acceptance benchmark: several heads, shapes and ways of sampling on the same prompts, in one run.

Owns: which runs a sweep has, the file that each can be resumed from, and what stands beside what. Must never load a
model or read arguments. Prompt look-up plays along as a head that every other one must beat.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from speculator.bench.compare import Difference, Paired, holm, paired
from speculator.bench.figures import Counted, as_recorded, prompt_rows
from speculator.bench.measure import Bench, halves_split, seed_split, shape_of, text_is_fixed
from speculator.bench.ngram import NAME, lookup, rounds_along
from speculator.bench.recording import Answer, Recording
from speculator.bench.records import Against, Shape, SweepPoint
from speculator.bench.report.words import sampling_text, short_shape
from speculator.bench.rounds import Plan
from speculator.sampling import GREEDY_BELOW
from speculator.types import DraftShape, Rule

LOOKUP = "ngram"  # the method of prompt look-up
FEWEST = 3  # prompts of a paired comparison


class Contender(NamedTuple):
    """A head of the sweep, and a bench with it on the target that all heads share."""

    name: str
    method: str
    bench: Bench


@dataclass(frozen=True, slots=True)
class Sweep:
    """Every contender under every plan, and before them prompt look-up, wherever the first contender plays.

    Contenders are asked for one after the other, so that each may go before the next one comes.
    """

    contenders: Iterable[Contender]
    plans: Sequence[Plan]
    book: Book
    baseline: bool = True
    confidence: float = 0.95

    def run(self) -> tuple[SweepPoint, ...]:
        """All points, each beside the earlier ones that differ from it in one choice."""
        return against(list(self._points()), self.confidence)

    def _points(self) -> Iterator[SweepPoint]:
        for i, contender in enumerate(self.contenders):
            head = _Runs(contender, self.book)
            played = [head.play(plan) for plan in distinct(self.plans)]
            if i == 0 and self.baseline:
                yield from _lookups(_Runs(Contender(NAME, LOOKUP, contender.bench), self.book), played)
            yield from (head.point(*one) for one in played)


class Played(NamedTuple):
    """A plan with its rounds, and those under another seed for the noise floor; none where there is no such run."""

    plan: Plan
    counted: Sequence[Counted]
    again: Sequence[Counted] = ()


def distinct(plans: Sequence[Plan]) -> list[Plan]:
    """The plans, greedy ones once: all rules accept the same then."""
    once: dict[object, Plan] = {}
    for plan in plans:
        greedy = plan.sampling.temperature < GREEDY_BELOW
        sampling = replace(plan.sampling, rule=Rule.COUPLED) if greedy else plan.sampling
        once.setdefault((sampling, plan.shape), plan)
    return list(once.values())


class _Runs:
    """The runs of one contender."""

    def __init__(self, contender: Contender, book: Book) -> None:
        (self._name, self._method, self._bench), self._book = contender, book

    def play(self, plan: Plan) -> Played:
        other = replace(plan, sampling=replace(plan.sampling, seed=plan.sampling.seed + 1))
        twice = self._bench.wishes.seeds > 1 and plan.sampling.temperature >= GREEDY_BELOW
        return Played(plan, self._rounds(plan), self._rounds(other) if twice else ())

    def _rounds(self, plan: Plan) -> list[Counted]:
        label = f"{self._name}, {short_shape(_shape(plan))}, {_sampling(plan)}"
        with self._book.recording(self._name, plan) as recording:
            return as_recorded(self._bench.run(plan, recording, label))

    def point(self, plan: Plan, counted: Sequence[Counted], again: Sequence[Counted]) -> SweepPoint:
        depth = _depth(plan)
        return SweepPoint(
            shape=_shape(plan),
            temperature=plan.sampling.temperature,
            rule=plan.sampling.rule.value,
            seed=plan.sampling.seed,
            figures=self._bench.figures(counted, depth),
            head=self._name,
            method=self._method,
            noise=(*halves_split(counted, depth), *([seed_split(counted, again, depth)] if again else [])),
            prompts=prompt_rows(counted, depth),
        )


def _lookups(runs: _Runs, played: Sequence[Played]) -> Iterator[SweepPoint]:
    """Prompt look-up, once for every depth and way of sampling."""
    once = {(one.plan.sampling, _depth(one.plan)): one for one in played}
    for one in once.values():
        yield runs.point(*_looked_up(runs, one))


def _looked_up(runs: _Runs, head: Played) -> Played:
    """Along the answers that a head had where drafts cannot change them."""
    plan = looked_up(head.plan)
    if not text_is_fixed(plan.sampling):
        return runs.play(plan)
    return Played(plan, *([(a, rounds_along(a, _depth(plan))) for a, _ in part] for part in head[1:]))


def looked_up(plan: Plan) -> Plan:
    """The plan with drafts of prompt look-up, chains as deep as its own."""
    depth = _depth(plan)
    return replace(plan, shape=DraftShape(depth), drafter=lambda tokens: lookup(tokens, depth))


def _shape(plan: Plan) -> Shape:
    assert plan.shape is not None
    return shape_of(plan.shape)


def _depth(plan: Plan) -> int:
    return _shape(plan).depth


def _sampling(plan: Plan) -> str:
    return sampling_text(plan.sampling.temperature, plan.sampling.rule.value)


# what stands beside what


def against(points: Sequence[SweepPoint], confidence: float = 0.95) -> tuple[SweepPoint, ...]:
    """The points, each with its differences from earlier ones; no more than one in twenty sweeps of equal runs has a
    significant one."""
    places = [(i, j) for i, b in enumerate(points) for j, a in enumerate(points[:i]) if _one_choice_apart(a, b)]
    pairs = [(i, j, found) for i, j in places if (found := _paired(points[j], points[i], confidence))]
    taus = holm([found.tau for _, _, found in pairs], 1 - confidence)
    beside: dict[int, list[Against]] = {}
    for (i, j, found), tau in zip(pairs, taus, strict=True):
        beside.setdefault(i, []).append(_against(j, tau, found))
    return tuple(replace(point, against=tuple(beside.get(i, ()))) for i, point in enumerate(points))


def _against(point: int, tau: Difference, found: Paired) -> Against:
    positions = tuple(i + 1 for i, one in enumerate(found.survival) if one.significant)
    return Against(point, tau.difference, tau.interval, tau.p, tau.significant, positions)


def _paired(a: SweepPoint, b: SweepPoint, confidence: float) -> Paired | None:
    shared = {(row.set, row.id) for row in a.prompts} & {(row.set, row.id) for row in b.prompts}
    return paired(a.prompts, b.prompts, confidence) if len(shared) >= FEWEST else None


def _one_choice_apart(a: SweepPoint, b: SweepPoint) -> bool:
    """Head, draft, temperature or rule; prompt look-up stands beside heads alone, by the depth of their drafts."""
    apart = [a.head != b.head, a.temperature != b.temperature, a.rule != b.rule]
    if LOOKUP in (a.method, b.method):
        return apart == [True, False, False] and a.shape.depth == b.shape.depth
    return sum([*apart, a.shape != b.shape]) == 1


# where runs are written down


class Book:
    """A recording file for every run of a sweep in `folder`, named by what the run was asked to do; None keeps nothing.

    `settings` are what all runs have in common; `weights` are fingerprints of the heads by name. What was noted as
    done is not played again.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], weights: Mapping[str, str]) -> None:
        self._folder, self._weights = folder, weights
        self._settings = {name: value for name, value in settings.items() if name not in ("models", "shape")}
        self._done: dict[tuple[str, Plan], Sequence[Answer]] = {}

    def note(self, name: str, plan: Plan, answers: Sequence[Answer]) -> None:
        self._done[name, plan] = answers

    def recording(self, name: str, plan: Plan) -> Recording:
        if (done := self._done.get((name, plan))) is not None or self._folder is None:
            held = Recording(None, {})
            held.answers += done or ()
            return held
        asked = self._settings | run_settings(name, plan) | {"weights": self._weights.get(name, "")}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
        words = f"{name} {short_shape(_shape(plan))} {_sampling(plan)} seed {plan.sampling.seed}"
        return Recording(self._folder / f"{_slug(words)}-{digest}.jsonl", asked)


def sweep_folder(record: Path | None) -> Path | None:
    """Where the runs of a sweep lie whose first one is written to `record`."""
    return None if record is None else record.with_name(f"{record.stem}.sweep")


def run_settings(name: str, plan: Plan) -> dict[str, Any]:
    """What tells one run of a sweep from the others."""
    s, shape = plan.sampling, _shape(plan)
    drawn = {"temperature": s.temperature, "rule": s.rule.value, "seed": s.seed, "top_k": s.top_k, "top_p": s.top_p}
    drafted = {name: getattr(shape, name) for name in ("depth", "nodes", "branching", "parents")}
    return {"head": name, "max_tokens": plan.tokens, **drawn, **drafted, "look-up": plan.drafter is not None}


def _slug(words: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", words).strip("-")[:80]
