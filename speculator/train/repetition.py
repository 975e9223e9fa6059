"""How much a text repeats itself.

Must never know models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def repeated(tokens: Sequence[int], n: int = 4) -> list[bool]:
    """For each token, whether it completes an n-gram that already occurred."""
    seen: set[tuple[int, ...]] = set()
    marks = [False] * min(n - 1, len(tokens))
    for i in range(n - 1, len(tokens)):
        gram = tuple(tokens[i - n + 1 : i + 1])
        marks.append(gram in seen)
        seen.add(gram)
    return marks


def stuttered(tokens: Sequence[int], words: Collection[int]) -> list[bool]:
    """For each token, whether it is one of `words` and the same as the token before it."""
    return [i > 0 and token == tokens[i - 1] and token in words for i, token in enumerate(tokens)]


def repeated_share(texts: Iterable[Sequence[int]], n: int = 4) -> float:
    """Repeated n-grams over all n-grams, all texts pooled; each text is compared with itself only."""
    again = total = 0
    for tokens in texts:
        again += sum(repeated(tokens, n))
        total += max(0, len(tokens) - n + 1)
    return again / total if total else 0.0


def shared_share(texts: Iterable[Sequence[int]], n: int = 8) -> float:
    """n-grams of a text that another text has too, over all n-grams: what is said to everybody, whatever was asked.

    A text that is shorter than n counts as one n-gram.
    """
    found = [_grams(tokens, n) for tokens in texts]
    counts = Counter(gram for grams in found for gram in grams)
    total = sum(map(len, found))
    return sum(counts[gram] > 1 for grams in found for gram in grams) / total if total else 0.0


def _grams(tokens: Sequence[int], n: int) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))} if tokens else set()


def common(texts: Sequence[Sequence[int]], least: int, n: int = 8) -> list[list[bool]]:
    """For each token of each text, whether it completes an n-gram that at least `least` of the texts have.

    A text that is shorter than n is common as a whole, or not at all.
    """
    lengths = np.array([len(tokens) for tokens in texts], np.int64)
    owner = np.repeat(np.arange(len(texts)), lengths)
    flat = np.fromiter((token for tokens in texts for token in tokens), np.uint64, int(lengths.sum()))
    marks = np.zeros(len(flat), bool)
    if len(flat) >= n:
        whole = owner[n - 1 :] == owner[: len(owner) - n + 1]
        ends = np.flatnonzero(whole) + n - 1
        marks[ends] = _owners(_hashes(flat, n)[whole], owner[ends]) >= least
    short = Counter(tuple(tokens) for tokens in texts if len(tokens) < n)
    split = np.split(marks, np.cumsum(lengths)[:-1])
    return [
        [short[tuple(tokens)] >= least] * len(tokens) if len(tokens) < n else part.tolist()
        for tokens, part in zip(texts, split, strict=True)
    ]


def _hashes(tokens: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """[len - n + 1] a polynomial of each window modulo 2^64: two different n-grams of a run practically never meet."""
    base = np.uint64(0x9E3779B97F4A7C15)
    total = np.zeros(len(tokens) - n + 1, np.uint64)
    for k in range(n):
        total = total * base + tokens[k : k + len(total)] + np.uint64(1)
    return total


def _owners(grams: NDArray[np.uint64], owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each entry, how many different owners its n-gram has."""
    _, number = np.unique(grams, return_inverse=True)
    texts = int(owner.max()) + 1
    pairs = np.unique(number * texts + owner)
    counts: NDArray[np.int64] = np.bincount(pairs // texts)
    return counts[number]
