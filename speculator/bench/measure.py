"""One run of the acceptance benchmark: plays the prompts and puts the report together.

Owns: which figures a report has and which runs they need. Must never read arguments or print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from speculator.bench import clock
from speculator.bench.bootstrap import interval, ratio, split_differences, weights
from speculator.bench.calibration import calibration, token_classes
from speculator.bench.counterfactual import cut_all, recorded, walk
from speculator.bench.definitions import DEFINITIONS, NAMES
from speculator.bench.figures import Counted, as_recorded, by_answer, figures, grouped, mean_tau, prompt_rows, tallies
from speculator.bench.forced import Found
from speculator.bench.ngram import NAME, lookup, rounds_along
from speculator.bench.plain import RecordError
from speculator.bench.player import EnginePlayer, Player
from speculator.bench.prompts import Prompt, PromptError
from speculator.bench.recording import Answer, Recording, done
from speculator.bench.records import (
    SCHEMA,
    Baseline,
    Counterfactual,
    Figures,
    Report,
    Settings,
    Shape,
    Split,
    Time,
)
from speculator.bench.repetition import repeated_share, repetition
from speculator.bench.rounds import ChatTokenizer, Key, Plan
from speculator.engine import Engine
from speculator.sampling import GREEDY_BELOW
from speculator.types import DraftShape, Rule, SamplingParams

Progress = Callable[[Iterable[Answer], int, str], Iterable[Answer]]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a report shall have beyond the figures of its own rounds."""

    counterfactual: bool = True
    also: tuple[DraftShape, ...] = ()
    seeds: int = 1
    theory: bool = False
    timed: int = 4  # prompts whose rounds are timed; 0: no times
    baseline: bool = True
    resamples: int = 2000
    confidence: float = 0.95


