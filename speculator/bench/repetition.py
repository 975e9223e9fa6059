"""Signs that a target has collapsed: it repeats itself, or says the same to everybody.

Owns: n-gram counts over answers. Must never know drafts. Acceptance of a target that repeats itself is high and worth
nothing, so both figures stand beside every tau.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from speculator.bench.bootstrap import interval, ratio, weights
from speculator.bench.figures import rounded
from speculator.bench.recording import Answer
from speculator.bench.records import Interval, Repetition

SHARED = (4, 8, 16)
Gram = tuple[int, ...]


def repetition(answers: Sequence[Answer], resamples: int = 2000, confidence: float = 0.95) -> Repetition:
    """Means over answers; the end mark, which they all share, does not count.

    Intervals draw prompts anew and leave what each of them shares with the others as it is.
    """
    texts = [(answer.set + "\n" + answer.id, _bare(answer)) for answer in answers]
    shares = {f"shared_{n}grams": shared_shares(texts, n) for n in SHARED}
    signs = {"repeated_4grams": [repeated_share(text) for _, text in texts], "identical_answers": _identical(texts)}
    prompts = [prompt for prompt, _ in texts]
    bands = {name: _band(prompts, values, resamples, confidence) for name, values in (shares | signs).items()}
    return Repetition(
        repeated_4grams=_mean(signs["repeated_4grams"]),
        shared={str(n): share for n in SHARED if (share := _mean(shares[f"shared_{n}grams"])) is not None},
        identical_answers=_mean(signs["identical_answers"]),
        intervals={name: band for name, band in bands.items() if band is not None},
    )


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same text."""
    found = _grams(tokens, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def shared_shares(texts: Sequence[tuple[str, Sequence[int]]], n: int) -> list[float]:
    """Of each text the share of its distinct n-grams that texts of another prompt have too; NaN where it has none."""
    prompts: dict[str, set[Gram]] = {}
    for prompt, text in texts:
        prompts.setdefault(prompt, set()).update(_grams(text, n))
    owners = Counter(gram for grams in prompts.values() for gram in grams)
    each = [set(_grams(text, n)) for _, text in texts]
    return [sum(owners[gram] > 1 for gram in grams) / len(grams) if grams else math.nan for grams in each]


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
    found = [value for value in values if not math.isnan(value)]
    return round(sum(found) / len(found), 6) if found else None


def _band(prompts: Sequence[str], values: Sequence[float], resamples: int, confidence: float) -> Interval | None:
    """Of the mean over answers, whose prompts are drawn anew."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    table = np.zeros((len(number), 2))
    for prompt, value in zip(prompts, values, strict=True):
        if not math.isnan(value):
            table[number[prompt]] += (value, 1)
    if not resamples or not len(table):
        return None
    drawn = weights(len(table), resamples) @ table
    return rounded(interval(ratio(drawn[:, 0], drawn[:, 1]), int((table[:, 1] > 0).sum()), confidence))
