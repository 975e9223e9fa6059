"""What rank 0 tells the other ranks before a step, as whole numbers and back.

Owns: the layout. Must never know transports or engines. Floats travel as their bits, so every rank decides from equal
values; of a page table only what changed since the row's last step travels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import takewhile
from typing import NamedTuple

from speculator.types import Bounds, Distribution, Draft, DraftShape, Feed, Rule, SamplingParams, Step

RULES = tuple(Rule)
NOTHING = -1  # in place of a token
NOBODY = -1  # in place of a row


class Open(NamedTuple):
    """A row is given to a new session."""

    row: int
    sampling: SamplingParams
    speculate: bool


class Close(NamedTuple):
    """A row is given back."""

    row: int


class Landed(NamedTuple):
    """The results of the oldest launched round were collected."""


class Kind(IntEnum):
    """What is done with the steps of an order; END is the last order of all."""

    STEP = 0
    LAUNCH = 1
    END = 2


Change = Open | Close | Landed


class Order(NamedTuple):
    """What every rank does next: the changes in order, then the steps.

    `digest` is what all steps of rank 0 came to up to these; a rank that came to something else has gone another way.
    """

    changes: Sequence[Change] = ()
    steps: Sequence[Step] = ()
    digest: int = 0
    kind: Kind = Kind.STEP


class Codec:
    """Encodes orders on one side and decodes them on the other; both must see every order, in turn.

    `draft.logprobs` do not travel: no engine reads them.
    """

    def __init__(self) -> None:
        self._pages: dict[int, tuple[int, ...]] = {}  # by row, as they were last

    def encode(self, order: Order) -> list[int]:
        words = [order.digest, int(order.kind), len(order.changes), len(order.steps)]
        for change in order.changes:
            words += self._change_words(change)
        for step in order.steps:
            words += self._step_words(step)
        return words

    def decode(self, words: Sequence[int]) -> Order:
        source = iter(words)
        digest, kind, changes, steps = _take(source, 4)
        told = [self._change(source) for _ in range(changes)]
        return Order(told, [self._step(source) for _ in range(steps)], digest, Kind(kind))

    def _change_words(self, change: Change) -> list[int]:
        if isinstance(change, Landed):
            return [NOBODY]
        self._pages.pop(change.row, None)
        return _open_words(change) if isinstance(change, Open) else [change.row, 0]

    def _change(self, source: Iterator[int]) -> Change:
        row = next(source)
        if row == NOBODY:
            return Landed()
        self._pages.pop(row, None)
        return _opened(row, source) if next(source) else Close(row)

    def _step_words(self, step: Step) -> list[int]:
        held, pages = self._pages.get(step.row, ()), tuple(step.pages)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, pages, strict=False)))
        self._pages[step.row] = pages
        words = [step.row, step.cached, step.root, same, *_counted(pages[same:])]
        words += [0] if step.feed is None else [1, *_feed_words(step.feed)]
        words += [0] if step.draft is None else [1, *_draft_words(step.draft)]
        words += [0] if step.propose is None else [1, *_shape_words(step.propose)]
        words += [0] if step.bounds is None else [1, step.bounds.limit, *_counted(sorted(step.bounds.stops))]
        return [*words, int(step.ahead)]

    def _step(self, source: Iterator[int]) -> Step:
        row, cached, root, same = _take(source, 4)
        pages = (*self._pages.get(row, ())[:same], *_list(source))
        self._pages[row] = pages
        feed = _feed(source) if next(source) else None
        draft = _draft(source) if next(source) else None
        shape = _shape(source) if next(source) else None
        bounds = Bounds(next(source), frozenset(_list(source))) if next(source) else None
        return Step(row, cached, pages, feed, root, draft, shape, bounds, bool(next(source)))


def _take(source: Iterator[int], count: int) -> list[int]:
    return [next(source) for _ in range(count)]


def _list(source: Iterator[int]) -> list[int]:
    return _take(source, next(source))


def _counted(values: Sequence[int]) -> list[int]:
    return [len(values), *values]


def float_word(value: float) -> int:
    """The bits of a double, as a signed whole number."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def word_float(word: int) -> float:
    """The double of such bits."""
    return float(struct.unpack("<d", struct.pack("<q", word))[0])


def _open_words(change: Open) -> list[int]:
    p = change.sampling
    reals = (p.temperature, p.top_p, p.min_p, p.repetition_penalty)
    seed = p.seed - (1 << 64) if p.seed >= 1 << 63 else p.seed
    return [change.row, 1, int(change.speculate), p.top_k, seed, RULES.index(p.rule), *map(float_word, reals)]


def _opened(row: int, source: Iterator[int]) -> Open:
    speculate, top_k, seed, rule = _take(source, 4)
    temperature, top_p, min_p, penalty = map(word_float, _take(source, 4))
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty, seed % (1 << 64), RULES[rule])
    return Open(row, params, bool(speculate))


def _feed_words(feed: Feed) -> list[int]:
    return [NOTHING if feed.following is None else feed.following, *_counted(feed.tokens)]


def _feed(source: Iterator[int]) -> Feed:
    following = next(source)
    return Feed(_list(source), None if following == NOTHING else following)


def _draft_words(draft: Draft) -> list[int]:
    words = [draft.draft_id, *_counted(draft.tokens), *draft.parents, int(draft.q is not None)]
    for node in draft.q or ():
        words += [*_counted(node.token_ids), *map(float_word, node.logprobs)]
    return words


def _draft(source: Iterator[int]) -> Draft:
    number = next(source)
    tokens = _list(source)
    parents, weighed = _take(source, len(tokens)), next(source)
    q = tuple(_distribution(source) for _ in tokens) if weighed else None
    return Draft(tuple(tokens), tuple(parents), q=q, draft_id=number)


def _distribution(source: Iterator[int]) -> Distribution:
    ids = _list(source)
    return Distribution(ids, [word_float(word) for word in _take(source, len(ids))])


def _shape_words(shape: DraftShape) -> list[int]:
    return [shape.depth, shape.nodes, shape.branching, *_counted(shape.parents)]


def _shape(source: Iterator[int]) -> DraftShape:
    depth, nodes, branching = _take(source, 3)
    return DraftShape(depth, nodes, branching, tuple(_list(source)))