class Bench:
    """An engine (or another player), a tokenizer and prompts, on which runs are played."""

    def __init__(
        self,
        player: Engine | Player,
        tokenizer: ChatTokenizer,
        prompts: Sequence[Prompt],
        wishes: Wishes,
        progress: Progress,
    ) -> None:
        self.player: Player = EnginePlayer(player) if isinstance(player, Engine) else player
        self.tokenizer, self.prompts = tokenizer, prompts
        self.wishes, self.progress, self.notes = wishes, progress, list[str]()

    def run(self, plan: Plan, recording: Recording | None = None, label: str = "recording") -> list[Answer]:
        """All answers, in the order of the prompts; those in `recording` already are not asked again."""
        recording = recording or Recording(None, {})
        self._check_texts(recording)
        have: dict[Key, Answer] = done(recording.answers)
        turns = sum((p.set, p.id, turn + 1) not in have for p in self.prompts for turn in range(len(p.turns)))
        played = self.player.play(self.tokenizer, self.prompts, plan, have, self.notes)
        for answer in self.progress(played, turns, label):
            recording.add(answer)
        order = {(prompt.set, prompt.id): i for i, prompt in enumerate(self.prompts)}
        self.notes += recording.notes
        known = [answer for answer in recording.answers if (answer.set, answer.id) in order]
        return sorted(known, key=lambda a: (order[a.set, a.id], a.turn))

    def _check_texts(self, recording: Recording) -> None:
        """RecordError when a recorded answer is one to another text than the prompt of its name has now."""
        prompts = {(prompt.set, prompt.id): prompt for prompt in self.prompts}
        for answer in recording.answers:
            prompt = prompts.get((answer.set, answer.id))
            if prompt and answer.asked and answer.asked != prompt.fingerprint(answer.turn):
                raise RecordError(
                    f"{recording.path}: prompt {answer.id} of {answer.set} was another text when it was recorded:"
                    " name another file.",
                    field="asked",
                )

    def figures(self, counted: Iterable[Counted], levels: int) -> Figures:
        return figures(counted, levels, self.wishes.resamples, self.wishes.confidence)

    def warm_up(self, plan: Plan) -> None:
        """A few rounds that nobody counts."""
        short = replace(plan, tokens=min(8, plan.tokens))
        for _ in self.player.play(self.tokenizer, self.prompts[: plan.rows], short, {}):
            pass

    def report(
        self, plan: Plan, settings: Settings, provenance: dict[str, Any], recording: Recording | None, synthetic: bool
    ) -> Report:
        """Everything that `wishes` asks for, from one recording."""
        assert plan.shape is not None
        self.warm_up(plan)
        answers = self.run(plan, recording)
        if not answers:
            raise PromptError("No prompt leaves room for an answer in the context of this model.")
        counted, levels = as_recorded(answers), plan.shape.depth
        parts = by_answer(counted, lambda a: a.set)
        sets = {n: replace(self.figures(p, levels), repeated_4grams=_repeated(p)) for n, p in parts.items()}
        mean, band = mean_tau(parts.values(), levels, self.wishes.resamples, self.wishes.confidence)
        others = self._counterfactual(plan, answers)
        return Report(
            schema=SCHEMA,
            engine="speculator",
            synthetic=synthetic,
            provenance=provenance,
            settings=settings,
            temperature=settings.temperature,
            mean_tau=mean,
            mean_tau_interval=band,
            overall=replace(self.figures(counted, levels), repeated_4grams=_repeated(counted)),
            sets=sets,
            groups=grouped(counted, levels, self.wishes.resamples, self.wishes.confidence),
            token_classes=token_classes(
                counted, lambda token: self.tokenizer.decode([token]), self.wishes.resamples, self.wishes.confidence
            ),
            counterfactual=others,
            baselines=self._baselines(plan, answers),
            calibration=calibration(answers, levels, self.wishes.resamples, self.wishes.confidence),
            theory=self._theory(plan),
            repetition=repetition(answers, self.wishes.resamples, self.wishes.confidence),
            noise=(*halves_split(counted, levels), *self._seeds(plan, counted, levels)),
            time=self._time(plan, others),
            prompts=prompt_rows(counted, levels),
            definitions=DEFINITIONS,
            names=NAMES,
            notes=tuple(self.notes),
        )

    # counterfactual shapes

    def _counterfactual(self, plan: Plan, answers: Sequence[Answer]) -> tuple[Counterfactual, ...]:
        if not self.wishes.counterfactual:
            return ()
        if not text_is_fixed(plan.sampling):
            self.notes.append("No counterfactual shapes: under this rule another draft would be another text.")
            return ()
        assert plan.shape is not None
        wanted = [*other_shapes(plan.shape), *self.wishes.also]
        whole = _drawn(plan, wanted)
        found = self._everywhere(plan, answers, whole)
        return tuple(self._shape(plan.shape, shape, answers, found) for shape in dict.fromkeys(wanted))

    def _everywhere(
        self, plan: Plan, answers: Sequence[Answer], shapes: Sequence[DraftShape]
    ) -> dict[tuple[Key, DraftShape], dict[int, Any]]:
        def have(answer: Answer) -> Found:
            return {plan.shape: recorded(answer)} if plan.shape else {}

        drafted = self.player.draft_everywhere(answers, shapes, plan.sampling, plan.rows, have)
        found = {}
        names = self.progress(
            (found.update({(a.key, s): drafts for s, drafts in each.items()}) or a for a, each in drafted),
            len(answers),
            "drafting at every position",
        )
        for _ in names:
            pass
        return found

    def _shape(
        self,
        whole: DraftShape,
        shape: DraftShape,
        answers: Sequence[Answer],
        found: dict[tuple[Key, DraftShape], dict[int, Any]],
    ) -> Counterfactual:
        shapes = {drafted for _, drafted in found}
        chains = [drafted for drafted in shapes if drafted.is_chain]
        source = shape if shape in shapes else max(chains, key=lambda s: s.depth) if shape.is_chain else whole
        counted: list[Counted] = []
        for answer in answers:
            drafts = cut_all(found[answer.key, source], source, shape) if source != shape else found[answer.key, shape]
            assert drafts is not None, f"{shape} cannot be cut out of {source}"
            counted.append((answer, walk(answer, drafts.__getitem__)))
        made = "recorded" if source == whole else "drafted"
        return Counterfactual(shape_of(shape), made, self.figures(counted, shape.depth))

    # the rest

    def _baselines(self, plan: Plan, answers: Sequence[Answer]) -> tuple[Baseline, ...]:
        if not self.wishes.baseline or plan.shape is None:
            return ()
        depth = plan.shape.depth
        if text_is_fixed(plan.sampling):
            counted: list[Counted] = [(answer, rounds_along(answer, depth)) for answer in answers]
        else:
            counted = as_recorded(self.run(replace(plan, drafter=lambda t: lookup(t, depth)), label="prompt look-up"))
        return (Baseline(NAME, Shape(depth), self.figures(counted, depth)),)

    def _theory(self, plan: Plan) -> Any:
        if not self.wishes.theory or plan.shape is None:
            return None
        if plan.sampling.temperature < GREEDY_BELOW:
            self.notes.append("No theoretical acceptance: at temperature 0 it is what was measured.")
            return None
        prompts = [self.tokenizer.encode_chat(prompt.turns[0]) for prompt in self.prompts]
        return self.player.theory(prompts, plan, plan.shape.depth, self.wishes.resamples, self.wishes.confidence)

    def _seeds(self, plan: Plan, counted: Sequence[Counted], levels: int) -> tuple[Split, ...]:
        if self.wishes.seeds < 2 or plan.sampling.temperature < GREEDY_BELOW:
            return ()
        other = replace(plan, sampling=replace(plan.sampling, seed=plan.sampling.seed + 1))
        again = as_recorded(self.run(other, label="another seed"))
        return (seed_split(counted, again, levels),)

    def _time(self, plan: Plan, others: Sequence[Counterfactual]) -> Time | None:
        if not self.wishes.timed:
            return None
        taus = {o.shape.depth: o.figures.tau for o in others if o.shape.branching <= 1 and not o.shape.parents}
        wishes, timed = self.wishes, self.prompts[: self.wishes.timed]
        found = clock.measure(self.player, self.tokenizer, timed, plan, taus, wishes.resamples, wishes.confidence)
        if found is not None:
            self.notes += [*self.player.notes, *clock.doubts(found)]
        return found


