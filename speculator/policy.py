"""How deep to draft: the shape that commits most tokens a second, by what was accepted so far and what rounds cost.

Owns: acceptance as it was lately, of each session and of all, and the choice. Must never import torch, see a drafted
token, or take a shape that a caller asked for away: it chooses for sessions that leave the shape open, from committed
rounds alone, so what is committed does not depend on it (`coupled` and greedy: not one token).

One shape a step: rows of a step wait for the deepest draft among them, so a shallower one would save a session nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from speculator.costs import CostTable, size
from speculator.drafts import capped
from speculator.types import Draft, DraftShape

LATELY, OVERALL = 0.96, 0.998  # what a session, and all sessions together, keep of their past with each round
BORROWED = 6.0  # rounds that what is known of all sessions counts for in a session of its own
FIRST, GUESSED = 0.7, 4.0  # conditional acceptance before anything was seen, and the rounds that it counts for
EVERY = 8  # steps between two choices
PROBE = 64  # steps between two looks at the next larger draft, whose acceptance is otherwise never seen again
WORTH = 0.02  # a change of shape must promise so much more
MARGIN = 0.05  # what all of this may cost against the best shape: WORTH, probes, and learning, once it has settled

Family = tuple[int, int, tuple[int, ...]]  # drafts whose levels are accepted alike
CHAIN: Family = (1, 0, ())
NOTHING = DraftShape(0)


class Riders(NamedTuple):
    """The sessions of one step."""

    rows: Sequence[int]  # those that leave the shape open
    batch: int  # all of them
    context: float  # tokens that one holds, on average
    fixed: DraftShape = NOTHING  # the largest draft that a caller asked for


class Survival:
    """How often a level was accepted where those above it were, with rounds long ago counting less.

    A level that a round did not reach keeps what it knew.
    """

    __slots__ = ("_keep", "_hits", "_seen")

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._hits, self._seen = list[float](), list[float]()

    def record(self, judged: int, accepted: int) -> None:
        """One round whose first `judged` levels could be accepted, of which `accepted` were."""
        reached = min(judged, accepted + 1)
        if reached > len(self._seen):
            self._hits += [0.0] * (reached - len(self._seen))
            self._seen += [0.0] * (reached - len(self._seen))
        for level in range(reached):
            self._seen[level] = self._seen[level] * self._keep + 1.0
            self._hits[level] = self._hits[level] * self._keep + (level < accepted)

    def rate(self, level: int, prior: float, weight: float) -> float:
        """Conditional acceptance at a level, counted from 0; `prior` counts for `weight` rounds."""
        if level >= len(self._seen):
            return prior
        return (self._hits[level] + weight * prior) / (self._seen[level] + weight)


class DepthPolicy:
    """Chooses among `shapes` for rows that `open` announced. One thread drives it; anyone may read `given`.

    Raises ValueError without shapes.
    """

    def __init__(self, shapes: Iterable[DraftShape], costs: CostTable) -> None:
        self.shapes = tuple(sorted(set(shapes), key=size))
        if not self.shapes:
            raise ValueError("a policy needs shapes to choose from")
        self.costs = costs
        self.shape = self.shapes[-1]  # the choice that holds
        self.given: dict[DraftShape, int] = dict.fromkeys(self.shapes, 0)  # drafts asked for, by shape
        self._all: dict[Family, Survival] = {}
        self._rows: dict[int, dict[Family, Survival]] = {}
        self._news: list[tuple[int, Draft, int, int]] = []
        self._steps, self._batch, self._due, self._probing = 0, 0, False, False

    # ---- what the scheduler tells

    def open(self, row: int) -> None:
        """A new session has the row."""
        self._learn()
        self._rows[row] = {}

    def give(self) -> DraftShape:
        """The shape of the next draft of a row that leaves it open."""
        shape = self._next_rung() if self._probing else self.shape
        self.given[shape] += 1
        return shape

    def observe(self, row: int, draft: Draft, accepted: int, most: int) -> None:
        """A draft was verified: `accepted` levels, where at most `most` could be judged."""
        if draft.draft_id:  # what a client drafted says nothing about the head
            self._news.append((row, draft, accepted, most))

    def due(self, batch: int) -> bool:
        """Counts a step of `batch` sessions; True until a choice is made, once there is one to make."""
        self._steps += 1
        self._probing = self._steps % PROBE == 0
        crowd = batch.bit_length()
        self._due |= crowd != self._batch or self._steps % EVERY == 0
        self._batch = crowd
        return self._due

    # ---- the choice

    def decide(self, riders: Riders) -> DraftShape:
        """Choose for the coming steps; the shape at hand stays unless another promises `WORTH` more."""
        self._learn()
        if not riders.rows:
            return self.shape
        self._due = False
        now = self.pace(riders, self.shape)
        best = max(self.shapes, key=lambda shape: self.pace(riders, shape))
        if self.pace(riders, best) > now * (1 + WORTH):
            self.shape = best
        return self.shape

    def pace(self, riders: Riders, shape: DraftShape) -> float:
        """Tokens a second that the sessions can expect to commit with drafts of `shape`."""
        cost = self.costs.seconds(riders.batch, max(shape, riders.fixed, key=size), riders.context)
        others = riders.batch - len(riders.rows)
        return (others + sum(self.expected(row, shape) for row in riders.rows)) / cost

    def expected(self, row: int, shape: DraftShape) -> float:
        """Tokens that a round of the row can expect to commit, the target's own token included."""
        total = chance = 1.0
        for rate in self._rates(row, shape):
            chance *= rate
            total += chance
        return total

    def _rates(self, row: int, shape: DraftShape) -> Iterator[float]:
        """Conditional acceptance of each level: the session's, drawn to that of all sessions."""
        family = _family(shape)
        own = self._rows.get(row, {}).get(family)
        for level, prior in enumerate(self._prior(family, shape.depth)):
            yield prior if own is None else own.rate(level, prior, BORROWED)

    def _prior(self, family: Family, depth: int) -> Iterator[float]:
        """Of all sessions. What nobody has seen is like the level above it; a new family is like the largest one."""
        known = self._all.get(family) or self._all.get(_family(self.shapes[-1]))
        rate = FIRST
        for level in range(depth):
            rate = rate if known is None else known.rate(level, rate, GUESSED)
            yield rate

    def _learn(self) -> None:
        for row, draft, accepted, most in self._news:
            found = self._levels(draft)
            if found is None:
                continue
            family, levels = found
            self._all.setdefault(family, Survival(OVERALL)).record(min(levels, most), accepted)
            mine = self._rows.setdefault(row, {})
            mine.setdefault(family, Survival(LATELY)).record(min(levels, most), accepted)
        self._news.clear()

    def _levels(self, draft: Draft) -> tuple[Family, int] | None:
        """The family of a draft and its levels; None for a tree that is none of ours, or was cut at a text's end.

        A level that a dynamic tree did not reach counts as not accepted: what a shape brings is what is asked.
        """
        if draft.is_chain:
            return CHAIN, len(draft.tokens)
        for shape in self.shapes:
            if shape.parents == draft.parents or (shape.branching > 1 and shape.nodes == len(draft.tokens)):
                return _family(shape), shape.depth
        return None

    def _next_rung(self) -> DraftShape:
        return self.shapes[min(self.shapes.index(self.shape) + 1, len(self.shapes) - 1)]


def menu(shape: DraftShape, recorded: Sequence[int] | None) -> tuple[DraftShape, ...]:
    """What there is to choose from where `shape` is configured: nothing larger, and no draft at all.

    `recorded` are the depths of chains that have recorded rounds of their own, beside `shape`; None: every size runs
    at its own cost.
    """
    if shape.is_chain:
        depths = range(shape.depth) if recorded is None else [depth for depth in recorded if depth < shape.depth]
        return (NOTHING, *(DraftShape(depth) for depth in depths if depth), shape)
    return (NOTHING, shape) if recorded is not None else (NOTHING, *_smaller(shape), shape)


def _smaller(tree: DraftShape) -> Iterator[DraftShape]:
    """Half the levels of a given tree; half and a quarter of the nodes of a dynamic one."""
    if tree.parents:
        yield capped(tree, tree.depth // 2)
        return
    for part in (2, 4):
        if tree.nodes // part >= max(tree.depth, tree.branching):
            yield DraftShape(tree.depth, tree.nodes // part, tree.branching)


def _family(shape: DraftShape) -> Family:
    return CHAIN if shape.is_chain else (shape.branching, shape.nodes, shape.parents)
