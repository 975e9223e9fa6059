"""How much a text repeats itself.

Must never know models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def repeated(tokens: Sequence[int], n: int = 4) -> list[bool]:
    """For each token, whether it completes an n-gram that already occurred."""
    seen: set[tuple[int, ...]] = set()
    marks = [False] * min(n - 1, len(tokens))
    for i in range(n - 1, len(tokens)):
        gram = tuple(tokens[i - n + 1 : i + 1])
        marks.append(gram in seen)
        seen.add(gram)
    return marks


def repeated_share(texts: Iterable[Sequence[int]], n: int = 4) -> float:
    """Repeated n-grams over all n-grams, all texts pooled; each text is compared with itself only."""
    again = total = 0
    for tokens in texts:
        again += sum(repeated(tokens, n))
        total += max(0, len(tokens) - n + 1)
    return again / total if total else 0.0