def text_is_fixed(sampling: SamplingParams) -> bool:
    """Whether drafts cannot change the text: greedy decoding and the coupled rule."""
    return sampling.rule is Rule.COUPLED or sampling.temperature < GREEDY_BELOW


def shape_of(shape: DraftShape) -> Shape:
    return Shape(shape.depth, shape.nodes, shape.branching, shape.parents)


def other_shapes(whole: DraftShape) -> list[DraftShape]:
    """Chains of every depth; of a tree also halves of its nodes, and every depth with all of them."""
    chains = [DraftShape(depth) for depth in range(1, whole.depth + 1)]
    if whole.is_chain or whole.parents:
        return chains
    fewer = [DraftShape(whole.depth, whole.nodes >> i, whole.branching) for i in range(4) if whole.nodes >> i > 1]
    shallow = [DraftShape(depth, whole.nodes, whole.branching) for depth in range(1, whole.depth)]
    return [*chains, *fewer, *shallow]


def _drawn(plan: Plan, wanted: Sequence[DraftShape]) -> list[DraftShape]:
    """The shapes to draft at every position, such that all wanted ones can be cut out of them.

    Scores of a sampled tree's nodes are not in its draft, so only greedy trees are cut.
    """
    assert plan.shape is not None
    deepest = max((s.depth for s in wanted if s.is_chain), default=0)
    chain = [DraftShape(deepest)] if deepest else []
    greedy, whole = plan.sampling.temperature < GREEDY_BELOW, plan.shape
    full = [replace(s, nodes=whole.nodes) for s in wanted]  # a tree of fewer nodes is part of one that differs by this
    inside = {s for s, f in zip(wanted, full, strict=True) if greedy and f == whole and s.nodes <= whole.nodes}
    trees = [s for s in wanted if not s.is_chain and s not in inside]
    return list(dict.fromkeys([whole, *chain, *trees]))


def halves_split(counted: Sequence[Counted], levels: int) -> tuple[Split, ...]:
    """tau of two halves of the prompts; none with fewer than four prompts."""
    counts = [tally for tally in tallies(counted, levels).values() if tally.rounds]
    if len(counts) < 4:
        return ()
    rows = np.array([[tally.tokens, tally.rounds] for tally in counts], dtype=np.float64)
    a, b = split_differences(rows[:, 0], rows[:, 1])
    apart = np.abs(a - b)
    return (Split("halves", *_rounded(a[0], b[0], float(np.median(apart)), float(np.quantile(apart, 0.95)))),)


def seed_split(counted: Sequence[Counted], again: Sequence[Counted], levels: int, resamples: int = 2000) -> Split:
    """tau under two seeds; the floor is what their difference stays below when prompts are drawn anew."""
    a, b = tallies(counted, levels), tallies(again, levels)
    keys = [key for key in a if key in b]
    rows = np.array([[a[k].tokens, a[k].rounds, b[k].tokens, b[k].rounds] for k in keys], dtype=np.float64)
    tau_a, tau_b = (float(ratio(rows[:, i].sum(), rows[:, i + 1].sum())) for i in (0, 2))
    drawn = weights(len(keys), resamples) @ rows
    apart = ratio(drawn[:, 0], drawn[:, 1]) - ratio(drawn[:, 2], drawn[:, 3])
    band = interval(np.abs(apart - (tau_a - tau_b)), len(keys), 0.9)
    return Split("seeds", *_rounded(tau_a, tau_b, abs(tau_a - tau_b), band[1] if band else abs(tau_a - tau_b)))


def _rounded(*values: float) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)


def _repeated(counted: Sequence[Counted]) -> float | None:
    shares = [repeated_share(answer.tokens) for answer, _ in counted]
    return round(sum(shares) / len(shares), 6) if shares else None
