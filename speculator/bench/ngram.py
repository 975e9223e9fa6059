"""Prompt look-up: the drafter without a model that every head must beat.

Owns: finding what followed the last time the newest tokens occurred (prompt look-up decoding, Saxena 2023).
Must never know an engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from speculator.bench.counterfactual import walk
from speculator.bench.outcomes import Outcome
from speculator.bench.recording import Answer
from speculator.types import Draft

LONGEST = 3
NAME = f"prompt look-up, {LONGEST}-grams"


def lookup(tokens: Sequence[int], depth: int, longest: int = LONGEST) -> Draft:
    """A chain of at most `depth` tokens that followed the latest earlier occurrence of the last `longest`, then fewer.

    Empty when even the last token is new.
    """
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        if found := _after_last(tokens, size, depth):
            return Draft(found, tuple(range(-1, len(found) - 1)))
    return Draft()


def rounds_along(answer: Answer, depth: int) -> list[Outcome]:
    """The rounds that prompt look-up would have had along a text that drafts cannot change."""
    text = answer.whole
    return walk(answer, lambda base: lookup(text[:base], depth))


def _after_last(tokens: Sequence[int], size: int, depth: int) -> tuple[int, ...]:
    key = tuple(tokens[-size:])
    for end in range(len(tokens) - 1, size - 1, -1):
        if tuple(tokens[end - size : end]) == key:
            return tuple(tokens[end : end + depth])
    return ()
