"""Signs that a target has collapsed: it repeats itself, or says the same to everybody.

Owns: n-gram counts over answers. Must never know drafts. Acceptance of a target that repeats itself is high and worth
nothing, so both figures stand beside every tau.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from speculator.bench.recording import Answer
from speculator.bench.records import Repetition

SHARED = (4, 8, 16)
Gram = tuple[int, ...]


def repetition(answers: Sequence[Answer]) -> Repetition:
    """Means over answers; the end mark, which they all share, does not count."""
    texts = [(answer.set + "\n" + answer.id, _bare(answer)) for answer in answers]
    return Repetition(
        repeated_4grams=_mean([repeated_share(text) for _, text in texts]),
        shared={str(n): share for n in SHARED if (share := _mean(shared_shares(texts, n))) is not None},
        identical_answers=_mean(_identical(texts)),
    )


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same text."""
    found = _grams(tokens, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def shared_shares(texts: Sequence[tuple[str, Sequence[int]]], n: int) -> list[float]:
    """Of each text that has n-grams: the share of its distinct ones that texts of another prompt have too."""
    prompts: dict[str, set[Gram]] = {}
    for prompt, text in texts:
        prompts.setdefault(prompt, set()).update(_grams(text, n))
    owners = Counter(gram for grams in prompts.values() for gram in grams)
    each = [set(_grams(text, n)) for _, text in texts]
    return [sum(owners[gram] > 1 for gram in grams) / len(grams) for grams in each if grams]


def _bare(answer: Answer) -> tuple[int, ...]:
    return answer.tokens[:-1] if answer.stopped else answer.tokens


def _grams(tokens: Sequence[int], n: int) -> list[Gram]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _identical(texts: Sequence[tuple[str, Sequence[int]]]) -> list[float]:
    owners: dict[Gram, set[str]] = {}
    for prompt, text in texts:
        owners.setdefault(tuple(text), set()).add(prompt)
    return [float(len(owners[tuple(text)]) > 1) for _, text in texts]


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None
