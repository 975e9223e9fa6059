"""How much a text repeats itself.

Must never know models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence


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
    """n-grams of a text that another text has too, over all n-grams: what is said to everybody, whatever was asked."""
    found = [{tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)} for tokens in texts]
    counts = Counter(gram for grams in found for gram in grams)
    total = sum(map(len, found))
    return sum(counts[gram] > 1 for grams in found for gram in grams) / total if total else 0.0
